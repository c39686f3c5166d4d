"""Useful tokens a second of the embedded engine and of transformers' generate, alternating, on the same prompts.

    python benchmarks/sampling.py --model smollm2 --prompts 4 --generations 8 --max_tokens 128

Both sample at temperature 1 from the whole vocabulary; lengths are ragged, since answers end at the end-of-sequence
token.  Tokens up to and with that one are useful.  Seconds are of processor time (one thread), so that other work on
the machine counts less; the two draw different answers, so the ratio is of tokens a second.
"""

import argparse
import copy
import statistics
import time

import torch

from vpd.config import ModelSettings
from vpd.engines.torch_engine import TorchEngine
from vpd.recipes.assemble import load_model

TOPICS = ["rivers", "prime numbers", "a cat who reads", "bread", "the moon", "chess", "trains", "bees"]
TEXT = "Answer in a few short sentences, name one fact, give one example, and say where one could read more about it. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--sentences", type=int, default=8, help="length of a prompt")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(ModelSettings(name_or_path=options.model))
    model.eval()
    plain = copy.deepcopy(model)  # the engine switches the attention of the model it loads
    prompts = []
    for number in range(options.prompts):
        text = f"Tell me about {TOPICS[number % len(TOPICS)]}. " + TEXT * options.sentences
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        prompts += [tuple(ids)] * options.generations
    engine = TorchEngine(tokenizer, eos_ids=[tokenizer.eos_token_id], max_rows=len(prompts))
    rates: dict[str, list[float]] = {"engine": [], "generate": []}
    for repeat in range(options.repeats):
        for name, sample in (("engine", of_engine), ("generate", of_generate)):
            started = time.process_time()
            useful, computed = sample(
                engine, plain if name == "generate" else model, tokenizer, prompts, options.max_tokens, repeat
            )
            seconds = time.process_time() - started
            rates[name].append(useful / seconds)
            print(
                f"{name}: {useful} useful of {computed} tokens, {seconds:.1f} s, {useful / seconds:.0f} a second",
                flush=True,
            )
    ratios = [a / b for a, b in zip(rates["engine"], rates["generate"], strict=True)]
    print(f"engine / generate = {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


def of_engine(engine, model, tokenizer, prompts, max_tokens: int, seed: int) -> tuple[int, int]:  # type: ignore[no-untyped-def]
    engine.load(model, 0)
    seeds = [1000 * seed + row for row in range(len(prompts))]
    answers = engine.generate(prompts, seeds=seeds, max_tokens=max_tokens)
    total = sum(len(answer.tokens) for answer in answers)
    return total, total


def of_generate(engine, model, tokenizer, prompts, max_tokens: int, seed: int) -> tuple[int, int]:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.eos_token_id] * (width - len(p)) + list(p) for p in prompts])
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        input_ids=ids, attention_mask=seen, max_new_tokens=max_tokens, do_sample=True, temperature=1.0, top_k=0,
        top_p=1.0, pad_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )[:, width:]  # fmt: skip
    ended = (out == tokenizer.eos_token_id).long()
    useful = int(((ended.cumsum(1) - ended) == 0).sum())
    return useful, out.numel()


if __name__ == "__main__":
    main()
