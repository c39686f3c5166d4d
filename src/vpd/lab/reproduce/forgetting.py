"""What learning one thing cost a model elsewhere: another task, and plain text."""

import dataclasses
import inspect
import pydoc_data.topics
import re
import statistics

import torch

from vpd.envs.instructions import Instructions
from vpd.evaluation import EvalSettings, evaluate, standard_error
from vpd.recipes.assemble import Parts

TASKS, LENGTH = 64, 48  # held-out instructions, tokens of an answer
TEXTS, TOKENS = 32, 128  # passages of plain text, tokens of each


def abilities(parts: Parts) -> dict[str, float]:
    """The model as it is now, with its engine's weights: the share of held-out ``instructions`` that it follows.

    ``instructions/accuracy`` is over 64 tasks, one answer each; ``text/nll`` the mean negative log-probability of plain
    text in nats a token, which rises with what was forgotten; ``text/nll_se`` its standard error over passages.
    """
    source = dataclasses.replace(parts.source, env=Instructions(), feedback=(), training_engine=None, teacher=None)
    sampling = dataclasses.replace(parts.config.rollout.sampling, max_completion_length=LENGTH)
    tasks = source.env.eval_tasks(TASKS)
    found = evaluate(source, tasks, EvalSettings(sampling=sampling, num_samples=1, teacher=False, control=False))
    nll = text_nll(parts)
    return {
        "instructions/accuracy": found.student["avg@1"],
        "instructions/accuracy_se": found.student["avg@1_se"],
        "text/nll": statistics.fmean(nll),
        "text/nll_se": standard_error(nll),
    }


@torch.no_grad()
def text_nll(parts: Parts) -> list[float]:
    """Mean negative log-probability of each passage's tokens but its first, in nats a token."""
    found = []
    device = next(parts.learner.model.parameters()).device
    for passage in passages():
        tokens = (
            parts.tokenizer(passage, return_tensors="pt", add_special_tokens=False).input_ids[:, :TOKENS].to(device)
        )
        logits = parts.learner.model(input_ids=tokens, use_cache=False).logits[:, :-1]
        logprobs = logits.float().log_softmax(-1).gather(-1, tokens[:, 1:, None])
        found.append(-float(logprobs.mean()))
    return found


def passages() -> list[str]:
    """Plain English that every Python has: the first prose of its help topics, one passage each."""
    topics = pydoc_data.topics.topics
    prose = (_prose(topics[name]) for name in sorted(topics))
    return [text for text in prose if len(text.split()) >= TOKENS][:TEXTS]


def _prose(topic: str) -> str:
    """The paragraphs of a help topic that are neither titles nor code."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(topic))
    return " ".join(" ".join(p.split()) for p in paragraphs if p[0].isalpha() and len(p.split()) > 12)
