"""Where should the teacher read its feedback?  Every ``prompts.layout``, and two that are not settings, on one model.

    python benchmarks/layouts.py --model smollm2 --env conventions instructions --tasks 48
    python benchmarks/layouts.py --model smollm2 --env '{name: science, path: train.jsonl, eval_path: test.jsonl}'
    python benchmarks/layouts.py --model smollm2 --env conventions --show 3

The student attempts held-out tasks; every layout's teacher, and the control, which reads no feedback, attempt the
failed ones again.  ``turn`` and ``turn+`` are a conversation: the task, the failed attempt as the assistant's answer,
and the feedback as the user's next message (``turn+``: and the task once more).

* gain: teacher less control, the mean over tasks of the difference, with its standard error
* quoted: words in a row that a retry shares with its feedback and not with the task; repeated: retries that are the
  failed attempt, word for word
* style: KL(teacher || student) of the next token, nats, along the student's failed attempts, where the teacher reads
  the feedback on *another* task's attempt: what a student would learn of the prompt besides its own feedback
* own: how much likelier the failed attempt is under the teacher that reads its own feedback, nats a token
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import yaml
from meters import commit, progress

import vpd
from vpd.evaluation import EvalSettings, evaluate, standard_error
from vpd.losses import divergence, token_logprobs
from vpd.model.forward import longest_input
from vpd.prompts import Prompter
from vpd.prompts.settings import PromptSettings
from vpd.quoting import feedback_quoted
from vpd.recipes.assemble import Parts, load_model
from vpd.rollout import Request
from vpd.types import Rollout, SampleKey, Tokens

Build = Callable[[Rollout, Rollout], Tokens]  # an attempt, and the one whose feedback is read: the teacher's prompt
LAYOUTS = ("block", "request", "system")
COLUMNS = ("student", "teacher", "gain", "quoted", "repeated", "style", "own")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a Hub id")
    parser.add_argument("--env", nargs="+", default=["conventions"], help="names, or sections env in YAML")
    parser.add_argument("--tasks", type=int, default=48)
    parser.add_argument("--samples", type=int, default=2, help="attempts at each task")
    parser.add_argument("--max_tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drift", type=int, default=24, help="tasks whose first failed attempt is scored")
    parser.add_argument("--dtype", default="float32", help="model.dtype")
    parser.add_argument("--show", type=int, default=0, help="retries of each layout to print")
    options = parser.parse_args()
    print(f"{commit()}, {options}\n", flush=True)
    loaded = load_model(vpd.parse_config({"model": model_section(options)}).model)
    print(f"| env | layout | {' | '.join(COLUMNS)} | control |\n|---|---|{'---|' * (len(COLUMNS) + 1)}", flush=True)
    for env in map(yaml.safe_load, options.env):
        for row in measured(options, env if isinstance(env, dict) else {"name": env}, loaded):
            print(row, flush=True)


def model_section(options: argparse.Namespace) -> dict[str, str]:
    return {"name_or_path": options.model, "dtype": options.dtype}


def assembled(options: argparse.Namespace, env: dict[str, Any], loaded: tuple[Any, Any]) -> Parts:
    """The parts of a run on these settings; the model is loaded once."""
    config = vpd.parse_config(
        {
            "model": model_section(options),
            "env": env,
            "feedback": ["environment"],
            "prompts": {"layout": "block"},
            "rollout": {"max_completion_length": options.max_tokens, "temperature": options.temperature},
            "algorithm": {"name": "sdpo"},
            "run": {"seed": options.seed, "output_dir": "unused"},
        }
    )
    parts = vpd.assemble(config, model=loaded[0], tokenizer=loaded[1])
    parts.engine.load(parts.learner.policy())
    return parts


def measured(options: argparse.Namespace, env: dict[str, Any], loaded: tuple[Any, Any]) -> Iterator[str]:
    """The rows of one environment."""
    parts = assembled(options, env, loaded)
    sampling = parts.config.rollout.sampling
    tasks = parts.env.eval_tasks(options.tasks)
    settings = EvalSettings(sampling=sampling, num_samples=options.samples, teacher=False)
    result = evaluate(parts.source, tasks, settings)
    groups = parts.source.add_feedback(result.groups)
    failed = [r for g in groups for r in g.rollouts if not r.success and r.teacher_prompt is not None]
    student = f"{result.student[f'avg@{options.samples}']:.3f} ± {result.student[f'avg@{options.samples}_se']:.3f}"
    progress(f"{env}: {len(tasks)} tasks, student {student}, {len(failed)} failed attempts with feedback")
    if not failed:
        return
    control = by_task(retries(parts, failed, [r.prompt for r in failed], "eval_control"))
    first = list({r.key.task: r for r in reversed(failed)}.values())[::-1][: options.drift]
    drift = Drift(loaded[0], options.temperature)
    others = [other_feedback(first, place) for place in range(len(first))]
    for name, build in builders(parts, loaded).items():
        answers = retries(parts, failed, [build(r, r) for r in failed], "eval_retry")
        teacher = by_task(answers)
        pairs = list(zip(failed, answers, strict=True))
        for attempt, answer in pairs[: options.show]:
            show(parts, name, build(attempt, attempt), attempt, answer)
        style = [drift.style(r, build(r, other)) for r, other in zip(first, others, strict=True)]
        own = [drift.own(r, build(r, r)) for r in first]
        cells = [
            student,
            with_error(teacher.values()),
            with_error([teacher[task] - control[task] for task in teacher], "+"),
            with_error(by_task(answers, [float(feedback_quoted(*pair)) for pair in pairs]).values()),
            with_error(by_task(answers, [float(same(*pair)) for pair in pairs]).values()),
            with_error(style),
            with_error(own, "+"),
            with_error(control.values()),
        ]
        yield f"| {env['name']} | {name} | {' | '.join(cells)} |"


def builders(parts: Parts, loaded: tuple[Any, Any]) -> dict[str, Build]:
    """How each layout makes the teacher's prompt."""
    length = parts.config.rollout.sampling.max_completion_length
    found: dict[str, Build] = {}
    for layout in LAYOUTS:
        settings = PromptSettings(layout=layout)  # type: ignore[arg-type]
        prompter = Prompter(loaded[1], settings, window=longest_input(loaded[0]), max_completion_length=length)
        found[layout] = of_layout(prompter)
    for name, again in (("turn", False), ("turn+", True)):
        found[name] = of_turns(parts.prompter, length, again)
    return found


def of_layout(prompter: Prompter) -> Build:
    def build(attempt: Rollout, read: Rollout) -> Tokens:
        prompt = prompter.build_teacher_prompt(attempt.task, read.context)
        assert prompt is not None, f"no room for the feedback on {attempt.task.id}"
        return prompt.tokens

    return build


def of_turns(prompter: Prompter, length: int, again: bool) -> Build:
    def build(attempt: Rollout, read: Rollout) -> Tokens:
        said = "\n\n".join(section.text for section in read.context)
        question = attempt.task.messages[-1]["content"]
        messages = [
            *attempt.task.messages,
            {"role": "assistant", "content": attempt.completion.text},
            {"role": "user", "content": f"{said} {question}" if again else said},
        ]
        return prompter.conversation(messages, length)

    return build


def retries(parts: Parts, failed: Sequence[Rollout], prompts: Sequence[Tokens], phase: str) -> list[Rollout]:
    """One more attempt for each failed one, with the prompt beside it."""
    requests = [
        Request(key=dataclasses.replace(r.key, phase=phase), task=r.task, prompt=prompt)
        for r, prompt in zip(failed, prompts, strict=True)
    ]
    return parts.source.generate_rollouts(requests, parts.config.rollout.sampling)


def other_feedback(attempts: Sequence[Rollout], place: int) -> Rollout:
    """The next attempt, in a ring, whose feedback is another text; the last resort is the attempt itself."""
    ring = [*attempts[place + 1 :], *attempts[:place]]
    return next((r for r in ring if r.context != attempts[place].context), attempts[place])


class Drift:
    """What a teacher's prompt changes along an attempt, in nats a token."""

    def __init__(self, model: Any, temperature: float):
        self._model = model
        self._temperature = temperature
        self._read: dict[SampleKey, torch.Tensor] = {}

    def style(self, attempt: Rollout, prompt: Tokens) -> float:
        """KL(teacher || student) of the next token."""
        teacher = self._logits(prompt, attempt.completion.tokens)
        return float(divergence(self._student(attempt), teacher, alpha=0.0).mean())

    def own(self, attempt: Rollout, prompt: Tokens) -> float:
        """log q - log pi of the attempt's tokens."""
        answer = attempt.completion.tokens
        tokens = torch.tensor([answer])
        teacher = token_logprobs(self._logits(prompt, answer), tokens)
        return float((teacher - token_logprobs(self._student(attempt), tokens)).mean())

    def _student(self, attempt: Rollout) -> torch.Tensor:
        if attempt.key not in self._read:
            self._read[attempt.key] = self._logits(attempt.prompt, attempt.completion.tokens)
        return self._read[attempt.key]

    @torch.no_grad()
    def _logits(self, prompt: Tokens, answer: Tokens) -> torch.Tensor:
        """The logits [1,T,V] that choose each token of an answer, at the sampler's temperature."""
        ids = torch.tensor([[*prompt, *answer]])
        logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits
        return logits[:, :-1].float() / self._temperature


def same(attempt: Rollout, answer: Rollout) -> bool:
    return attempt.completion.text.strip() == answer.completion.text.strip()


def by_task(answers: Sequence[Rollout], values: Sequence[float] | None = None) -> Mapping[int, float]:
    """Each task's mean over its answers: the share that is right, or of other values."""
    found: dict[int, list[float]] = {}
    for answer, value in zip(answers, values or [float(answer.success) for answer in answers], strict=True):
        found.setdefault(answer.key.task, []).append(value)
    return {task: statistics.fmean(own) for task, own in found.items()}


def with_error(values: Any, sign: str = "") -> str:
    numbers = list(values)
    return f"{statistics.fmean(numbers):{sign}.3f} ± {standard_error(numbers):.3f}"


def show(parts: Parts, name: str, prompt: Tokens, attempt: Rollout, answer: Rollout) -> None:
    progress(f"--- {name}, attempt: {attempt.completion.text!r}")
    progress(parts.tokenizer.decode(list(prompt)))
    progress(f"    [{answer.grade.reward:g}] {answer.completion.text!r}")


if __name__ == "__main__":
    main()
