"""Ranges are declared once: the check, the words of the error, and what help shows."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Interval, Lt

from vpd.errors import ConfigError
from vpd.settings import Settings, Share, declarations


@dataclass(frozen=True, kw_only=True)
class Example(Settings, section="part"):
    rows: Annotated[int, Ge(1), "rows at once"] = 1
    rate: Annotated[float, Gt(0)] = 0.1
    share: Annotated[float, Share, "share of the rows"] = 0.5
    memory: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    limit: Annotated[int | None, Ge(1), "most rows; null: any"] = None
    below: Annotated[float, Lt(3)] = 0.0
    form: Annotated[Literal["sum", "mean"], "how rows are added up"] = "sum"
    maybe: Literal["a"] | None = None
    text: str = ""

    def check(self) -> None:
        if self.rows > 100 and self.limit is None:
            raise ConfigError("part.limit is missing")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rows": 0}, "part.rows is out of range; got 0; expected at least 1"),
        ({"rate": 0}, "part.rate is out of range; got 0; expected above 0"),
        ({"share": 1.5}, "part.share is out of range; got 1.5; expected from 0.0 to 1.0"),
        ({"share": float("nan")}, "part.share is out of range; got nan"),
        ({"memory": 1}, "expected from 0 to below 1"),
        ({"limit": 0}, "expected at least 1, or null"),
        ({"below": 3}, "expected below 3"),
        ({"form": "max"}, "part.form is out of range; got 'max'; expected 'sum' or 'mean'"),
        ({"maybe": "b"}, "expected 'a' or null"),
        ({"rows": "many"}, "part.rows is out of range; got 'many'"),
        ({"rows": 101}, "part.limit is missing"),
    ],
)
def test_a_value_out_of_range_is_one_error_that_names_the_setting(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        Example(**changes)
    assert told in str(error.value)


def test_values_on_the_edge_are_taken() -> None:
    Example(rows=1, share=0.0, memory=0.999, limit=None, form="mean", maybe=None)
    Example(share=1.0, limit=1, maybe="a", rows=101)


def test_what_help_shows() -> None:
    found = declarations(Example)
    assert found["rows"].meaning == "rows at once" and found["rows"].range == "at least 1"
    assert found["limit"].range == "at least 1, or null" and found["text"].range == ""
