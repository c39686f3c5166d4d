"""All methods and ablations, each as the ``algorithm`` section of a configuration.

Every method samples as many answers and has a learning rate of its own, chosen from one grid on other seeds
(rates.yaml).  A method with retries samples half as many attempts, and at most one retry for each; it has the rate of
the method without retries.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vpd.errors import ConfigError, nearest
from vpd.lab.reproduce.settings_table import GENERATIONS, SETTINGS

GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
RATES = Path(__file__).with_name("rates.yaml")
JUDGE = {"name": "judge", "judge": "reward", "max_pairs": 3 * GENERATIONS}
RETRIES = {"num_generations": GENERATIONS // 2, "retries": 1}


@dataclass(frozen=True, kw_only=True)
class Method:
    """``reads_feedback``: False for a method that learns without it, from the reward or from an external teacher.

    ``rollout``: settings of that section that differ from the other methods'.  ``feedback``: its own sources in the
    place of the setting's.
    ``tuned_as``: the method whose learning rate an ablation uses (None: its own).
    """

    name: str
    title: str
    algorithm: Mapping[str, Any]
    rollout: Mapping[str, Any] = field(default_factory=dict)
    feedback: tuple[Any, ...] | None = None
    reads_feedback: bool = True
    tuned_as: str | None = None


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(name="grpo", title="GRPO", algorithm={"name": "grpo"}, reads_feedback=False),
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
        Method(name="gkd", title="GKD (external expert)", algorithm={"name": "gkd"}, reads_feedback=False),
        Method(
            name="gkd_data",
            title="GKD, right answers of the data",
            algorithm={"name": "gkd", "student_fraction": 0.0, "other_answers": "data"},
            reads_feedback=False,
            tuned_as="gkd",
        ),
        Method(
            name="plare",
            title="PLARE (the reward as judge)",
            algorithm={"name": "plare"},
            feedback=(JUDGE,),
            reads_feedback=False,
        ),
        Method(name="reshape", title="AdvReshape", algorithm={"name": "hybrid", "form": "reshape"}),
        Method(name="reweight", title="AdvReweight", algorithm={"name": "hybrid", "form": "reweight"}),
        Method(name="gated", title="evidence-gated VPD", algorithm={"name": "gated"}),
        Method(
            name="gated_no_e",
            title="evidence-gated VPD, no E-step",
            algorithm={"name": "gated", "e_every": None},
            tuned_as="gated",
        ),
        Method(
            name="gated_f1",
            title="evidence-gated VPD, F = 1",
            algorithm={"name": "gated", "e_every": 1},
            tuned_as="gated",
        ),
        Method(name="vpd_f1", title="VPD, F = 1", algorithm={"name": "vpd", "e_every": 1}, tuned_as="vpd"),
        Method(name="vpd_f10", title="VPD, F = 10", algorithm={"name": "vpd", "e_every": 10}, tuned_as="vpd"),
        Method(name="vpd_fixed", title="VPD, fixed prior", algorithm={"name": "vpd", "prior": "fixed"}, tuned_as="vpd"),
        Method(
            name="imitate",
            title="revise and imitate",
            algorithm={"name": "sdpo", "distillation_weight": 0.0},
            rollout=RETRIES,
            tuned_as="vpd",
        ),
        Method(
            name="retries_pg",
            title="policy gradient on attempts and retries",
            algorithm={"name": "sdpo", "distillation_weight": 0.0, "retry_loss": "policy_gradient"},
            rollout=RETRIES,
            tuned_as="vpd",
        ),
        Method(
            name="retries_kl",
            title="forward KL on retries",
            algorithm={"name": "sdpo", "distillation_weight": 0.0, "retry_loss": "forward_kl"},
            rollout=RETRIES,
            tuned_as="vpd",
        ),
        Method(
            name="vpd_retries", title="VPD with retries", algorithm={"name": "vpd"}, rollout=RETRIES, tuned_as="vpd"
        ),
        Method(
            name="vpd_retries_no_e",
            title="VPD with retries, no E-step",
            algorithm={"name": "vpd", "e_every": None},
            rollout=RETRIES,
            tuned_as="vpd",
        ),
        Method(
            name="vpd_retries_f1",
            title="VPD with retries, F = 1",
            algorithm={"name": "vpd", "e_every": 1},
            rollout=RETRIES,
            tuned_as="vpd",
        ),
        Method(
            name="gated_retries",
            title="evidence-gated VPD with retries",
            algorithm={"name": "gated"},
            rollout=RETRIES,
            tuned_as="gated",
        ),
    )
}


#: The rows of the table of all methods: each method once, in the form that we recommend; ablations are not in it.
COMPARED = (
    "grpo",
    "plare",
    "gkd",
    "gkd_data",
    "sdpo",
    "vpd",
    "gated",
    "reshape",
    "reweight",
    "imitate",
    "vpd_retries",
    "gated_retries",
)


def find_method(name: str) -> Method:
    """A method by its name.  Raises ConfigError."""
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}", do=nearest(name, METHODS))
    return METHODS[name]


def load_rates(path: Path = RATES) -> dict[str, dict[str, float]]:
    """Learning rates by setting and method.  Raises ConfigError."""
    return {
        setting: {name: row["learning_rate"] for name, row in rows.items()}
        for setting, rows in load_table(path).items()
    }


def load_table(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The whole table: setting -> method -> learning_rate, and the seeds and results that it was chosen by."""
    try:
        table = yaml.safe_load(path.read_text())
        return {
            setting: {name: {**row, "learning_rate": float(row["learning_rate"])} for name, row in rows.items()}
            for setting, rows in table["rates"].items()
        }
    except OSError as error:
        raise ConfigError(f"cannot read the learning rates {path}", got=error.strerror) from error
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{path} is no table of learning rates",
            got=" ".join(str(error).split())[:120],
            expected="rates: setting: method: {learning_rate: number}, as vpd reproduce --tune writes it",
        ) from error


def rate_of(rates: Mapping[str, Mapping[str, float]], setting: str, name: str) -> float:
    """The learning rate of a method in a setting.  Raises ConfigError if the table does not have it."""
    tuned = find_method(name).tuned_as or name
    source = SETTINGS[setting].tuned_as or setting
    try:
        return rates[source][tuned]
    except KeyError as error:
        raise ConfigError(
            f"no learning rate for {tuned} in the setting {source}", do="Tune it: vpd reproduce --tune."
        ) from error
