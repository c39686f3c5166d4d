"""``vpd replay``: run an iteration again that met a number that is not finite, and show where it begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpd.algorithms import Algorithm
from vpd.config import Config, parse
from vpd.errors import NonFiniteError, StorageError
from vpd.learners import Measure, ModelName, Objective, Update
from vpd.learners.accelerate_learner import AccelerateLearner
from vpd.learners.calls import Call, Fault
from vpd.learners.journal import Journal
from vpd.learners.nonfinite import MOST, Trace, numbers_not_finite, watched_measure, weights_not_finite
from vpd.model.scorer import Role
from vpd.recipes.assemble import load_model, make_learner, make_prompter
from vpd.recipes.external_teacher import load_teacher
from vpd.report.console import Terminal
from vpd.run_folder import faults
from vpd.types import Example


def replay(folder: Path) -> list[str]:
    """Run the iteration of a dump again and show where a number is not finite, the first place first.

    Returns these places; none, where all is finite on this machine.  Raises StorageError for a folder without a dump.
    """
    console = Terminal()
    fault, settings = faults.read(folder)
    config = _config(settings, folder)
    model, tokenizer = load_model(config.model, finite=False)
    learner = make_learner(config, model, load_teacher(config, model, tokenizer))
    algorithm = config.build_algorithm(make_prompter(config, model, tokenizer))
    learner.load(folder)
    console.print(f"step {fault.step}: {fault.error}", markup=False, highlight=False, soft_wrap=True)
    found = find(fault, learner, algorithm)
    for number, place in enumerate(found):
        title = "first" if number == 0 else "then"
        console.print(f"  {title:<6}{place}", markup=False, highlight=False, soft_wrap=True)
    if not found:
        console.print("Run again here, every number is finite.")
    return found


def find(fault: Fault, learner: AccelerateLearner, algorithm: Algorithm) -> list[str]:
    """The places that are not finite: weights, numbers of rows, then in the order in which they are computed."""
    places = [f"weight of {title} {line}" for title, m in learner.models().items() for line in weights_not_finite(m)]
    if fault.call is None:
        return places[:MOST]
    places += numbers_not_finite(fault.call.examples)
    if places:
        return places[:MOST]
    call, asked = fault.call, _asked(fault, learner, algorithm)
    whole = _run(call, call.examples, asked, learner)
    rows = [
        f"{example.name} alone: {found[0]}"
        for example in call.examples
        if whole and (call.kind == "score" or any(example.loss_weights.values()))
        for found in [_run(call, [example], asked, learner)]
        if found
    ]
    return whole[:MOST] + rows[:MOST]


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What the algorithm passed to the call besides examples: a measure, or objectives."""

    measure: Measure | None = None
    objectives: Mapping[str, Objective] = dataclasses.field(default_factory=dict)


class _Reached(Exception):
    """The algorithm has come to the call that failed."""

    def __init__(self, asked: _Asked):
        self.asked = asked


class _Rerun(Journal):
    """A learner that gives an algorithm what its calls gave before, until the one that failed."""

    def __init__(self, learner: AccelerateLearner, fault: Fault):
        super().__init__(learner, fault.groups)
        self._given = list(fault.results)

    def score(self, examples: Sequence[Example], measure: Measure, *, model: ModelName = "live") -> list[list[float]]:
        if not self._given:
            raise _Reached(_Asked(measure=measure))
        given = self._given.pop(0)
        if not isinstance(given, list):
            raise _another()
        return given

    def update(
        self,
        name: str,
        examples: Sequence[Example],
        objectives: Mapping[str, Objective],
        *,
        train: Role = "student",
        lr_scale: float = 1.0,
    ) -> Update:
        if not self._given:
            raise _Reached(_Asked(objectives=objectives))
        given = self._given.pop(0)
        if isinstance(given, list):
            raise _another()
        return given


def _asked(fault: Fault, learner: AccelerateLearner, algorithm: Algorithm) -> _Asked:
    """What the call that failed was given besides its examples; raises StorageError if it does not come to it."""
    algorithm.restore(dict(fault.algorithm))
    try:
        algorithm.step(fault.groups, _Rerun(learner, fault))
    except _Reached as reached:
        return reached.asked
    raise _another()


def _run(call: Call, examples: Sequence[Example], asked: _Asked, learner: AccelerateLearner) -> list[str]:
    """The call on some of its examples, watched; no weight moves."""
    trace = Trace()
    try:
        with trace.watching(learner.models()):
            if asked.measure is not None:
                model: Any = call.name
                learner.score(examples, watched_measure(trace, asked.measure), model=model)
            else:
                watched = {term: trace.objective(term, objective) for term, objective in asked.objectives.items()}
                learner.update(call.name, examples, watched, train=call.train, lr_scale=0.0)
    except NonFiniteError as error:
        return trace.found or [str(error)]
    return trace.found


def _config(settings: Mapping[str, Any], folder: Path) -> Config:
    """The run's settings, without environment and feedback, which a replay does not need."""
    kept = {name: section for name, section in settings.items() if name not in ("env", "feedback", "engine")}
    config = parse(kept | {"rollout": {**kept["rollout"], "overlap": False}})
    if config.model.lora is not None:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, name_or_path=str(folder.resolve())))


def _another() -> StorageError:
    return StorageError(
        "the algorithm does not ask the learner what it asked when this dump was written",
        do="Replay it with the version of vpd, and of your own algorithm, that wrote it.",
    )
