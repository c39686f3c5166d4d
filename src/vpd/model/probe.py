"""What a model can do, found by trying: which paths give its own numbers, and whether it is supported at all.

Before anything is trained, learner and engine are each compared with the untouched model: ``model(input_ids).logits``
of one row at a time, under the attention that it came with.  The rows have several lengths, side by side; the longest
crosses every window, chunk and top-k of the configuration, so that a path that ignores one of them is found out.  The
first path that gives the model's numbers is taken; where none does, the model is refused.

Dimension legend: N compared tokens, V vocabulary.
"""

import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vpd.errors import ModelError
from vpd.model import attention, forward, head, lora
from vpd.model.decoding import EnginePath, decoder_for
from vpd.model.difference import Difference, are_numbers, difference_of
from vpd.model.packing import Layout, in_groups
from vpd.model.passes import LearnerPath, last_hidden
from vpd.model.widened import NARROW, widened, wider_type
from vpd.types import Tokens

LOG = logging.getLogger("vpd")
Compute: TypeAlias = Callable[[Any], list[Tensor]]  # the logits of the rows by a path
SHORTEST = 24  # tokens of the longest prompt, if the configuration has nothing to cross
LONGEST = 4096  # windows beyond it are not crossed: the fast paths are then refused
BEYOND = 18  # tokens of the longest row after what is crossed
#: Settings whose number a row must exceed to show what they do.
CROSSED = re.compile(
    r"window|chunk|index_topk|topk_tokens|block_size|block_topk|local_attention|floor|compress_rat|budget|rel_extent"
)
#: Settings that count blocks of tokens, and those that say how many tokens a block has (MiniMax M3, DeepSeek V4).
COUNTS_BLOCKS = re.compile(r"index_topk|block_topk|budget")
SIZE_OF_BLOCKS = re.compile(r"block_size|compress_rat")
#: RoPE that is scaled by the length of the longest row in a pass.
SCALED_BY_LENGTH = {"longrope", "dynamic"}


@dataclass(frozen=True)
class Rows:
    """The rows of a probe: prompts, and the tokens that follow."""

    prompts: list[Tokens]
    completions: list[Tokens]

    @property
    def masks(self) -> list[list[bool]]:
        """Every token of every completion."""
        return [[True] * len(completion) for completion in self.completions]

    def __iter__(self) -> Iterator[tuple[Tokens, Tokens]]:
        return zip(self.prompts, self.completions, strict=True)


@torch.no_grad()
def learner_path(
    model: Any, name: str = "model", *, share_prefixes: bool = True, device: torch.device | None = None
) -> LearnerPath:
    """The fastest path that gives the log-probs of rows computed alone; ``name`` is the model's in messages.

    ``device`` is where it will be trained, if not where it is: packed rows are tried in the form that they have there.

    Switches the model's attention to :func:`vpd.model.attention.attend` where packed rows are right.
    ``share_prefixes`` False: packed rows are not tried.  Raises ModelError where no path is right.  A model whose own
    logits are no numbers, as of weights that a step has broken, is computed one length at a time, with a warning.
    """
    rows = _learner_rows(model)
    counts = [len(completion) for completion in rows.completions]
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        probe = _Probe(model, f"the learner's passes of the {name}", rows, counts)
        if not probe.has_numbers:
            LOG.warning("%s: by_length, because its own logits are no numbers", probe.what)
            return "by_length"
        paths: list[LearnerPath] = ["by_length"]
        if not forward.rope_types(model) & SCALED_BY_LENGTH:
            paths = ["packed", "padded", "by_length"] if share_prefixes else ["padded", "by_length"]
        grouped = device is not None and attention.computes_groups(device)
        return probe.first_right(paths, lambda path: _learner_logits(model, rows, path, grouped=grouped))


@torch.no_grad()
def engine_path(model: Any) -> EnginePath:
    """The fastest way to decode that gives the logits of a forward pass over each row alone.

    Switches the model's attention to :func:`vpd.model.attention.attend` where shared prompts are right.  Raises
    ModelError where no way is right.
    """
    rows = _engine_rows(model)
    counts = [len(completion) + 1 for completion in rows.completions]
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        probe = _Probe(model, "the engine's passes of the model", rows, counts)
        if not probe.has_numbers:
            raise ModelError(
                f"the logits of the model ({_name(model)}) are not finite",
                do="Its weights are damaged, or too large for the numbers that it computes in (model.dtype).",
            )
        paths: list[EnginePath] = ["recomputed"]
        if not forward.rope_types(model) & SCALED_BY_LENGTH:
            paths = ["shared", "cached", "cached_by_length", "recomputed"]
        return probe.first_right(paths, lambda path: _decoded_logits(model, rows, path))


@torch.no_grad()
def check_head(model: Any, name: str, device: torch.device) -> None:
    """Raise ModelError unless the logits of ``model`` are a function that we know of head(hidden states).

    ``name`` is the model's in the message.  The function is compared on numbers of every size, put in the place of the
    head's results, because a soft cap does not show on the small logits of a young model.
    """
    ids = torch.arange(4, device=device)[None] % _vocabulary(model)
    own = model.get_output_embeddings()
    if own is None:
        raise ModelError(f"the {name} ({_name(model)}) has no head that gives logits", do="Take another model.")
    seen: list[Tensor] = []

    def replace(module: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        seen.extend([inputs[0], torch.linspace(-200, 200, output.numel()).reshape(output.shape).to(output)])
        return seen[1]

    hook = own.register_forward_hook(replace)
    try:
        with attention.untouched(model):
            logits = model(**forward.accepted(model, input_ids=ids, use_cache=False)).logits
    except forward.RAISED as error:
        raise ModelError(f"the {name} ({_name(model)}) cannot be run", got=_first_line(error)) from error
    finally:
        hook.remove()
    if logits.shape[-1] > len(model.get_input_embeddings().weight):
        raise ModelError(
            f"the {name} ({_name(model)}) gives more tokens than it reads", got=f"{logits.shape[-1]} logits"
        )
    known = head.logit_function(model)
    if len(seen) != 2 or logits.shape != seen[1].shape or not _close(known(seen[1] / head.scale_before(model)), logits):
        raise ModelError(
            f"the {name} ({_name(model)}) changes its logits after the head in a way that is not known",
            expected="logits that are head(hidden states), multiplied or softly capped",
        )


@torch.no_grad()
def check_causal(model: Any, name: str) -> None:
    """Raise ModelError if logits of ``model`` depend on later tokens (XLNet, CPM-Ant): such a model cannot answer.

    ``name`` is the model's in the message.  Of a model whose logits are no numbers without them too, nothing is said.
    """
    try:
        with attention.untouched(model):
            difference = _of_later_tokens(model, model.dtype)
            if difference is not None and difference.may_be_rounding(model.dtype) and (dtype := wider_type(model)):
                with contextlib.suppress(*forward.RAISED), widened(model, dtype):  # else what was seen before counts
                    difference = _of_later_tokens(model, dtype)
    except forward.RAISED as error:
        raise ModelError(f"the {name} ({_name(model)}) cannot be run", got=_first_line(error)) from error
    if difference is not None:
        raise ModelError(
            f"the {name} ({_name(model)}) is not causal: what it says of a token depends on the tokens after it",
            got=f"{difference}, with and without 3 more tokens",
            do="Take a causal language model, or set what makes this one causal in its configuration (is_decoder, "
            "causal).",
        )


def _of_later_tokens(model: Any, dtype: torch.dtype) -> Difference | None:
    """How far the logits of five tokens change with three more after them, in numbers of ``dtype``."""
    ids = _Ids(model)(8)
    device = next(model.parameters()).device
    logits = []
    for row in (ids, ids[:5]):
        inputs = {"input_ids": torch.tensor([row], device=device), "use_cache": False}
        logits.append(model(**forward.accepted(model, **inputs)).logits[0, :5].float())
    return difference_of(logits[:1], logits[1:], dtype) if are_numbers(logits[1]) else None


@torch.enable_grad()
def check_backward(model: Any) -> None:
    """Raise ModelError if ``model`` has no backward pass without dropout (Reformer)."""
    seen: list[Tensor] = []

    def begin(module: Any, inputs: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[0].clone()  # some models add to it in place

    hook = model.get_input_embeddings().register_forward_hook(begin)
    try:
        done = last_hidden(model, [_Ids(model)(4)], [_Ids(model)(2)], [[True, True]], path="by_length")
        torch.autograd.grad(done.hidden_NH.sum(), seen[0])
    except forward.RAISED as error:
        raise ModelError(f"the model ({_name(model)}) cannot be trained", got=_first_line(error)) from error
    finally:
        hook.remove()


def _close(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = 1e-4 if ours.dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)


@dataclass(frozen=True)
class _InWider:
    """Logits [count,V] of each row from a model in more bits than its own."""

    dtype: torch.dtype
    logits: list[Tensor]


class _Probe:
    """One comparison of a model with itself, and what it cost."""

    def __init__(self, model: Any, what: str, rows: Rows, counts: Sequence[int]):
        """``counts`` are the logits that are compared of each row, from its prompt's last token on."""
        self.model = model
        self.what = f"{what} ({_name(model)})"
        self.tokens = sum(len(prompt) + len(completion) for prompt, completion in rows)
        self._begin = time.monotonic()
        self._rows, self._counts = rows, counts
        self._crossed = _crossing(model) <= _longest(model)
        self._own = self._references()
        self._wider: _InWider | None = None

    def _references(self) -> list[Tensor]:
        """Of each row, its logits [count,V] from the untouched model.  Raises ModelError if it cannot be run."""
        logits = []
        try:
            with attention.untouched(self.model):
                for (prompt, completion), count in zip(self._rows, self._counts, strict=True):
                    forward.forget_lengths(self.model)
                    ids = torch.tensor([prompt + completion], device=next(self.model.parameters()).device)
                    whole = self.model(**forward.accepted(self.model, input_ids=ids, use_cache=False)).logits[0]
                    logits.append(whole[len(prompt) - 1 :][:count].float())
        except forward.RAISED as error:
            raise ModelError(f"{self.what}: the model cannot be run", got=_first_line(error)) from error
        return logits

    @property
    def has_numbers(self) -> bool:
        """Whether there is something to compare with."""
        return all(are_numbers(logits) for logits in self._own)

    def first_right(self, paths: Sequence[Any], compute: Compute) -> Any:
        """The first path that gives the model's own logits; one line says why those before it are not taken."""
        refused: list[str] = []
        for path in paths:
            reason = self._why_not(path, compute)
            if reason is None:
                self._report(path, refused)
                return path
            refused.append(f"{path}: {reason}")
        raise ModelError(
            f"{self.what} do not give the model's own log-probs",
            got="; ".join(refused),
            do="Such models are not supported; docs/models.md lists those that are.",
        )

    def _why_not(self, path: Any, compute: Compute) -> str | None:
        fast, installed = path in ("packed", "shared"), attention.is_installed(self.model)
        if fast and not self._crossed:
            return f"it has a window of {_crossing(self.model)} tokens, too many to try"
        if fast and not attention.install(self.model):
            return "its attention cannot be replaced"
        try:
            found = difference_of(compute(path), self._own, self.model.dtype)
            # 16 bits hide mistakes; in float32, the rounding of a model that amplifies it looks like one
            doubtful = self.model.dtype in NARROW if found is None else found.may_be_rounding(self.model.dtype)
            if doubtful and (wider := self._in_wider()) is not None:
                with widened(self.model, wider.dtype):
                    found = difference_of(compute(path), wider.logits, wider.dtype)
            reason = None if found is None else str(found)
        except forward.RAISED as error:  # what models raise when a path is not for them; anything else is a bug
            reason = _first_line(error)
        if reason is not None and fast and not installed:
            attention.remove(self.model)
        return reason

    def _in_wider(self) -> _InWider | None:
        """The references in more bits, None without memory for them or where the model's code asks for 16."""
        dtype = wider_type(self.model)
        if self._wider is None and dtype is not None:
            with contextlib.suppress(ModelError, RuntimeError), widened(self.model, dtype):
                self._wider = _InWider(dtype, self._references())
        return self._wider

    def _report(self, path: Any, refused: Sequence[str]) -> None:
        if refused:
            LOG.warning("%s: %s, because %s", self.what, path, "; ".join(refused))
        seconds = time.monotonic() - self._begin
        checked = f"checked against the model itself ({self.tokens} tokens, {seconds:.1f} s)"
        LOG.info("%s are %s, %s", self.what, path, checked)


def _learner_logits(model: Any, rows: Rows, path: LearnerPath, *, grouped: bool) -> list[Tensor]:
    counted: list[_CountingSegments] = []

    def count_calls(layout: Layout) -> Layout:
        layout = in_groups(layout) if grouped else layout
        counted.append(_CountingSegments(layout.inputs["segments"]))
        return dataclasses.replace(layout, inputs=layout.inputs | {"segments": counted[0]})

    prepare = count_calls if path == "packed" else None
    done = last_hidden(model, rows.prompts, rows.completions, rows.masks, path=path, prepare=prepare)
    if counted and counted[0].calls < model.config.get_text_config().num_hidden_layers:
        raise attention.FastPathError("not every layer is attention that can be replaced")
    logits_NV = forward.logits_of(model, done.hidden_NH).float()
    return list(logits_NV.split([len(completion) for completion in rows.completions]))


class _CountingSegments:
    """Packed segments that count how often a layer attends to them."""

    def __init__(self, segments: attention.PackedSegments | attention.GroupedSegments):
        self._segments = segments
        self.calls = 0

    def attend(self, *arguments: Any, **options: Any) -> Tensor:
        self.calls += 1
        return self._segments.attend(*arguments, **options)


def _decoded_logits(model: Any, rows: Rows, path: EnginePath) -> list[Tensor]:
    """Logits of every row, fed its own completion; rows leave as soon as theirs ends, as in sampling."""
    device = next(model.parameters()).device
    decoder = decoder_for(model, rows.prompts, path)
    found = [[logits_V] for logits_V in decoder.logits_BV]
    running = list(range(len(found)))
    for step in range(max(map(len, rows.completions))):
        left = [place for place, row in enumerate(running) if len(rows.completions[row]) > step]
        if len(left) < len(running):
            decoder.keep(torch.tensor(left, device=device))
            running = [running[place] for place in left]
        tokens = torch.tensor([rows.completions[row][step] for row in running], device=device)
        for row, logits_V in zip(running, decoder.step(tokens), strict=True):
            found[row].append(logits_V)
    return [torch.stack(logits).float() for logits in found]


def _learner_rows(model: Any) -> Rows:
    """Two rows of one long prompt, one that leaves it before its end, and a short one."""
    long, ids = _long_prompt(model), _Ids(model)
    prompt = ids(long)
    other = prompt[: long - 6] + ids(3)
    return Rows([prompt, prompt, other, ids(3)], [ids(8), ids(5), ids(14), ids(4)])


def _engine_rows(model: Any) -> Rows:
    """Two rows of one long prompt, one that crosses the last window while it decodes, and short ones."""
    long, ids = _long_prompt(model), _Ids(model)
    prompt = ids(long)
    return Rows([prompt, ids(long - 6), prompt, ids(2), ids(5)], [ids(6), ids(9), ids(3), ids(7), ids(1)])


def _long_prompt(model: Any) -> int:
    return max(min(max(_crossing(model) + 4, SHORTEST), _longest(model) + 4), 8)


class _Ids:
    """Random tokens, the same at every start; the first few, which are often special, are left out."""

    def __init__(self, model: Any):
        self._vocabulary = _vocabulary(model)
        self._draw = torch.Generator().manual_seed(0)

    def __call__(self, count: int) -> Tokens:
        low = min(3, self._vocabulary - 1)
        return tuple(torch.randint(low, self._vocabulary, (count,), generator=self._draw).tolist())


def _crossing(model: Any) -> int:
    """The largest window, chunk or top-k of the configuration that rows can exceed, in tokens; 0: none."""
    config = model.config.get_text_config().to_dict()
    full = set(config.get("layer_types") or ()) == {"full_attention"}
    named = [(name, value) for name, value in _whole_numbers(config) if not (full and "window" in name)]
    numbers = [value for name, value in named if CROSSED.search(name)]
    block = max((value for name, value in named if SIZE_OF_BLOCKS.search(name)), default=1)
    numbers += [value * block for name, value in named if COUNTS_BLOCKS.search(name)]
    limit = forward.longest_input(model)
    return max((value for value in numbers if limit is None or value < limit), default=0)


def _whole_numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """The whole numbers of a configuration, also those in mappings and lists, with the names that lead to them."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _whole_numbers(part, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _whole_numbers(part, name)
    elif type(value) is int:
        yield name, value


def _longest(model: Any) -> int:
    """The largest number that rows of a probe exceed."""
    limit = forward.longest_input(model)
    return LONGEST if limit is None else min(LONGEST, limit - 4 - BEYOND)


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _name(model: Any) -> str:
    """The class of a model, with an adapter or without."""
    return type(model.model if isinstance(model, lora.View) else model).__name__


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
