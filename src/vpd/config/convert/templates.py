"""The teacher's prompt of SDPO's configurations (TRL's and the authors') as the section ``prompts``."""

from typing import Any

from vpd.config.convert import Foreign, Outcome, Rule, impossible, mapped


def header(place: str, placeholder: str) -> Rule:
    """``solution_template`` and ``feedback_template``: what stands before the placeholder."""

    def rule(value: Any, foreign: Foreign) -> Outcome:
        before, found, after = str(value).partition(f"{{{placeholder}}}")
        if not found or after.strip():
            return impossible(f"{place} is a text above the {placeholder}; there is none below it")
        return Outcome(verdict="mapped", settings={place: before})

    return rule


def reprompt(value: Any, foreign: Foreign) -> Outcome:
    """``reprompt_template``: prompt, demonstration and feedback stand in this order, and a closing text after them."""
    before, found, after = str(value).partition("{prompt}{solution}{feedback}")
    if before.strip() or not found:
        return impossible("the task comes first, then demonstration, feedback and prompts.closing")
    return mapped(prompts__closing=after)


def reprompt_length(value: Any, foreign: Foreign) -> Outcome:
    return mapped(
        "half of it for each; the task is never cut",
        prompts__max_demonstration_length=max(value // 2, 1),
        prompts__max_feedback_length=max(value // 2, 1),
    )


def own_success(value: Any, foreign: Foreign) -> Outcome:
    if value:
        return Outcome(verdict="ignored", why="as here: an attempt is never its own demonstration")
    return impossible("an attempt is never its own demonstration")


def sources(environment: Any, sibling: Any, *, remove_thinking: Any) -> list[Any]:
    """The feedback sources that the switches ask for."""
    demonstration = "sibling" if remove_thinking else {"name": "sibling", "remove_thinking": False}
    return [*(["environment"] if environment else []), *([demonstration] if sibling else [])]


def without_solution(value: Any, environment: Any) -> Outcome:
    """``environment_feedback_only_without_solution``, which matters where the environment is read."""
    if not environment:
        return Outcome(verdict="ignored", why="the environment's feedback is not read")
    return mapped(prompts__feedback_with_demonstration=not value)
