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
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from vpd.algorithms import Algorithm
from vpd.engines import Engine
from vpd.errors import Abandoned as Abandoned
from vpd.errors import NonFiniteError, TrainingError
from vpd.learners import TrainedLearner, Update
from vpd.learners.calls import Fault
from vpd.learners.journal import Journal
from vpd.learners.token_records import Recording, TokenRecord, TokenRecorder
from vpd.ranks import OneProcess, Ranks, gather, largest, on_first, together
from vpd.rollout import Source
from vpd.run_folder.best import BestModel
from vpd.types import Group, Metrics

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")
OF_EACH_PROCESS = ("time/", "memory/")  # metrics of which the run's is the largest of any process


class Observer(Protocol):
    """Watches a run: writes metrics and rollouts, shows progress; of several processes it is called in the first.

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
    (0: never) and after the last step, and at every step that is the ``best`` so far; where ``best`` has waited long
    enough, the run ends before ``max_steps``.  ``owes_evaluation``: the evaluation of ``step`` failed, and is made when
    the run goes on.  ``recording`` says how many rows of a step are recorded token by token (None: none).
    ``saved_step`` is the step of the newest checkpoint, -1 without one.  ``is_between_steps``: all that a checkpoint
    holds is that of ``step``, from the end of an update until the next begins.

    With several ``ranks`` each runs this loop; observers are called on the first, and a request to stop that reaches
    one rank stops all at the same place.
    """

    source: Source
    engine: Engine
    learner: TrainedLearner
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
    best: BestModel | None = None
    step: int = 0
    saved_step: int = -1
    ranks: Ranks = field(default_factory=OneProcess)
    is_between_steps: bool = field(default=True, init=False)
    owes_evaluation: bool = field(default=False, init=False)

    def run(self) -> None:
        """Train until ``is_over``, or until ``stop`` has a signal; a step without rollouts is given up."""
        with contextlib.suppress(Abandoned), contextlib.closing(self.source):
            self._run()

    def _run(self) -> None:
        self.engine.load(self.learner.policy())
        if self.evaluate is None or not self.eval_steps:
            self.owes_evaluation = False
        elif self.step == 0 or self.owes_evaluation:
            self._evaluate_alone(self.evaluate)
        if not self.is_over:
            self.source.start(self.step)
        while not self.is_over and not self._is_stopping():
            groups, metrics = self._unless_stopped(lambda: self.source.take(self.step))
            if self.step + 1 < self.max_steps:
                self.source.start(self.step + 1)
            recorder = self._recorder(groups)
            self.is_between_steps = False
            update = self.train(groups, drawn=int(metrics.get("rows/drawn", _count(groups))), recorder=recorder)
            metrics |= update.metrics
            self.source.finish()
            self.engine.load(self.learner.policy())
            self._evaluate_and_notify(metrics, update, groups, recorder)
            improved = self.best is not None and self.best.judge(self.step, metrics)
            if improved or self._is_due(self.save_steps):
                self.save_checkpoint()

    def _evaluate_alone(self, evaluate: Callable[[], Metrics]) -> None:
        """Before the first step, or where the evaluation of the last one had failed and is still to be judged."""
        metrics = self._unless_stopped(lambda: self._evaluated(evaluate))
        self._notify(metrics, [])
        if self.owes_evaluation:
            self.owes_evaluation, self.saved_step = False, -1  # the checkpoint there knows nothing of it
            if self.best is not None:
                self.best.judge(self.step, metrics)
            self.save_checkpoint()

    def _evaluate_and_notify(
        self, metrics: Metrics, update: Update, groups: Sequence[Group], recorder: TokenRecorder | None
    ) -> None:
        """Evaluate where it is due, and tell the observers; what fails here leaves the step that was trained whole."""
        evaluate = self.evaluate if self._is_due(self.eval_steps) else None
        self.owes_evaluation = evaluate is not None
        try:
            if evaluate is not None:
                metrics |= self._evaluated(evaluate)
                self.owes_evaluation = False
        finally:
            if self.ranks.world == 1 or not self.owes_evaluation:  # of several ranks some may not have failed
                self.is_between_steps = True
                self._notify(metrics, groups)
                self._notify_of_tokens(update, groups, recorder)

    def _unless_stopped(self, work: Callable[[], Result]) -> Result:
        """``work()``; raises Abandoned on all ranks where one of them was asked to stop meanwhile.

        A request may be an exception anywhere in the work, so all of it is inside :func:`together`, where that is a
        failure like another.
        """

        def abandonable() -> Result:
            with self.stop.abandonable():
                result = work()
            if self.stop.signal is not None:
                raise Abandoned
            return result

        try:
            return together(self.ranks, "work that may be given up", abandonable)
        except Abandoned:
            self._is_stopping()
            raise

    def _is_stopping(self) -> bool:
        """Whether any rank was asked to stop; all then have its signal."""
        signals = [number for number in gather(self.ranks, "may go on", self.stop.signal) if number is not None]
        if signals and self.stop.signal is None:
            self.stop.signal = signals[0]
        return bool(signals)

    @property
    def is_over(self) -> bool:
        """Whether all steps are trained, or no better one is waited for, and none waits for its evaluation."""
        ended = self.step >= self.max_steps or (self.best is not None and self.best.is_over)
        return ended and not self.owes_evaluation

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
            if not isinstance(update, Update):
                got, expected = type(update).__name__, "vpd.learners.Update"
                raise TrainingError("the method's step returned something else", got=got, expected=expected)
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
        """What a checkpoint must hold besides the learner, and the groups that the source has made already."""
        kept = {} if self.best is None else {"best": self.best.state()}
        owes = {"owes_evaluation": True} if self.owes_evaluation else {}
        return {"algorithm": self.algorithm.state(), **kept, **owes}

    def resume(self, progress: dict[str, Any]) -> None:
        """Continue where :meth:`progress` was taken."""
        self.step = self.saved_step = progress["step"]
        self.owes_evaluation = bool(progress.get("owes_evaluation"))
        self.algorithm.restore(progress["algorithm"])
        if self.best is not None:
            self.best.restore(progress.get("best", {}))

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
        return bool(every) and (self.is_over or self.step % every == 0)

    def _notify(self, metrics: Metrics, groups: Sequence[Group]) -> None:
        metrics |= largest(self.ranks, metrics, OF_EACH_PROCESS)

        def notify() -> None:
            for observer in self.observers:
                observer.on_step(self.step, metrics, groups)

        on_first(self.ranks, "observers", notify)

    def _notify_of_tokens(self, update: Update, groups: Sequence[Group], recorder: TokenRecorder | None) -> None:
        def notify() -> None:
            for observer in self.observers:
                if isinstance(observer, TokenObserver):
                    observer.on_token_signals(self.step, update.tokens, groups)
                if isinstance(observer, RecordObserver) and recorder is not None:
                    observer.on_token_records(self.step, recorder.records())

        on_first(self.ranks, "observers of tokens", notify)

    def _recorder(self, groups: Sequence[Group]) -> TokenRecorder | None:
        recording = self.recording
        return TokenRecorder(groups, recording) if recording is not None and recording.rows else None


def _count(groups: Sequence[Group]) -> int:
    return sum(len(group.rollouts) for group in groups)
