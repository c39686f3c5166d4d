"""vpd: post-train language models from language feedback (arXiv 2605.15113).

    import vpd

    run = vpd.train("Qwen/Qwen3-0.6B", tasks, grade, algorithm="gated", run={"output_dir": "out"})
    run = vpd.train(vpd.load_config("run.yaml"))

Everything in ``__all__`` is loaded when it is first asked for, so ``import vpd`` needs no torch.  The reading order of
the code is the order of the data: types, prompts, engines, envs, feedback, algorithms, loop.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to others; before torch

if TYPE_CHECKING:
    from vpd.algorithms import Algorithm, Needs
    from vpd.api.collect import collect
    from vpd.api.entry import evaluate, train
    from vpd.api.runs import Run
    from vpd.api.sft import sft
    from vpd.api.solve import solve
    from vpd.config import Config
    from vpd.config import load as load_config
    from vpd.config import parse as parse_config
    from vpd.engines import Engine
    from vpd.engines.settings import EngineParts
    from vpd.envs import Env, per_row
    from vpd.envs.check import check_env
    from vpd.errors import (
        ConfigError,
        DataError,
        EnvError,
        FeedbackError,
        ModelError,
        SandboxError,
        StorageError,
        TrainingError,
        VPDError,
    )
    from vpd.evaluation import EvalOptions, Evaluation
    from vpd.feedback import Feedback, Writer, extend
    from vpd.loop import Observer
    from vpd.recipes.assemble import Parts, assemble
    from vpd.recipes.solve import Solution
    from vpd.settings import Settings
    from vpd.solving import SolveOptions, Try
    from vpd.types import Completion, Example, Grade, Group, Message, Metrics, Rollout, Section, Task

__version__ = "0.1.0"

__all__ = [
    "Algorithm",
    "Completion",
    "Config",
    "ConfigError",
    "DataError",
    "Engine",
    "EngineParts",
    "Env",
    "EnvError",
    "EvalOptions",
    "Evaluation",
    "Example",
    "Feedback",
    "FeedbackError",
    "Grade",
    "Group",
    "Message",
    "Metrics",
    "ModelError",
    "Needs",
    "Observer",
    "Parts",
    "Rollout",
    "Run",
    "SandboxError",
    "Section",
    "Settings",
    "Solution",
    "SolveOptions",
    "StorageError",
    "Task",
    "TrainingError",
    "Try",
    "VPDError",
    "Writer",
    "assemble",
    "check_env",
    "collect",
    "evaluate",
    "extend",
    "load_config",
    "parse_config",
    "per_row",
    "sft",
    "solve",
    "train",
]

_MODULES = {
    "vpd.algorithms": ("Algorithm", "Needs"),
    "vpd.api.collect": ("collect",),
    "vpd.api.entry": ("evaluate", "train"),
    "vpd.api.runs": ("Run",),
    "vpd.api.sft": ("sft",),
    "vpd.api.solve": ("solve",),
    "vpd.config": ("Config", "load_config", "parse_config"),
    "vpd.engines": ("Engine",),
    "vpd.engines.settings": ("EngineParts",),
    "vpd.envs": ("Env", "per_row"),
    "vpd.envs.check": ("check_env",),
    "vpd.errors": (
        "ConfigError",
        "DataError",
        "EnvError",
        "FeedbackError",
        "ModelError",
        "SandboxError",
        "StorageError",
        "TrainingError",
        "VPDError",
    ),
    "vpd.evaluation": ("EvalOptions", "Evaluation"),
    "vpd.feedback": ("Feedback", "Writer", "extend"),
    "vpd.loop": ("Observer",),
    "vpd.recipes.assemble": ("Parts", "assemble"),
    "vpd.recipes.solve": ("Solution",),
    "vpd.settings": ("Settings",),
    "vpd.solving": ("SolveOptions", "Try"),
    "vpd.types": ("Completion", "Example", "Grade", "Group", "Message", "Metrics", "Rollout", "Section", "Task"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_RENAMED = {"load_config": "load", "parse_config": "parse"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'vpd' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), _RENAMED.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
