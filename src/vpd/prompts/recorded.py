"""Answers that a log holds, as rollouts: tokenised, or with the tokens that were sampled."""

import dataclasses
import logging
from collections.abc import Sequence

from vpd.errors import DataError
from vpd.prompts import Prompter
from vpd.types import Completion, Group, RecordedAnswer, Rollout, SampleKey, Task, Tokens

LOG = logging.getLogger("vpd")


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


def check_answers(prompter: Prompter, answers: Sequence[tuple[Task, RecordedAnswer]], *, learned: bool) -> None:
    """Tokenise every recorded answer once, and warn of those that will be cut.

    Raises DataError for tokens of another tokenizer, and, where answers are all that is ``learned``, if none has a
    token.
    """
    lengths = [len(_tokens(prompter, task, answer)) for task, answer in answers]
    if learned and lengths and not any(lengths):
        raise DataError(
            "no recorded answer has a token to learn from",
            got=f"{len(lengths)} empty answers",
            expected="at least one answer with a text, or a chat template whose end of an answer is learned",
            do="Look at the records: is the answer under another key?",
        )
    limit = prompter.max_completion_length
    cut = sum(length > limit for length in lengths)
    if cut:
        LOG.warning(
            "%d of %d recorded answers are cut to %d tokens (rollout.max_completion_length), and their ends are not"
            " learned: the longest has %d. Raise it as far as the model's window goes, or leave them out.",
            *(cut, len(lengths), limit, max(lengths)),
        )


def _tokens(prompter: Prompter, task: Task, answer: RecordedAnswer) -> Tokens:
    """The whole answer."""
    if answer.tokens is None:
        return prompter.answer(answer.text)
    if not prompter.spells(answer.tokens, answer.text):
        raise DataError(
            f"{answer.where or f'an answer to task {task.id!r}'}: 'tokens' are another tokenizer's",
            got=f"tokens for another text than {answer.text!r:.60}",
            do="Take the model that gave the answers, or leave 'tokens' and 'logprobs' out of the records.",
        )
    return answer.tokens


def _recorded_completion(prompter: Prompter, task: Task, answer: RecordedAnswer) -> Completion:
    tokens, limit = _tokens(prompter, task, answer), prompter.max_completion_length
    return Completion(
        tokens=tokens[:limit],
        sampled=(True,) * min(len(tokens), limit),
        logprobs=(answer.logprobs or ())[:limit],
        text=answer.text,
        finish="stop" if len(tokens) <= limit else "length",
        thinking_open=prompter.opens_thinking(prompter.build_student_prompt(task)),
        recorded=True,
    )
