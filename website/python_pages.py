"""The pages about Python: every public name, with its docstring."""

import vpd

#: Pages with their title, an introduction and the names on them, in the order of a reader.
PAGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "run": (
        "Train, evaluate, solve, runs",
        "[From Python](../python.md) shows them at work.",
        (
            "train",
            "evaluate",
            "sft",
            "collect",
            "solve",
            "Run",
            "EvalOptions",
            "Evaluation",
            "SolveOptions",
            "Solution",
            "Try",
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
    found = {f"api/{page}.md": _page(title, about, _names(page)) for page, (title, about, _) in PAGES.items()}
    return found | {f"api/{page}.md": f"# {title}\n\n::: {module}\n" for page, (title, module) in MODULES.items()}


def navigation() -> list[str]:
    """The entries of the navigation."""
    return [f"api/{page}.md" for page in (*PAGES, *MODULES)]


def anchors() -> dict[str, str]:
    """The place ``page#anchor`` of every public name."""
    return {f"vpd.{name}": f"api/{page}.html#vpd.{name}" for page in PAGES for name in _names(page)}


def _names(page: str) -> tuple[str, ...]:
    """The names on a page; the first one also has those that no page lists."""
    listed = {name for _, _, names in PAGES.values() for name in names}
    others = [name for name in vpd.__all__ if name not in listed] if page == next(iter(PAGES)) else []
    return (*PAGES[page][2], *others)


def _page(title: str, about: str, names: tuple[str, ...]) -> str:
    return "\n\n".join([f"# {title}", about, *map(_block, names)]) + "\n"


def _block(name: str) -> str:
    options = ["heading_level: 2", *([MORE[name]] if name in MORE else [])]
    return "\n      ".join([f"::: vpd.{name}\n    options:", *options])
