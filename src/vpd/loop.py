"""The whole of training on one page.

    tasks -> rollouts -> grades -> feedback -> teacher prompts -> algorithm.step -> the next weights

Whatever the method, this is the loop: VPD, SDPO, GKD and GRPO differ in ``algorithm`` alone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vpd.algorithms import Algorithm
from vpd.engines import Engine
from vpd.envs import Env, draw_tasks
from vpd.feedback import Feedback
from vpd.feedback.writers import ModelWriter
from vpd.learners import Learner
from vpd.prompts import Prompter
from vpd.rollout import RolloutSettings, collect
from vpd.types import Group, Metrics


class Observer(Protocol):
    """Watches a run: writes metrics and rollouts, shows progress."""

    def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None: ...


@dataclass(kw_only=True)
class Loop:
    """One run in progress.  ``step`` and ``cursor`` (tasks drawn so far) are all the loop itself remembers.

    ``measure`` is called before the first step and every ``eval_steps`` (0: never), ``save`` every ``save_steps``
    (0: never) and after the last step.
    """

    env: Env
    engine: Engine
    learner: Learner
    algorithm: Algorithm
    feedback: Sequence[Feedback]
    prompter: Prompter
    rollout: RolloutSettings
    describe: Callable[[Sequence[Group]], Metrics]
    observers: Sequence[Observer] = ()
    measure: Callable[[], Metrics] | None = None
    save: Callable[["Loop"], Any] | None = None
    seed: int = 0
    max_steps: int = 100
    eval_steps: int = 0
    save_steps: int = 0
    step: int = 0
    cursor: int = 0

    def run(self) -> None:
        """Train until ``max_steps``."""
        self.engine.load(self.learner.weights(), self.step)
        if self.step == 0 and self.measure is not None and self.eval_steps:
            self._notify(self.measure(), [])
        while self.step < self.max_steps:
            started = time.perf_counter()
            groups = self.collect_rollouts()
            rolled_out = time.perf_counter()
            groups = self.add_feedback(groups)
            explained = time.perf_counter()
            metrics = self.describe(groups) | {"learning_rate": self.learner.learning_rate}
            metrics |= self.algorithm.step(groups, self.learner)
            self.learner.end_iteration()
            self.step += 1
            self.engine.load(self.learner.weights(), self.step)
            metrics["time/rollout"] = rolled_out - started
            metrics["time/feedback"] = explained - rolled_out
            metrics["time/update"] = time.perf_counter() - explained
            last = self.step == self.max_steps
            if self.measure is not None and self.eval_steps and (last or self.step % self.eval_steps == 0):
                metrics |= self.measure()
            self._notify(metrics, groups)
            if self.save is not None and self.save_steps and (last or self.step % self.save_steps == 0):
                self.save(self)

    def collect_rollouts(self) -> list[Group]:
        """The graded rollouts of one iteration."""
        count = self.rollout.prompts_per_step
        tasks = draw_tasks(self.env, range(self.cursor, self.cursor + count), seed=self.seed)
        self.cursor += count
        return collect(
            self.env,
            self.engine,
            self.prompter,
            tasks,
            self.rollout.sampling,
            num_generations=self.rollout.num_generations,
            success_threshold=self.rollout.success_threshold,
            stream=(self.seed, "train", self.step),
        )

    def add_feedback(self, groups: Sequence[Group]) -> list[Group]:
        """The rollouts with what every feedback source says about them, and their teacher's prompts."""
        writer = ModelWriter(self.engine, self.prompter, stream=(self.seed, "feedback", self.step))
        for source in self.feedback:
            groups = source(groups, writer)
        return self.prompter.attach(groups)

    def progress(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the learner."""
        return {"cursor": self.cursor, "algorithm": self.algorithm.state()}

    def resume(self, progress: dict[str, Any]) -> None:
        """Continue where :meth:`progress` was taken."""
        self.step, self.cursor = progress["step"], progress["cursor"]
        self.algorithm.restore(progress["algorithm"])

    def _notify(self, metrics: Metrics, groups: Sequence[Group]) -> None:
        for observer in self.observers:
            observer.on_step(self.step, metrics, groups)
