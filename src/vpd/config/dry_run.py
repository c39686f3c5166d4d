"""The section ``dry_run``: it says what to assume of a machine, and is no part of a run's settings."""

from collections.abc import Sequence

from vpd.config import mapping, pairs_of, read_files
from vpd.config.sections import BESIDE, build, settings_class
from vpd.errors import ConfigError
from vpd.estimate.settings import DryRunSettings
from vpd.settings import split_words

NAME = "dry_run"


def load_dry_run(
    paths: Sequence[str] | None, overrides: Sequence[str], *, wanted: bool
) -> tuple[DryRunSettings, list[str]]:
    """The section of the files and of ``--dry_run.key value``, and the other words of the command line.

    Raises ConfigError, also where such words stand and no dry run is ``wanted``: they would train.
    """
    own, others = split_words(overrides, lambda key: key.startswith(f"--{NAME}."))
    if own and not wanted:
        raise ConfigError(f"{own[0]} says what a dry run assumes, and none is asked for", do="Add --dry_run.")
    if not wanted:
        return DryRunSettings(), others
    data = {**mapping(read_files(paths), NAME)}
    data |= {key.removeprefix(f"{NAME}."): value for key, value in pairs_of(own)}
    settings: DryRunSettings = build(settings_class(BESIDE[NAME]), data, NAME)
    return settings, others
