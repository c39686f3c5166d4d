"""Useful tokens a second of the embedded engine against ``transformers.generate``: same model, prompts and lengths.

    python benchmarks/sampling.py --model smollm2 --repeats 3

4 prompts, 8 answers each, one batch of 32; ``--sentences`` makes the prompts longer.  ``generate`` samples answers that
end where the model ends them, at most ``--max_tokens``; the engine then samples answers of exactly those lengths, so
both make the same number of useful tokens.  The engine's log-probs are compared with a plain forward pass over each
answer alone.
"""

import argparse
import copy
import statistics
from typing import Any

import torch
from material import SHAPES, key_of, load, prompter_of
from meters import DEVICE, commit, elapsed, progress, spread

from vpd.engines.torch_engine import TorchEngine
from vpd.losses import token_logprobs
from vpd.policy import FixedPolicy
from vpd.types import Completion, Task, Tokens

TOPICS = ("rivers", "prime numbers", "bread", "the moon")
TEXT = " Answer in a few short sentences, name one fact, give an example, and say where one could read more about it."
TINY = ("apply rule A to 1 2 3 4 5 6", "apply rule B to 6 5 4", "apply half to 1 2", "apply rule C to 9 9 9 9")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder, or tiny")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--sentences", type=int, default=1, help="length of a prompt: about 24 tokens each, and 40")
    parser.add_argument("--max_tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer, _ = load(options.model)
    model.eval()
    plain = copy.deepcopy(model)  # an engine may switch the attention of the model it loads
    prompts = student_prompts(options, tokenizer)
    engine = TorchEngine(tokenizer, eos_ids=())
    engine.load(FixedPolicy(model))
    rates: dict[str, list[float]] = {"generate": [], "engine": []}
    apart: list[float] = []
    for repeat in range(options.repeats):
        started = elapsed()
        lengths = generate(plain, tokenizer, prompts, options.max_tokens, seed=options.seed + repeat)
        middle = elapsed()
        keys = [key_of(repeat, row) for row in range(len(prompts))]
        completions = engine.generate(prompts, keys=keys, seed=options.seed, max_tokens=lengths)
        ended = elapsed()
        useful = sum(lengths)
        assert [len(c.tokens) for c in completions] == lengths
        rates["generate"].append(useful / (middle - started))
        rates["engine"].append(useful / (ended - middle))
        apart += differences(plain, prompts, completions)
        said = {name: round(values[-1], 1) for name, values in rates.items()}
        progress(f"repeat {repeat + 1}: {useful} tokens, longest {max(lengths)}, {said} tokens/s")
    ratios = [a / b for a, b in zip(rates["engine"], rates["generate"], strict=True)]
    sizes = (
        f"prompts of {min(map(len, prompts))}-{max(map(len, prompts))} tokens, answers of at most {options.max_tokens}"
    )
    print(f"{options.model}, {len(prompts)} rows, {sizes}, {commit()}\n")
    print("| | useful tokens / s |\n|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {spread(values, 0)} |")
    print(f"| engine / generate | {spread(ratios)} |")
    print(f"\nlog-probs apart from a plain forward pass: mean {statistics.fmean(apart):.1e}, largest {max(apart):.1e}")


def student_prompts(options: argparse.Namespace, tokenizer: Any) -> list[Tokens]:
    prompter = prompter_of(options.model, tokenizer, SHAPES["smoke"])
    asked = [f"Tell me about {topic}." + TEXT * options.sentences for topic in TOPICS]
    questions = TINY if options.model == "tiny" else asked
    tasks = [Task(id=text, messages=({"role": "user", "content": text},)) for text in questions]
    return [prompter.build_student_prompt(task) for task in tasks for _ in range(options.generations)]


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: list[Tokens], max_tokens: int, *, seed: int) -> list[int]:
    """Lengths of the answers that ``transformers`` samples in one left-padded batch, their ends included."""
    torch.manual_seed(seed)
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=DEVICE)
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
    settings = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": max_tokens}
    whole = model.generate(input_ids=ids, attention_mask=seen, pad_token_id=pad, **settings)
    ends = model.generation_config.eos_token_id
    eos = torch.tensor(ends if isinstance(ends, list) else [ends], device=DEVICE)
    lengths = []
    for row in whole[:, longest:]:
        places = torch.isin(row, eos).nonzero()[:, 0].tolist()
        lengths.append(places[0] + 1 if places else len(row))
    return lengths


@torch.no_grad()
def differences(model: Any, prompts: list[Tokens], completions: list[Completion]) -> list[float]:
    """|engine's log-prob - plain forward's| of every sampled token."""
    found: list[float] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion.tokens]], device=DEVICE)
        logits = model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 : -1]
        plain = token_logprobs(logits, ids[:, len(prompt) :])[0]
        found += (plain - torch.tensor(completion.logprobs, device=DEVICE)).abs().tolist()
    return found


if __name__ == "__main__":
    main()
