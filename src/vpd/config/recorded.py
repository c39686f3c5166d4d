"""What a continued run starts from: the settings that the run itself has recorded in its folder."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpd.config.run_settings import RunSettings
from vpd.config.sections import CHOICES, PLAIN, build, known_keys, settings_class
from vpd.run_folder import state as run_state

LOG = logging.getLogger("vpd")


def over_recorded(data: Mapping[str, Any]) -> dict[str, Any]:
    """``data``, and with ``run.resume`` the settings of the run in ``run.output_dir`` for what it does not say.

    Without a run there it is ``data`` alone.  A section that chooses another part than the run's is taken as it is, and
    compared later.  Raises ConfigError for these two settings, StorageError for a damaged ``run.json``.
    """
    given = data.get("run")
    given = given if isinstance(given, Mapping) else {}
    run = build(RunSettings, {key: given[key] for key in ("resume", "output_dir") if key in given}, "run")
    folder = Path(run.output_dir)
    state = run_state.read(folder) if run.resume else None
    if state is None:
        return dict(data)
    sections = {name: section for name, section in state.settings.items() if name in PLAIN or name in CHOICES}
    settings = {name: _known(name, section) for name, section in sections.items()}
    settings["run"] = {**settings.get("run", {}), "output_dir": str(folder)}
    return {
        name: over(settings.get(name), data[name]) if name in data else settings[name] for name in {**settings, **data}
    }


def over(below: Any, above: Any) -> Any:
    """``above``, and where both are mappings of one part what ``below`` says besides."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    if "name" in above and above["name"] != below.get("name"):
        return above
    return {**below, **{key: over(below.get(key), value) for key, value in above.items()}}


def _known(name: str, section: Any) -> Any:
    """A recorded section without the settings that this version does not have."""
    if not isinstance(section, Mapping) or "object" in section:
        return section
    if name in PLAIN:
        known = {field.name for field in dataclasses.fields(settings_class(PLAIN[name])) if field.init}
    elif name in CHOICES and section.get("name") in CHOICES[name].table:
        known = {"name", *(known_keys(name, section["name"]) or ())}
    else:
        return section
    gone = [key for key in section if key not in known]
    if gone:
        LOG.warning("this version has no setting %s: left out", ", ".join(f"{name}.{key}" for key in gone))
    return {key: value for key, value in section.items() if key in known}
