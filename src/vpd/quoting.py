"""How much of a text another text quotes: does an answer say what its feedback says, word for word?

    quoted_run('Use the word "ocean" twice, please.', 'I use the word "ocean" twice.', known="Write a sentence.")   -> 5

Only runs of words count that ``known``, the task's own words, does not hold.
"""

import re

from vpd.types import Rollout

LONGEST = 32  # words of a run that are told apart
_WORD = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\W\u3040-\u30ff\u4e00-\u9fff]+")  # a Chinese character is a word


def quoted_run(source: str, text: str, *, known: str = "") -> int:
    """Words in the longest run that ``text`` shares with ``source`` and ``known`` does not hold; at most ``LONGEST``.

    >>> quoted_run("Aldo wants the word ocean", "He wants the word now", known="the word")
    3
    """
    source_words, text_words, known_words = _words(source), _words(text), _words(known)
    longest = 0
    for length in range(1, min(len(source_words), len(text_words), LONGEST) + 1):
        shared = _runs(source_words, length) & _runs(text_words, length)
        if not shared:
            break
        if shared - _runs(known_words, length):
            longest = length
    return longest


def feedback_quoted(attempt: Rollout, answer: Rollout) -> int:
    """Words in the longest run that ``answer`` shares with the feedback on ``attempt``, beyond the task's own words.

    Demonstrations do not count: they are there to be followed.
    """
    feedback = " ".join(section.text for section in attempt.context if section.kind == "feedback")
    task = " ".join(message["content"] for message in attempt.task.messages)
    return quoted_run(feedback, answer.completion.text, known=task)


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _runs(words: list[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}
