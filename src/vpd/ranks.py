"""Several processes that run one program: how work is divided among them, and how they stay together.

Every rank calls the same functions in the same order, on the same data.  :func:`divide` is the one way to split work:
each rank works on a contiguous share, and the results are gathered in order.  :func:`on_first` is for what is done once
(the run folder, trackers, the console), :func:`together` for what every rank does and may fail at.  A failure is
gathered like a result, so that all ranks raise instead of waiting for one that will not come: the rank that failed
raises its own error, the others a :class:`~vpd.errors.RankError`.  :func:`agree` proves that the data are the same.
"""

import atexit
import contextlib
import datetime
import hashlib
import json
import os
import queue
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from vpd.errors import Abandoned, ConfigError, RankError, TrainingError, VPDError

Item = TypeVar("Item")
Result = TypeVar("Result")
#: Each part of what all ranks must hold alike: what messages call it, and a digest of it.
Digests = Sequence[tuple[str, bytes]]

TIMEOUT = 3600.0  # seconds
WHAT_TO_LOOK_FOR = (
    "Every process must come to the same result by itself. Look for hash() of a text, the order of a set, a clock, an"
    " unseeded generator, other files or package versions on one machine, or a model elsewhere that answers each"
    " process differently."
)


class Ranks(Protocol):
    """The processes of a run; ``rank`` is this one's number, ``world`` how many there are."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    @property
    def gathering(self) -> bool:
        """Whether this rank is inside :meth:`all_gather`, which no exception of a signal handler may interrupt."""
        ...

    depth: int
    """How many calls of :func:`together` and its like this rank is inside of."""

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order; a collective."""
        ...


class OneProcess:
    """The default: a run of one process."""

    rank = 0
    world = 1
    gathering = False
    depth = 0

    def all_gather(self, value: Any) -> list[Any]:
        return [value]


class TorchRanks:
    """The processes that ``torchrun`` or ``accelerate launch`` has started.

    Values travel over a gloo group of their own, also beside NCCL.  ``timeout`` is for every group, in seconds: how
    long a rank waits for the others before the run ends with an error.
    """

    def __init__(self, timeout: float):
        import torch
        import torch.distributed as dist

        limit = datetime.timedelta(seconds=timeout)
        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group(backend(), timeout=limit)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.gathering = False
        self.depth = 0
        self._timeout = timeout
        self._group = dist.new_group(backend="gloo", timeout=limit)

    def all_gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.world
        self.gathering = True
        try:
            dist.all_gather_object(gathered, value, group=self._group)
        except RuntimeError as error:
            raise _lost(error, self._timeout) from error
        finally:
            self.gathering = False
        return gathered


class ThreadRanks:
    """A fake for tests: ``ThreadRanks.run(2, program)`` runs ``program(ranks)`` in two threads that can gather."""

    gathering = False

    def __init__(self, rank: int, inboxes: "Sequence[queue.Queue[tuple[int, Any]]]", *, timeout: float):
        self.rank = rank
        self.world = len(inboxes)
        self.depth = 0
        self._inboxes = inboxes
        self._timeout = timeout
        self._early: dict[int, list[Any]] = {rank: [] for rank in range(self.world)}

    def all_gather(self, value: Any) -> list[Any]:
        for inbox in self._inboxes:
            inbox.put((self.rank, value))
        while not all(self._early.values()):
            sender, sent = self._inboxes[self.rank].get(timeout=self._timeout)
            self._early[sender].append(sent)
        return [self._early[rank].pop(0) for rank in range(self.world)]

    @classmethod
    def run(cls, world: int, program: Callable[["ThreadRanks"], Result], *, timeout: float = 10.0) -> list[Any]:
        """What ``program`` returned, or the exception that it raised, on each rank."""
        inboxes: list[queue.Queue[tuple[int, Any]]] = [queue.Queue() for _ in range(world)]
        with ThreadPoolExecutor(world) as pool:
            futures = [pool.submit(program, cls(rank, inboxes, timeout=timeout)) for rank in range(world)]
        return [future.exception() or future.result() for future in futures]


def start_ranks(timeout: float = TIMEOUT) -> Ranks:
    """The ranks of this run: those of the launcher that started this process, else one process.

    Raises ConfigError where Accelerate was asked to shard by itself.
    """
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise ConfigError(
                "accelerate launch was asked to shard the model by itself",
                got=f"{name}={os.environ[name]}",
                do="Launch with --multi_gpu alone, and set optim.sharding to fsdp2.",
            )
    return TorchRanks(timeout) if launched()[1] > 1 else OneProcess()


def launched() -> tuple[int, int]:
    """This process's rank and how many there are, as the launcher says in the environment; 0 and 1 without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def backend() -> str:
    """What torch's processes talk over on this machine; NCCL was never run here."""
    import torch

    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def share_of(rank: int, world: int, count: int) -> range:
    """The contiguous share of ``count`` items that a rank takes; shares differ by one item at most."""
    return range(count * rank // world, count * (rank + 1) // world)


def gather(ranks: Ranks, place: str, value: Any) -> list[Any]:
    """Every rank's value, in rank order; ``place`` says where in the program, which must be the same on all ranks.

    Raises RankError where a rank has failed elsewhere, TrainingError where one is elsewhere for no such reason.
    """
    if ranks.world == 1:
        return [value]
    here = (place, ranks.depth)
    while True:
        gathered = ranks.all_gather((here, value))
        if all(there == here for there, _ in gathered):
            return [sent for _, sent in gathered]
        failed = {rank: sent for rank, (_, sent) in enumerate(gathered) if isinstance(sent, _Fault)}
        if not failed:
            raise _once(ranks, _elsewhere([there[0] for there, _ in gathered]))
        if not isinstance(value, _Fault) or all(there[1] <= ranks.depth for there, _ in gathered):
            raise _passed_on(failed)
        # the others are deeper in the program: they fail too now, and come here


def together(ranks: Ranks, place: str, work: Callable[[], Result]) -> Result:
    """``work()`` on every rank, each with its own result; where one rank fails, all do.

    Raises the lowest failing rank's VPDError there, RankError on the others, and Abandoned on all where one was asked
    to stop.
    """
    return _exchange(ranks, place, work, lambda result: None)[0]


def on_first(ranks: Ranks, place: str, work: Callable[[], Result]) -> Result:
    """``work()`` on the first rank; the others wait and get its result.  Raises as :func:`together`."""
    if ranks.world == 1:
        return work()
    found: Result = _exchange(ranks, place, lambda: work() if ranks.rank == 0 else None, lambda one: one)[1][0]
    return found


def divide(
    ranks: Ranks,
    items: Sequence[Item],
    work: Callable[[Sequence[Item]], Sequence[Result]],
) -> list[Result]:
    """``work(share)`` on every rank, and the results of all shares in order, whole on every rank.

    A rank without a share is not called.  Raises as :func:`together`.
    """
    share = [items[index] for index in share_of(ranks.rank, ranks.world, len(items))]
    _, gathered = _exchange(
        ranks, "work that is divided", lambda: list(work(share)) if share or ranks.world == 1 else [], list
    )
    return [result for results in gathered for result in results]


def agree(ranks: Ranks, what: str, digests: Callable[[], Digests]) -> None:
    """Raise TrainingError unless ``what`` is the same on all ranks; the message names a rank and a part that differ."""
    if ranks.world == 1:
        return
    parts = digests()
    whole = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    if len(set(gather(ranks, what, whole))) == 1:
        return
    others: list[dict[str, bytes]] = list(map(dict, gather(ranks, f"{what}, part by part", parts)))
    rank, different = next(
        (rank, name)
        for rank, other in enumerate(others)
        for name in [*others[0], *other]
        if other.get(name) != others[0].get(name)
    )
    raise _once(
        ranks,
        TrainingError(
            f"rank {rank} differs from rank 0 in {what}",
            got=f"{different} of {len(others[0])} parts on rank 0, {len(others[rank])} on rank {rank}",
            expected="the same on every process",
            do=WHAT_TO_LOOK_FOR,
        ),
    )


def largest(ranks: Ranks, metrics: Mapping[str, float], prefixes: tuple[str, ...]) -> dict[str, float]:
    """The largest value over all ranks of each metric whose name begins with one of these."""
    own = {name: value for name, value in metrics.items() if name.startswith(prefixes)}
    found: dict[str, float] = {}
    for other in gather(ranks, "metrics", own):
        found |= {name: max(value, found.get(name, value)) for name, value in other.items()}
    return found


@contextlib.contextmanager
def after_the_one_that_failed() -> Iterator[None]:
    """Let a rank that only passes on another's failure end later, so that the launcher reports the one that failed.

    So does a rank that fails before it can ask the others: most of all the first has failed in the same way.
    """
    try:
        yield
    except VPDError as error:
        if isinstance(error, RankError) or (launched()[0] > 0 and not _connected()):
            time.sleep(1.5)
        raise


def leave_for_launcher(line: str) -> None:
    """Leave the line that ends this process where torchrun looks for it; it shows it at the end of its own report."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError), open(path, "w") as file:
            json.dump({"message": message}, file)


def end_process(code: int) -> None:
    """Exit at once with what is registered for the exit done: gloo's own end may wait without end (pytorch 56297)."""
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(code)


class _Fault:
    """A failure as a value; ``text`` None: the work was given up.  ``own``: it happened on the rank that sends it."""

    def __init__(self, error: VPDError | Abandoned):
        self.text = None if isinstance(error, Abandoned) else str(error)
        self.own = not isinstance(error, RankError)


def _exchange(
    ranks: Ranks, place: str, work: Callable[[], Result], sent: Callable[[Result], Any]
) -> tuple[Result, list[Any]]:
    """This rank's result, and what every rank sends of its own."""
    if ranks.world == 1:
        result = work()
        return result, [sent(result)]
    fault: VPDError | Abandoned | None = None
    value: Any = None
    depth = ranks.depth
    try:
        ranks.depth = depth + 1
        result = work()
        value = sent(result)
    except (VPDError, Abandoned) as error:
        fault, value = error, _Fault(error)
    finally:
        ranks.depth = depth  # as it was: a signal's exception may have skipped this line further in
    try:
        gathered = gather(ranks, place, value)
    except RankError:
        if fault is None:
            raise
        raise fault from None
    failed = {rank: one for rank, one in enumerate(gathered) if isinstance(one, _Fault)}
    if not failed:
        return result, gathered
    passed_on = _passed_on(failed)
    if isinstance(passed_on, Abandoned):
        raise passed_on
    if fault is not None and (not failed[ranks.rank].own or ranks.rank == _lowest(failed)):
        raise fault
    raise passed_on from fault


def _lowest(failed: Mapping[int, _Fault]) -> int:
    """The lowest rank that failed by itself."""
    return min(failed, key=lambda number: (not failed[number].own, number))


def _passed_on(failed: Mapping[int, _Fault]) -> RankError | Abandoned:
    """What the failures of others are here."""
    if any(one.text is None for one in failed.values()):
        return Abandoned()
    rank = _lowest(failed)
    return RankError(f"rank {rank} failed: {failed[rank].text}" if failed[rank].own else str(failed[rank].text))


def _elsewhere(places: Sequence[str]) -> TrainingError:
    rank, other = next((rank, place) for rank, place in enumerate(places) if place != places[0])
    return TrainingError(
        "the processes of this run are not at the same place of the program",
        got=f"{places[0]!r} on rank 0, {other!r} on rank {rank}",
        do=WHAT_TO_LOOK_FOR,
    )


def _connected() -> bool:
    """Whether this process can gather with others."""
    if "torch.distributed" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _once(ranks: Ranks, error: VPDError) -> VPDError:
    """An error that all ranks have found, as each raises it, so that one of them shows it."""
    return error if ranks.rank == 0 else RankError(f"as on rank 0: {error}")


def _lost(error: RuntimeError, timeout: float) -> VPDError:
    """What became of the others when a collective failed."""
    if "imed out" in str(error) or "imeout" in str(error):
        return TrainingError(
            f"the other processes of this run did not come within {timeout:g} seconds",
            do="See what they do (py-spy dump --pid); where they only need longer, raise run.rank_timeout.",
        )
    return TrainingError(
        "the connection to another process of this run is lost",
        got=re.sub(r"^\[\S*\] ", "", " ".join(str(error).split())).split(". ")[0][:80],
        do="Its own message says why; without one, see whether it was killed (out of memory?). Then go on with"
        " --run.resume true.",
    )
