"""Eight worlds for the same task: what is told after a wrong answer, and what the base already knows.

The last three were not used to design the gated method, and nothing is tuned on them: rates are those of ``sparse``.
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
    "template": tiny.critic_of("{task}", "{attempt}", "{verdict}"),
    "failed_verdict": "wrong",
    "passed_verdict": "right",
    "max_critique_length": 6,
}


@dataclass(frozen=True, kw_only=True)
class Regime:
    """``env`` and ``feedback`` are sections of a configuration; ``steps`` iterations of 128 rollouts each.

    ``tuned_as``: the regime whose learning rates are used (None: its own).  ``eval_samples``: answers to each held-out
    task, always 256 in all; a sibling needs several.
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
        """Tokens of an answer."""
        return int(self.env.get("length", LENGTH))


CHANGE = 40  # the iteration from which ``changing`` tells wrong things
REGIMES: dict[str, Regime] = {
    regime.name: regime
    for regime in (
        Regime(
            name="sparse",
            title="sparse reward (one answer in a thousand is right), text that names the operation",
            base="tiny",
            steps=100,
        ),
        Regime(
            name="sibling",
            title="a right answer of the same group is all that is shown",
            base="tiny-mid",
            steps=60,
            feedback=("sibling",),
            eval_samples=4,
        ),
        Regime(
            name="self_critique",
            title="the model criticises itself, and names the true operation six times in ten",
            base="tiny-mid",
            steps=60,
            feedback=(CRITIQUE,),
        ),
        Regime(
            name="rigid",
            title="right or wrong and nothing else, as in mathematics: the text names nothing",
            base="tiny-mid",
            steps=60,
            env={"hint": "empty"},
        ),
        Regime(name="cold", title="a base that cannot read the text", base="tiny-cold", steps=60),
        Regime(
            name="noisy",
            title="as sparse, but the text is wrong for 30 % of the tasks",
            base="tiny",
            steps=100,
            env={"wrong_share": 0.3},
            tuned_as="sparse",
        ),
        Regime(
            name="partial",
            title="as sparse, but the text is informative for two letters of four and random for the others",
            base="tiny",
            steps=100,
            env={"helped_rules": "AB"},
            tuned_as="sparse",
        ),
        Regime(
            name="changing",
            title=f"answers of ten digits; the text is right for {CHANGE} iterations and wrong from then on",
            base="tiny-long",
            steps=80,
            env={"length": 10, "wrong_from": CHANGE * PROMPTS_PER_STEP},
            tuned_as="sparse",
        ),
    )
}


def regime(name: str) -> Regime:
    """A regime by its name.  Raises ConfigError."""
    if name not in REGIMES:
        raise ConfigError(f"unknown regime {name!r}", do=nearest(name, REGIMES))
    return REGIMES[name]
