"""The learner on Accelerate: micro-batches, one root module, one optimiser, any number of processes.

Every rank is given the full list of examples (their weights already carry the global normalisation), takes its
share, and the gradients are *summed* over ranks.
"""

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import get_scheduler

from vpd.errors import ConfigError, ModelError, TrainingError
from vpd.learners import Measure, ModelName, Objective, Terms, weights
from vpd.learners.teachers import TeacherSettings, TeacherWeights
from vpd.model import attention, head, lora
from vpd.model.activation_checkpointing import Checkpointing, active, enable
from vpd.model.packing import lay_out, tokens_of
from vpd.model.scorer import Batch, LogitMixture, Role, Scorer, collate
from vpd.types import Example, Metrics

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """The optimiser, its schedule, and how much is held in memory at once."""

    learning_rate: Annotated[float, "peak learning rate"] = 1e-5
    optimizer: Annotated[Literal["adamw", "sgd"], "torch optimiser"] = "adamw"
    adam_beta1: Annotated[float, "AdamW's first-moment decay"] = 0.9
    adam_beta2: Annotated[float, "AdamW's second-moment decay"] = 0.999
    weight_decay: Annotated[float, "decoupled weight decay"] = 0.01
    max_grad_norm: Annotated[float | None, "gradient clipping by global norm; null for none"] = 1.0
    lr_scheduler_type: Annotated[str, "a scheduler of transformers, counted in iterations"] = "constant_with_warmup"
    warmup_steps: Annotated[int, "iterations of linear warm-up"] = 0
    micro_batch_size: Annotated[int, "most rows per forward pass and process"] = 16
    max_tokens_per_microbatch: Annotated[
        int | None,
        "most tokens per forward pass, shared ones counted once; a longer row stands alone; null: any number",
    ] = 2048
    chunk_tokens: Annotated[
        int | None, "tokens that reach the head at once; null: by vocabulary (64 MiB of logits)"
    ] = None
    share_prefixes: Annotated[
        bool, "rows that begin alike share one pass over their beginning, where the model allows it"
    ] = True
    gradient_checkpointing: Annotated[
        Checkpointing,
        "what the backward pass computes again: nothing, all but matrix products (selective) or whole layers (full)",
    ] = "none"
    mixed_precision: Annotated[Literal["no", "bf16"], "autocast of matrix products; weights stay fp32"] = "no"

    def __post_init__(self) -> None:
        for name, low in (("learning_rate", 0.0), ("micro_batch_size", 1), ("warmup_steps", 0), ("weight_decay", 0.0)):
            if getattr(self, name) < low:
                raise ConfigError(f"optim.{name} is too small", got=getattr(self, name), expected=f"at least {low}")
        if self.max_tokens_per_microbatch is not None and self.max_tokens_per_microbatch < 1:
            raise ConfigError(
                "optim.max_tokens_per_microbatch is too small",
                got=self.max_tokens_per_microbatch,
                expected="at least 1, or null for no bound",
            )
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ConfigError(
                "optim.max_grad_norm must be positive", got=self.max_grad_norm, do="Use null for no clipping."
            )


class _Root(nn.Module):
    """The one prepared module: objectives run inside its ``forward``, as sharded training needs."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[Scorer, Batch], Result], scorer: Scorer, batch: Batch) -> Result:
        return function(scorer, batch)


class AccelerateLearner:
    """Trains a causal language model of transformers: all of it, or the adapter that :func:`lora.attach` put into it.

    ``temperature`` is the rollouts': every log-prob is of logits / temperature.  ``external`` is GKD's teacher;
    ``keep_initial`` keeps the initial weights (fixed prior).  ``total_iterations`` is for decaying schedules.
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
        accelerator: Accelerator | None = None,
    ):
        self.settings = settings
        self.accelerator = accelerator or Accelerator(mixed_precision=settings.mixed_precision)
        self.model = model.eval().to(self.accelerator.device)  # no dropout: a policy is one distribution
        self._adapted = lora.is_attached(model)
        if external is not None:
            external.to(self.accelerator.device)
        self.teacher = TeacherWeights(
            teacher or TeacherSettings(), self.model, external=external, keep_initial=keep_initial
        )
        self.temperature = temperature
        enable(self.model, settings.gradient_checkpointing)
        self._check_head()
        self.shares_prefixes = settings.share_prefixes and self._can_share()
        self._chunk_tokens = settings.chunk_tokens or max((1 << 24) // model.config.get_text_config().vocab_size, 1)
        optimizer = _optimizer(self.model, settings)
        scheduler = get_scheduler(
            settings.lr_scheduler_type,
            optimizer,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=total_iterations or None,
        )
        self._root, self._optimizer = self.accelerator.prepare(_Root(self.model), optimizer)
        self._scheduler = scheduler

    def score(self, examples: Sequence[Example], measure: Measure, *, model: ModelName = "live") -> list[list[float]]:
        mixture = self.teacher.mixture(model)
        mine: list[tuple[int, list[float]]] = []
        with torch.no_grad(), self.accelerator.autocast():
            for rows, batch in self._micro_batches(list(enumerate(examples))):
                scorer = self._scorer(batch, student=mixture, teacher=mixture, train=None)
                values_BT = self._root(measure, scorer, batch)
                for (index, example), values in zip(rows, values_BT.tolist(), strict=True):
                    if index >= 0:
                        mine.append((index, values[: len(example.completion)]))
        gathered = gather_object(mine) if self.accelerator.num_processes > 1 else mine
        return [values for _, values in sorted(gathered)]

    def update(
        self,
        name: str,
        examples: Sequence[Example],
        objective: Objective,
        *,
        train: Role = "student",
        lr_scale: float = 1.0,
    ) -> Metrics:
        entering = [(i, example) for i, example in enumerate(examples) if any(example.loss_weights.values())]
        tokens = sum(sum(example.mask) for _, example in entering)
        metrics: Metrics = {f"{name}/rows": float(len(entering)), f"{name}/tokens": float(tokens)}
        if not entering:
            return metrics
        teacher = self.teacher.mixture("live" if train == "teacher" else "teacher")
        totals: dict[str, float] = {"computed": 0.0, "padding": 0.0}
        micro_batches = list(self._micro_batches(entering))
        self._optimizer.zero_grad()
        for number, (rows, batch) in enumerate(micro_batches, 1):
            last = number == len(micro_batches)
            with self._no_sync_until_last(last), self.accelerator.autocast(), active(self.model):
                scorer = self._scorer(batch, student=self.teacher.mixture("live"), teacher=teacher, train=train)
                terms = self._root(objective, scorer, batch)
                loss = _weigh(terms, [example for _, example in rows], totals)
                totals["computed"] += scorer.tokens
                totals["padding"] += scorer.padding
                self.accelerator.backward(loss * self.accelerator.num_processes)
        totals = self._sum_over_ranks(totals)
        norm = self._step(name, totals["loss"], lr_scale)
        metrics |= {f"{name}/loss": totals.pop("loss"), f"{name}/grad_norm": norm}
        metrics[f"{name}/padding"] = totals.pop("padding") / max(totals.pop("computed"), 1.0)
        metrics |= {f"{name}/{stat}": total / max(tokens, 1) for stat, total in totals.items()}
        return metrics

    def in_one_pass(self, examples: Sequence[Example]) -> bool:
        return self.accelerator.num_processes == 1 and sum(map(len, self._parts(list(enumerate(examples))))) == 1

    def end_iteration(self) -> None:
        with warnings.catch_warnings():  # an iteration without any row takes no optimiser step, and that is meant
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self._scheduler.step()
        self.teacher.end_iteration()

    def weights(self) -> Any:
        return self.model

    @property
    def learning_rate(self) -> float:
        """The schedule's rate of the iteration at hand."""
        return float(self._scheduler.get_last_lr()[0])

    def state(self) -> dict[str, Any]:
        return {
            "model": lora.state(self.model) if self._adapted else self.accelerator.get_state_dict(self._root),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "teacher": self.teacher.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        if self._adapted:
            lora.restore(self.model, state["model"])
        else:
            self.accelerator.unwrap_model(self._root).load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self.teacher.restore(state["teacher"])

    def save(self, folder: Path) -> None:
        weights.save(self.model, folder)
        torch.save({name: part for name, part in self.state().items() if name != "model"}, folder / "state.pt")

    def load(self, folder: Path) -> None:
        prefix = "" if self._adapted else "model."  # of the root's one child
        model = {prefix + name: tensor for name, tensor in weights.read(self.model, folder).items()}
        self.restore({"model": model, **torch.load(folder / "state.pt", map_location="cpu", weights_only=True)})

    def export(self, folder: Path) -> None:
        weights.export(self.model, folder)

    def _step(self, name: str, loss: float, lr_scale: float) -> float:
        """Clip and step at ``lr_scale`` times the schedule's rate; the gradient norm before clipping."""
        limit = self.settings.max_grad_norm
        norm = float(self.accelerator.clip_grad_norm_(self._root.parameters(), limit or float("inf")))
        if not torch.isfinite(torch.tensor([norm, loss])).all():
            self._optimizer.zero_grad()
            raise TrainingError(
                f"the update {name!r} is not finite",
                got=f"loss {loss}, gradient norm {norm}",
                do="No step was taken. Lower optim.learning_rate or look at the last rollouts.",
            )
        rates = [group["lr"] for group in self._optimizer.param_groups]
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * lr_scale
        self._optimizer.step()
        self._optimizer.zero_grad()
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return norm

    def _scorer(self, batch: Batch, *, student: LogitMixture, teacher: LogitMixture, train: Role | None) -> Scorer:
        return Scorer(
            batch,
            student=student,
            teacher=teacher,
            train=train,
            temperature=self.temperature,
            chunk_tokens=self._chunk_tokens,
            share_prefixes=self.shares_prefixes,
            analytic=head.is_plain(self.model.get_output_embeddings()),
        )

    def _micro_batches(self, rows: Sequence[tuple[int, Example]]) -> Iterator[tuple[list[tuple[int, Example]], Batch]]:
        """This rank's share of the rows as (rows, batch); rows of one prompt, else of similar length, stand together.

        Rows with a teacher's prompt and rows without never share a batch.  Every rank gets the same number of batches
        of each kind, so that collectives match: a share that comes out short is filled up with batches of one row of no
        weight and position -1.
        """
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        for parts in self._parts(rows):
            for part in parts:
                yield part, collate([example for _, example in part], device=self.accelerator.device, dtype=dtype)

    def _parts(self, rows: Sequence[tuple[int, Example]]) -> Iterator[list[list[tuple[int, Example]]]]:
        """The micro-batches of :meth:`_micro_batches` as rows, for each of the two kinds."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        for told in (True, False):
            kind = [row for row in rows if (row[1].teacher_prompt is not None) == told]
            ordered = sorted(kind, key=self._neighbours)
            size = -(-len(ordered) // world)
            shares = [self._split(ordered[start : start + size]) for start in range(0, size * world, size or 1)]
            most = max(map(len, shares), default=0)
            filler = [[(-1, dataclasses.replace(row[1], loss_weights={}))] for row in ordered[:1]]
            yield shares[rank] + filler * (most - len(shares[rank])) if shares else []

    def _split(self, rows: Sequence[tuple[int, Example]]) -> list[list[tuple[int, Example]]]:
        """Rows as micro-batches within the bounds; those of one prompt stay together where they fit into one."""
        parts: list[list[tuple[int, Example]]] = []
        for _, group in itertools.groupby(rows, key=lambda row: row[1].prompt if self.shares_prefixes else row[0]):
            together = list(group)
            if parts and self._fits([*parts[-1], *together]):
                parts[-1] += together
                continue
            parts.append([])
            for row in together:
                if parts[-1] and not self._fits([*parts[-1], row]):
                    parts.append([])
                parts[-1].append(row)
        return parts

    def _fits(self, rows: Sequence[tuple[int, Example]]) -> bool:
        limit = self.settings.max_tokens_per_microbatch
        if len(rows) > self.settings.micro_batch_size or limit is None:
            return len(rows) <= self.settings.micro_batch_size
        hidden_size = self.model.config.get_text_config().hidden_size if self.shares_prefixes else None
        completions = [example.completion for _, example in rows]
        prompts = [[example.prompt for _, example in rows]]
        prompts.append([example.teacher_prompt or example.prompt for _, example in rows])
        return all(tokens_of(read, completions, hidden_size) <= limit for read in prompts)

    def _neighbours(self, row: tuple[int, Example]) -> tuple[Any, ...]:
        """What the rows are sorted by."""
        index, example = row
        if self.shares_prefixes:
            return len(example.prompt), example.prompt, len(example.completion), index
        return len(example.teacher_prompt or example.prompt) + len(example.completion), len(example.prompt), index

    def _no_sync_until_last(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self._root)

    def _sum_over_ranks(self, totals: dict[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1:
            return totals
        names = sorted(totals)
        values = torch.tensor([totals[n] for n in names], dtype=torch.float64, device=self.accelerator.device)
        return dict(zip(names, self.accelerator.reduce(values, "sum").tolist(), strict=True))

    @torch.no_grad()
    def _can_share(self) -> bool:
        """Whether all models compute branches as if they stood alone; where one does not, says so once."""
        for model in {id(m): m for w in ("live", "teacher") for m, _ in self.teacher.mixture(w)}.values():
            windowed = "sliding_attention" in model.config.get_text_config().to_dict().get("layer_types", ())
            if windowed or not attention.install(model) or not _tree_equals_chain(model, self.accelerator.device):
                warnings.warn(f"optim.share_prefixes is off: {type(model).__name__} takes no branches", stacklevel=2)
                return False
        return True

    @torch.no_grad()
    def _check_head(self) -> None:
        """Log-probs are taken from hidden states and the head alone: refuse a model that does more in between."""
        for name, model in [("model", self.model), *(("teacher", m) for m, _ in self.teacher.mixture("teacher"))]:
            ids = torch.arange(4, device=self.accelerator.device)[None]
            whole = model(input_ids=ids, use_cache=False).logits
            ours = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
            if whole.shape != ours.shape or not torch.allclose(whole, ours, rtol=1e-3, atol=1e-3):
                raise ModelError(
                    f"the {name} ({type(model).__name__}) changes its logits after the head (soft-capping or scaling)",
                    do="Such models are not supported yet; take one whose logits are head(hidden states).",
                )


def _tree_equals_chain(model: Any, device: torch.device) -> bool:
    """Whether two branches of one pack give the hidden states that two rows of their own give."""
    rows = [(tuple(range(5)), (1, 2, 3)), ((*range(4), 2), (3, 1))]
    vocabulary = model.config.get_text_config().vocab_size
    prompts = [tuple(token % vocabulary for token in prompt) for prompt, _ in rows]
    completions = [tuple(token % vocabulary for token in completion) for _, completion in rows]
    mask = [[True] * len(completion) for completion in completions]
    hidden = []
    for size in (None, 1 << 20):
        layout = lay_out(prompts, completions, mask, hidden_size=size, device=device, dtype=model.dtype)
        states = model.base_model(**layout.inputs, use_cache=False).last_hidden_state
        hidden.append(states[layout.row_N, layout.place_N])
    return bool((hidden[0] - hidden[1]).norm() <= 1e-2 * hidden[0].norm())


def _weigh(terms: Terms, examples: Sequence[Example], totals: dict[str, float]) -> Tensor:
    """The loss of a micro-batch; adds the loss, each term and each stat to ``totals``."""
    loss: Tensor | None = None
    for term, value_B in terms.losses.items():
        weight_B = torch.tensor(
            [e.loss_weights.get(term, 0.0) for e in examples], dtype=value_B.dtype, device=value_B.device
        )
        part = (weight_B * value_B).sum()
        loss = part if loss is None else loss + part
    unknown = {term for e in examples for term in e.loss_weights} - set(terms.losses)
    if loss is None or unknown:
        raise ValueError(f"weights name terms that the objective does not return: {sorted(unknown)}")
    totals["loss"] = totals.get("loss", 0.0) + float(loss.detach())
    for stat, value_B in terms.stats.items():
        enters_B = torch.tensor([any(e.loss_weights.values()) for e in examples], device=value_B.device)
        totals[stat] = totals.get(stat, 0.0) + float(value_B[enters_B].sum())
    return loss


def _optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=betas, weight_decay=settings.weight_decay)
