"""The whole of training on one page.

    rollouts (sampled, graded, with feedback and teacher prompts) -> algorithm.step -> the next weights

Whatever the method, this is the loop: VPD, SDPO, GKD and GRPO differ in ``algorithm`` alone.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from vpd.algorithms import Algorithm
from vpd.engines import Engine
from vpd.errors import NonFiniteError
from vpd.learners import Learner, Update
from vpd.learners.journal import Fault, Journal
from vpd.learners.token_records import Recording, TokenRecord, TokenRecorder
from vpd.rollout import Source
from vpd.types import Group, Metrics

if TYPE_CHECKING:
    from torch import Tensor


class Observer(Protocol):
    """Watches a run: writes metrics and rollouts, shows progress.

    When a run is continued, ``restore`` gets what ``state`` gave at the checkpoint (nothing, where that is empty or the
    checkpoint has none), and then ``rewind`` is called.  An observer that keeps nothing returns an empty state and
    does nothing in these two.
    """

    def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
        """Called after every step, and before the first with an evaluation alone (step 0, no groups)."""
        ...

    def rewind(self, step: int) -> None:
        """Forget all that came after ``step``; -1: all.  The run goes on from there."""
        ...

    def state(self) -> dict[str, Any]:
        """What it must remember of the steps so far, as plain JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        ...


@runtime_checkable
class TokenObserver(Protocol):
    """An observer that also wants what the updates measured of every token."""

    def on_token_signals(
        self, step: int, signals: Mapping[str, Sequence["Tensor | None"]], groups: Sequence[Group]
    ) -> None:
        """Called after :meth:`Observer.on_step` of a step that trained.

        ``signals`` holds for each ``update/signal`` (such as ``m_step/divergence``) the values [T] of each rollout's
        tokens, rollouts in the order of the groups; None for a rollout that did not take part.
        """
        ...


@runtime_checkable
class RecordObserver(Protocol):
    """An observer that also wants the rows that were recorded token by token (``Loop.recording``)."""

    def on_token_records(self, step: int, records: Sequence[TokenRecord]) -> None:
        """Called after :meth:`Observer.on_step` of a step that trained."""
        ...


class Abandoned(KeyboardInterrupt):
    """The rollouts in progress are given up; the learner is what it was after the last step."""


class StopRequest:
    """Whether a run was asked to end before ``max_steps``: the number of the signal that asked, or None."""

    signal: int | None = None

    @contextlib.contextmanager
    def abandonable(self) -> Iterator[None]:
        """Around work that may be given up when the request comes; then raises :class:`Abandoned`."""
        yield


@dataclass(kw_only=True)
class Loop:
    """One run in progress.  ``step``, the iterations trained so far, is all the loop itself remembers.

    Every rollout is accounted for in the metrics ``rows/...`` (:meth:`vpd.learners.journal.Journal.account`).  ``dump``
    gets what it takes to run an iteration again that met a number that is not finite, and gives the folder.

    ``evaluate`` is called before the first step and every ``eval_steps`` (0: never), ``save`` every ``save_steps``
    (0: never) and after the last step.  ``recording`` says how many rows of a step are recorded token by token (None:
    none).  ``saved_step`` is the step of the newest checkpoint, -1 without one.
    """

    source: Source
    engine: Engine
    learner: Learner
    algorithm: Algorithm
    rollout_metrics: Callable[[Sequence[Group]], Metrics]
    observers: Sequence[Observer] = ()
    evaluate: Callable[[], Metrics] | None = None
    save: Callable[["Loop"], Any] | None = None
    dump: Callable[[Fault], Path] | None = None
    recording: Recording | None = None
    max_steps: int = 100
    eval_steps: int = 0
    save_steps: int = 0
    stop: StopRequest = field(default_factory=StopRequest)
    step: int = 0
    saved_step: int = -1

    def run(self) -> None:
        """Train until ``max_steps``, or until ``stop`` has a signal; a step without rollouts is given up."""
        with contextlib.suppress(Abandoned):
            self._run()

    def _run(self) -> None:
        self.engine.load(self.learner.policy())
        if self.step == 0 and self.evaluate is not None and self.eval_steps:
            with self.stop.abandonable():
                evaluated = self._evaluated(self.evaluate)
            self._notify(evaluated, [])
        if self.step < self.max_steps:
            self.source.start(self.step)
        while self.step < self.max_steps and self.stop.signal is None:
            with self.stop.abandonable():
                groups, metrics = self.source.take(self.step)
            if self.step + 1 < self.max_steps:
                self.source.start(self.step + 1)
            recorder = self._recorder(groups)
            update = self.train(groups, drawn=int(metrics.get("rows/drawn", _count(groups))), recorder=recorder)
            metrics |= update.metrics
            self.engine.load(self.learner.policy())
            if self.evaluate is not None and self._is_due(self.eval_steps):
                metrics |= self._evaluated(self.evaluate)
            self._notify(metrics, groups)
            self._notify_of_tokens(update, groups, recorder)
            if self._is_due(self.save_steps):
                self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """Save, unless this step is saved already."""
        if self.save is not None and self.saved_step != self.step:
            self.save(self)
            self.saved_step = self.step

    def train(
        self, groups: Sequence[Group], *, drawn: int | None = None, recorder: TokenRecorder | None = None
    ) -> Update:
        """One iteration on these rollouts, and what was measured; ``drawn`` rows were to be made (None: as many)."""
        started = time.perf_counter()
        metrics = self.rollout_metrics(groups) | {"learning_rate": self.learner.learning_rate}
        lags = [self.step - rollout.completion.version for group in groups for rollout in group.rollouts]
        metrics["rollout/staleness"] = statistics.fmean(lags)
        journal, before = Journal(self.learner, groups, recorder), self.algorithm.state()
        try:
            update = self.algorithm.step(groups, journal)
            self.learner.end_iteration()
        except NonFiniteError as error:
            raise self._dumped(error, groups, before, journal) from error
        metrics |= journal.account(_count(groups) if drawn is None else drawn)
        self.step += 1
        metrics |= update.metrics | {"time/update": time.perf_counter() - started - journal.seconds_recording}
        if recorder is not None:
            metrics["time/record"] = journal.seconds_recording
        return dataclasses.replace(update, metrics=metrics)

    def progress(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the learner."""
        return {"algorithm": self.algorithm.state()}

    def resume(self, progress: dict[str, Any]) -> None:
        """Continue where :meth:`progress` was taken."""
        self.step = self.saved_step = progress["step"]
        self.algorithm.restore(progress["algorithm"])

    def _dumped(
        self, error: NonFiniteError, groups: Sequence[Group], algorithm: Mapping[str, Any], journal: Journal
    ) -> NonFiniteError:
        """The error with the place of its dump."""
        if self.dump is None:
            return error
        fault = Fault(
            step=self.step + 1,
            error=str(error),
            groups=groups,
            algorithm=algorithm,
            results=journal.results,
            call=journal.call,
        )
        return NonFiniteError(str(error).rstrip("."), do=f"To see where, run: vpd replay {self.dump(fault)}")

    def _evaluated(self, evaluate: Callable[[], Metrics]) -> Metrics:
        """What the evaluation gave, and the seconds that it took."""
        started = time.perf_counter()
        return evaluate() | {"time/eval": time.perf_counter() - started}

    def _is_due(self, every: int) -> bool:
        """Every so many steps and after the last; 0: never."""
        return bool(every) and (self.step == self.max_steps or self.step % every == 0)

    def _notify(self, metrics: Metrics, groups: Sequence[Group]) -> None:
        for observer in self.observers:
            observer.on_step(self.step, metrics, groups)

    def _notify_of_tokens(self, update: Update, groups: Sequence[Group], recorder: TokenRecorder | None) -> None:
        for observer in self.observers:
            if isinstance(observer, TokenObserver):
                observer.on_token_signals(self.step, update.tokens, groups)
            if isinstance(observer, RecordObserver) and recorder is not None:
                observer.on_token_records(self.step, recorder.records())

    def _recorder(self, groups: Sequence[Group]) -> TokenRecorder | None:
        recording = self.recording
        return TokenRecorder(groups, recording) if recording is not None and recording.rows else None


def _count(groups: Sequence[Group]) -> int:
    return sum(len(group.rollouts) for group in groups)
