"""The experimental settings: the same task with other feedback, or from another base.

Eight are of tiny models and the task ``digits``; the last three of them were not used to design evidence-gated VPD, and
nothing is tuned on them: they use the learning rates of ``sparse``.  Seven are of a pretrained model and the task
``conventions``: one, four in which the text is changed and nothing else, one in which reward is not sparse, and one
whose notes stand where the base hardly reads them; nothing is tuned on the last six.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vpd.envs.digits import LENGTH
from vpd.errors import ConfigError, nearest
from vpd.lab import tiny

CRITIQUE = {
    "name": "self_critique",
    "template": tiny.critic_prompt("{task}", "{attempt}", "{verdict}"),
    "failed_verdict": "wrong",
    "passed_verdict": "right",
    "max_critique_length": 6,
}


@dataclass(frozen=True, kw_only=True)
class Warming:
    """How much a base is trained before a method begins: transcripts collected (``batch`` at a time), updates and rows
    of each, and learning rate.
    """

    tasks: int
    batch: int
    steps: int
    rows: int
    rate: float


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """On one idle core: of an iteration without distillation (``plain``) and with it, what an E-step adds, and of a
    warm-up.
    """

    plain: float
    distilling: float
    e_step: float = 0.0
    warming: float


@dataclass(frozen=True, kw_only=True)
class Family:
    """What all settings of one task share: sections of a configuration, and how much is sampled and evaluated.

    ``seconds``: by the number type of the weights, for answers of ``length`` tokens; where there are several types, a
    machine's faster one is used.  ``grid``: learning rates to choose from.  ``same_evaluation``: methods that read no
    feedback are evaluated with as many answers per task as the others; else with one, on more tasks.  ``forgetting``:
    other abilities are measured before and after training.  ``samples``: held-out answers that a run keeps from before
    and after training.  ``save_steps``: a run is saved every so many iterations and goes on from there (0: never, it is
    short).
    """

    env: str
    prompts: Mapping[str, Any]
    rollout: Mapping[str, Any]
    optim: Mapping[str, Any]
    seconds: Mapping[str, Seconds]
    grid: tuple[float, ...]
    warming: Warming
    length: int
    prompts_per_step: int
    eval_steps: int
    num_generations: int = 8
    same_evaluation: bool = False
    forgetting: bool = False
    samples: int = 0
    save_steps: int = 0

    @property
    def rollouts(self) -> int:
        """Answers of one iteration."""
        return self.prompts_per_step * self.num_generations


DIGITS = Family(
    env="digits",
    prompts=asdict(tiny.TEMPLATE),
    rollout={"max_rows": 512},
    optim={"weight_decay": 0.0, "micro_batch_size": 128},
    seconds={"float32": Seconds(plain=0.07, distilling=0.11, warming=12.0)},
    grid=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    warming=Warming(tasks=2048, batch=256, steps=60, rows=64, rate=3e-4),
    length=LENGTH,
    prompts_per_step=16,
    eval_steps=20,
)
CONVENTIONS = Family(
    env="conventions",
    prompts={"layout": "request"},
    rollout={"temperature": 0.6},
    optim={"warmup_steps": 3, "micro_batch_size": 64},
    seconds={
        "bfloat16": Seconds(plain=8.0, distilling=17.0, e_step=18.0, warming=300.0),
        # measured: plain, and the sum of distilling and e_step at the start of VPD with retries; the rest is computed
        "float32": Seconds(plain=35.0, distilling=70.0, e_step=60.0, warming=1200.0),
    },
    grid=(2e-5, 5e-5, 1e-4),
    warming=Warming(tasks=512, batch=64, steps=30, rows=16, rate=5e-5),
    length=32,
    prompts_per_step=8,
    eval_steps=40,
    same_evaluation=True,
    forgetting=True,
    samples=16,
    save_steps=5,
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """``env``, ``text`` and ``feedback`` are of a configuration; ``text`` are the environment's settings of feedback.

    A method that reads no feedback gets neither ``text`` nor ``feedback``.  ``tuned_as``: the setting whose learning
    rates are used (None: its own).  ``eval_samples``: answers per held-out task, 256 answers in all; feedback from
    siblings needs several per task.
    """

    name: str
    title: str
    base: str
    steps: int
    family: Family = DIGITS
    eval_samples: int = 1
    env: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    feedback: tuple[Any, ...] = ("environment",)
    tuned_as: str | None = None

    @property
    def length(self) -> int:
        """Tokens per answer."""
        return int(self.env.get("length", self.family.length))


CHANGE = 40  # ``changing``: feedback is wrong from this iteration on
TINY: dict[str, Setting] = {
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
            text={"hint": "empty"},
        ),
        Setting(name="cold", title="a base that cannot read feedback", base="tiny-cold", steps=60),
        Setting(
            name="noisy",
            title="as sparse, but feedback is wrong for 30 % of the tasks",
            base="tiny",
            steps=100,
            text={"wrong_share": 0.3},
            tuned_as="sparse",
        ),
        Setting(
            name="partial",
            title="as sparse, but feedback is informative for two letters of four and random for the others",
            base="tiny",
            steps=100,
            text={"helped_rules": "AB"},
            tuned_as="sparse",
        ),
        Setting(
            name="changing",
            title=f"answers of ten digits; feedback is right for {CHANGE} iterations and wrong from then on",
            base="tiny-long",
            steps=80,
            env={"length": 10},
            text={"wrong_from": CHANGE * DIGITS.prompts_per_step},
            tuned_as="sparse",
        ),
    )
}


def _conventions(
    name: str, title: str, *, family: Family = CONVENTIONS, env: Mapping[str, Any] | None = None, **text: Any
) -> Setting:
    return Setting(
        name=name,
        title=title,
        base=PRETRAINED_BASE,
        steps=40,
        family=family,
        eval_samples=8,
        env=env or {},
        text=text,
        tuned_as=None if name == "conventions" else "conventions",
    )


THEMES = {"kinds": ("theme",)}
IN_BLOCK = replace(CONVENTIONS, prompts={"layout": "block"})  # where SmolLM2-135M hardly reads a note


PRETRAINED_BASE = "smollm2-135m"
PRETRAINED: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        _conventions("conventions", "SmolLM2-135M and clients' conventions that only the reviewer's notes name"),
        _conventions(
            "conventions_noisy", "as conventions, but three notes in ten name another client's", wrong_share=0.3
        ),
        _conventions("conventions_shuffled", "as conventions, but all notes name another client's", wrong_share=1.0),
        _conventions("conventions_verdict", "as conventions, but notes are verdicts alone", notes="verdict"),
        _conventions("conventions_silent", "as conventions, without notes", notes="none"),
        _conventions(
            "conventions_themes",
            "reward is not sparse: clients want themes that the model's sentences often speak of anyway",
            env=THEMES,
        ),
        _conventions(
            "conventions_cold",
            "as conventions_themes, but notes stand in a block of their own, where the base hardly reads them",
            env=THEMES,
            family=IN_BLOCK,
        ),
    )
}
SETTINGS = {**TINY, **PRETRAINED}


def find_setting(name: str) -> Setting:
    """A setting by its name.  Raises ConfigError."""
    if name not in SETTINGS:
        raise ConfigError(f"unknown setting {name!r}", do=nearest(name, SETTINGS))
    return SETTINGS[name]
