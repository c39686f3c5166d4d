"""Tiny base models: 0.24 M parameters, with words as tokens.

They are made by supervised warm-up on *imperfect* data, so that something is left to learn: the demo's base knows the
operations by name, follows a hint most of the time, and knows a rule's letter little better than by chance.  The others
(:data:`BASES`) know more or less, for ``vpd reproduce``.  ``build`` makes a base; :mod:`vpd.bundled` loads the shipped
ones.
"""

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vpd.bundled import ASSETS, write_hashes
from vpd.envs.digits import LENGTH, NOTHING, OPERATIONS, RULES, apply
from vpd.prompts import Prompter
from vpd.prompts.settings import PromptSettings, save_settings
from vpd.run_folder.checkpoint import save_model
from vpd.types import Section, Task

FOLDER = ASSETS / "tiny"
SEED = 0
VERSION = 1  # of this code: raise it when the same recipe gives other weights
TEMPLATE = PromptSettings(
    layout="block",
    demonstration_header=" . a correct solution : ",
    feedback_header=" . feedback : ",
    closing="",
    cut_marker=" ",
)
SPECIALS = ("<pad>", "<eos>", "<unk>", "<user>", "<assistant>")
WORDS = ["apply", "rule", "to", "means", "right", "wrong", "feedback", "a", "correct", "solution", ":", "."]
MORE_WORDS = [NOTHING, "attempt", "critique"]
CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant> {{ m.content }} {% else %}"
    "<user> {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
STEPS = (130, 170)  # phase 1: operations and hints, exact answers; phase 2: everything, imperfect answers


@dataclass(frozen=True, kw_only=True)
class Base:
    """The recipe of a base: rows of each kind per step of the two phases, and the quality of their answers.

    ``knows``: share of right digits where only the rule's letter is given; ``follows`` and ``copies``: share of digits
    that follow a hint or a demonstration; ``criticises``: share of critiques that name the true operation; ``silent``:
    share of hints that name no operation (the answer is then the student's own); ``more_words``: add the vocabulary of
    critiques; ``start``: the base of the same seed whose weights the warm-up starts from.
    """

    first: Mapping[str, int]
    then: Mapping[str, int]
    knows: float
    follows: float = 0.7
    copies: float = 0.7
    criticises: float = 0.6
    silent: float = 0.0
    length: int = LENGTH
    steps: tuple[int, int] = STEPS
    more_words: bool = False
    start: str | None = None


_ALL = {"student": 80, "skill": 16, "hint": 80, "demonstration": 32, "critic": 40}
_RULES, _ANSWERS = {"skill": 96, "student": 64}, {"student": 128, "skill": 32}
BASES: dict[str, Base] = {
    "tiny": Base(
        first={"skill": 96, "hint": 96},
        then={"student": 80, "skill": 16, "hint": 80, "demonstration": 40},
        knows=0.25,
    ),
    "tiny-mid": Base(first={"skill": 96, "hint": 96, "critic": 32}, then=_ALL, knows=0.55, silent=0.2, more_words=True),
    "tiny-cold": Base(  # never shown a teacher's format
        first=_RULES, then=_ANSWERS, knows=0.55, more_words=True
    ),
    "tiny-long": Base(
        first={"student": 80, "hint": 32},
        then={"student": 96, "hint": 64},
        knows=0.65,
        follows=0.8,
        length=10,
        steps=(180, 150),
        start="tiny",
    ),
    "tiny-expert": Base(first=_RULES, then=_ANSWERS, knows=0.95),
    "tiny-mid-expert": Base(first=_RULES, then=_ANSWERS, knows=0.95, more_words=True),
    "tiny-long-expert": Base(first={"student": 160}, then={"student": 160}, knows=0.95, length=10, start="tiny-long"),
}


def make_tokenizer(more_words: bool = False) -> Any:
    """A word-level tokenizer of fewer than a hundred words, with a chat template."""
    words = [*SPECIALS, *"0123456789", *RULES, *OPERATIONS, *WORDS, *(MORE_WORDS if more_words else [])]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
        model_max_length=96,
    )
    fast.chat_template = CHAT
    return fast


def make_model(tokenizer: Any, seed: int) -> Any:
    """A Llama model of two layers with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=96,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


class WarmUpData:
    """Supervised examples: prompts as training renders them, answers in which some digits are wrong.

    Each kind of prompt is rendered once, with zeros for digits, and then filled in, which is much faster.
    """

    def __init__(self, tokenizer: Any, base: Base, seed: int):
        self._ids: dict[str, int] = tokenizer.get_vocab()
        self._base = base
        self._prompter = Prompter(tokenizer, TEMPLATE, window=None, max_completion_length=base.length)
        self._random = random.Random(seed)
        self._templates: dict[tuple[str, ...], Sequence[int]] = {}

    def batch(self, kind: str, count: int, *, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """``count`` rows of one kind as prompt + answer ids [count, L], and the answers' ids [count, T]."""
        return self._tensors([self._row(kind, exact) for _ in range(count)])

    def _tensors(self, rows: Sequence[tuple[list[int], str]]) -> tuple[torch.Tensor, torch.Tensor]:
        answers = torch.tensor([[self._ids[word] for word in answer.split()] for _, answer in rows])
        return torch.cat([torch.tensor([prompt for prompt, _ in rows]), answers], 1), answers

    def test_rows(self, kind: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Like :meth:`batch`, with the right answer; hint and demonstration are right too (``silent``: no hint)."""
        return self._tensors([self._test_row(kind) for _ in range(count)])

    def _test_row(self, kind: str) -> tuple[list[int], str]:
        base, rule = self._base, self._random.choice(list(RULES))
        digits, zeros = [self._random.randrange(10) for _ in range(base.length)], _words([0] * base.length)
        right, task = apply(RULES[rule], digits), f"apply rule {rule} to {_words([0] * base.length)}"
        match kind:
            case "student":
                return self._prompt(digits, task), _words(right)
            case "hint" | "silent":
                hint = hint_text(rule, RULES[rule] if kind == "hint" else NOTHING)
                return self._prompt(digits, task, hint), _words(right)
            case "demonstration":
                return self._prompt([*digits, *right], task, zeros, "demonstration"), _words(right)
            case _:
                attempt = map(int, self._mix(RULES[rule], digits, base.knows).split())
                return self._prompt([*digits, *attempt], critic_prompt(task, zeros)), hint_text(rule, RULES[rule])

    def _row(self, kind: str, exact: bool) -> tuple[list[int], str]:
        draw, base = self._random, self._base
        rule, digits = draw.choice(list(RULES)), [draw.randrange(10) for _ in range(base.length)]
        named, zeros = draw.choice(list(OPERATIONS)), _words([0] * base.length)
        if kind == "skill":
            return self._prompt(digits, f"apply {named} to {zeros}"), _words(apply(named, digits))
        task = f"apply rule {rule} to {zeros}"
        if kind == "student":
            return self._prompt(digits, task), self._mix(RULES[rule], digits, base.knows)
        if kind == "hint":
            named = RULES[rule] if draw.random() < 0.3 else named
            if base.silent and not exact and draw.random() < base.silent:
                return self._prompt(digits, task, hint_text(rule, NOTHING)), self._mix(RULES[rule], digits, base.knows)
            return self._prompt(digits, task, hint_text(rule, named)), self._mix(
                named, digits, 1.0 if exact else base.follows
            )
        if kind == "critic":
            attempt = self._mix(RULES[rule], digits, base.knows)
            found = self._or_another(RULES[rule], base.criticises)
            return self._prompt([*digits, *map(int, attempt.split())], critic_prompt(task, zeros)), hint_text(
                rule, found
            )
        answer = self._mix(named, digits, 1.0 if exact else base.copies)
        return self._prompt([*digits, *apply(named, digits)], task, zeros, "demonstration"), answer

    def _prompt(
        self,
        digits: Sequence[int],
        content: str,
        context: str = "",
        kind: Literal["demonstration", "feedback"] = "feedback",
    ) -> list[int]:
        """The student's prompt for ``content``, with a ``context`` the teacher's; digits replace its zeros."""
        key = (content, context, kind)
        if key not in self._templates:
            task = Task(id=content, messages=({"role": "user", "content": content},))
            prompt = (
                self._prompter.build_teacher_prompt(task, [Section(kind=kind, source="warm_up", text=context)])
                if context
                else None
            )
            self._templates[key] = prompt.tokens if prompt else self._prompter.build_student_prompt(task)
        filling = iter(digits)
        zero = self._ids["0"]
        return [zero + next(filling) if token == zero else token for token in self._templates[key]]

    def _mix(self, operation: str, digits: Sequence[int], share: float) -> str:
        """Each digit by ``operation`` with probability ``share``, else by one of the others."""
        names = [self._or_another(operation, share) for _ in digits]
        return _words([apply(name, [digit])[0] for name, digit in zip(names, digits, strict=True)])

    def _or_another(self, operation: str, share: float) -> str:
        others = [name for name in OPERATIONS if name != operation]
        return operation if self._random.random() < share else self._random.choice(others)


def hint_text(rule: str, operation: str) -> str:
    """The feedback that names an operation, as the environment writes it."""
    return f"wrong : rule {rule} means {operation}"


def critic_prompt(task: str, attempt: str, verdict: str = "wrong") -> str:
    """The task of a critic: the task, an attempt and its verdict."""
    return f"{task} . attempt : {attempt} {verdict} . critique"


def warm_up(model: Any, data: WarmUpData, base: Base) -> None:
    """Supervised training, about half a minute on one core."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(sum(base.steps)):
        late = max(0, step - base.steps[0]) / base.steps[1]
        rate = 3e-3 * min(1.0, (step + 1) / 40) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * late)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        sizes = base.then if step >= base.steps[0] else base.first
        optimizer.zero_grad()
        for kind, count in sizes.items():
            ids, answers = data.batch(kind, count, exact=step < base.steps[0])
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, -answers.shape[1] :]
            loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
            (loss * count / sum(sizes.values())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def recipe_hash(name: str) -> str:
    """A hash (8 characters) of the recipe of a base and of the code's :data:`VERSION`."""
    base = BASES[name]
    changed = {f.name: value for f in fields(base) if (value := vars(base)[f.name]) != f.default}
    return hashlib.sha256(f"{VERSION} {changed}".encode()).hexdigest()[:8]


def build(folder: Path, seed: int = SEED, name: str = "tiny", start: Path | None = None) -> Path:
    """Make a base and write it to ``folder``, with prompt settings and hashes; ``start``: initial weights' folder."""
    base = BASES[name]
    tokenizer = make_tokenizer(base.more_words)
    model = make_model(tokenizer, seed) if start is None else LlamaForCausalLM.from_pretrained(start)
    warm_up(model, WarmUpData(tokenizer, base, seed), base)
    save_model(model, tokenizer, folder)
    save_settings(TEMPLATE, folder)
    write_hashes(folder)
    return folder


def _words(digits: Sequence[int]) -> str:
    return " ".join(map(str, digits))
