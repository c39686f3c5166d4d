"""The pages about Python: every public name, with its docstring."""

import vpd

#: Pages with their title, an introduction and the names on them; together they hold all of ``vpd.__all__``.
PAGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "run": (
        "Train, evaluate, runs",
        "[From Python](../python.md) shows them at work.",
        (
            "train",
            "evaluate",
            "Run",
            "EvalOptions",
            "Evaluation",
            "load_config",
            "parse_config",
            "Config",
            "assemble",
            "Parts",
        ),
    ),
    "data": (
        "Tasks, attempts, groups",
        "What flows down the loop. Each stage makes a new, frozen object.",
        ("Task", "Message", "Completion", "Grade", "Section", "Rollout", "Group", "Example", "Metrics"),
    ),
    "parts": (
        "Parts of your own",
        "What an environment, a feedback source, a method, an engine, an observer has. [Your own task](../own_task.md)"
        " and [other parts of your own](../extending.md) have examples in full.",
        (
            *("Env", "per_row", "check_env", "Feedback", "Writer", "extend", "Algorithm", "Needs", "Settings"),
            *("Engine", "EngineParts", "Observer"),
        ),
    ),
    "errors": (
        "Errors",
        "Each is one line: what, got, expected, what to do.",
        (
            *("VPDError", "ConfigError", "DataError", "EnvError", "FeedbackError", "ModelError", "SandboxError"),
            *("StorageError", "TrainingError"),
        ),
    ),
}
#: Where a docstring alone does not say what there is.
MORE = {"Env": "inherited_members: true", "Message": "show_if_no_docstring: true"}
#: Modules that a method of your own is built from: all that is public in them.
MODULES = {
    "losses": ("Losses", "vpd.losses"),
    "weighting": ("Weights of rows", "vpd.algorithms.weighting"),
    "examples": ("Rows of an update", "vpd.algorithms.examples"),
    "learner": ("Learner", "vpd.learners"),
}


def pages() -> dict[str, str]:
    """Markdown of every page, by its path in the site."""
    named = {name for _, _, names in PAGES.values() for name in names}
    if named != set(vpd.__all__):
        raise ValueError(f"website/python_pages.py does not list vpd.__all__: {sorted(named ^ set(vpd.__all__))}")
    found = {f"api/{page}.md": _page(*content) for page, content in PAGES.items()}
    return found | {f"api/{page}.md": f"# {title}\n\n::: {module}\n" for page, (title, module) in MODULES.items()}


def anchors() -> dict[str, str]:
    """The place ``page#anchor`` of every public name."""
    return {f"vpd.{name}": f"api/{page}.html#vpd.{name}" for page, (_, _, names) in PAGES.items() for name in names}


def _page(title: str, about: str, names: tuple[str, ...]) -> str:
    return "\n\n".join([f"# {title}", about, *map(_block, names)]) + "\n"


def _block(name: str) -> str:
    options = ["heading_level: 2", *([MORE[name]] if name in MORE else [])]
    return "\n      ".join([f"::: vpd.{name}\n    options:", *options])
