"""The data sets that a Python script gives its trainer, as keys: which file or data set of the Hub, and what is done to
its records that is not taken over.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from vpd.config.convert import Unread
from vpd.config.convert.script_names import Script, called

READERS = ("json", "csv", "parquet", "arrow", "text")  # data sets of load_dataset that are forms of files
POSITIONS = ("path", "name", "data_dir", "data_files", "split")
HARMLESS = ("cache_dir", "num_proc", "streaming", "trust_remote_code", "token", "verification_mode", "keep_in_memory")
MADE = "the records are taken as they lie there; write what the script makes of them to a file, for --env.path"
UNKNOWN = "which data set this is cannot be told from the file; give it as --env.path"
UNKNOWN_EVAL = "which data set this is cannot be told from the file; give it as --env.eval_path"
PARTS = "a part of the training data: set env.eval_share, the share held out, or write it to a file for env.eval_path"
ONE_SPLIT = (
    "env.subset and env.split are of env.path too: write these records to a file, and give it as --env.eval_path"
)
Flat: TypeAlias = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Loaded:
    """A data set as ``load_dataset`` is asked for it; ``steps``: what is then done to it, by name."""

    path: Any
    subset: Any
    split: Any
    is_file: bool
    steps: dict[str, str]


def train_data(script: Script, node: ast.expr) -> Flat:
    """The keys of the data set that is trained on."""
    loaded = _followed(script, node)
    if loaded is None or isinstance(loaded.path, Mapping):
        return {"train_dataset": Unread(ast.unparse(node), UNKNOWN)}
    flat: Flat = {"dataset_name": loaded.path}
    if loaded.subset is not None:
        flat["dataset_config"] = loaded.subset
    if loaded.split is not None and not (loaded.is_file and loaded.split == "train"):
        flat["dataset_train_split"] = loaded.split
    return flat | {f"train_dataset.{name}": Unread(text, MADE) for name, text in loaded.steps.items()}


def eval_data(script: Script, node: ast.expr, train: Mapping[str, Any]) -> Flat:
    """The keys of the data set that is evaluated on; ``train`` are those of the other."""
    loaded, text = _followed(script, node), ast.unparse(node)
    if isinstance(node, ast.Constant) and node.value is None:
        return {}
    if loaded is None or isinstance(loaded.path, Mapping):
        return {"eval_dataset": Unread(text, UNKNOWN_EVAL)}
    if "train_test_split" in loaded.steps:
        return {"eval_dataset": Unread(text, PARTS)}
    if isinstance(loaded.path, Unread):
        return {"eval_dataset": loaded.path}
    where = (loaded.subset, loaded.split or "train")
    if not loaded.is_file and where != (train.get("dataset_config"), train.get("dataset_train_split", "train")):
        return {"eval_dataset": Unread(text, ONE_SPLIT)}
    if loaded.is_file and loaded.split is not None and set(str(loaded.split)) & set("[+"):
        loaded.steps["split"] = str(loaded.split)
    made = MADE.replace("--env.path", "--env.eval_path")
    return {"eval_dataset": loaded.path} | {f"eval_dataset.{n}": Unread(t, made) for n, t in loaded.steps.items()}


def lone_data(script: Script, calls: list[ast.Call]) -> Flat:
    """The keys of the one data set that a script without a trainer loads; of several none."""
    if len(calls) == 1:
        return train_data(script, calls[0])
    why = "which of the data sets is trained on cannot be told; give it as --env.path"
    return {"train_dataset": Unread(", ".join(map(ast.unparse, calls)), why)} if calls else {}


def _followed(script: Script, node: ast.expr) -> Loaded | None:
    """The data set that an expression is, by way of names, splits and methods; None where it is another thing."""
    if isinstance(node, ast.Name):
        value = script.value(node)
        return None if value is None else _followed(script, value)
    if isinstance(node, ast.Subscript):
        return _part(_followed(script, node.value), script.literal(node.slice))
    if not isinstance(node, ast.Call):
        return None
    name = called(node)
    if name == "load_dataset":
        return _loaded(script, node)
    if name in ("load_from_disk", "from_json", "from_csv", "from_parquet") and node.args:
        return Loaded(path=script.literal(node.args[0]), subset=None, split=None, is_file=True, steps={})
    loaded = _followed(script, node.func.value) if isinstance(node.func, ast.Attribute) else None
    if loaded is not None and name is not None:
        words = [*map(ast.unparse, node.args), *(ast.unparse(word) for word in node.keywords)]
        loaded.steps[name] = ", ".join(words) or "()"
    return loaded


def _part(loaded: Loaded | None, key: Any) -> Loaded | None:
    """``data["train"]``: a split, or a part that ``train_test_split`` makes."""
    if loaded is None or isinstance(key, Unread) or not isinstance(key, str):
        return None
    if "train_test_split" in loaded.steps:
        return loaded
    if loaded.split is not None:
        return None
    loaded.split = key
    if isinstance(loaded.path, Mapping):
        loaded.path = _file(loaded.path.get(key))
    return loaded


def _loaded(script: Script, node: ast.Call) -> Loaded:
    given = {word.arg: script.literal(word.value) for word in node.keywords if word.arg}
    given |= {key: script.literal(value) for key, value in zip(POSITIONS, node.args, strict=False)}
    path, files, split = given.pop("path", None), given.pop("data_files", None), given.pop("split", None)
    subset = given.pop("name", None)
    is_file = path in READERS
    if is_file and files is not None:
        path = files if isinstance(files, Unread) else _file(files, split)
    elif is_file:
        path = Unread(ast.unparse(node), "its files are not named; give them as --env.path")
    elif files is not None:
        given["data_files"] = files
    steps = {f"load_dataset({key})": str(value) for key, value in given.items() if value and key not in HARMLESS}
    unread = [ast.unparse(word.value) for word in node.keywords if word.arg is None]
    steps |= {"load_dataset(**)": ", ".join(unread)} if unread else {}
    return Loaded(path=path, subset=subset, split=split, is_file=is_file, steps=steps)


def _file(files: Any, split: Any = None) -> Any:
    """``data_files`` as one file; those by split stay a mapping until the split is known."""
    if isinstance(files, Mapping):
        return files if split is None else _file(files.get(str(split).partition("[")[0]))
    if isinstance(files, (list, tuple)) and len(files) == 1:
        return _file(files[0])
    if isinstance(files, str) and not set(files) & set("*?{"):
        return files
    return Unread(str(files), "one file is read; join them, and give it as --env.path")
