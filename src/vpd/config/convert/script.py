"""TRL's settings in a Python script: what the trainer is given, and its configuration.  Nothing is executed."""

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from vpd.config.convert import Unread
from vpd.config.convert.script_data import eval_data, lone_data, train_data
from vpd.config.convert.script_names import FUNCTIONS, Script, called
from vpd.errors import ConfigError

Flat: TypeAlias = dict[str, Any]

CLASSES = {"SDPOConfig": "trl-sdpo", "GRPOConfig": "trl-grpo", "GKDConfig": "trl-gkd"}
TRAINERS = {"SDPOTrainer": "trl-sdpo", "GRPOTrainer": "trl-grpo", "GKDTrainer": "trl-gkd"}
#: calls that a script makes for its training alone
MAKING = (*CLASSES, *TRAINERS, "LoraConfig", "load_dataset")
_REWARDED = ("model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class",
             "reward_processing_classes", "callbacks", "optimizers", "peft_config")  # fmt: skip
#: parameters of the trainers in their order
POSITIONS = {
    "trl-sdpo": _REWARDED,
    "trl-grpo": (*_REWARDED, "tools", "rollout_func", "environment_factory"),
    "trl-gkd": ("model", "teacher_model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class",
                "compute_metrics", "callbacks", "optimizers", "preprocess_logits_for_metrics", "peft_config",
                "formatting_func"),
}  # fmt: skip
#: arguments of peft's LoraConfig that have another name in the YAML of TRL's scripts
LORA = {
    **{key: key for key in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora")},
    "r": "lora_r", "target_modules": "lora_target_modules", "modules_to_save": "lora_modules_to_save",
    "target_parameters": "lora_target_parameters", "task_type": "lora_task_type",
}  # fmt: skip
#: what peft takes where nothing is given
LORA_DEFAULTS: Mapping[str, Any] = {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
#: arguments of ``from_pretrained`` that have another name there
LOADING = {"revision": "model_revision", "pretrained_model_name_or_path": "model_name_or_path"}
MOVING = ("to", "cuda", "train", "eval")  # methods of a model that leave its weights what they are
MODEL = "no name that could be read; give it as --model.name_or_path"
ADAPTER = "what adapter this is cannot be told from the file; set model.lora"
SEVERAL = "keep one of them in the file that is converted"
LATER = "changed in a branch, by another value or after the trainer is made; give it as --section.key VALUE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A script's settings: which of TRL's configurations, its flat keys, and what is taken where a key is not given."""

    dialect: str
    flat: Mapping[str, Any]
    defaults: Mapping[str, Any]


def read_script(path: Path, dialect: str | None) -> Found:
    """What a script trains with.  Raises ConfigError where there is nothing of TRL's, or more than one of it."""
    try:
        tree = ast.parse(path.read_text())
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot read {path}", got=reason) from error
    script = Script(tree, path)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    configs = [(CLASSES[name], node) for node in calls if (name := _named(script, node)) in CLASSES]
    trainers = [(TRAINERS[name], node) for node in calls if (name := _named(script, node)) in TRAINERS]
    found = {kind for kind, _ in (*trainers, *configs)}
    wanted = found if dialect is None else found & {dialect}
    if not wanted:
        raise ConfigError(f"{path} makes no such configuration", expected=f"a call of {' or '.join(CLASSES)}")
    if len(wanted) > 1:
        raise ConfigError(f"{path} makes several configurations", got=", ".join(sorted(found)), do="Give --from.")
    [chosen] = wanted
    reader = _Reader(script, chosen, [node for kind, node in configs if kind == chosen])
    flat = reader.read(_one(script, [node for kind, node in trainers if kind == chosen]))
    return Found(dialect=chosen, flat=flat, defaults=LORA_DEFAULTS if flat.get("use_peft") is True else {})


def _named(script: Script, node: ast.Call) -> str:
    """What is called, by the name that it is imported from; a trainer that a class of the script derives from."""
    name = called(node) or ""
    if isinstance(node.func, ast.Name):
        name = script.imported.get(name, name).rpartition(":")[2]
    for one in script.tree.body:
        if isinstance(one, ast.ClassDef) and one.name == name:
            bases = [base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in one.bases]
            return next((base for base in bases if base in TRAINERS or base in CLASSES), name)
    return name


def _one(script: Script, calls: Sequence[ast.Call]) -> ast.Call | None:
    """The one call that the script comes to; of several it must be told which.  Raises ConfigError."""
    reached = _reached(script)
    candidates = [node for node in calls if all(f in reached for f in script.above(node) if isinstance(f, FUNCTIONS))]
    candidates = candidates or list(calls)
    if len(candidates) > 1:
        raise ConfigError(
            f"{script.path} makes several of {called(candidates[0])}",
            got=", ".join(f"line {node.lineno}" for node in candidates),
            do=SEVERAL[0].upper() + SEVERAL[1:] + ".",
        )
    return candidates[0] if candidates else None


def _reached(script: Script) -> set[ast.AST]:
    """The functions that the script's own statements mention, and those that these mention in turn."""
    named: dict[str, list[ast.AST]] = {}
    for node in ast.walk(script.tree):
        if isinstance(node, FUNCTIONS):
            named.setdefault(node.name, []).append(node)
    reached: set[ast.AST] = set()
    waiting: list[ast.AST] = [script.tree]
    while waiting:
        for name in _mentioned(waiting.pop()):
            waiting += [node for node in named.get(name, ()) if node not in reached]
            reached |= set(named.get(name, ()))
    return reached


def _mentioned(node: ast.AST) -> Iterable[str]:
    """The names that a function or script mentions, those in functions inside it left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            continue
        if isinstance(child, ast.Name):
            yield child.id
        elif isinstance(child, ast.Attribute):
            yield child.attr
        yield from _mentioned(child)


class _Reader:
    """The keys of one trainer and of the configuration that it is given."""

    def __init__(self, script: Script, dialect: str, configs: Sequence[ast.Call]):
        self.script, self.dialect, self.configs = script, dialect, configs

    def read(self, trainer: ast.Call | None) -> Flat:
        if trainer is None:
            config = _one(self.script, self.configs)
            return (self._settings(config, None) if config else {}) | self._alone()
        given, flat = self._given(trainer)
        flat = self._configuration(given.pop("args", None), trainer, bool(flat)) | flat
        data = given.pop("train_dataset", None)
        flat |= train_data(self.script, data) if data is not None else {}
        held_out = given.pop("eval_dataset", None)
        flat |= eval_data(self.script, held_out, flat) if held_out is not None else {}
        for key, value in given.items():
            flat |= self._argument(key, value)
        return flat

    def _alone(self) -> Flat:
        """The data set and the adapter of a script that makes a configuration and no trainer."""
        calls = [node for node in ast.walk(self.script.tree) if isinstance(node, ast.Call)]
        flat = lone_data(self.script, [node for node in calls if called(node) == "load_dataset"])
        adapters = [node for node in calls if called(node) == "LoraConfig"]
        if len(adapters) == 1:
            return flat | self._adapter(adapters[0])
        return flat | ({"peft_config": Unread("several of LoraConfig", ADAPTER)} if adapters else {})

    def _given(self, trainer: ast.Call) -> tuple[dict[str, ast.expr], Flat]:
        """The trainer's arguments by name, and those that cannot be read."""
        names, unread = POSITIONS[self.dialect], Flat()
        given: dict[str, ast.expr] = {}
        for number, value in enumerate(trainer.args):
            if isinstance(value, ast.Starred) or number >= len(names):
                unread[f"argument {number + 1}"] = Unread(ast.unparse(value))
                break
            given[names[number]] = value
        for word in trainer.keywords:
            if word.arg:
                given[word.arg] = word.value
            elif isinstance(word.value, ast.Dict) and all(isinstance(key, ast.Constant) for key in word.value.keys):
                given |= {key.value: value for key, value in zip(word.value.keys, word.value.values, strict=True)}  # type: ignore[union-attr]
            else:
                unread[f"**{ast.unparse(word.value)}"] = Unread(ast.unparse(word.value), "what it holds is not read")
        return given, unread

    def _configuration(self, node: ast.expr | None, trainer: ast.Call, unread: bool) -> Flat:
        """The keys of the configuration that the trainer is given as ``args``."""
        if node is None and not unread:
            return {}
        config = None if node is None else self._made(node)
        if config is not None:
            return self._settings(config, trainer)
        text = "" if node is None else ast.unparse(node)
        if len(self.configs) != 1:
            return {"args": Unread(text, "which configuration the trainer is given cannot be told from the file")}
        [only] = self.configs
        why = f"what it holds cannot be told from the file; the configuration made in line {only.lineno} is taken"
        return {"args": Unread(text, why)} | self._settings(only, trainer)

    def _made(self, node: ast.expr) -> ast.Call | None:
        """The call that makes a configuration: itself, that of a name, or the one in a function of the script."""
        if isinstance(node, ast.Name):
            value = self.script.value(node)
            return None if value is None else self._made(value)
        if node in self.configs and isinstance(node, ast.Call):
            return node
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and self.script.is_function(node.func):
            name = node.func.id
            inside = [c for c in self.configs if any(getattr(f, "name", "") == name for f in self.script.above(c))]
            return inside[0] if len(inside) == 1 and not node.args and not node.keywords else None
        return None

    def _settings(self, config: ast.Call, trainer: ast.Call | None) -> Flat:
        flat: Flat = {}
        for number, value in enumerate(config.args):
            named = "output_dir" if number == 0 and not isinstance(value, ast.Starred) else f"argument {number + 1}"
            flat[named] = self.script.literal(value) if named == "output_dir" else Unread(ast.unparse(value))
        for word in config.keywords:
            if word.arg:
                flat[word.arg] = self.script.literal(word.value)
                continue
            pairs, text = self.script.pairs(word.value), ast.unparse(word.value)
            flat |= {f"**{text}": Unread(text, "what it holds is not read")} if pairs is None else pairs
        return flat | self._changed(config, trainer)

    def _changed(self, config: ast.Call, trainer: ast.Call | None) -> Flat:
        """``args.temperature = 0.7`` after the configuration is made; also by way of ``trainer.args``."""
        parent = self.script.parents[config]
        targets = parent.targets if isinstance(parent, ast.Assign) else [getattr(parent, "target", None)]
        names = {target.id for target in targets if isinstance(target, ast.Name)}
        flat: Flat = {}
        for node in ast.walk(self.script.tree):
            if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Store):
                continue
            of_trainer = isinstance(node.value, ast.Attribute) and node.value.attr == "args"
            if not of_trainer and not (isinstance(node.value, ast.Name) and node.value.id in names):
                continue
            statement = self.script.parents[node]
            plain = isinstance(statement, ast.Assign) and node in statement.targets and self.script.is_certain(node)
            here = self.script.scope(node) is self.script.scope(config) and node.lineno >= config.lineno
            before = trainer is None or self.script.scope(trainer) is not self.script.scope(node)
            in_time = before or node.lineno <= trainer.lineno  # type: ignore[union-attr]
            if plain and here and in_time and not of_trainer and node.attr not in flat:
                flat[node.attr] = self.script.literal(statement.value)  # type: ignore[attr-defined]
            else:
                flat[node.attr] = Unread(ast.unparse(statement), LATER)
        return flat

    def _argument(self, key: str, node: ast.expr) -> Flat:
        """The keys of one more argument of the trainer."""
        if key in ("model", "teacher_model"):
            return self._model(node, "" if key == "model" else "teacher_")
        if key == "reward_funcs":
            return {key: self.script.functions(node)}
        if key == "peft_config":
            return self._adapter(node)
        if key == "callbacks":
            return self._callbacks(node)
        value = self.script.literal(node)
        return {} if value in (None, []) or value == (None, None) else {key: value}

    def _model(self, node: ast.expr, role: str) -> Flat:
        """``"owner/name"``, or what ``from_pretrained`` is given, with its other arguments."""
        key, text = f"{role}model_name_or_path", ast.unparse(node)
        if isinstance(node, ast.Name) and (value := self.script.value(node)) is not None:
            node = value
        while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MOVING:
            node = node.func.value
        if isinstance(node, ast.Call) and called(node) == "get_peft_model" and len(node.args) >= 2 and not role:
            return self._model(node.args[0], role) | self._adapter(node.args[1])
        if not isinstance(node, ast.Call):
            name = self.script.literal(node)
            return {key: name if isinstance(name, str) and not isinstance(name, Unread) else Unread(text, MODEL)}
        if called(node) != "from_pretrained" or not (node.args or node.keywords):
            return {key: Unread(text, MODEL)}
        found = {LOADING.get(str(word.arg), str(word.arg)): self.script.literal(word.value) for word in node.keywords}
        if node.args:
            found["model_name_or_path"] = self.script.literal(node.args[0])
        name = found.pop("model_name_or_path", None)
        name = Unread(text, MODEL) if isinstance(name, Unread) or not isinstance(name, str) else name
        return {key: name} | {f"{role}{other}": value for other, value in found.items()}

    def _adapter(self, node: ast.expr) -> Flat:
        """The keys of peft's LoraConfig."""
        text = ast.unparse(node)
        if isinstance(node, ast.Name) and (value := self.script.value(node)) is not None:
            node = value
        if isinstance(node, ast.Constant) and node.value is None:
            return {}
        if not isinstance(node, ast.Call) or called(node) != "LoraConfig":
            return {"peft_config": Unread(text, ADAPTER)}
        flat: Flat = {"use_peft": True}
        for word in node.keywords:
            if word.arg is None:
                pairs = self.script.pairs(word.value)
                given = {f"**{ast.unparse(word.value)}": Unread(text, ADAPTER)} if pairs is None else pairs
            else:
                given = {word.arg: self.script.literal(word.value)}
            flat |= {LORA.get(key, f"LoraConfig.{key}"): value for key, value in given.items()}
        return flat | {f"LoraConfig, argument {n + 1}": Unread(ast.unparse(a)) for n, a in enumerate(node.args)}

    def _callbacks(self, node: ast.expr) -> Flat:
        """The patience of transformers' early stopping; any other callback as it is written."""
        flat: Flat = {}
        if isinstance(node, ast.Name) and (value := self.script.value(node)) is not None:
            node = value
        entries = node.elts if isinstance(node, (ast.List, ast.Tuple)) else [node]
        for entry in entries:
            if isinstance(entry, ast.Call) and called(entry) == "EarlyStoppingCallback":
                words = {word.arg: self.script.literal(word.value) for word in entry.keywords}
                patience = self.script.literal(entry.args[0]) if entry.args else words.get("early_stopping_patience", 1)
                flat["early_stopping_patience"] = patience
            elif not (isinstance(entry, ast.Constant) and entry.value is None):
                text = f"{flat['callbacks']}, {ast.unparse(entry)}" if "callbacks" in flat else ast.unparse(entry)
                flat["callbacks"] = Unread(text, "a callback of transformers' trainer is not called here")
        return flat
