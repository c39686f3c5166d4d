"""Who learns: every method and ablation, as the ``algorithm`` section of a configuration.

All have the same rollouts; the learning rate is each one's own, chosen from one grid on other seeds (rates.yaml).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vpd.errors import ConfigError, nearest
from vpd.lab.reproduce.regimes import REGIMES

GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
RATES = Path(__file__).with_name("rates.yaml")


@dataclass(frozen=True, kw_only=True)
class Method:
    """``tuned_as``: the method whose learning rate an ablation takes (None: its own)."""

    name: str
    title: str
    algorithm: Mapping[str, Any]
    reads: bool = True
    tuned_as: str | None = None


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(name="grpo", title="GRPO", algorithm={"name": "grpo"}, reads=False),
        Method(name="sdpo", title="SDPO (EMA teacher)", algorithm={"name": "sdpo"}),
        Method(
            name="sdpo_live", title="SDPO, live teacher", algorithm={"name": "sdpo", "teacher": "live"}, tuned_as="sdpo"
        ),
        Method(name="vpd", title="VPD, F = 5", algorithm={"name": "vpd"}),
        Method(
            name="vpd_paper",
            title="VPD, reverse KL and live teacher",
            algorithm={"name": "vpd", "preset": "paper"},
            tuned_as="vpd",
        ),
        Method(name="gkd", title="GKD (external expert)", algorithm={"name": "gkd"}, reads=False),
        Method(name="reshape", title="AdvReshape", algorithm={"name": "hybrid", "form": "reshape"}),
        Method(name="reweight", title="AdvReweight", algorithm={"name": "hybrid", "form": "reweight"}),
        Method(name="gated", title="gated VPD", algorithm={"name": "gated"}),
        Method(
            name="gated_no_e",
            title="gated, no E-step",
            algorithm={"name": "gated", "e_every": None},
            tuned_as="gated",
        ),
        Method(name="gated_f1", title="gated, F = 1", algorithm={"name": "gated", "e_every": 1}, tuned_as="gated"),
        Method(name="vpd_f1", title="VPD, F = 1", algorithm={"name": "vpd", "e_every": 1}, tuned_as="vpd"),
        Method(name="vpd_f10", title="VPD, F = 10", algorithm={"name": "vpd", "e_every": 10}, tuned_as="vpd"),
        Method(name="vpd_fixed", title="VPD, fixed prior", algorithm={"name": "vpd", "prior": "fixed"}, tuned_as="vpd"),
    )
}


def method(name: str) -> Method:
    """A method by its name.  Raises ConfigError."""
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}", do=nearest(name, METHODS))
    return METHODS[name]


def load_rates(path: Path = RATES) -> dict[str, dict[str, float]]:
    """Learning rates by regime and method.  Raises ConfigError."""
    return {
        regime: {name: row["learning_rate"] for name, row in rows.items()} for regime, rows in load_table(path).items()
    }


def load_table(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The table of rates as it was chosen: regime -> method -> learning_rate, and what it was chosen from."""
    try:
        table = yaml.safe_load(path.read_text())
        return {
            regime: {name: {**row, "learning_rate": float(row["learning_rate"])} for name, row in rows.items()}
            for regime, rows in table["rates"].items()
        }
    except OSError as error:
        raise ConfigError(f"cannot read the learning rates {path}", got=error.strerror) from error
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{path} is no table of learning rates",
            got=" ".join(str(error).split())[:120],
            expected="rates: regime: method: {learning_rate: number}, as vpd reproduce --tune writes it",
        ) from error


def rate_of(rates: Mapping[str, Mapping[str, float]], regime: str, name: str) -> float:
    """The learning rate of a method in a regime.  Raises ConfigError if the table does not have it."""
    tuned = method(name).tuned_as or name
    where = REGIMES[regime].tuned_as or regime
    try:
        return rates[where][tuned]
    except KeyError as error:
        raise ConfigError(
            f"no learning rate for {tuned} in the regime {where}", do="Tune it: vpd reproduce --tune."
        ) from error
