"""``check_env``: does an environment do what training relies on?  (The idea is Stable-Baselines3's.)

    report = check_env(MyEnv())
    report.require()  # raises EnvError if there is a fault

It draws tasks twice, compares them with the held-out ones, and grades a right, a wrong, an empty, a huge and a garbled
answer.  A *fault* breaks training or evaluation; a *warning* is allowed and rarely intended.
"""

import contextlib
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from vpd.envs import (
    Env,
    Finite,
    Restating,
    Revealing,
    SharesQuestions,
    Solvable,
    all_train_tasks,
    draw_tasks,
    grade_texts,
    held_out_tasks,
    wrap_user_errors,
)
from vpd.errors import ConfigError, EnvError, VPDError
from vpd.types import Grade, Task

ROLES = ("system", "user", "assistant", "tool")
ANSWERS = {
    "wrong": "I do not know what to say here.",
    "empty": "",
    "huge": "word " * 200_000,
    "garbled": "\ud800 \x00\x1b[31m\u202e\ufffd {{ <|im_end|> ```",
}
OTHER = "another task's"
RESTATED = "right, in another form"
ALTERED = "another value's"
RIGHT = ("right", RESTATED)
SEARCHED = 512  # tasks of an endless stream that held-out tasks are compared with

#: what to do about a fault, by the promise that it breaks
ADVICE = {
    "the same index and seed give the same task": "Draw a task from index and seed alone.",
    "held-out tasks keep their order": "Make them once, or from a seed of their own.",
    "eval_tasks respects its limit": "Return the first of all: tasks[:limit].",
    "held-out tasks are not trained on": "Leave the questions of eval_tasks out of task.",
    "grades are the same again, and in one batch": "Grade by task and text alone.",
    "its own solution is a success": "Correct grade, or solution.",
    "its solution's value is a success in other forms": "Correct grade, or restated.",
    "other values fail": "Correct grade, or altered.",
    "feedback can be written as UTF-8": "Quote answers in it with repr().",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One requirement and what was found."""

    name: str
    status: Literal["ok", "warning", "fault"]
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One answer that was graded, with its grade and the seconds that grading took."""

    kind: str
    task: Task
    text: str
    grade: Grade
    seconds: float

    @property
    def success(self) -> bool:
        return self.grade.reward >= 0.5 if self.grade.success is None else self.grade.success


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All checks, and the attempts behind them."""

    checks: tuple[Check, ...]
    attempts: tuple[Attempt, ...]

    def of(self, status: Literal["ok", "warning", "fault"]) -> list[Check]:
        return [check for check in self.checks if check.status == status]

    def require(self) -> None:
        """Raise EnvError if there is a fault."""
        faults = self.of("fault")
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            name, got = faults[0].name, faults[0].detail + more
            raise EnvError(f"the environment has a fault: {name}", got=got, do=ADVICE.get(name))


def check_env(env: Env, *, tasks: int = 32, seed: int = 0) -> Report:
    """Draw ``tasks`` training tasks with ``seed``, grade answers to them, and report; faults do not raise.

    Raises ConfigError for an object that is no environment.
    """
    absent = [name for name in ("task", "eval_tasks", "grade") if not hasattr(env, name)]
    if absent:
        kind = type(env).__name__
        got = f"{kind} without {' and '.join(absent)}"
        raise ConfigError(f"{kind} is no environment", got=got, expected="task, eval_tasks, grade")
    if tasks < 1:
        raise ConfigError("check_env needs at least one task", got=f"tasks {tasks}", expected="at least 1")
    checks: list[Check] = []
    drawn: list[Task] = []
    attempts: list[Attempt] = []

    def passes(subject: str, found: Iterator[Check]) -> bool:
        """Whether the checks find no fault; an error that they raise is a fault named ``subject``."""
        before = len(checks)
        try:
            checks.extend(found)
        except VPDError as error:
            checks.append(Check(name=subject, status="fault", detail=str(error)))
        return all(check.status != "fault" for check in checks[before:])

    if passes("tasks can be drawn", _check_tasks(env, tasks, seed, drawn)):
        passes("held-out tasks can be drawn", _check_held_out(env, drawn, seed))
        if passes("answers can be graded", _check_grades(env, drawn, attempts)):
            checks.extend(_check_feedback(env, attempts))
    return Report(checks=tuple(checks), attempts=tuple(attempts))


def _check_tasks(env: Env, count: int, seed: int, drawn: list[Task]) -> Iterator[Check]:
    drawn.extend(draw_tasks(env, range(count), seed=seed))
    yield (formed := _well_formed("tasks are well formed", drawn))
    if formed.status == "fault":
        return
    again = draw_tasks(env, reversed(range(count)), seed=seed)[::-1]
    changed = [index for index in range(count) if _public_form(drawn[index]) != _public_form(again[index])]
    pairs = list(zip(drawn, again, strict=True))
    other = [index for index, (one, two) in enumerate(pairs) if not _same_payload(one.payload, two.payload)]
    yield _check(
        "the same index and seed give the same task",
        changed and f"task {changed[0]} changed when it was drawn again, in another order",
        warning=other and f"the payload of task {other[0]} changed when it was drawn again, in another order",
        ok="drawn twice",
    )
    one_id = len({task.id for task in drawn}) == 1 < len(_questions(drawn))
    yield _check("tasks have ids of their own", warning=one_id and f"all of {count} have the id {drawn[0].id!r}")
    others = draw_tasks(env, range(count), seed=seed + 1)
    same = count > 1 and _public_forms(drawn) == _public_forms(others)
    yield _check(
        "another seed gives other tasks", warning=same and f"seeds {seed} and {seed + 1} give the same {count} tasks"
    )


def _check_held_out(env: Env, drawn: Sequence[Task], seed: int) -> Iterator[Check]:
    held_out = held_out_tasks(env, None)
    yield (formed := _well_formed("held-out tasks are well formed", held_out))
    if formed.status == "fault":
        return
    yield _check("there are held-out tasks", warning=not held_out and "none: nothing can be evaluated")
    changed = _public_forms(held_out_tasks(env, None)) != _public_forms(held_out)
    yield _check("held-out tasks keep their order", changed and "eval_tasks(None) changed between two calls")
    limits = (1, max(1, len(held_out) // 2))
    broken = [limit for limit in limits if _public_forms(held_out_tasks(env, limit)) != _public_forms(held_out)[:limit]]
    yield _check(
        "eval_tasks respects its limit",
        broken and f"eval_tasks({broken[0]}) is not the first {min(broken[0], len(held_out))} of eval_tasks(None)",
    )
    repeated = len(held_out) - len(_questions(held_out))
    yield _check("held-out tasks differ", warning=repeated and f"{repeated} of {len(held_out)} repeat another")
    if isinstance(env, Finite):
        train, extent = all_train_tasks(env), "all training tasks"
    else:
        train = [*drawn, *draw_tasks(env, range(len(drawn), SEARCHED), seed=seed)]
        extent = f"{len(train)} training tasks"
    trained = _questions(train)
    shared = [task for task in held_out if str(task.messages) in trained]
    if (
        shared
        and isinstance(env, SharesQuestions)
        and wrap_user_errors(lambda: env.shares_questions, "shares_questions")
    ):
        detail = f"{len(shared)} of {len(held_out)} are, with other tests, as declared (shares_questions)"
        yield _check("held-out tasks are not trained on", warning=detail)
        return
    alike = _alike(held_out, train)
    yield _check(
        "held-out tasks are not trained on",
        shared and f"{len(shared)} of {len(held_out)} are, e.g. {shared[0].id!r}",
        warning=alike
        and f"{len(alike)} of {len(held_out)} are up to case, white space or the system message, e.g. {alike[0].id!r}",
        ok=f"compared with {extent}",
    )


def _alike(held_out: Sequence[Task], train: Sequence[Task]) -> list[Task]:
    """The held-out tasks that ask what training asks, but for case, white space and the system message.

    None, where held-out tasks differ in nothing else.
    """
    if len(set(map(_plain_question, held_out))) < len(_questions(held_out)):
        return []
    trained = set(map(_plain_question, train))
    return [task for task in held_out if _plain_question(task) in trained]


def _plain_question(task: Task) -> tuple[str, ...]:
    asked = [message for message in task.messages if message["role"] != "system"] or task.messages
    return tuple(f"{message['role']} {' '.join(message['content'].casefold().split())}" for message in asked)


def _check_grades(env: Env, drawn: Sequence[Task], attempts: list[Attempt]) -> Iterator[Check]:
    """Every kind of answer to the first few tasks, and the wrong and the right ones to all."""
    solutions = _solutions(env, drawn)
    for number, task in enumerate(drawn):
        texts = dict(ANSWERS) if number < 4 else {"wrong": ANSWERS["wrong"]}
        own, other = solutions[number], solutions[number - 1]
        if own is not None:
            texts["right"] = own
        if other is not None and other != own:
            texts[OTHER] = other
        for kind, text in (*texts.items(), *_other_writings(env, task)):
            started = time.perf_counter()
            [grade] = grade_texts(env, [task], [text])
            seconds = time.perf_counter() - started
            attempts.append(Attempt(kind=kind, task=task, text=text, grade=grade, seconds=seconds))
    yield _check("every kind of answer is graded", ok=f"{len(attempts)} answers: {', '.join(_kinds(attempts))}")
    batch = grade_texts(env, [a.task for a in attempts], [a.text for a in attempts])
    differ = [a for a, grade in zip(attempts, batch, strict=True) if a.grade != grade]
    yield _check(
        "grades are the same again, and in one batch",
        differ and f"the {differ[0].kind} answer to {differ[0].task.id!r} got another grade",
    )
    slowest = max(attempts, key=lambda attempt: attempt.seconds)
    mean = statistics.fmean(attempt.seconds for attempt in attempts)
    times = f"{_seconds(mean)} an answer, {_seconds(slowest.seconds)} at worst (the {slowest.kind} one)"
    yield _check("grading is fast", warning=mean > 1 and f"{times}: a step waits for all its answers", ok=times)
    right = [attempt for attempt in attempts if attempt.kind == "right"]
    failed = [attempt for attempt in right if not attempt.success]
    yield _check(
        "its own solution is a success",
        failed and f"{failed[0].text[:80]!r} fails {failed[0].task.id!r}: {failed[0].grade.feedback}",
        warning=not right and "not known: the environment has no solution(task), or it gives none",
        ok=f"{len(right)} solved",
    )
    if isinstance(env, Restating):
        yield from _check_values(attempts)
    yield _check("failures earn less than successes", warning=_overpaid(attempts))
    wrong = [attempt for attempt in attempts if attempt.kind not in RIGHT]
    solved = [a.kind for a in wrong if a.success]
    yield _check(
        "bad answers can fail",
        warning=len(solved) == len(wrong) and "all of them succeed",
        ok=f"{len(wrong) - len(solved)} of {len(wrong)} do",
    )


def _overpaid(attempts: Sequence[Attempt]) -> str:
    """About a failure with the reward of its task's best success, or with 1 where that is not known; else empty."""
    best: dict[str, float] = {}
    for attempt in attempts:
        if attempt.success:
            best[attempt.task.id] = max(attempt.grade.reward, best.get(attempt.task.id, attempt.grade.reward))
    for attempt in attempts:
        if not attempt.success and attempt.grade.reward >= best.get(attempt.task.id, 1.0):
            return (
                f"reward {attempt.grade.reward:g}, success False, on the {attempt.kind} answer to {attempt.task.id!r}"
            )
    return ""


def _other_writings(env: Env, task: Task) -> list[tuple[str, str]]:
    """(kind, answer) of the solution's value in other forms, and of other values."""
    if not isinstance(env, Restating):
        return []
    restated = wrap_user_errors(lambda: list(env.restated(task)), f"restated(task {task.id!r})")
    altered = wrap_user_errors(lambda: list(env.altered(task)), f"altered(task {task.id!r})")
    return [*((RESTATED, text) for text in restated), *((ALTERED, text) for text in altered)]


def _check_values(attempts: Sequence[Attempt]) -> Iterator[Check]:
    """Whether the value counts, and not its text: misread, a right value fails in every form but its own."""
    restated = [attempt for attempt in attempts if attempt.kind == RESTATED]
    failed = [attempt for attempt in restated if not attempt.success]
    yield _check(
        "its solution's value is a success in other forms",
        failed and f"{failed[0].text[:80]!r} fails {failed[0].task.id!r}: {failed[0].grade.feedback}",
        ok=f"{len(restated)} tried" if restated else "no other form is known of any",
    )
    altered = [attempt for attempt in attempts if attempt.kind == ALTERED]
    solved = [attempt for attempt in altered if attempt.success]
    yield _check(
        "other values fail",
        solved and f"{solved[0].text[:80]!r} is a success on {solved[0].task.id!r}",
        ok=f"{len(altered)} tried",
    )


def _check_feedback(env: Env, attempts: Sequence[Attempt]) -> Iterator[Check]:
    unwritable = [a for a in attempts if not _encodable(a.grade.feedback or "")]
    yield _check(
        "feedback can be written as UTF-8",
        unwritable and f"not on the {unwritable[0].kind} answer: it quotes an unpaired surrogate",
    )
    failures = [attempt for attempt in attempts if not attempt.success]
    texts = [a.grade.feedback for a in failures if a.grade.feedback and a.grade.informative]
    yield _check(
        "the teacher has something to read",
        warning=(not texts and "no failure has informative feedback: nothing can be learned from its text")
        or (len(texts) > 1 and len(set(texts)) == 1 and f"every failure has the same feedback: {texts[0][:80]!r}"),
        ok=f"{len(texts)} of {len(failures)} failures, {len(set(texts))} different texts",
    )
    yield _check_for_answers(env, attempts)


def _check_for_answers(env: Env, attempts: Sequence[Attempt]) -> Check:
    """Whether feedback on failures contains the answer of its own task more often than any other task's answer."""
    name = "feedback does not contain the answer"
    if isinstance(env, Revealing) and wrap_user_errors(lambda: env.reveals_answer, "reveals_answer"):
        return _check(name, ok="it does, as declared (reveals_answer)")
    answers = reference_answers({a.task.id: a.text for a in attempts if a.kind == "right"})
    wrong = [a for a in attempts if a.kind not in RIGHT and not a.success and a.task.id in answers]
    if len(set(answers.values())) < 2 or not wrong:
        return _check(name, warning="not known: needs solution(task) and two tasks with different answers")
    compared, revealed = 0, []
    for attempt in wrong:
        own = answers[attempt.task.id]
        others = set(answers.values()) - {own}
        prompt = "\n".join(message["content"] for message in attempt.task.messages)
        in_prompt = _occurrences(own, prompt) > min(_occurrences(other, prompt) for other in others)
        if in_prompt or _occurrences(own, attempt.text):
            continue  # feedback may repeat what the task or the attempt contains
        compared += 1
        feedback = attempt.grade.feedback or ""
        if _occurrences(own, feedback) > max(_occurrences(other, feedback) for other in others):
            revealed.append(attempt)
    found = revealed and f"{len(revealed)} of {compared} contain it, e.g. {revealed[0].grade.feedback!r:.160}"
    if len(revealed) * 2 > compared:
        return _check(name, f"{found}; declare it with reveals_answer = True if that is intended")
    if not compared:
        return _check(name, warning="not known: every task or attempt contains the answer itself")
    return _check(name, warning=found and f"{found}; perhaps by chance", ok=f"{compared} failures compared")


def reference_answers(solutions: dict[str, str]) -> dict[str, str]:
    """Solutions without the beginning and the end that all share: ``<answer>B</answer>`` among others is ``B``.

    >>> reference_answers({"1": "It is 12.", "2": "It is 72."})
    {'1': '12', '2': '72'}
    """
    texts = list(solutions.values())
    if len(texts) < 2:
        return dict(solutions)
    start = _shared_start(texts)
    end = _shared_start([text[len(start) :][::-1] for text in texts])
    return {key: text[len(start) : len(text) - len(end)].strip() for key, text in solutions.items()}


def _shared_start(texts: Sequence[str]) -> str:
    """The text that all begin with, up to the end of a word."""
    columns = zip(*texts, strict=False)
    length = next((place for place, column in enumerate(columns) if len(set(column)) > 1), min(map(len, texts)))
    return re.sub(r"\w+$", "", texts[0][:length])


def _check(name: str, fault: Any = None, *, warning: Any = None, ok: str = "") -> Check:
    """A fault if there is one, else a warning if there is one, else ok."""
    if fault:
        return Check(name=name, status="fault", detail=str(fault))
    return Check(name=name, status="warning" if warning else "ok", detail=str(warning or ok))


def _solutions(env: Env, tasks: Sequence[Task]) -> list[str | None]:
    """A correct answer to each task; None where the environment gives none."""
    if not isinstance(env, Solvable):
        return [None] * len(tasks)
    return [wrap_user_errors(partial(env.solution, task), f"solution(task {task.id!r})") for task in tasks]


def _well_formed(name: str, tasks: Sequence[Task]) -> Check:
    fault = next((fault for task in tasks if (fault := _task_fault(task))), None)
    return _check(name, fault, ok="" if fault else f"{len(tasks)}, {len(_questions(tasks))} different")


def _task_fault(task: Task) -> str | None:
    """What a valid Task should still not be: other roles, text that cannot be encoded, nothing to answer."""
    if not isinstance(task.messages, tuple):
        return f"task {task.id!r}: messages are a {type(task.messages).__name__}, not a tuple"
    for message in task.messages:
        if message["role"] not in ROLES:
            return f"task {task.id!r}: {message!r:.80} has no role of {', '.join(ROLES)}"
        if not _encodable(message["content"]):
            return f"task {task.id!r}: the {message['role']} message cannot be encoded as UTF-8"
    if task.messages[-1]["role"] not in ("user", "tool"):
        return f"task {task.id!r}: the last message is the {task.messages[-1]['role']}'s, so nothing is asked"
    return None


def _public_form(task: Task) -> tuple[str, str, str]:
    """What training sees of a task: everything but the payload."""
    return task.id, str(task.messages), str(task.tools)


def _same_payload(one: Any, two: Any) -> bool:
    """Whether two payloads are equal, or are written the same; what shows no more than its address counts as that."""
    with contextlib.suppress(EnvError):
        if wrap_user_errors(lambda: bool(one == two), "comparing payloads"):
            return True
    with contextlib.suppress(EnvError):
        first, second = wrap_user_errors(lambda: (repr(one), repr(two)), "a payload as text")
        return first == second or " at 0x" in first
    return True


def _public_forms(tasks: Sequence[Task]) -> list[tuple[str, str, str]]:
    return [_public_form(task) for task in tasks]


def _questions(tasks: Sequence[Task]) -> set[str]:
    return {str(task.messages) for task in tasks}


def _kinds(attempts: Sequence[Attempt]) -> list[str]:
    return [f"{count} {kind}" for kind, count in Counter(attempt.kind for attempt in attempts).items()]


def _occurrences(word: str, text: str) -> int:
    """How often ``word`` stands in ``text``, not as a part of a longer one; from four letters on in any case."""
    flags = re.IGNORECASE if len(word) >= 4 else 0
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, flags)) if word else 0


def _encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value * 1000:.1f} ms"
