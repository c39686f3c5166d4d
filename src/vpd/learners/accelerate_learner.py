"""The learner on Accelerate: micro-batches, one root module, one optimiser, any number of processes.

Every rank is given the full list of examples (their weights already carry the global normalisation), takes its
share, and the gradients are *summed* over ranks.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vpd.errors import ConfigError, ModelError, NonFiniteError
from vpd.learners import Measure, ModelName, Objective, Update, schedule, sharding, weights
from vpd.learners.agreement import check_examples
from vpd.learners.jobs import UpdateJob, check_terms
from vpd.learners.master_weights import MasterWeights
from vpd.learners.micro_batches import Limits, MicroBatch, plan
from vpd.learners.nonfinite import check_rate, check_step, check_weights
from vpd.learners.reporting import UpdateReport
from vpd.learners.settings import OptimSettings as OptimSettings
from vpd.learners.settings import TeacherSettings
from vpd.learners.teachers import TeacherWeights
from vpd.model import attention, lora
from vpd.model.activation_checkpointing import active, enable
from vpd.model.batch import Batch, collate
from vpd.model.passes import LearnerPath
from vpd.model.probe import check_backward, check_causal, check_head, learner_path
from vpd.model.scorer import LogitMixture, Role, Scorer
from vpd.policy import Policy
from vpd.ranks import Ranks, agree, gather, start_ranks, together
from vpd.types import Example

Item = TypeVar("Item")
ROLES: tuple[ModelName, ...] = ("live", "teacher")
Result = TypeVar("Result")


class _Root(nn.Module):
    """The one prepared module: objectives run inside its ``forward``, as sharded training needs.

    ``copies`` of the weights (an averaged teacher, the initial policy, an external teacher) are its children, so that
    they are moved and sharded with it.
    """

    def __init__(self, model: Any, copies: Mapping[str, nn.Module]):
        super().__init__()
        self.model = model
        self.copies = nn.ModuleDict(dict(copies))

    def forward(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return function(*arguments)


class AccelerateLearner:
    """Trains a causal language model of transformers: all of it, or the adapter that :func:`lora.attach` put into it.

    ``temperature`` is the rollouts': every log-prob is of logits / temperature.  ``external`` is GKD's teacher;
    ``keep_initial`` keeps the initial weights (fixed prior).  ``total_iterations`` is for decaying schedules.
    ``ranks`` are the processes that train together (None: those that the launcher of this one has started).
    """

    def __init__(
        self,
        model: Any,
        settings: OptimSettings,
        *,
        temperature: float = 1.0,
        teacher: TeacherSettings | None = None,
        external: Any = None,
        keep_initial: bool = False,
        total_iterations: int = 0,
        ranks: Ranks | None = None,
    ):
        attention.without_cudnn()
        self.settings = settings
        self.ranks = ranks or start_ranks()
        self._sharded = settings.sharding != "none"
        self.accelerator = _accelerator("no" if self._sharded else settings.mixed_precision, self.ranks)
        # a model that is to be sharded stays where it is until then: it may not fit on one device
        self.model = model.eval() if self._sharded else model.eval().to(self.accelerator.device)  # no dropout
        self._adapted = lora.is_attached(model)
        if external is not None and not self._sharded:
            external.to(self.accelerator.device)
        self._masters = MasterWeights(self.model, wanted=settings.master_weights)
        self.teacher = TeacherWeights(
            teacher or TeacherSettings(),
            self.model,
            external=external,
            keep_initial=keep_initial,
            precise=self._masters.precise,
        )
        self.temperature = temperature
        enable(self.model, settings.gradient_checkpointing)
        self.path = together(self.ranks, "checks of the model", self._checked_path)
        agree(self.ranks, "the pass that the model allows", lambda: [(self.path, b"")])
        vocabulary, hidden_size = model.get_output_embeddings().weight.shape
        self._chunk_tokens = settings.chunk_tokens or max((1 << 24) // vocabulary, 1)
        self._limits = Limits(
            rows=settings.micro_batch_size,
            tokens=settings.max_tokens_per_microbatch,
            hidden_size=hidden_size if self.shares_prefixes else None,
        )
        self._root, self._optimizer = self._prepared(_Root(self.model, self.teacher.modules()))
        self._replicas = sharding.Replicas(settings, self.accelerator.device)
        self._scheduler = schedule.make_schedule(
            settings.lr_scheduler_type,
            self._optimizer if self._sharded else self._optimizer.optimizer,
            warmup_steps=settings.warmup_steps,
            total_iterations=total_iterations,
        )

    def _prepared(self, root: _Root) -> tuple[Any, Any]:
        """The root, sharded or as a replica of every process, and the optimiser of its trained weights."""
        if not self._sharded:
            root, optimizer = self.accelerator.prepare(root, _optimizer(self._masters.parameters, self.settings))
            return root, optimizer
        sharding.shard(root, {"model": self.model, **self.teacher.modules()}, self.settings, self.accelerator.device)
        return root, _optimizer([p for p in self.model.parameters() if p.requires_grad], self.settings)

    def score(self, examples: Sequence[Example], measure: Measure, *, model: ModelName = "live") -> list[list[float]]:
        check_examples(self.ranks, "a score", examples)
        mixture = self.teacher.mixture(model)
        mine: list[tuple[int, list[float]]] = []
        with self._without_gradients():
            for micro in self._plan(examples, [row for row, example in enumerate(examples) if example.completion]):
                batch = self._collate(examples, micro)
                scorer = self._scorer(batch, student=mixture, teacher=mixture, train=None)
                values_BT = self._root(measure, scorer, batch)
                for row, values in zip(micro.rows, values_BT.tolist(), strict=True):
                    if not micro.padding:
                        mine.append((row, values[: len(examples[row].completion)]))
        found = dict(self._gather(mine))
        return [found.get(row, []) for row in range(len(examples))]

    def update(
        self,
        name: str,
        examples: Sequence[Example],
        objectives: Mapping[str, Objective],
        *,
        train: Role = "student",
        lr_scale: float = 1.0,
    ) -> Update:
        check_examples(self.ranks, f"the update {name!r}", examples)
        check_terms(examples, objectives)
        entering = [row for row, example in enumerate(examples) if any(example.loss_weights.values())]
        report = UpdateReport(name, examples, entering)
        if not entering:
            return report.without_step()
        micro_batches = self._plan(examples, entering)
        job = UpdateJob(examples, objectives, teacher=self.teacher.mixture("live" if train == "teacher" else "teacher"))
        if self.accelerator.num_processes > 1 or len(micro_batches) > 1:
            self._measure_beforehand(job, micro_batches)
        self._zero_grad()
        for number, micro in enumerate(micro_batches, 1):
            with (
                self._no_sync_until_last(number == len(micro_batches)),
                self.accelerator.autocast(),
                active(self.model),
            ):
                batch = self._collate(examples, micro)
                scorer = self._scorer(batch, student=self.teacher.mixture("live"), teacher=job.teacher, train=train)
                losses, signals = self._root(job.losses, scorer, batch, micro)
                loss = report.add(micro, batch, losses, signals, scorer)
                self.accelerator.backward(loss * self.accelerator.num_processes)
            self._masters.take_gradients()
        sums = self._sum_over_ranks(report.sums())
        norm = self._step(name, sums["loss"], lr_scale)
        return report.finish(sums, norm, job.values, self._gather(report.kept_tokens()))

    def end_iteration(self) -> None:
        check_weights(self.model, "after this iteration")
        schedule.advance(self._scheduler)
        self.teacher.end_iteration()

    def policy(self, model: ModelName = "live") -> Policy:
        if not self._sharded:
            return LearnerPolicy(self, model)
        module = _one_model(self.teacher, model)
        return sharding.ShardedPolicy(
            module,
            self.version,
            replica=lambda: self._replicas.of(module),
            call=self.call_together,
            first=self.ranks.rank == 0,
        )

    @property
    def version(self) -> int:
        return int(self._scheduler.last_epoch)

    @property
    def learning_rate(self) -> float:
        return float(self._scheduler.get_last_lr()[0])

    @property
    def is_narrow(self) -> bool:
        """Whether products are formed in 16 bits."""
        return self.model.dtype.itemsize < 4 or self.settings.mixed_precision != "no"

    @property
    def logprob_tolerance(self) -> float:
        """.001 nats; .5 where it is narrow (tokens then differ by about .03 on average)."""
        return 0.5 if self.is_narrow else 1e-3

    def state(self) -> dict[str, Any]:
        state = {
            "model": lora.state(self.model) if self._adapted else self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "teacher": self.teacher.state(),
        }
        return state | {"master_weights": self._masters.state()} if self._masters else state

    def restore(self, state: dict[str, Any]) -> None:
        if self._adapted:
            lora.restore(self.model, state["model"])
        else:
            self.model.load_state_dict(state["model"])
        self._masters.restore(state.get("master_weights", {}))  # only 16-bit weights have masters
        self._optimizer.load_state_dict(state["optimizer"])
        schedule.restore(self._scheduler, state["scheduler"])
        self.teacher.restore(state["teacher"])

    def save(self, folder: Path) -> None:
        if self._sharded:
            sharding.save(self._root, self._optimizer, folder)
            state = {"scheduler": self._scheduler.state_dict()}
        elif self.ranks.rank == 0:
            weights.save(self.model, folder)
            state = {name: part for name, part in self.state().items() if name != "model"}
        if self.ranks.rank == 0:
            torch.save(state, folder / "state.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        if not self._sharded:
            self.restore({"model": weights.read(self.model, folder), **state})
            return
        sharding.load(self._root, self._optimizer, folder)
        schedule.restore(self._scheduler, state["scheduler"])

    def export(self, folder: Path) -> None:
        if self._sharded:
            sharding.export(self.model, folder, first=self.ranks.rank == 0)
        elif self.ranks.rank == 0:
            weights.export(self.model, folder)

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """``function(*arguments)`` inside the root's forward pass, on this rank alone."""
        with self.accelerator.autocast():
            return self.accelerator.unwrap_model(self._root)(function, *arguments)

    def call_together(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """``function(*arguments)`` inside the root's forward pass, without gradients; all ranks call it together."""
        with self._without_gradients():
            result: Result = self._root(function, *arguments)
        return result

    @contextlib.contextmanager
    def _without_gradients(self) -> Iterator[None]:
        """Around passes without gradients."""
        with torch.no_grad(), self.accelerator.autocast():
            yield
        sharding.reshard(self._root)

    def _measure_beforehand(self, job: UpdateJob, micro_batches: Sequence[MicroBatch]) -> None:
        """A pass without gradient over the rows of every measured term."""
        with self._without_gradients():
            for term, objective in job.measured().items():
                mine: list[tuple[int, float]] = []
                for micro in micro_batches:
                    if term not in micro.terms:
                        continue
                    batch = self._collate(job.examples, micro)
                    scorer = self._scorer(batch, student=self.teacher.mixture("live"), teacher=job.teacher, train=None)
                    values_B = self._root(objective.measure, scorer, batch)
                    if not micro.padding:
                        mine += zip(micro.rows, values_B.tolist(), strict=True)
                job.prepare(term, dict(self._gather(mine)))

    def _step(self, name: str, loss: float, lr_scale: float) -> float:
        """Clip and step at ``lr_scale`` times the schedule's rate; the gradient norm before clipping."""
        if self._masters and self.accelerator.num_processes > 1:
            self._masters.reduce(lambda gradient: self.accelerator.reduce(gradient, "mean"))
        trained = self._masters.parameters if self._masters else self._root.parameters()
        most = self.settings.max_grad_norm or float("inf")
        norm = float(sharding.whole(self.accelerator.clip_grad_norm_(trained, most)))
        rates = [group["lr"] for group in self._optimizer.param_groups]
        try:
            check_step(name, loss, norm)
            check_rate(name, max(rates) * lr_scale)
            check_weights(self.model, f"before the step of {name!r}")
        except NonFiniteError:
            self._zero_grad()
            raise
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * lr_scale
        self._optimizer.step()
        self._masters.round()
        self._zero_grad()
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return norm

    def _zero_grad(self) -> None:
        self._optimizer.zero_grad()
        self._masters.drop_gradients()

    def _scorer(self, batch: Batch, *, student: LogitMixture, teacher: LogitMixture, train: Role | None) -> Scorer:
        return Scorer(
            batch,
            student=student,
            teacher=teacher,
            train=train,
            temperature=self.temperature,
            chunk_tokens=self._chunk_tokens,
            path=self.path,
            analytic=True,
        )

    def _plan(self, examples: Sequence[Example], rows: Sequence[int]) -> list[MicroBatch]:
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        return plan(examples, rows, self._limits, rank=rank, world=world)

    def _collate(self, examples: Sequence[Example], micro: MicroBatch) -> Batch:
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        return collate([examples[row] for row in micro.rows], device=self.accelerator.device, dtype=dtype)

    def _no_sync_until_last(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients of masters are summed over ranks by :meth:`_step`, in fp32; others by the last backward pass.

        In shards every backward pass sums them: whole gradients would take 4 bytes a weight between the passes.
        """
        synced = self._sharded or (last and not self._masters)
        return contextlib.nullcontext() if synced else self.accelerator.no_sync(self._root)

    def _gather(self, mine: list[Item]) -> list[Item]:
        return [item for part in gather(self.ranks, "results of rows", mine) for item in part]

    def _sum_over_ranks(self, sums: dict[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1:
            return sums
        names = sorted(sums)
        values = torch.tensor([sums[n] for n in names], dtype=torch.float64, device=self.accelerator.device)
        return dict(zip(names, self.accelerator.reduce(values, "sum").tolist(), strict=True))

    def _models(self) -> list[tuple[str, Any]]:
        """The models of both roles, each once, with what messages call them."""
        found: dict[int, tuple[str, Any]] = {}
        for name, weights_of in zip(("model", "teacher"), ROLES, strict=True):
            for model, _ in self.teacher.mixture(weights_of):
                found.setdefault(id(model), (name, model))
        return list(found.values())

    def _find_path(self) -> LearnerPath:
        """The fastest path that gives the numbers of all models; each is compared with itself."""
        share, device = self.settings.share_prefixes, self.accelerator.device  # shards are made after this
        paths = [learner_path(m, name, share_prefixes=share, device=device) for name, m in self._models()]
        if "packed" in paths and set(paths) != {"packed"}:
            for _, model in self._models():
                attention.remove(model)
            paths = [learner_path(model, name, share_prefixes=False) for name, model in self._models()]
        return max(paths, key=("packed", "padded", "by_length").index)

    def models(self) -> dict[str, nn.Module]:
        """The modules whose logits the two roles are made of, by what messages call them."""
        return {name: model for name, model in self._models() if isinstance(model, nn.Module)}

    @property
    def shares_prefixes(self) -> bool:
        """Whether rows that begin alike share one pass over their beginning."""
        return self.path == "packed"

    def _checked_path(self) -> LearnerPath:
        self._check_models()
        return self._find_path()

    def _check_models(self) -> None:
        for name, model in self._models():
            check_head(model, name, next(model.parameters()).device)
            check_causal(model, name)
        check_backward(self.model)


class LearnerPolicy:
    """The policy of a learner on Accelerate, or of a teacher that is a model of its own.

    Raises ValueError for a teacher that mixes two models, or that is the live model with another adapter.
    """

    def __init__(self, learner: AccelerateLearner, model: ModelName):
        self._learner = learner
        self._model = _one_model(learner.teacher, model)

    @property
    def version(self) -> int:
        return self._learner.version

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return self._learner.call(function, self._model, *arguments)

    def call_together(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return self._learner.call_together(function, self._model, *arguments)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        whole = lora.merged(self._model) if lora.is_attached(self._model) else self._model
        for name, tensor in whole.state_dict().items():
            yield name, tensor.detach()

    def save(self, folder: Path) -> None:
        if self._learner.ranks.rank == 0:
            weights.save(self._model, folder)


def _accelerator(mixed_precision: str, ranks: Ranks) -> Accelerator:
    """Accelerate's view of the same processes: on a CPU it sees one, unless it is asked for the CPU."""
    on_cpu = ranks.world > 1 and not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=on_cpu)
    if accelerator.num_processes != ranks.world:
        raise ConfigError(
            "Accelerate does not see the processes that were started",
            got=f"{accelerator.num_processes} processes",
            expected=f"{ranks.world}, as WORLD_SIZE says",
            do="Start them with torchrun.",
        )
    return accelerator


def _one_model(teacher: TeacherWeights, model: ModelName) -> Any:
    """The module whose weights these are.  Raises ValueError if there is none."""
    (module, _), *others = teacher.mixture(model)
    if others or not isinstance(module, nn.Module):
        raise ValueError(f"the {model!r} weights are no model of their own, so no engine can load them")
    return module


def _optimizer(parameters: Sequence[nn.Parameter], settings: OptimSettings) -> torch.optim.Optimizer:
    if not parameters:
        raise ModelError(
            "the model has no weight to train", got="requires_grad False everywhere", do="Set it where it should learn."
        )
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=betas, weight_decay=settings.weight_decay)
