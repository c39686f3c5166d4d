"""Rules for what TRL and verl have alike: vLLM, trackers, and the arguments of a chat template."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

from vpd.config.convert import Foreign, Outcome, Rule, ignored, impossible, mapped, only_where
from vpd.config.run_settings import Tracker

Condition = Callable[[Foreign], bool]

TRACKERS: tuple[str, ...] = get_args(Tracker)
SAMPLER = "how answers are computed, not from which distribution they are sampled"
WITHOUT_VLLM = "of vLLM, which this run goes without"
SERVER = "as a server of its own, which vpd serve starts before vpd train (docs/vllm.md)"
BOUND = "the method's own bounds the ratio: algorithm.importance_clip, or clip_low and clip_high"


def vllm() -> Outcome:
    return mapped(SERVER, engine__name="vllm")


def of_vllm(uses_vllm: Condition, rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """Rules for keys that nothing but vLLM reads."""
    return {key: only_where(uses_vllm, WITHOUT_VLLM, rule) for key, rule in rules.items()}


def server_arguments(options: Mapping[str, str]) -> dict[str, Rule]:
    """Keys that are options of vLLM's command line; together they are the list ``engine.server_args``."""

    def rule(value: Any, foreign: Foreign) -> Outcome:
        given = {option: foreign[key] for key, option in options.items() if foreign[key] is not None}
        return mapped(engine__server_args=[f"--{option}={value}" for option, value in given.items()])

    return dict.fromkeys(options, rule)


def context(value: Any, foreign: Foreign) -> Outcome:
    """The longest row that the server takes."""
    return ignored("none") if value is None else mapped(engine__max_model_len=value)


def correction(value: Any, foreign: Foreign) -> Outcome:
    """Whether the importance ratio is against the log-probs that the server gave."""
    if value:
        return ignored("as here: with engine.name vllm algorithm.importance_reference is sampler")
    return mapped(algorithm__importance_reference="own")


def trackers(*without: str, why: str = "") -> Rule:
    """The trackers of ``run.report_to``; the names ``without`` stand for none."""

    def rule(value: Any, foreign: Foreign) -> Outcome:
        names = [value] if isinstance(value, str) else list(value or ())
        known = [name for name in names if name in TRACKERS]
        if set(names) - {*TRACKERS, *without}:
            return impossible(f"the trackers are {', '.join(TRACKERS)}", run__report_to=known)
        return mapped(why, run__report_to=known)

    return rule


def template_arguments(value: Any, foreign: Foreign) -> Outcome:
    if not value:
        return ignored("none")
    if isinstance(value, Mapping) and set(value) == {"enable_thinking"}:
        return mapped(prompts__enable_thinking=bool(value["enable_thinking"]))
    return impossible("of a template's arguments enable_thinking alone can be given")
