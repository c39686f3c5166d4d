"""Numbers from a user's code, NumPy's and torch's among them, as Python's own."""

import contextlib
import numbers
from collections.abc import Mapping
from typing import Any

from vpd.errors import EnvError
from vpd.printable import shown


def plain(value: Any) -> Any:
    """A scalar of NumPy or torch as Python's own; anything else, an array too, as it is."""
    if hasattr(value, "item"):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # more than one number
            return value.item()
    return value


def finite_metrics(metrics: Any, largest: float) -> dict[str, float]:
    """A grade's metrics by their names, as numbers of Python of at most ``largest`` either way.  Raises EnvError."""
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise EnvError("a grade's metrics are no mapping of names", got=shown(metrics), expected="{str: number}")
    found: dict[str, float] = {}
    for name, given in metrics.items():
        value = plain(given)
        if isinstance(value, numbers.Real) and not isinstance(value, int):
            value = float(value)
        if not isinstance(value, (int, float)) or not abs(value) <= largest:
            raise EnvError(
                f"a grade's metric {name!r} is not a finite number",
                got=shown(given),
                expected=f"a number of at most {largest:g} either way",
                do="Leave out what was not measured.",
            )
        found[name] = value
    return found
