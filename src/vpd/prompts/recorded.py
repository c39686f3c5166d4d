"""Answers that a log holds, as rollouts: tokenised, or with the tokens that were sampled."""

import dataclasses
from collections.abc import Sequence

from vpd.errors import DataError
from vpd.prompts import Prompter
from vpd.types import Completion, Group, RecordedAnswer, Rollout, SampleKey, Task


def recorded_group(prompter: Prompter, key: SampleKey, task: Task, answers: Sequence[RecordedAnswer]) -> Group:
    """Recorded answers to a task as its group; ``key`` is the first one's.

    A longer one than ``max_completion_length`` is cut, and counts as one that did not end.  Raises DataError for tokens
    that are no answer of this tokenizer.
    """
    prompt = prompter.build_student_prompt(task)
    return Group(
        rollouts=tuple(
            Rollout(
                key=dataclasses.replace(key, sample=number),
                task=task,
                prompt=prompt,
                completion=_recorded_completion(prompter, task, answer),
                grade=answer.grade,
            )
            for number, answer in enumerate(answers)
        )
    )


def _recorded_completion(prompter: Prompter, task: Task, answer: RecordedAnswer) -> Completion:
    tokens = prompter.answer(answer.text) if answer.tokens is None else answer.tokens
    if answer.tokens is not None and not prompter.spells(tokens, answer.text):
        raise DataError(
            f"the recorded tokens of an answer to task {task.id!r} are another tokenizer's",
            got=f"tokens for another text than {answer.text!r:.60}",
            do="Take the model that gave the answers, or leave 'tokens' and 'logprobs' out of the records.",
        )
    limit = prompter.max_completion_length
    return Completion(
        tokens=tokens[:limit],
        sampled=(True,) * min(len(tokens), limit),
        logprobs=(answer.logprobs or ())[:limit],
        text=answer.text,
        finish="stop" if len(tokens) <= limit else "length",
        thinking_open=prompter.opens_thinking(prompter.build_student_prompt(task)),
        recorded=True,
    )
