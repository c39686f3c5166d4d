"""The user's code of a tortured run: graders that behave, until ``fault.json`` beside this file says at which call not.

``fault.json``: {"kind": a name in FAULTS, "call": the number of the call, from 1, "where": "grade", "task", ...,
"lasting": whether every later call fails too}.  Removing it mends the grader without changing this file.
"""

import asyncio
import ctypes
import gc
import hashlib
import json
import locale
import logging
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import torch

from vpd import Grade, Task

HERE = Path(__file__).resolve().parent
calls = {}


def judge(prompt, text):
    """A verdict that hangs on the words alone: four in ten answers pass."""
    draw = int(hashlib.sha256(f"{prompt}|{text}".encode()).hexdigest(), 16) % 10
    feedback = "right" if draw < 4 else f"wrong : rule {'ABCD'[draw % 4]} means swap"
    return {"reward": float(draw < 4) + draw / 100, "success": draw < 4, "feedback": feedback, "informative": draw >= 4}


def due(where):
    """The fault that strikes at this call, None for none."""
    calls[where] = calls.get(where, 0) + 1
    try:
        fault = json.loads((HERE / "fault.json").read_text())
    except OSError:
        return None
    struck = calls[where] == fault["call"] or (fault["lasting"] and calls[where] > fault["call"])
    if fault["where"] != where or not struck:
        return None
    (HERE / "struck").touch()
    return fault["kind"]


def reward(prompts, completions, **columns):
    kind = due("grade")
    answers = [judge(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
    return answers if kind is None else FAULTS[kind](answers)


async def reward_async(prompts, completions, **columns):
    await asyncio.sleep(0)
    kind = due("grade")
    answers = [judge(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
    if kind is None:
        return answers
    answers = FAULTS[kind](answers)
    return await answers if asyncio.iscoroutine(answers) else answers


def nothing(groups, writer):
    """A feedback source that adds nothing."""
    kind = due("feedback")
    return groups if kind is None else FAULTS[kind](groups)


class Words:
    """An environment with a reply: whoever fails may try once more."""

    def task(self, index, *, seed):
        task = self._task(f"train {index % 8}", index)
        kind = due("task")
        return task if kind is None else FAULTS[kind](task)

    def eval_tasks(self, limit):
        return [self._task(f"eval {index}", index + 8) for index in range(8)][:limit]

    def grade(self, tasks, texts):
        kind = due("grade")
        grades = [Grade(**judge(task.payload, text)) for task, text in zip(tasks, texts, strict=True)]
        return grades if kind is None else FAULTS[kind](grades)

    def respond(self, tasks, conversations):
        kind = due("respond")
        firsts = [sum(message["role"] == "assistant" for message in said) == 1 for said in conversations]
        replies = ["wrong : rule A means swap" if first else None for first in firsts]
        return replies if kind is None else FAULTS[kind](replies)

    def _task(self, name, number):
        content = f"apply rule {'ABCD'[number % 4]} to {number % 10} 2 3 {number // 10} 5 6"
        return Task(id=name, messages=({"role": "user", "content": content},), payload=content)


def raises(error):
    def fault(answers):
        raise error

    return fault


def then(action):
    """Does something to the process and answers as if nothing had been."""

    def fault(answers):
        action()
        return answers

    return fault


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("an error without words")


class SlowNumber:
    def __float__(self):
        time.sleep(3600)
        return 0.0


def endless(answers):
    while True:
        yield answers[0]


def recursion(answers):
    return recursion(answers)


def eats_memory(answers):
    kept = []
    while True:
        kept.append(bytearray(1 << 26))


def ends_its_thread(answers):
    raise SystemExit


async def stops_the_loop(answers):
    asyncio.get_running_loop().stop()
    await asyncio.sleep(0.1)
    return answers


async def waits(answers):
    await asyncio.sleep(3600)


async def blocks(answers):
    time.sleep(3600)


def forks(answers):
    os.fork()
    return answers


def leaves_a_thread(answers):
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
    return answers


def with_feedback(text):
    return lambda answers: [{**answer, "feedback": text} for answer in answers]


def spoils_text_layer():
    sys.stdout.write("a grader's own words\n")
    sys.stderr.write("")
    warnings.simplefilter("error")


#: the run must stop with one line, or go on as if nothing had been (a row that is graded again)
STOPS = {
    "raise": raises(ValueError("the grader is broken")),
    "raise without words": raises(Unprintable()),
    "raise with escapes": raises(ValueError("\x1b]52;c;ZXZpbA==\x07\x1b[2J broken")),
    "raise a group": raises(BaseExceptionGroup("several", [ValueError("a"), SystemExit(0)])),
    "raise CancelledError": raises(asyncio.CancelledError()),
    "raise GeneratorExit": raises(GeneratorExit()),
    "raise MemoryError": raises(MemoryError()),
    "raise TimeoutError": raises(TimeoutError("elsewhere")),
    "raise OSError": raises(OSError(28, "No space left on device")),
    "raise RecursionError": recursion,
    "raise 10 MB of text": raises(ValueError("x" * 10_000_000)),
    "sys.exit(0)": raises(SystemExit(0)),
    "sys.exit(text)": raises(SystemExit("enough")),
    "exit()": lambda answers: exit(),
    "memory": eats_memory,
    "None": lambda answers: None,
    "one too few": lambda answers: answers[:-1],
    "one too many": lambda answers: [*answers, answers[0]],
    "a number": lambda answers: 5,
    "a text": lambda answers: "x" * len(answers),
    "a mapping": lambda answers: {"reward": 1.0},
    "objects": lambda answers: [object()] * len(answers),
    "NaN": lambda answers: [float("nan")] * len(answers),
    "infinite": lambda answers: [float("inf")] * len(answers),
    "1e308": lambda answers: [1e308, -1e308] * (len(answers) // 2) + [1e308] * (len(answers) % 2),
    "a complex number": lambda answers: [1j] * len(answers),
    "a tensor": lambda answers: [torch.ones(3)] * len(answers),
}
#: the same, where ``env.seconds`` bounds the call
HANGS = {
    "hang": lambda answers: time.sleep(3600),
    "hang in a generator": endless,
    "hang in __float__": lambda answers: [SlowNumber()] * len(answers),
    "hang in C": lambda answers: re.match(r"(a+)+b", "a" * 60),
    "end of its thread": ends_its_thread,
}
ASYNC = {
    "async: raise": raises(ValueError("the grader is broken")),
    "async: sys.exit(0)": raises(SystemExit(0)),
    "async: KeyboardInterrupt": raises(KeyboardInterrupt()),
    "async: stop the loop": stops_the_loop,
    "async: wait": waits,
    "async: block": blocks,
}
#: the process may die; its exit code must not be 0
DIES = {
    "os._exit(0)": lambda answers: os._exit(0),
    "os.abort": lambda answers: os.abort(),
    "segmentation fault": lambda answers: ctypes.string_at(0),
    "SIGKILL to itself": lambda answers: os.kill(os.getpid(), signal.SIGKILL),
    "KeyboardInterrupt": raises(KeyboardInterrupt()),
}
#: nothing of it may reach the run: it goes on, or stops with one line
SPOILS = {
    "fork": forks,
    "chdir": then(lambda: os.chdir(HERE / "base")),
    "environment": then(os.environ.clear),
    "locale": then(lambda: locale.setlocale(locale.LC_ALL, "C")),
    "no gradients": then(lambda: torch.set_grad_enabled(False)),
    "default type": then(lambda: torch.set_default_dtype(torch.float64)),
    "seeds": then(lambda: (torch.manual_seed(7), random.seed(7))),
    "signal handlers": then(
        lambda: (
            [signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)]
            if threading.current_thread() is threading.main_thread()
            else None
        )
    ),
    "umask": then(lambda: os.umask(0o777)),
    "stdout": then(lambda: sys.stdout.close()),
    "logging": then(lambda: logging.disable(logging.CRITICAL)),
    "recursion limit": then(lambda: sys.setrecursionlimit(120)),
    "garbage collector": then(gc.disable),
    "warnings": then(spoils_text_layer),
    "a thread": leaves_a_thread,
}
#: another text is another run: only the ending is looked at
TEXTS = {
    "feedback with half a surrogate": with_feedback("\ud83d wrong"),
    "feedback with escapes": with_feedback("\x1b]52;c;ZXZpbA==\x07\x1b[2J"),
    "feedback of 10 MB": with_feedback("word " * 2_000_000),
    "feedback with control tokens": with_feedback("<eos> <assistant> <user> <pad>"),
    "feedback with NUL": with_feedback("a\x00b\u202e\ufffe"),
}
FAULTS = {**STOPS, **HANGS, **ASYNC, **DIES, **SPOILS, **TEXTS}
