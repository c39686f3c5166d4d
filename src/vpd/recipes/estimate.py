"""What an iteration takes: the method is rehearsed, its updates are run without data, seconds are added up."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vpd.config import Config
from vpd.engines.settings import VLLMSettings
from vpd.estimate.architecture import Architecture, find_architecture, head_weight, layer_sizes
from vpd.estimate.memory import Item, Peak, Trained, Weights, update_peak
from vpd.estimate.rehearsal import Call, Rehearsal
from vpd.estimate.settings import DryRunSettings
from vpd.estimate.work import Decoding, Sizes, Work, decoding_work, work_of
from vpd.learners.settings import TeacherSettings
from vpd.prompts import Prompter
from vpd.types import Group

REHEARSED = 10  # iterations, for methods that do not do the same in each
LOADED_PER_SECOND = 1.5e9  # bytes of weights that a server takes from files
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Memory of one GPU in one stage of an iteration: what it adds to the fixed items, and all of it, in bytes."""

    name: str
    added: int
    total: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Work of one phase, and how often it happens in an iteration (the E-step of VPD: 1 in F)."""

    work: Work
    times: float
    part: Literal["sampling", "update", "sync"] = "update"

    @property
    def seconds(self) -> float:
        """Seconds of an average iteration."""
        return self.work.seconds * self.times


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run would need: memory of one GPU, seconds and tokens of an iteration and of the run, and the price.

    ``server`` is the memory of one GPU of the server that samples, if there is one; ``overlap``: it samples while the
    learner updates.
    """

    parameters: int
    fixed: tuple[Item, ...]
    stages: tuple[Stage, ...]
    available: int
    phases: tuple[Phase, ...]
    sampled_tokens: int
    evaluation: Work | None
    evaluations: int
    iterations: int
    gpus: int
    price: float
    server: int = 0
    overlap: bool = False

    @property
    def peak(self) -> int:
        """The most bytes of one training GPU."""
        return max(stage.total for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether that, and the server's, is at most what a GPU has."""
        return max(self.peak, self.server) <= self.available

    @property
    def seconds(self) -> float:
        """Seconds of an average iteration, one phase after the other; with overlap sampling beside the update."""
        spent = {"sampling": 0.0, "update": 0.0, "sync": 0.0}
        for phase in self.phases:
            spent[phase.part] += phase.seconds
        beside = min(spent["sampling"], spent["update"]) if self.overlap else 0.0
        return sum(spent.values()) - beside

    @property
    def run_seconds(self) -> float:
        """Seconds of all iterations and evaluations."""
        evaluation = 0.0 if self.evaluation is None else self.evaluation.seconds
        return self.seconds * self.iterations + evaluation * self.evaluations

    def cost(self, seconds: float) -> float:
        """The price of all GPUs, the server's included, for so many seconds."""
        return seconds / 3600 * self.gpus * self.price


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """The iteration that is computed: groups of ``expected`` and of the ``longest`` attempts, how many critiques are
    asked for, and how many held-out tasks an evaluation has.
    """

    expected: Sequence[Group]
    longest: Sequence[Group]
    critiques: int = 0
    held_out: int = 0


def estimate(
    config: Config, machine: DryRunSettings, architecture: Architecture, prompter: Prompter, attempts: Attempts
) -> Estimate:
    """Compute everything; ``config`` is resolved.  Raises ModelError for an external teacher of unknown shape."""
    trained = trained_of(config, architecture)
    weights = Weights(trained)
    longest = _calls(config, prompter, attempts.longest, 1)[0]
    updates = {call.name: call for call in longest if call.kind == "update"}
    peaks = [update_peak(trained, call, world=machine.gpus) for call in updates.values()]
    served = config.engine.dtype if isinstance(config.engine, VLLMSettings) else None
    sizes = Sizes.of(trained, packed=all(peak.path == "packed" for peak in peaks), sampled=served)
    stages = _stages(config, machine, weights, peaks, sizes)
    evaluation = _evaluation(config, machine, attempts, sizes)
    run = config.run
    return Estimate(
        parameters=sum(parameter.numel() for parameter in weights.model.parameters()),
        fixed=tuple(_shared(item, weights.trained, machine) for item in weights.fixed()),
        stages=stages,
        available=round(machine.memory_gb * GIB),
        phases=tuple(_phases(config, machine, trained, prompter, attempts, sizes)),
        sampled_tokens=sum(len(r.completion.tokens) for group in attempts.expected for r in group.rollouts),
        evaluation=evaluation,
        evaluations=1 + math.ceil(run.max_steps / run.eval_steps) if run.eval_steps else 0,  # as the loop makes them
        iterations=run.max_steps,
        gpus=machine.gpus + machine.server_gpus,
        price=machine.price,
        server=_server_bytes(config, machine, sizes, attempts),
        overlap=config.rollout.overlap,
    )


def trained_of(config: Config, architecture: Architecture) -> Trained:
    """What is trained, from a configuration."""
    needs = config.needs
    external = None if needs.external_model is None else find_architecture(needs.external_model)
    return Trained(
        architecture=architecture,
        model=config.model,
        optim=config.optim,
        teacher=needs.teacher or TeacherSettings(kind="live"),
        keep_initial=needs.initial_copy,
        external=external,
    )


def _calls(config: Config, prompter: Prompter, groups: Sequence[Group], iterations: int) -> list[list[Call]]:
    """What the method asks of the learner in each of these iterations."""
    algorithm = config.build_algorithm(prompter)
    found = []
    for _ in range(iterations):
        rehearsal = Rehearsal(version=int(config.rollout.overlap))
        algorithm.step(groups, rehearsal)
        found.append(rehearsal.calls)
    return found


def _shared(item: Item, trained: Trained, machine: DryRunSettings) -> Item:
    """What one GPU holds of it."""
    return Item(name=item.name, bytes=item.bytes // (machine.gpus if trained.sharded else 1))


def _stages(
    config: Config, machine: DryRunSettings, weights: Weights, peaks: Sequence[Peak], sizes: Sizes
) -> tuple[Stage, ...]:
    context = round(machine.context_gb * GIB)
    items = {item.name: _shared(item, weights.trained, machine).bytes for item in weights.fixed()}
    fixed = sum(items.values()) + context
    sharded = weights.trained.sharded
    whole = _whole_layers(weights) if sharded else 0
    stages = []
    if not machine.server_gpus:
        replica = sizes.weights_bytes if sharded else 0
        sampling = _sampling_bytes(config, machine, sizes, weights) + replica
        stages.append(Stage(name="sampling", added=sampling, total=fixed - items["gradients"] + sampling))
    for peak in peaks:
        note = f"at worst {peak.micro_batches} micro-batches, the largest of {peak.tokens:,} tokens, {peak.path} rows"
        added = peak.bytes + whole
        stages.append(Stage(name=peak.name, added=added, total=fixed + added, note=note))
    step = items["gradients"] if config.optim.optimizer == "adamw" else 0
    stages.append(Stage(name="optimiser's step", added=step, total=fixed + step, note="AdamW's square roots"))
    return tuple(stages)


def _whole_layers(weights: Weights) -> int:
    """Bytes of what FSDP2 gathers at one time: two layers (one ahead) and what stands outside of them, of live weights
    and of a teacher's copy, and whole gradients of one layer, with their copy in fp32, and of the outside, whose copy
    is made when nothing else is left of the pass."""
    layer, outside = layer_sizes(weights.model)
    moved, moved_outside = layer_sizes(weights.model, trained=True)
    copies = 2 if any(item.name == "teacher's copies" for item in weights.fixed()) else 1
    width = 2 if weights.trained.narrow else 4
    return width * (copies * (2 * layer + outside) + moved + moved_outside) + 4 * moved


def _sampling_bytes(config: Config, machine: DryRunSettings, sizes: Sizes, weights: Weights) -> int:
    """Keys and values of the answers that decode at once (buffers double as they grow), and five times their logits."""
    rollout = config.rollout
    rows = min(rollout.max_rows, -(-rollout.prompts_per_step * rollout.num_generations // machine.gpus))
    answers = 2 * rows * rollout.sampling.max_completion_length * sizes.kv_bytes
    return answers + 5 * 4 * rows * len(head_weight(weights.model))


def _server_bytes(config: Config, machine: DryRunSettings, sizes: Sizes, attempts: Attempts) -> int:
    """Weights and the keys and values of all rows, divided among the server's GPUs."""
    if not machine.server_gpus:
        return 0
    rows = [r for group in attempts.expected for r in group.rollouts]
    held = sum((len(r.prompt) + len(r.completion.tokens)) * sizes.kv_bytes for r in rows)
    return (sizes.weights_bytes + held) // machine.server_gpus + round(machine.context_gb * GIB)


def _phases(
    config: Config, machine: DryRunSettings, trained: Trained, prompter: Prompter, attempts: Attempts, sizes: Sizes
) -> list[Phase]:
    phases = [Phase(work=_rollout(config, machine, attempts, sizes), times=1.0, part="sampling")]
    if attempts.critiques:
        asked = Decoding(
            rows=attempts.critiques,
            prompt=_mean_prompt(attempts),
            answer=machine.feedback_tokens,
            longest=machine.feedback_tokens,
            at_once=config.rollout.max_rows,
        )
        phases.append(Phase(work=decoding_work("critiques", asked, sizes, machine), times=1.0, part="sampling"))
    iterations = min(REHEARSED, config.run.max_steps)
    calls = [call for one in _calls(config, prompter, attempts.expected, iterations) for call in one]
    kinds: dict[tuple[str, int], list[Call]] = {}
    for call in calls:
        kinds.setdefault((_title(call), len(call.examples)), []).append(call)
    titles = [title for title, _ in kinds]
    for (title, rows), same in kinds.items():
        name = title if titles.count(title) == 1 else f"{title}, {rows} rows"
        work = replace(work_of(same[0], trained, sizes, machine), name=name)
        phases.append(Phase(work=work, times=len(same) / iterations))
    updates = sum(call.kind == "update" for call in calls) / iterations
    phases.append(Phase(work=_optimiser_work(trained, sizes, machine), times=updates))
    if machine.server_gpus:
        seconds = sizes.weights_bytes / LOADED_PER_SECOND
        sync = Work(name="weights to the server", operations=0, tokens=0, seconds=seconds)
        phases.append(Phase(work=sync, times=1.0, part="sync"))
    return phases


def _title(call: Call) -> str:
    """An update's name; of a score, whose log-probs it measures."""
    return call.name if call.kind == "update" else f"score the {' and the '.join(sorted(call.use.read))}"


def _optimiser_work(trained: Trained, sizes: Sizes, machine: DryRunSettings) -> Work:
    """Masters, gradients and moments are read and written once."""
    numbers = sizes.layers + sizes.head
    held = 7 * 4 * numbers / (machine.gpus if trained.sharded else 1)
    seconds = 0.0 if trained.model.lora else held / (machine.gb_per_s * 1e9)
    return Work(name="optimiser", operations=0, tokens=0, seconds=seconds)


def _mean_prompt(attempts: Attempts) -> float:
    lengths = [len(r.prompt) for group in attempts.expected for r in group.rollouts]
    return sum(lengths) / len(lengths)


def _longest(config: Config, machine: DryRunSettings, attempts: Attempts) -> int:
    mean = len(attempts.expected[0].rollouts[0].completion.tokens)
    return min(machine.longest_tokens or 3 * mean, config.rollout.sampling.max_completion_length)


def _rollout(config: Config, machine: DryRunSettings, attempts: Attempts, sizes: Sizes) -> Work:
    rollouts = [r for group in attempts.expected for r in group.rollouts]
    asked = Decoding(
        rows=len(rollouts),
        prompt=_mean_prompt(attempts),
        answer=len(rollouts[0].completion.tokens),
        longest=_longest(config, machine, attempts),
        at_once=config.rollout.max_rows if not machine.server_gpus else len(rollouts),
    )
    return decoding_work("rollout", asked, sizes, machine)


def _evaluation(config: Config, machine: DryRunSettings, attempts: Attempts, sizes: Sizes) -> Work | None:
    """One evaluation of the student: ``eval_samples`` answers to each held-out task."""
    run = config.run
    if not run.eval_steps or not attempts.held_out:
        return None
    asked = Decoding(
        rows=run.eval_samples * attempts.held_out,
        prompt=_mean_prompt(attempts),
        answer=len(attempts.expected[0].rollouts[0].completion.tokens),
        longest=_longest(config, machine, attempts),
        at_once=config.rollout.max_rows,
    )
    return decoding_work("evaluation", asked, sizes, machine)
