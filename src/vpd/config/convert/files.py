"""The files that other libraries are configured by, as flat keys: YAML or JSON, a shell script of Hydra overrides, and
a Python script (:mod:`vpd.config.convert.script`).  Nothing of them is executed.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vpd.config.convert import Dialect, trl, verl
from vpd.config.convert.script import read_script
from vpd.config.convert.shell import read_shell
from vpd.config.convert.verl_rules import SELF
from vpd.config.reading import read_file, read_value
from vpd.errors import ConfigError

DIALECTS: Mapping[str, Dialect] = {
    "trl-sdpo": trl.SDPO,
    "trl-grpo": trl.GRPO,
    "trl-gkd": trl.GKD,
    "verl": verl.VERL,
    "sdpo": verl.SDPO,
}
NESTED = ("actor_rollout_ref", "trainer", "data", "algorithm", "critic", "custom_reward_function")
WHOLE = ("apply_chat_template_kwargs", "chat_template_kwargs")  # keys whose mapping is their value
REFERENCE = re.compile(r"\$\{(?:oc\.select:\s*)?([\w.]+)(?:\s*,\s*([^{}]*))?\}")
ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*(\w+)(?:\s*,[^{}]*)?\}")


def read(path: Path, dialect: str | None) -> tuple[Dialect, dict[str, Any]]:
    """The library and its settings by flat keys.  Raises ConfigError for a file that is none of any."""
    if path.suffix == ".py":
        found = read_script(path, dialect)
        chosen = DIALECTS[found.dialect]
        return replace(chosen, defaults={**chosen.defaults, **found.defaults}), dict(found.flat)
    if path.suffix in (".sh", ".bash"):
        flat = read_shell(path)
    else:
        data = read_file(str(path))
        nested = any(isinstance(data.get(section), Mapping) for section in NESTED)
        flat = _resolved(dict(_flattened(data))) if nested or dialect in ("verl", "sdpo") else data
    return DIALECTS[dialect or _recognized(flat, path)], flat


def _recognized(flat: Mapping[str, Any], path: Path) -> str:
    if any(key.startswith(SELF) or value == "sdpo" for key, value in flat.items()):
        return "sdpo"
    if any(key.partition(".")[0] in NESTED and "." in key for key in flat):
        return "verl"
    if flat.keys() & {"lmbda", "teacher_model_name_or_path", "seq_kd"}:
        return "trl-gkd"
    if flat.keys() & (
        trl.SDPO.defaults.keys() - trl.GRPO.defaults.keys() | {"distillation_topk", "teacher_sync_steps"}
    ):
        return "trl-sdpo"
    if flat.keys() & {"reward_funcs", "num_generations", "epsilon", "epsilon_high", "scale_rewards", "loss_type"}:
        return "trl-grpo"
    raise ConfigError(
        f"{path} is not recognized as the configuration of another library",
        got=", ".join(map(str, flat))[:120] or "nothing",
        expected=", ".join(DIALECTS),
        do="Give --from.",
    )


def _flattened(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value and key not in WHOLE:
            yield from _flattened(value, f"{prefix}{key}.")
        elif key != "_target_":
            yield f"{prefix}{key}", value


def _resolved(flat: dict[str, Any]) -> dict[str, Any]:
    """Hydra's ``${key}`` and ``${oc.select:key,default}`` by their values, ``${oc.env:NAME}`` as ``${NAME}``."""

    def value_of(value: Any, depth: int = 0) -> Any:
        if isinstance(value, list):
            return [value_of(entry, depth) for entry in value]
        if not isinstance(value, str) or "${" not in value or depth > 8:
            return value
        whole = REFERENCE.fullmatch(value.strip())
        if whole and whole[1] in flat:
            return value_of(flat[whole[1]], depth + 1)
        if whole and whole[2] is not None:
            return read_value(whole[2], whole[1])
        text = REFERENCE.sub(lambda m: str(value_of(flat.get(m[1], m[0]), depth + 1)), value)
        return ENVIRONMENT.sub(r"${\1}", text)

    return {key: value_of(value) for key, value in flat.items()}


def is_settings(path: Path) -> bool:
    """Whether a file holds settings and no data; a JSON object is settings, anything else in JSON is data."""
    if path.suffix != ".json":
        return path.suffix in (".yaml", ".yml", ".py", ".sh", ".bash")
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except (OSError, ValueError):
        return False
