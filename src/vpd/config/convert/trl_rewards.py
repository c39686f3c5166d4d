"""TRL's reward functions and their weights."""

import re
from typing import Any

from vpd.config.convert import Foreign, Outcome, ignored, impossible, mapped
from vpd.config.elsewhere import ABSENT

PLACE = re.compile(r".+\.py:\w+|[A-Za-z_]\w*(\.\w+)*[.:][A-Za-z_]\w*")
OWN_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
BOXED = (
    r"the environment math compares by math-verify too, but reads an answer in \boxed{} alone, where TRL reads one"
    " anywhere: the prompt must ask for it, or env.ask does"
)


def rewards(value: Any, f: Foreign) -> Outcome:
    names = [value] if isinstance(value, str) else list(value or ())
    if not names:
        return ignored("none is named")
    if names == ["accuracy_reward"]:
        return impossible(BOXED, env__name="math", env__ask="")
    if any(not PLACE.fullmatch(name) and name not in OWN_REWARDS for name in names):
        models = [name for name in names if "/" in name and not PLACE.fullmatch(name)]
        return impossible(
            f"{ABSENT['reward_model_name_or_path']}: set env.reward to one"
            if models
            else "a reward function is named by its place; set env.reward to my_rewards.py:function"
        )
    shares = f["reward_weights"] or [1.0] * len(names)
    if len(shares) != len(names):
        return impossible(
            f"{len(names)} functions and {len(shares)} weights: set env.reward [{{function, weight}}, ...]"
        )
    entries = [{"function": _place(name), "weight": float(weight)} for name, weight in zip(names, shares, strict=True)]
    reward: Any = entries[0]["function"] if len(entries) == 1 and entries[0]["weight"] == 1 else entries
    why = "a function may also return (reward, feedback)"
    if any(".py:" in name for name in names):
        why += "; the file is loaded for it, so it should hold functions and start nothing"
    return mapped(why, env__name="dataset", env__reward=reward)


def _place(name: str) -> str:
    """``a.b.function`` as ``a.b:function``; TRL's own by the module that has them."""
    if name in OWN_REWARDS:
        return f"trl.rewards:{name}"
    return name if ":" in name else ":".join(name.rsplit(".", 1))


def weights(value: Any, f: Foreign) -> Outcome:
    if not value:
        return ignored("each weighs 1")
    return (
        ignored("taken over with reward_funcs")
        if f["reward_funcs"]
        else impossible("the functions are not in the file: env.reward [{function, weight}, ...]")
    )
