"""Where a reward function runs, and what its time limit bounds.

* :class:`ProcessCaller`: in a process of its own, which a time limit ends, whatever the function does.  It loads the
  function by its name; a process that was ended is started again for the next row.
* :class:`LocalCaller`: in this process.  Without a limit in the calling thread; with one in a thread of its own, or, if
  it is async, on one event loop that all async functions share.  After the limit the row has failed and the function
  runs on unobserved, as Python can stop no thread.  While C code holds the interpreter (a regular expression,
  ``9**9**9``), nothing in this process can even see the limit.

Calling the function, awaiting, listing and reading its answers all happen within the limit, so a generator is evaluated
there, too.
"""

import asyncio
import base64
import contextlib
import functools
import inspect
import itertools
import pickle
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias

from vpd.envs import without_blank_feedback
from vpd.envs.adapters.reward_functions import Result, RewardFunction, Row, WrongCount
from vpd.envs.user_code import errors_named, one_process, process_kept
from vpd.envs.worker import Worker, WorkerFault
from vpd.errors import EnvError, VPDError
from vpd.types import Grade

#: turns a raw answer into a grade, or None where the function does not apply to the row; raises EnvError
Reader: TypeAlias = Callable[[Any, str], Grade | None]
LOOP_SECONDS = 1.0  # in which an event loop that is free answers


@dataclass(frozen=True, slots=True)
class LocalCaller:
    """Calls a reward function in this process."""

    function: RewardFunction
    read: Reader

    @property
    def name(self) -> str:
        return self.function.name

    @property
    def batched(self) -> bool:
        return self.function.batched

    def __call__(self, rows: Sequence[Row], texts: Sequence[str], first: int, seconds: float | None) -> list[Result]:
        what = call_name(self.name, first, len(rows))

        def results() -> list[Result]:
            with errors_named(what, do=None):
                answers = self.function(rows, texts)
                if inspect.isawaitable(answers):
                    return _on_loop(self._awaited(answers, first, len(rows)), what, seconds)
                return self._results(answers, first, len(rows))

        with process_kept(what):
            return results() if seconds is None or self.function.is_async else _in_thread(results, what, seconds)

    async def _awaited(self, answers: Any, first: int, count: int) -> list[Result]:
        try:
            with errors_named(call_name(self.name, first, count), do=None):
                return self._results(await answers, first, count)
        except EnvError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling() and error.__cause__ is not None:
                raise error.__cause__ from None
            raise

    def _results(self, answers: Any, first: int, count: int) -> list[Result]:
        listed = _as_list(answers, count, call_name(self.name, first, count))
        return [self._read(answer, f"{self.name} on row {first + place}") for place, answer in enumerate(listed)]

    def _read(self, answer: Any, what: str) -> Result:
        """A raw answer as a grade; one that cannot be read is an error of its row."""
        try:
            with errors_named(what, do=None):
                grade = self.read(answer, what)
        except EnvError as error:
            return error
        return None if grade is None else without_blank_feedback(grade)


def call_name(name: str, first: int, count: int) -> str:
    return f"{name} on row {first}" if count == 1 else f"{name} on a batch of {count} rows"


def _as_list(answers: Any, count: int, what: str) -> list[Any]:
    """Answers as a list of the right length; raises WrongCount."""
    if isinstance(answers, (str, Mapping)):
        raise WrongCount(f"{what} returned no list", got=type(answers).__name__, expected=f"a list of {count}")
    if not hasattr(answers, "__iter__") and not hasattr(answers, "__getitem__"):
        raise WrongCount(f"{what} returned no list", got=repr(answers)[:80], expected=f"a list of {count}")
    listed = list(itertools.islice(iter(answers), count + 1))
    if len(listed) != count:
        got = f"more than {count}" if len(listed) > count else len(listed)
        raise WrongCount(f"{what} returned the wrong number of rewards", got=got, expected=count)
    return listed


def _in_thread(call: Callable[[], list[Result]], what: str, seconds: float) -> list[Result]:
    """``call()`` in a thread of its own.  Raises EnvError, also if it takes longer than ``seconds``."""
    future: Future[list[Result]] = Future()

    def run() -> None:
        try:
            with one_process(what):
                future.set_result(call())
        except VPDError as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name=what).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        raise late(what, seconds) from None


def _on_loop(call: Coroutine[Any, Any, list[Result]], what: str, seconds: float | None) -> list[Result]:
    """``await call`` on the event loop that all async functions share, so that their clients stay usable."""
    loop = _loop()
    future = asyncio.run_coroutine_threadsafe(call, loop)
    try:
        return future.result(seconds)
    except TimeoutError:
        future.cancel()
        free = threading.Event()
        loop.call_soon_threadsafe(free.set)
        if not free.wait(LOOP_SECONDS):  # the function does not await: the next one gets another loop
            _loop.cache_clear()
        raise late(what, seconds) from None


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()

    def run() -> None:
        while True:  # a function may stop it, or end it from a task of its own
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                loop.run_forever()

    threading.Thread(target=run, daemon=True, name="async reward functions").start()
    return loop


def late(what: str, seconds: float | None) -> EnvError:
    return EnvError(f"{what} took too long", expected=f"at most {seconds:g} s (env.seconds for each row)")


@dataclass(frozen=True)
class ProcessCaller:
    """Calls a reward function in a process of its own, where ``serve(spec)`` of ``module`` loads it."""

    name: str
    batched: bool
    module: str
    spec: str

    @functools.cached_property
    def _worker(self) -> Worker:
        return Worker(self.module, self.spec, seconds=0.0, users=True)

    def __call__(self, rows: Sequence[Row], texts: Sequence[str], first: int, seconds: float | None) -> list[Result]:
        what = call_name(self.name, first, len(rows))
        assert seconds is not None
        sent = base64.b64encode(pickle.dumps((list(rows), list(texts), first))).decode()
        try:
            answer = self._worker.ask(sent, seconds=seconds)
        except WorkerFault as fault:
            raise (late(what, seconds) if fault.late else EnvError(f"{what} gave no answer: {fault}")) from None
        if "count" in answer:
            raise WrongCount(answer["count"])
        if "error" in answer:
            raise EnvError(answer["error"])
        return [_received(result) for result in answer["results"]]


def _received(result: Any) -> Result:
    if result is None:
        return None
    return EnvError(result["error"]) if "error" in result else Grade(**result)


def answering(local: LocalCaller) -> Callable[[str], dict[str, Any]]:
    """In the worker: a request of :class:`ProcessCaller` -> the results as JSON."""

    def answer(sent: str) -> dict[str, Any]:
        rows, texts, first = pickle.loads(base64.b64decode(sent))
        try:
            return {"results": [_sent(result) for result in local(rows, texts, first, None)]}
        except WrongCount as error:
            return {"count": str(error)}
        except EnvError as error:
            return {"error": str(error)}

    return answer


def _sent(result: Result) -> dict[str, Any] | None:
    if result is None:
        return None
    if isinstance(result, EnvError):
        return {"error": str(result)}
    return {
        "reward": float(result.reward),
        "success": result.success,
        "feedback": result.feedback,
        "informative": result.informative,
        "metrics": {str(name): float(value) for name, value in result.metrics.items()},
        "graded": result.graded,
    }
