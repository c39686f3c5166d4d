"""The eight experimental settings: the same task with other feedback, or from another base.

The last three were not used to design evidence-gated VPD, and nothing is tuned on them: they use the learning rates of
``sparse``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vpd.envs.digits import LENGTH
from vpd.errors import ConfigError, nearest
from vpd.lab import tiny

PROMPTS_PER_STEP = 16
GENERATIONS = 8
CRITIQUE = {
    "name": "self_critique",
    "template": tiny.critic_prompt("{task}", "{attempt}", "{verdict}"),
    "failed_verdict": "wrong",
    "passed_verdict": "right",
    "max_critique_length": 6,
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """``env`` and ``feedback`` are sections of a configuration; ``steps`` iterations of 128 rollouts each.

    ``tuned_as``: the setting whose learning rates are used (None: its own).  ``eval_samples``: answers per held-out
    task, 256 answers in all; feedback from siblings needs several per task.
    """

    name: str
    title: str
    base: str
    steps: int
    eval_samples: int = 1
    env: Mapping[str, Any] = field(default_factory=dict)
    feedback: tuple[Any, ...] = ("environment",)
    tuned_as: str | None = None

    @property
    def length(self) -> int:
        """Tokens per answer."""
        return int(self.env.get("length", LENGTH))


CHANGE = 40  # ``changing``: feedback is wrong from this iteration on
SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting(
            name="sparse",
            title="sparse reward (one answer in a thousand is right), feedback that names the operation",
            base="tiny",
            steps=100,
        ),
        Setting(
            name="sibling",
            title="the only feedback is a right answer of the same group",
            base="tiny-mid",
            steps=60,
            feedback=("sibling",),
            eval_samples=4,
        ),
        Setting(
            name="self_critique",
            title="the model's own critique, which names the true operation six times in ten",
            base="tiny-mid",
            steps=60,
            feedback=(CRITIQUE,),
        ),
        Setting(
            name="rigid",
            title="the verdict alone, as in mathematics: feedback names no operation",
            base="tiny-mid",
            steps=60,
            env={"hint": "empty"},
        ),
        Setting(name="cold", title="a base that cannot read feedback", base="tiny-cold", steps=60),
        Setting(
            name="noisy",
            title="as sparse, but feedback is wrong for 30 % of the tasks",
            base="tiny",
            steps=100,
            env={"wrong_share": 0.3},
            tuned_as="sparse",
        ),
        Setting(
            name="partial",
            title="as sparse, but feedback is informative for two letters of four and random for the others",
            base="tiny",
            steps=100,
            env={"helped_rules": "AB"},
            tuned_as="sparse",
        ),
        Setting(
            name="changing",
            title=f"answers of ten digits; feedback is right for {CHANGE} iterations and wrong from then on",
            base="tiny-long",
            steps=80,
            env={"length": 10, "wrong_from": CHANGE * PROMPTS_PER_STEP},
            tuned_as="sparse",
        ),
    )
}


def find_setting(name: str) -> Setting:
    """A setting by its name.  Raises ConfigError."""
    if name not in SETTINGS:
        raise ConfigError(f"unknown setting {name!r}", do=nearest(name, SETTINGS))
    return SETTINGS[name]
