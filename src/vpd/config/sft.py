"""The settings of ``vpd sft``: those of ``vpd train``, with recorded answers in the place of an environment."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpd.config import Config, mapping, merged_data, of_another, pairs_of, parse
from vpd.config.recorded import over_recorded
from vpd.run_folder import state as run_state
from vpd.settings import expand_path

FROM_THE_RUN = ("model", "prompts")


def load_sft(data: str, files: str | Sequence[str] | None, overrides: Sequence[str]) -> Config:
    """Files and ``--section.key value`` pairs as the config of a supervised run on the records of ``data``.

    Raises ConfigError, and StorageError for a run that cannot be read.
    """
    given = on_answers(merged_data(files, pairs_of(overrides)), expand_path(data, "DATA"))
    return parse(over_recorded(given))


def on_answers(given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Sections of settings as those of a supervised run on recorded answers.

    An environment that they name becomes ``env.fresh``, which is evaluated on; where ``path`` is a run folder, its
    model and environment are taken where no other is given.
    """
    before = _settings_of(Path(path))
    data = {**{name: before[name] for name in FROM_THE_RUN if before.get(name)}, **given}
    env = dict(mapping(given, "env"))
    if env.get("name", "recorded") != "recorded":
        env = {"fresh": env}
    if "fresh" not in env and (fresh := _fresh_of(before)) is not None:
        env["fresh"] = fresh
    data["env"] = {"only": "success", **env, "name": "recorded", "path": path}
    algorithm = dict(mapping(given, "algorithm"))
    kept = of_another("algorithm", algorithm, "sft") if "name" in algorithm else algorithm
    data["algorithm"] = {**kept, "name": "sft"}
    return data


def _settings_of(folder: Path) -> Mapping[str, Any]:
    """The settings of the run in a folder; of no run none."""
    found = run_state.read(folder)
    settings = {} if found is None else dict(found.settings)
    if str(settings.get("model", {}).get("name_or_path", "")).startswith("(object)"):
        del settings["model"]
    return settings


def _fresh_of(settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The environment of a run, None where it was an object of Python's or has no tasks of its own."""
    env = settings.get("env", {})
    if env.get("name") == "recorded":
        env = env.get("fresh") or {}
    return env if "name" in env else None
