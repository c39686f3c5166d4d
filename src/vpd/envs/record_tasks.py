"""Task sources over records: split into training and evaluation, and visited in epochs.

An environment over a file derives from :class:`FileTasks` and adds how records are read and how answers are graded::

    @dataclass(frozen=True, kw_only=True)
    class Capitals(FileTasks[Country]):
        name: Literal["capitals"] = "capitals"

        def read_items(self, path):
            return [...]

        def make_task(self, part, item):
            return Task(id=f"{part}/{item.id}", messages=..., payload=item)

        def split_key(self, item):
            return item.question

        def grade(self, tasks, texts): ...
"""

import functools
import hashlib
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Literal, Protocol, TypeAlias, TypeVar

from annotated_types import Interval

from vpd.errors import DataError
from vpd.settings import IsPath, Settings
from vpd.types import Task

Part: TypeAlias = Literal["train", "eval"]
EvalShare: TypeAlias = Annotated[
    float,
    Interval(ge=0.0, lt=1.0),
    "share of the data held out for evaluation, chosen by a hash of the question; 0: none",
]
LOG = logging.getLogger("vpd")


class Identified(Protocol):
    """What has an id that an error message can quote."""

    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=Identified)


class RecordTasks(Settings, ABC, Generic[Item], section="env"):
    """A finite task source over items that are read once, when the first task is asked for.

    A subclass has the settings ``name`` and ``eval_share``.
    """

    name: Any
    eval_share: Any
    #: how a user has the held-out items taken from the others
    held_out_by_share: ClassVar[str] = "leave env.eval_path out: env.eval_share of env.path is then held out"

    @property
    @abstractmethod
    def sources(self) -> tuple[str, str | None]:
        """Where items are read from: for training, and for evaluation (None: a share of the former)."""

    @abstractmethod
    def read_items(self, source: str) -> list[Item]:
        """All items of a source.  Raises DataError that names the record."""

    @abstractmethod
    def make_task(self, part: Part, item: Item) -> Task:
        """The task that an item becomes in training or in evaluation."""

    @abstractmethod
    def split_key(self, item: Item) -> str:
        """Text whose hash decides whether an item is held out; items with the same key stay on one side."""

    def identity_key(self, item: Item) -> str:
        """Text that two items share if they are the same question; it must not be in both sources."""
        return self.split_key(item)

    def shared_is_meant(self, train: Sequence[Item], held_out: Sequence[Item]) -> bool:
        """Whether both sources may hold the same questions (``held_out`` has those that training has too)."""
        return False

    def task(self, index: int, *, seed: int) -> Task:
        """Epoch ``index // n`` visits all n training tasks in the order drawn by (seed, epoch)."""
        tasks = self.train_tasks()
        epoch, place = divmod(index, len(tasks))
        return tasks[_permutation(self.name, len(tasks), seed, epoch)[place]]

    def train_tasks(self) -> Sequence[Task]:
        return self._tasks[0]

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        return self._tasks[1][:limit]

    @functools.cached_property
    def _tasks(self) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
        """(training tasks, held-out tasks)."""
        train, held_out = self._items
        return (
            tuple(self.make_task("train", item) for item in train),
            tuple(self.make_task("eval", item) for item in held_out),
        )

    @functools.cached_property
    def _items(self) -> tuple[list[Item], list[Item]]:
        """(training items, held-out items).

        With another source for evaluation the two must have no ``identity_key`` in common, unless ``shared_is_meant``.
        Without one, the items with ``fraction(split_key) < eval_share`` are held out (:func:`_bound`).  Raises
        DataError for a shared item or an empty source.
        """
        path, eval_path = self.sources
        items = self.read_items(path)
        if eval_path is None or eval_path == path:
            train, held_out = self._divided(items)
        else:
            train, held_out = items, self.read_items(eval_path)
            known = {self.identity_key(item) for item in train}
            shared = [item for item in held_out if self.identity_key(item) in known]
            if shared and not self.shared_is_meant(train, shared):
                raise DataError(
                    f"{path} and {eval_path} share {len(shared)} questions",
                    got=f"record {shared[0].id} of the latter in both",
                    expected="no question in both",
                    do=f"Remove them from one, or {self.held_out_by_share}.",
                )
            if not held_out:
                raise DataError(
                    f"{eval_path} has no question for evaluation", do="Leave env.eval_path out, or filter less."
                )
        if not train:
            raise DataError(f"{path} has no question for training", do="Give more questions, or filter less.")
        held_out.sort(key=lambda item: fraction(self.identity_key(item)))  # so that the first few are a fair sample
        return train, held_out

    def _divided(self, items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
        """The items of one source as (training items, held-out items)."""
        places = [fraction(self.split_key(item)) for item in items]
        different = sorted(set(places))
        below = _bound(different, self.eval_share)
        train = [item for item, place in zip(items, places, strict=True) if place >= below]
        held_out = [item for item, place in zip(items, places, strict=True) if place < below]
        if items and self.eval_share and not held_out:
            LOG.warning(
                "%s: env.eval_share %g of %d different questions holds none out: no evaluation",
                *(self.sources[0], self.eval_share, len(different)),
            )
        return train, held_out


@dataclass(frozen=True, kw_only=True)
class FileTasks(RecordTasks[Item]):
    """:class:`RecordTasks` over a file, a folder that ``datasets`` saved, or a data set on the Hub."""

    name: str
    path: Annotated[
        str, IsPath(), "JSON lines, a JSON array, CSV, parquet, a folder that datasets saved, or owner/name on the Hub"
    ]
    eval_path: Annotated[str | None, IsPath(), "records held out for evaluation; null: eval_share of path"] = None
    eval_share: EvalShare = 0.1
    subset: Annotated[str | None, "configuration of the Hub's data set"] = None
    split: Annotated[str, "split of the Hub's data set"] = "train"

    @property
    def sources(self) -> tuple[str, str | None]:
        return self.path, self.eval_path


def _bound(places: Sequence[float], share: float) -> float:
    """The fraction below which questions, at these ``places`` in ascending order, are held out.

    That is ``share``, whatever else is in the data.  Where it would hold out none of at least 1 / share different
    questions, the first is held out; where it would hold out all, none is.
    """
    if not places or places[-1] < share:
        return 0.0
    if places[0] >= share and len(places) > 1 and share * len(places) >= 1:
        return places[1]
    return share


@functools.lru_cache(maxsize=8)
def _permutation(name: str, length: int, seed: int, epoch: int) -> Sequence[int]:
    order = list(range(length))
    random.Random(f"{name}/{seed}/{epoch}").shuffle(order)
    return order


def fraction(content: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=6).digest(), "big") / 2**48
