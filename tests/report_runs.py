"""Run folders made without training, for tests of what reads them."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vpd.learners.token_records import TokenRecord
from vpd.run_folder.files import FileSystem
from vpd.run_folder.state import Recorder
from vpd.run_folder.tables import RunFolder
from vpd.types import Completion, Grade, Group, Rollout, SampleKey, Section, Task, TeacherPrompt

HEADER = "\n\nFeedback on an earlier, unsuccessful attempt:\n\n"
CLOSING = "\n\nNow solve the original task."
SETTINGS = {
    "model": {"name_or_path": "tiny"},
    "env": {"name": "letters"},
    "feedback": [{"name": "environment", "when": "always"}],
    "prompts": {"feedback_header": HEADER, "closing": CLOSING, "cut_marker": " [...] "},
    "algorithm": {"name": "vpd", "teacher_beta": 0.1, "log_ratio": "sum"},
    "run": {"seed": 0, "max_steps": 3, "output_dir": "out"},
}


class Letters:
    """A tokenizer of characters: a text's code points are its ids."""

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))


def group_of(step: int, text: str, answers: Sequence[tuple[str, bool]], feedback: str) -> Group:
    """Attempts at one task; failures have the feedback as their context."""
    letters, rollouts = Letters(), []
    task = Task(id=f"task/{step}", messages=({"role": "user", "content": text},))
    for sample, (answer, success) in enumerate(answers):
        key = SampleKey(phase="train", step=step, task=step, sample=sample)
        context = () if success else (Section(kind="feedback", source="environment", text=feedback),)
        teacher = letters.encode(f"<user>{text}{HEADER}{feedback}{CLOSING}<assistant>")
        teacher_prompt = None if success else TeacherPrompt(tokens=teacher, sources=("environment",))
        attempt = Rollout(
            key=key,
            task=task,
            prompt=letters.encode(f"<user>{text}<assistant>"),
            completion=_completion(answer),
            grade=Grade(reward=float(success), success=success, feedback="Right." if success else feedback),
            context=context,
            teacher_prompt=teacher_prompt,
        )
        rollouts.append(attempt)
    return Group(rollouts=tuple(rollouts))


def _completion(text: str) -> Completion:
    tokens = Letters().encode(text)
    count = len(tokens)
    return Completion(tokens=tokens, sampled=(True,) * count, logprobs=(-0.5,) * count, text=text, finish="stop")


def record_of(row: int, rollout: Rollout) -> TokenRecord:
    """Made-up log-probs: the teacher's swing around the student's; row 0 was in an E-step."""
    count = len(rollout.completion.tokens)
    student = tuple(-0.5 - 0.01 * (place % 7) for place in range(count))
    teacher = tuple(value + 2 * math.sin(place) - 1 for place, value in enumerate(student))
    e_step = {
        "student_before": student,
        "teacher_before": tuple(value - 0.5 for value in teacher),
        "teacher_after": teacher,
    }
    return TokenRecord(
        row=row,
        rollout=rollout,
        student=student,
        teacher=teacher,
        top_ids=tuple((97 + place % 26, 0x202E) for place in range(count)),
        top_teacher=((-0.2, -2.0),) * count,
        top_student=((-3.0, -1.0),) * count,
        **(e_step if row == 0 else {}),
    )


def write_run(
    folder: Path,
    *,
    seed: int = 0,
    method: str = "vpd",
    steps: int = 3,
    text: str = "Spell a word.",
    answer: str = "wrong word",
    feedback: str = "You wrote two words; one was asked for.",
    settings: dict[str, Any] | None = None,
    noise: int = 0,
) -> Path:
    """A finished run with metrics, an alarm, rollouts and recorded tokens; ``noise`` random bytes in each task."""
    folder.mkdir(parents=True)
    files = FileSystem()
    whole = {
        **SETTINGS,
        "algorithm": {**SETTINGS["algorithm"], "name": method},
        "run": {**SETTINGS["run"], "seed": seed},
    }
    whole = {**whole, **(settings or {})}
    writer = RunFolder(folder, Letters(), files=files)
    writer.on_step(0, {"eval/accuracy": 0.1 + 0.01 * seed, "eval_teacher/gain": 0.3, "eval_teacher/gain_se": 0.1}, [])
    for step in range(1, steps + 1):
        task = text + random.randbytes(noise).hex()
        groups = [group_of(step, task, [(answer, False), ("word", True), (f"{answer} {step}", False)], feedback)]
        writer.on_step(step, _metrics(step, seed), groups)
        rollouts = groups[0].rollouts
        writer.on_token_records(step, [record_of(row, rollouts[row]) for row in (0, 1)])
    alarm = {"step": steps, "rule": "flat_reward", "saw": f"{text} <b>saw</b>", "do": "Make tasks easier."}
    files.append_line(folder / "alarms.jsonl", json.dumps(alarm))
    Recorder(folder=folder, files=files, settings=whole).record("done", steps)
    return folder


def add_demonstration(folder: Path, *, step: int) -> Path:
    """The run with a step of one answer that nobody graded."""
    key = SampleKey(phase="train", step=step, task=0, sample=0)
    task = Task(id="shown", messages=({"role": "user", "content": "Spell."},))
    grade = Grade(reward=0.0, success=False, graded=False)
    prompt = Letters().encode("<user>Spell.<assistant>")
    shown = Rollout(key=key, task=task, prompt=prompt, completion=_completion("a word"), grade=grade)
    RunFolder(folder, Letters()).on_step(step, {}, [Group(rollouts=(shown,))])
    return folder


def _metrics(step: int, seed: int) -> dict[str, float]:
    return {
        "reward": 0.1 * step + 0.02 * seed,
        "success": 0.1 * step,
        "eval/accuracy": 0.1 * step + 0.01 * seed,
        "eval_teacher/accuracy": 0.5,
        "eval_teacher/student_accuracy": 0.2,
        "eval_teacher/gain": 0.3,
        "eval_teacher/gain_se": 0.1,
        "completions/mean_length": 10.0,
        "rows/drawn": 3.0,
        "m_step/divergence": 1 / step,
        "m_step/tokens": 20.0,
        "e_step/implicit_reward_success": 0.1 * step,
        "e_step/implicit_reward_failure": -0.1 * step,
        "e_step/shift": math.nan if step == 2 else 0.0,
        "time/rollout": 2.0,
        "time/update": 3.0,
        "time/e_step": 1.0,
    }
