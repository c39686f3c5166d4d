"""The tiny base of the demo: a quarter of a million parameters that read words.

It is made here by supervised warm-up on *imperfect* data, so that there is something to learn: it knows the operations
by name, follows a hint most of the time, and is right about a rule's letter little more than by chance.  ``build``
makes it anew; ``load_bundled`` checks the shipped copy against its hashes.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vpd.checkpoint import save_model
from vpd.envs.digits import LENGTH, OPERATIONS, RULES, apply
from vpd.errors import ModelError
from vpd.prompts import Prompter, PromptSettings
from vpd.types import Section, Task

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "tiny"
HASHES = "SHA256"
SEED = 0
TEMPLATE = PromptSettings(
    demonstration_header=" . a correct solution : ", feedback_header=" . feedback : ", closing="", cut_marker=" "
)
SPECIALS = ("<pad>", "<eos>", "<unk>", "<user>", "<assistant>")
WORDS = ["apply", "rule", "to", "means", "right", "wrong", "feedback", "a", "correct", "solution", ":", "."]
CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant> {{ m.content }} {% else %}"
    "<user> {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
STEPS = (130, 170)  # phase 1: bare skills and hints, followed exactly; phase 2: everything, imperfectly
PHASE_1 = {"skill": 96, "hint": 96}
PHASE_2 = {"student": 80, "skill": 16, "hint": 80, "demonstration": 40}


def make_tokenizer() -> Any:
    """Words as tokens, well under a hundred of them, with a chat template."""
    words = [*SPECIALS, *"0123456789", *RULES, *OPERATIONS, *WORDS]
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
    """A Llama of two layers with random weights."""
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


class Drill:
    """Imperfect examples: prompts rendered as in training, answers mixed digit by digit."""

    def __init__(self, tokenizer: Any, seed: int, *, knows: float = 0.25, follows: float = 0.7, copies: float = 0.7):
        self._tokenizer = tokenizer
        self._prompter = Prompter(tokenizer, TEMPLATE, window=None, max_completion_length=LENGTH)
        self._random = random.Random(seed)
        self._knows, self._follows, self._copies = knows, follows, copies

    def batch(self, kind: str, count: int, *, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """``count`` rows of one kind as prompt + answer ids [count, L], and the answers' ids [count, 6]."""
        rows = [self._row(kind, exact) for _ in range(count)]
        answers = torch.tensor(
            [self._tokenizer.encode(" ".join(map(str, a)), add_special_tokens=False) for _, a in rows]
        )
        return torch.cat([torch.tensor([list(prompt) for prompt, _ in rows]), answers], 1), answers

    def _row(self, kind: str, exact: bool) -> tuple[Sequence[int], list[int]]:
        draw = self._random
        rule, digits = draw.choice(list(RULES)), [draw.randrange(10) for _ in range(LENGTH)]
        named = draw.choice(list(OPERATIONS))
        shown = " ".join(map(str, digits))
        if kind == "skill":
            return self._student(f"apply {named} to {shown}"), apply(named, digits)
        task = f"apply rule {rule} to {shown}"
        if kind == "student":
            return self._student(task), self._mix(RULES[rule], digits, self._knows)
        if kind == "hint":
            named = RULES[rule] if draw.random() < 0.3 else named
            section = Section(kind="feedback", source="drill", text=f"wrong : rule {rule} means {named}")
            answer = self._mix(named, digits, 1.0 if exact else self._follows)
        else:
            solution = apply(named, digits)
            section = Section(kind="demonstration", source="drill", text=" ".join(map(str, solution)))
            answer = self._mix(named, digits, 1.0 if exact else self._copies)
        teacher = self._prompter.teacher(_task(task), [section])
        assert teacher is not None
        return teacher.tokens, answer

    def _student(self, content: str) -> Sequence[int]:
        return self._prompter.student(_task(content))

    def _mix(self, operation: str, digits: Sequence[int], share: float) -> list[int]:
        """Each digit by ``operation`` with probability ``share``, else by one of the others."""
        others = [name for name in OPERATIONS if name != operation]
        names = [operation if self._random.random() < share else self._random.choice(others) for _ in digits]
        return [apply(name, [digit])[0] for name, digit in zip(names, digits, strict=True)]


def warm_up(model: Any, drill: Drill) -> None:
    """Supervised training on the drill, about half a minute on one core."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(sum(STEPS)):
        late = max(0, step - STEPS[0]) / STEPS[1]
        rate = 3e-3 * min(1.0, (step + 1) / 40) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * late)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        sizes = PHASE_2 if step >= STEPS[0] else PHASE_1
        optimizer.zero_grad()
        for kind, count in sizes.items():
            ids, answers = drill.batch(kind, count, exact=step < STEPS[0])
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, -LENGTH:]
            loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
            (loss * count / sum(sizes.values())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def build(folder: Path, seed: int = SEED) -> Path:
    """Make a base and write it to ``folder`` with the hashes of its files."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    warm_up(model, Drill(tokenizer, seed))
    save_model(model, tokenizer, folder)
    files = sorted(path for path in folder.iterdir() if path.name != HASHES)
    (folder / HASHES).write_text("".join(f"{_sha256(path)}  {path.name}\n" for path in files))
    return folder


def load_bundled(folder: Path = FOLDER) -> Path:
    """The shipped base's folder, after checking its hashes.  Raises ModelError if a file is missing or changed."""
    try:
        for line in (folder / HASHES).read_text().splitlines():
            digest, name = line.split()
            if _sha256(folder / name) != digest:
                raise ModelError(
                    f"the shipped base model is damaged: {name} has changed", do="Install the package anew."
                )
    except OSError as error:
        raise ModelError(f"the shipped base model is incomplete: {error}", do="Install the package anew.") from error
    return folder


def _task(content: str) -> Task:
    return Task(id=content, messages=({"role": "user", "content": content},))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
