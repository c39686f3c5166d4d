"""What tasks, chat template, tokenizer and window must have in common, found before anything is made."""

import dataclasses
import logging
from collections.abc import Iterable, Sequence

from vpd.errors import ModelError
from vpd.feedback import Feedback
from vpd.feedback.critique import SelfCritique
from vpd.feedback.judge import Judge
from vpd.prompts import LEAST_CONTEXT, Prompter
from vpd.types import Message, Task, Tokens

LOG = logging.getLogger("vpd")
ASK: Message = {"role": "user", "content": "?"}


def check_prompts(
    prompter: Prompter,
    tasks: Sequence[Task],
    *,
    vocabulary: int,
    replies: bool,
    feedback: Sequence[Feedback],
    context: bool,
) -> None:
    """Build every known prompt once.

    ``vocabulary`` is the number of rows of the model's embedding, ``replies`` whether the environment speaks,
    ``feedback`` what the method learns from, ``context`` whether its teacher reads that.  Raises ModelError or EnvError
    for what template or window refuse.
    """
    for task in tasks:
        _check_tokens(prompter, prompter.build_student_prompt(task), f"the prompt of task {task.id!r}", vocabulary)
    if replies:
        _check_tokens(prompter, prompter.reply(ASK, after=None).tokens, "an environment's reply", vocabulary)
    if context:
        _check_context(prompter, tasks)
    _check_messages(prompter, tasks)
    for source in feedback:
        if isinstance(source, SelfCritique):
            prompter.conversation(source.shortest_prompt, source.max_critique_length)
        if isinstance(source, Judge) and source.asks_student:
            prompter.conversation(source.shortest_prompt, source.max_comparison_length)
    _warn_of_unknown_tokens(prompter, tasks)
    spelled = sum(prompter.control_tokens_in(task) > 0 for task in tasks)
    if spelled:
        LOG.info(
            "%d of %d known tasks spell control tokens of the tokenizer; they are read as text"
            " (prompts.control_tokens_in_tasks)",
            *(spelled, len(tasks)),
        )


def _warn_of_unknown_tokens(prompter: Prompter, tasks: Sequence[Task]) -> None:
    unknown = {task.id: count for task in tasks if (count := prompter.unknown_tokens_in(task))}
    if unknown:
        LOG.warning(
            "%d of %d known tasks hold text that the tokenizer has no tokens for, so that the model reads %s instead:"
            " %d tokens of task %r. Take a model whose tokenizer knows this text.",
            *(len(unknown), len(tasks), prompter.unknown_word),
            *next((count, name) for name, count in unknown.items()),
        )


def answer_ends(prompter: Prompter, ends: Sequence[int]) -> tuple[int, ...]:
    """The tokens that end an answer: ``ends`` of model and tokenizer, and what ends it in the chat template.

    The template's is added if it is a special token: a chat template may end a turn with a token that a base model's
    configuration does not name, and the answer would run on into a made-up conversation.
    """
    behind = prompter.answer_end()[:1]
    added = prompter.tokenizer.added_tokens_decoder
    token = next((token for token in behind if token in added and added[token].special), None)
    if token is not None and token not in ends:
        LOG.warning(
            "an answer ends with %r in the chat template, which neither the tokenizer nor generation_config.json names"
            " as the end of a sequence: answers end there too",
            prompter.tokenizer.decode([token]),
        )
        return tuple(sorted({*ends, token}))
    if not ends:
        LOG.warning(
            "neither the tokenizer nor generation_config.json names an end-of-sequence token: every answer takes all"
            " of rollout.max_completion_length"
        )
    return tuple(ends)


def _check_tokens(prompter: Prompter, tokens: Tokens, what: str, vocabulary: int) -> None:
    if not tokens:
        raise ModelError(f"{what} is empty: the chat template writes nothing", do="Take another chat template.")
    if max(tokens) >= vocabulary:
        raise ModelError(
            f"{what} has a token without a row in the model's embedding",
            got=f"{prompter.tokenizer.decode([max(tokens)])!r}, number {max(tokens)} of {len(prompter.tokenizer)}",
            expected=f"numbers below {vocabulary}",
            do="Take the tokenizer that belongs to the model, or call resize_token_embeddings and save it.",
        )


def _check_messages(prompter: Prompter, tasks: Sequence[Task]) -> None:
    """Every message of a task must be read: with another text the prompt must be another, in each form of a task.

    Beside a call of a tool many templates leave out a text, which then is seldom more than a blank.
    """
    for task in _one_of_each_form(tasks):
        for place, message in enumerate(task.messages):
            if not message["content"].strip() or "tool_calls" in message:
                continue
            prompts = [prompter.prompt_of(_with_text(task, place, text)) for text in ("0 yes", "1 no")]
            if prompts[0] == prompts[1]:
                raise ModelError(
                    f"the model's chat template leaves out message {place} of task {task.id!r}",
                    got=f"the same prompt for any text of the role {message['role']!r}",
                    do="Take a model whose chat template shows it, or put its text into the user's message (of shipped"
                    " environments env.system is such a message).",
                )


def _one_of_each_form(tasks: Sequence[Task]) -> Iterable[Task]:
    """The longest task of each sequence of roles."""
    return {tuple(message["role"] for message in task.messages): task for task in sorted(tasks, key=_length)}.values()


def _with_text(task: Task, place: int, text: str) -> Task:
    changed: Message = {**task.messages[place], "content": text}
    return dataclasses.replace(task, messages=(*task.messages[:place], changed, *task.messages[place + 1 :]))


def _check_context(prompter: Prompter, tasks: Sequence[Task]) -> None:
    """The teacher must read its context: the template shows it, and the window has room for it."""
    for task in _one_of_each_form(tasks):
        if not prompter.shows_context(task):
            raise ModelError(
                f"the chat template drops the end of the last user message of task {task.id!r}, where the teacher reads"
                " the feedback: its prompt would be the student's",
                do="Take a model with another chat template, or a method that needs no feedback (grpo).",
            )
    short = [task for task in tasks if not prompter.has_room(task)]
    if short:
        LOG.warning(
            "%d of %d known tasks (%r, ...) leave no room for the teacher's context in the model's window of %s tokens:"
            " their rows have no teacher, unless the context is very short (teacher/rows_without_room)",
            *(len(short), len(tasks), short[0].id, prompter.window),
        )


def require_room(prompter: Prompter, tasks: Sequence[Task]) -> None:
    """Raise ModelError if there are training tasks whose rows the teacher could not judge: its prompt has no room."""
    short = [task for task in tasks if not prompter.has_room(task)]
    if short:
        raise ModelError(
            f"{len(short)} of {len(tasks)} tasks leave no room for the teacher's context in the model's window",
            got=f"{len(prompter.build_student_prompt(short[0]))} tokens in the prompt of task {short[0].id!r}"
            f" + {prompter.max_completion_length} completion tokens + what stands around the context",
            expected=f"at most {prompter.window} together, with {LEAST_CONTEXT} tokens of context",
            do="Drop these tasks, lower rollout.max_completion_length, shorten the headers in prompts, or take a model"
            " with a longer window.",
        )


def _length(task: Task) -> int:
    return sum(len(message["content"]) for message in task.messages)
