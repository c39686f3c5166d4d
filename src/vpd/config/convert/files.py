"""The files that other libraries are configured by, as flat keys: YAML or JSON, a shell script of Hydra overrides, and
the calls of a Python script.  Nothing of them is executed.
"""

import ast
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vpd.config.convert import Dialect, Unread, trl, verl
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
CLASSES = {"SDPOConfig": "trl-sdpo", "GRPOConfig": "trl-grpo", "GKDConfig": "trl-gkd"}
NESTED = ("actor_rollout_ref", "trainer", "data", "algorithm", "critic", "custom_reward_function")
WHOLE = ("apply_chat_template_kwargs", "chat_template_kwargs")  # keys whose mapping is their value
REFERENCE = re.compile(r"\$\{(?:oc\.select:\s*)?([\w.]+)(?:\s*,\s*([^{}]*))?\}")
ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*(\w+)(?:\s*,[^{}]*)?\}")
ASSIGNMENT = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)=(.*)")
OVERRIDE = re.compile(r"[+~]*([A-Za-z_]\w*(?:\.\w+)+)=(.*)", re.DOTALL)
#: arguments of calls in a script that stand for keys of the scripts' YAML
ARGUMENTS = {
    "LoraConfig": {"r": "lora_r", "lora_alpha": "lora_alpha", "target_modules": "lora_target_modules",
                   "lora_dropout": "lora_dropout"},
    "Trainer": {"model": "model_name_or_path", "reward_funcs": "reward_funcs",
                "teacher_model": "teacher_model_name_or_path"},
    "load_dataset": {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split",
                     "data_files": "data_files"},
}  # fmt: skip
POSITIONS = {"load_dataset": ("path", "name")}
READERS = ("json", "csv", "parquet", "arrow", "text")  # data sets of load_dataset that are forms of files


def read(path: Path, dialect: str | None) -> tuple[Dialect, dict[str, Any]]:
    """The library and its settings by flat keys.  Raises ConfigError for a file that is none of any."""
    if path.suffix == ".py":
        found, flat = _script(path, dialect)
        return DIALECTS[found], flat
    if path.suffix in (".sh", ".bash"):
        flat = dict(_overrides(path))
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


def _overrides(path: Path) -> Iterator[tuple[str, Any]]:
    """``a.b=value`` words of a shell script, its variables replaced where the script itself sets them to a text."""
    try:
        text = path.read_text().replace("\\\n", " ")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot read {path}", got=reason) from error
    variables: dict[str, str] = {}
    for line in text.splitlines():
        for word in _words(line):
            override, assignment = OVERRIDE.fullmatch(word), ASSIGNMENT.fullmatch(word)
            if override:
                yield override[1], _value(_filled(override[2], variables), override[1])
            elif assignment:
                variables.setdefault(assignment[1], _filled(assignment[2], variables))


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a quote that goes on in the next line: no override that could be read alone
        return line.split()


def _filled(text: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name, otherwise = match["braced"] or match["plain"], match["otherwise"]
        return variables.get(name, match[0] if otherwise is None else otherwise)

    return re.sub(r"\$(?:\{(?P<braced>\w+)(?::-(?P<otherwise>[^}]*))?\}|(?P<plain>\w+))", value, text)


def _value(text: str, key: str) -> Any:
    if re.fullmatch(r"\$\{?\w+\}?|\$\(.*", text):
        return Unread(text)
    return text if "$" in text else read_value({"True": "true", "False": "false", "None": "null"}.get(text, text), key)


def _script(path: Path, dialect: str | None) -> tuple[str, dict[str, Any]]:
    """The literals that a Python script passes to a configuration's class and to what goes with it."""
    try:
        tree = ast.parse(path.read_text())
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot read {path}", got=reason) from error
    calls = [(called(node), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = {CLASSES[name] for name, _ in calls if name in CLASSES}
    wanted = found if dialect is None else found & {dialect}
    if not wanted:
        raise ConfigError(f"{path} makes no such configuration", expected=f"a call of {' or '.join(CLASSES)}")
    if len(wanted) > 1:
        raise ConfigError(f"{path} makes several configurations", got=", ".join(sorted(found)), do="Give --from.")
    [chosen] = wanted
    names, imported = _names(tree, path), _imported(tree)
    flat: dict[str, Any] = {}
    for name, node in calls:
        if name in CLASSES and CLASSES[name] == chosen:
            flat |= {word.arg: _literal(word.value, names) for word in node.keywords if word.arg}
        elif name is not None:
            flat |= _arguments(name, node, names, imported)
    return chosen, flat


def _names(tree: ast.Module, path: Path) -> dict[str, Any]:
    """What the names at the top of a script stand for: a function is ``script.py:function``."""
    names: dict[str, Any] = {n.name: f"{path}:{n.name}" for n in tree.body if isinstance(n, ast.FunctionDef)}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target, value = statement.targets[0], _literal(statement.value, names)
            if isinstance(target, ast.Name) and not isinstance(value, Unread):
                names[target.id] = value
    return names


def _imported(tree: ast.Module) -> dict[str, str]:
    """What is imported at the top of a script, ``module:name``; of a whole module its name."""
    found: dict[str, str] = {}
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            found |= {one.asname or one.name: f"{statement.module}:{one.name}" for one in statement.names}
        elif isinstance(statement, ast.Import):
            found |= {one.asname: one.name for one in statement.names if one.asname}
            found |= {one.name: one.name for one in statement.names if not one.asname and "." not in one.name}
    return found


def called(node: ast.Call) -> str | None:
    """The name of what is called, without what it is an attribute of."""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else None


def _arguments(name: str, node: ast.Call, names: Mapping[str, Any], imported: Mapping[str, str]) -> dict[str, Any]:
    kind = "Trainer" if name.endswith("Trainer") else name
    known = ARGUMENTS.get(kind, {})
    given = {word.arg: word.value for word in node.keywords if word.arg}
    given |= dict(zip(POSITIONS.get(kind, ()), node.args, strict=False))
    flat = {known[key]: _literal(value, names) for key, value in given.items() if key in known}
    if "reward_funcs" in given and kind == "Trainer":
        flat["reward_funcs"] = _functions(given["reward_funcs"], names, imported)
    if kind == "load_dataset":
        files = flat.pop("data_files", None)
        if flat.get("dataset_name") in READERS and files is not None:
            flat["dataset_name"] = files[0] if isinstance(files, list) and len(files) == 1 else files
    return {"use_peft": True, **flat} if kind == "LoraConfig" else flat


def _functions(node: ast.expr, names: Mapping[str, Any], imported: Mapping[str, str]) -> Any:
    """Reward functions: those of the script itself, and those that it imports, as ``module:function``."""
    if isinstance(node, ast.List):
        return _whole([_functions(entry, names, imported) for entry in node.elts], node)
    if isinstance(node, ast.Name) and node.id not in names and ":" in imported.get(node.id, ""):
        return imported[node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
        return f"{imported[node.value.id].replace(':', '.')}:{node.attr}"
    return _literal(node, names)


def _literal(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """A literal, a name that the script gives one, or a function of the script as ``script.py:function``."""
    if isinstance(node, ast.List):
        return _whole([_literal(entry, names) for entry in node.elts], node)
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return Unread(ast.unparse(node))


def _whole(entries: list[Any], node: ast.List) -> Any:
    """A list, unless one of its entries cannot be read."""
    return Unread(ast.unparse(node)) if any(isinstance(entry, Unread) for entry in entries) else entries


def is_settings(path: Path) -> bool:
    """Whether a file holds settings and no data; a JSON object is settings, anything else in JSON is data."""
    if path.suffix != ".json":
        return path.suffix in (".yaml", ".yml", ".py", ".sh", ".bash")
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except (OSError, ValueError):
        return False
