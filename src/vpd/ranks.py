"""Several processes that run one program: how work is divided among them and its results are gathered.

Every rank calls the same functions in the same order.  :func:`divide` is the one way to split work: each rank works on
a contiguous share, the results are gathered in order, and a failure on one rank is gathered too, so that all ranks
raise instead of waiting for it.
"""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from vpd.errors import VPDError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Ranks(Protocol):
    """The processes of a run; ``rank`` is this one's number, ``world`` how many there are."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order; a collective."""
        ...


class OneProcess:
    """The default: a run of one process."""

    rank = 0
    world = 1

    def all_gather(self, value: Any) -> list[Any]:
        return [value]


class ThreadRanks:
    """A fake for tests: ``ThreadRanks.run(2, program)`` runs ``program(ranks)`` in two threads that can gather."""

    def __init__(self, rank: int, inboxes: "Sequence[queue.Queue[tuple[int, Any]]]", *, timeout: float):
        self.rank = rank
        self.world = len(inboxes)
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


def share_of(rank: int, world: int, count: int) -> range:
    """The contiguous share of ``count`` items that a rank takes; shares differ by one item at most."""
    return range(count * rank // world, count * (rank + 1) // world)


def divide(ranks: Ranks, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
    """``work(share)`` on every rank, and the results of all shares in order, whole on every rank.

    Raises the lowest rank's VPDError on every rank; the others name that rank.
    """
    share = [items[index] for index in share_of(ranks.rank, ranks.world, len(items))]
    fault: VPDError | None = None
    done: list[Result] = []
    try:
        done = list(work(share)) if share or ranks.world == 1 else []
    except VPDError as error:
        fault = error
    gathered = ranks.all_gather((done, None if fault is None else str(fault)))
    if fault is not None:
        raise fault
    for rank, (_, fault_text) in enumerate(gathered):
        if fault_text is not None:
            raise VPDError(f"rank {rank} failed: {fault_text}")
    return [result for results, _ in gathered for result in results]
