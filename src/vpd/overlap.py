"""Overlap: the next step's rollouts are made in a thread while the learner updates (``rollout.overlap``).

    weights      v0                      v1                       v2
    engine       sample step 1 | sample step 2 | send v1 | sample step 3 | send v2 | ...
    learner      (waits)       | update 1      | (waits) | update 2      | (waits) | ...

The answers of a step come from the weights that the engine held when they were started: from step 2 on those before the
last update, never older ones, because the loop waits for them before it sends new weights.  Only the thread uses the
engine, the environment and the feedback sources meanwhile, and only the loop uses the learner.
"""

import dataclasses
import threading
import time
from concurrent.futures import Future

from vpd.envs import draw_tasks
from vpd.errors import StorageError, VPDError
from vpd.rollout import Made, RolloutSource
from vpd.types import Group, Task

LONGEST_END = 10.0  # seconds that the thread has to end when its work is given up


class OverlappedSource:
    """A source that makes a step's groups from the moment it is started; with several ranks each makes its share.

    ``source`` makes them; its engine must have weights of its own.  The metrics get ``time/rollout_wait``, the seconds
    that the loop waited for them, beside those that they took.
    """

    def __init__(self, source: RolloutSource):
        self._source = source
        self._step = -1
        self._thread: threading.Thread | None = None
        self._own: Future[Made] = Future()  # this rank's share
        self._made: Made | VPDError | None = None  # every rank's

    def start(self, step: int) -> None:
        """Begin with the groups of ``step``, unless a checkpoint held them."""
        if step == self._step:
            return
        self._step, self._own, self._made = step, Future(), None
        self._thread = threading.Thread(target=self._work, args=(step, self._own), daemon=True, name=f"step {step}")
        self._thread.start()

    def _work(self, step: int, own: Future[Made]) -> None:
        try:
            own.set_result(self._source.make(step))
        except BaseException as error:  # it is raised again in the thread that waits
            own.set_exception(error)

    def take(self, step: int) -> Made:
        self.finish()
        made = self.state(step)
        assert made is not None, "take(step) without start(step)"
        return made

    def finish(self) -> None:
        if self._thread is None or self._made is not None:
            return
        began = time.perf_counter()
        try:
            groups, metrics = self._source.gather(self._own.result)
            self._made = groups, metrics | {"time/rollout_wait": time.perf_counter() - began}
        except VPDError as error:
            self._made = error

    def state(self, step: int) -> Made | None:
        if isinstance(self._made, VPDError):
            raise self._made
        return self._made if step == self._step else None

    def restore(self, step: int, made: Made) -> None:
        """Take back the groups of a checkpoint, with tasks drawn anew: what belongs to the environment is not kept."""
        groups, metrics = made
        places = [group.rollouts[0].key.task for group in groups]
        tasks = draw_tasks(self._source.env, places, seed=self._source.seed)
        self._made = [with_task(group, task) for group, task in zip(groups, tasks, strict=True)], metrics
        self._step, self._thread = step, None

    def close(self) -> None:
        thread, deadline = self._thread, time.monotonic() + LONGEST_END
        while thread is not None and thread.is_alive() and time.monotonic() < deadline:
            self._source.abandon()
            thread.join(0.02)


def with_task(group: Group, task: Task) -> Group:
    """The attempts at a task, and their retries, with the task as it is drawn now.  Raises StorageError for another."""
    if group.rollouts[0].task.id != task.id:
        raise StorageError(
            "the environment draws another task than when the checkpoint was written",
            got=repr(task.id),
            expected=repr(group.rollouts[0].task.id),
            do="Let task(index, seed) depend on these two alone.",
        )
    return Group(
        rollouts=tuple(
            dataclasses.replace(r, task=task, retries=tuple(dataclasses.replace(x, task=task) for x in r.retries))
            for r in group.rollouts
        )
    )
