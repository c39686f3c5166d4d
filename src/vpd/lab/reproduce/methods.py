"""All methods and ablations, each as the ``algorithm`` section of a configuration.

Every method samples as many answers and has a learning rate of its own, chosen from one grid on other seeds
(rates.yaml).  A method with retries samples half as many attempts, and at most one retry for each; where no rate was
tuned for it, it has the rate of the method without retries; likewise F = 1 without a rate has that of F = 5.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vpd.errors import ConfigError, nearest
from vpd.lab.reproduce.settings_table import SETTINGS

Entry = TypeVar("Entry")
RATES = Path(__file__).with_name("rates.yaml")
JUDGE = {"name": "judge", "judge": "reward", "max_pairs": 24}


@dataclass(frozen=True, kw_only=True)
class Method:
    """``reads_feedback``: False for a method that learns without it, from the reward or from an external teacher.

    ``retries``: half of its answers are the teacher's retries.  ``feedback``: its own sources in the place of the
    setting's.  ``warmup``: what the base is trained with before (:mod:`vpd.lab.reproduce.warmups`), ``dynamics``: that
    section of the run that follows.
    ``tuned_as``: the method whose learning rate an ablation uses where the table has none of its own.
    """

    name: str
    title: str
    algorithm: Mapping[str, Any]
    feedback: tuple[Any, ...] | None = None
    retries: bool = False
    warmup: str | None = None
    dynamics: Mapping[str, Any] = field(default_factory=dict)
    reads_feedback: bool = True
    tuned_as: str | None = None

    @property
    def samples(self) -> bool:
        """Whether it answers training tasks itself, so that they say how good it is."""
        return bool(self.algorithm.get("student_fraction", 1.0))


IMITATE = {"name": "sdpo", "distillation_weight": 0.0}
WARMED = {"grpo": "GRPO", "vpd": "VPD"}


def _after(warmup: str, title: str) -> tuple[Method, ...]:
    """Each method from a base that was warmed up, at the method's own rate."""
    retries = Method(
        name=f"{warmup}_imitate",
        title=f"{title}, then revise and imitate",
        algorithm=IMITATE,
        retries=True,
        warmup=warmup,
        tuned_as="imitate",
    )
    return retries, *(
        Method(
            name=f"{warmup}_{name}",
            title=f"{title}, then {method}",
            algorithm={"name": name},
            reads_feedback=name != "grpo",
            warmup=warmup,
            tuned_as=name,
        )
        for name, method in WARMED.items()
    )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *_after("ldd", "LDD"),
        *_after("sft", "supervised warm-up"),
        Method(
            name="ldd_vpd_tied",
            title="LDD, then VPD with the auxiliary term",
            algorithm={"name": "vpd"},
            warmup="ldd",
            dynamics={"weight": 0.1},
            tuned_as="vpd",
        ),
        Method(name="grpo", title="GRPO", algorithm={"name": "grpo"}, reads_feedback=False),
        Method(name="sdpo", title="SDPO (EMA teacher)", algorithm={"name": "sdpo"}),
        Method(
            name="sdpo_live", title="SDPO, live teacher", algorithm={"name": "sdpo", "teacher": "live"}, tuned_as="sdpo"
        ),
        Method(
            name="sdpo_forward",
            title="SDPO, forward KL",
            algorithm={"name": "sdpo", "distillation_alpha": 0.0},
            tuned_as="sdpo",
        ),
        Method(name="vpd", title="VPD, F = 5", algorithm={"name": "vpd"}),
        Method(name="vpd_f1", title="VPD, F = 1", algorithm={"name": "vpd", "e_every": 1}, tuned_as="vpd"),
        Method(name="vpd_no_e", title="VPD, no E-step", algorithm={"name": "vpd", "e_every": None}, tuned_as="vpd_f1"),
        Method(name="vpd_f10", title="VPD, F = 10", algorithm={"name": "vpd", "e_every": 10}, tuned_as="vpd"),
        Method(name="vpd_fixed", title="VPD, fixed prior", algorithm={"name": "vpd", "prior": "fixed"}, tuned_as="vpd"),
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
            name="gated_f1",
            title="evidence-gated VPD, F = 1",
            algorithm={"name": "gated", "e_every": 1},
            tuned_as="gated",
        ),
        Method(
            name="gated_no_e",
            title="evidence-gated VPD, no E-step",
            algorithm={"name": "gated", "e_every": None},
            tuned_as="gated",
        ),
        Method(
            name="imitate",
            title="revise and imitate",
            algorithm=IMITATE,
            retries=True,
            tuned_as="vpd",
        ),
        Method(
            name="retries_pg",
            title="policy gradient on attempts and retries",
            algorithm={"name": "sdpo", "distillation_weight": 0.0, "retry_loss": "policy_gradient"},
            retries=True,
            tuned_as="vpd",
        ),
        Method(
            name="retries_kl",
            title="forward KL on retries",
            algorithm={"name": "sdpo", "distillation_weight": 0.0, "retry_loss": "forward_kl"},
            retries=True,
            tuned_as="vpd",
        ),
        Method(name="vpd_retries", title="VPD with retries", algorithm={"name": "vpd"}, retries=True, tuned_as="vpd"),
        Method(
            name="vpd_retries_no_e",
            title="VPD with retries, no E-step",
            algorithm={"name": "vpd", "e_every": None},
            retries=True,
            tuned_as="vpd",
        ),
        Method(
            name="vpd_retries_f1",
            title="VPD with retries, F = 1",
            algorithm={"name": "vpd", "e_every": 1},
            retries=True,
            tuned_as="vpd_f1",
        ),
        Method(
            name="gated_retries",
            title="evidence-gated VPD with retries",
            algorithm={"name": "gated"},
            retries=True,
            tuned_as="gated",
        ),
        Method(
            name="gated_retries_f1",
            title="evidence-gated VPD with retries, F = 1",
            algorithm={"name": "gated", "e_every": 1},
            retries=True,
            tuned_as="gated_f1",
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
    "ldd_vpd",
    "sft_vpd",
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


def has_own_rate(name: str) -> bool:
    """Whether a method never uses another's learning rate.  Raises ConfigError for an unknown name."""
    return find_method(name).tuned_as is None


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
    return entry_of(rates, setting, name)


def entry_of(table: Mapping[str, Mapping[str, Entry]], setting: str, name: str) -> Entry:
    """What a table of rates has for a method in a setting: its own entry, else that of the method it is tuned as."""
    source = SETTINGS[setting].tuned_as or setting
    here = table.get(source, {})
    while name not in here:
        tuned = find_method(name).tuned_as
        if tuned is None:
            raise ConfigError(
                f"no learning rate for {name} in the setting {source}", do="Tune it: vpd reproduce --tune."
            )
        name = tuned
    return here[name]
