"""What a learner hands to an engine and to a checkpoint: the policy, never its modules."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")


class Policy(Protocol):
    """A model's weights at this moment, however they are held: whole or sharded, plain or with an adapter."""

    @property
    def version(self) -> int:
        """Iterations that have been trained; stamped on what these weights sample."""
        ...

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """``function(model, *arguments)`` inside the root module's forward pass, in the learner's precision.

        Each rank calls it at its own pace, so weights in shards are copied whole to every rank first.
        """
        ...

    def call_together(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """As :meth:`call`, but a collective: all ranks make the same passes at the same time, and nothing is copied."""
        ...

    def tensors(self) -> "Iterator[tuple[str, Tensor]]":
        """Every weight as (its name on the Hub, a whole tensor), adapters merged in; a collective."""
        ...

    def save(self, folder: Path) -> None:
        """Write the weights that are trained: a ``from_pretrained`` folder, or the adapter in peft's form.

        A collective; the first rank writes.  Raises what the libraries raise where the disk takes no more.
        """
        ...


class FixedPolicy:
    """The policy of a plain model that nobody trains, and a fake for tests."""

    def __init__(self, model: Any, version: int = 0):
        self.model = model
        self.version = version

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return function(self.model, *arguments)

    def call_together(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return function(self.model, *arguments)

    def tensors(self) -> "Iterator[tuple[str, Tensor]]":
        yield from self.model.state_dict().items()

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
