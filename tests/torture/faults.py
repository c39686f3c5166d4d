"""Kinds of faults: each strikes a run, mends what it did, continues the run and says what came of it."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from torture import damage
from torture.compare import differences, left_by, raw
from torture.points import (
    FillDisk,
    Point,
    ReadOnly,
    Signal,
    Watch,
    immutable,
    kill,
    mount,
    stop,
    unmount,
)
from torture.references import Reference
from torture.runs import (
    LIMIT,
    STEPS,
    VARIANTS,
    WORDS,
    Ended,
    keep_more,
    make_workplace,
    resume,
    start,
    start_anew,
    train,
    user_files,
)
from torture.workplace import grader

#: exit codes as docs/reliability.md has them
DONE = 0
REFUSED = frozenset({2})
SAVED = 75
ON_SIGNAL: Mapping[int, frozenset[int]] = {
    signal.SIGINT: frozenset({SAVED, 130}),
    signal.SIGTERM: frozenset({SAVED, 143, -signal.SIGTERM}),
}

Verdict = Literal["equal", "refused", "untidy", "lost"]
MEANING: Mapping[Verdict, str] = {
    "equal": "went on (or was continued) and ended as the uninterrupted run, bit for bit",
    "refused": "stopped with one line and the documented exit code; the fault mended and the run continued: equal",
    "untidy": "nothing lost, but a traceback, a wrong exit code, no line or several, a hang, or a process left behind",
    "lost": "ended as another run, could not be continued, or touched the user's files",
}


@dataclass
class Trial:
    """One fault on one variant: its folder of work, its random numbers, and what was seen."""

    reference: Reference
    work: Path
    draw: random.Random
    mounts: bool
    kept_more: bool = False
    detail: str = ""
    losses: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    was_refused: bool = False
    ends: list[Ended] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.work / "run"

    @property
    def verdict(self) -> Verdict:
        if self.losses:
            return "lost"
        return "untidy" if self.complaints else "refused" if self.was_refused else "equal"

    def make(self) -> None:
        make_workplace(self.work, self.reference.variant)

    def pick(self, points: Sequence[Point], keep: Callable[[int, Point], bool]) -> int:
        """One of the points."""
        return self.draw.choice([number for number, point in enumerate(points) if keep(number, point)])

    def strike(self, number: int, action: Any, *words: str) -> Ended:
        """A run that is struck at a point."""
        self.detail += f"{action if not callable(action) or not hasattr(action, '__name__') else action.__name__} "
        self.detail += f"at {number}: {self.reference.points[number].label}, {self.reference.points[number].detail}"
        return self.seen(start(self.work, *words, watch=Watch(self.run, number, action)).wait())

    def seen(self, ended: Ended) -> Ended:
        """Note what no process may do, however it ends."""
        self.ends.append(ended)
        if ended.code is None:
            self.complaints.append("hung")
        if "Traceback" in ended.err + ended.out:
            self.complaints.append(f"traceback: {ended.lines[-1][:160] if ended.lines else ''}")
        if any(sign in ended.err + ended.out for sign in ("\x1b", "\x07", "\u202e", "\x00")):
            self.complaints.append("control characters on the terminal")
        if ended.left:
            self.complaints.append("left a process behind")
        return ended

    def expect_line(self, ended: Ended, codes: frozenset[int], lines: int = 1) -> None:
        """An ending with one of these codes and one line that says why, or at most so many of ours."""
        if ended.code is not None and ended.code not in codes:
            self.complaints.append(f"exit code {ended.code}, not {' or '.join(map(str, sorted(codes)))}")
        elif ended.code is not None and not (
            1 <= len(ended.lines) <= lines and all(line.startswith("vpd: ") for line in ended.lines)
        ):
            self.complaints.append(f"{len(ended.lines)} lines on stderr: {' | '.join(ended.lines)[-300:]!r}")
        elif ended.code is not None and len(ended.err) > 2000 * lines:
            self.complaints.append(f"a line of {len(ended.err)} characters")

    def expect_killed(self, ended: Ended) -> None:
        if ended.code != -signal.SIGKILL:
            self.complaints.append(f"was not killed there: exit code {ended.code}")

    def expect_equal(self, allowed: Callable[[str], bool] = lambda line: False) -> None:
        """The run folder is that of the uninterrupted run."""
        found = [line for line in differences(self.reference.left, left_by(self.run)) if not allowed(line)]
        self.losses += found[:5]

    def finish(self, allowed: Callable[[str], bool] = lambda line: False) -> None:
        """Continue the run: it must end as the uninterrupted one."""
        self.kept_more = keep_more(self.run)
        ended = self.seen(resume(self.work))
        if ended.code != DONE:
            self.losses.append(f"cannot be continued: exit code {ended.code}, {' | '.join(ended.lines)[-300:]}")
        else:
            self.expect_equal(allowed)

    def check_user_files(self) -> None:
        self.losses += [
            f"the user's {name} is {what}" for name, what in user_files(self.run, later=self.kept_more).items()
        ]


Strike = Callable[[Trial, str], None]


# --- kills ----------------------------------------------------------------------------------------------------


def killed(trial: Trial, label: str) -> None:
    trial.make()
    at = trial.pick(trial.reference.points, lambda number, point: point.label == label)
    trial.expect_killed(trial.strike(at, kill))
    trial.finish()


def killed_resuming(trial: Trial, label: str) -> None:
    """Killed, and killed again while it is continued."""
    trial.make()
    trial.expect_killed(trial.strike(trial.reference.first_kill, kill))
    points = trial.reference.points_resumed
    at = trial.pick(points, lambda number, point: point.label == label)
    trial.detail = f"resumed, at {at}: {points[at].detail}"
    again = start(trial.work, "--run.resume", "true", watch=Watch(trial.run, at, kill)).wait()
    trial.expect_killed(trial.seen(again))
    trial.finish()


def killed_any_time(trial: Trial, label: str) -> None:
    """Killed at a moment of the clock, inside of libraries too; at times twice."""
    trial.make()
    for words in ((), ("--run.resume", "true"))[: trial.draw.choice([1, 1, 2])]:
        child = start_anew(trial.work, *words) if label == "a new process" else start(trial.work, *words)
        seconds = trial.draw.uniform(0, trial.reference.seconds * (4 if label == "a new process" else 1))
        trial.detail += f"after {seconds:.3f} s "
        time.sleep(seconds)
        child.signal(signal.SIGKILL)
        trial.seen(child.wait())
    trial.finish()


def signalled(number: signal.Signals) -> Strike:
    def strike(trial: Trial, label: str) -> None:
        trial.make()
        if label == "a new process":
            child = start_anew(trial.work)
            started = time.monotonic()
            while not (trial.run / "metrics.jsonl").exists() and time.monotonic() < started + 60:
                time.sleep(0.02)
            time.sleep(trial.draw.uniform(0, trial.reference.seconds / 2))
            child.signal(number)
            ended = trial.seen(child.wait())
        else:
            at = trial.pick(trial.reference.points, lambda number, point: point.label == label)
            ended = trial.strike(at, Signal(number, times=trial.draw.choice([1, 1, 1, 2])))
        if ended.code == DONE:
            trial.expect_equal()
        elif not (ended.code == -number and not ended.lines and not _is_training(trial.run)):
            trial.expect_line(ended, ON_SIGNAL[number], lines=2)
        trial.finish(allowed=_is_extra_checkpoint)

    return strike


def _is_training(run: Path) -> bool:
    """Whether a run has begun and is not done; before and after a signal ends the process without a word."""
    path = run / "run.json"
    return path.is_file() and json.loads(path.read_text())["phase"] != "done"


def _is_extra_checkpoint(line: str) -> bool:
    """A signal saves a checkpoint out of turn, which stays, or has a limit on their number remove an older one."""
    return line.startswith("checkpoint-") and not line.startswith(f"checkpoint-{STEPS}/") and "differs" not in line


# --- the disk -------------------------------------------------------------------------------------------------


def disk_full(trial: Trial, label: str) -> None:
    trial.work.mkdir(parents=True)
    if trial.mounts:
        mount("tmpfs", trial.work, kind="tmpfs", options="size=12m,nr_inodes=3000")
    try:
        trial.make()
        at = trial.pick(trial.reference.points, lambda number, point: point.label == label)
        leave = trial.draw.choice([0, 0, 4096, 8192, 16384, 65536])
        inodes = trial.mounts and trial.draw.random() < 0.2
        fill = FillDisk(leave=leave if trial.mounts else max(leave, 8192), inodes=inodes, mounted=trial.mounts)
        ended = trial.strike(at, fill)
        _after_storage_fault(trial, ended)
        if ended.code != DONE and trial.mounts and trial.draw.random() < 0.5:
            _after_storage_fault(trial, trial.seen(resume(trial.work)))
        shutil.rmtree(trial.work / "filler", ignore_errors=True)
        trial.finish()
        trial.check_user_files()
        if trial.losses or trial.complaints:
            shutil.copytree(trial.work, f"{trial.work}-kept", symlinks=True)
    finally:
        if trial.mounts:
            unmount(trial.work)


def read_only(trial: Trial, label: str) -> None:
    trial.make()
    at = trial.pick(trial.reference.points, lambda number, point: point.label == label)
    try:
        ended = trial.strike(at, ReadOnly(mounted=trial.mounts))
        _after_storage_fault(trial, ended)
        if ended.code != DONE:
            again = trial.seen(resume(trial.work))
            trial.expect_line(again, REFUSED)
    finally:
        if trial.mounts:
            unmount(trial.work)
        else:
            immutable(trial.work, False)
    trial.finish()


def _after_storage_fault(trial: Trial, ended: Ended) -> None:
    """It has ended equal in spite of it, or with one line."""
    if ended.code == DONE:
        trial.expect_equal()
    else:
        trial.expect_line(ended, REFUSED)
        trial.was_refused = True


# --- bytes ----------------------------------------------------------------------------------------------------

#: label, pattern below the folder of work, damages
FILES: Mapping[str, tuple[str, tuple[damage.Damage, ...]]] = {
    "checkpoint: trainer.json": ("run/checkpoint-[0-9]/trainer.json", damage.ANY),
    "checkpoint: state.pt": ("run/checkpoint-[0-9]/state.pt", damage.ANY),
    "checkpoint: weights": ("run/checkpoint-[0-9]/*.safetensors", damage.ANY),
    "checkpoint: other files": ("run/checkpoint-[0-9]/[!ts]*.json*", damage.ANY),
    "run.json": ("run/run.json", damage.TEXT),
    "metrics.jsonl": ("run/metrics.jsonl", damage.TEXT),
    "config.yaml": ("run/config.yaml", damage.TEXT),
    "rollouts": ("run/rollouts/step-0*.parquet", damage.ANY),
    "alarms.jsonl": ("run/alarms.jsonl", damage.TEXT),
    "lock": ("run/.lock", (damage.removed, damage.garbage, damage.folder, damage.fifo, damage.loop)),
    "the user's run.yaml": ("run.yaml", damage.TEXT),
    "the data": ("tasks.jsonl", damage.ANY),
    "the model's weights": ("base/model.safetensors", damage.ANY),
    "the model's other files": ("base/*.json", damage.ANY),
    "the teacher's weights": ("teacher/model.safetensors", damage.ANY),
}


def damaged(trial: Trial, label: str) -> None:
    """A file is damaged between a kill and the continuation."""
    trial.make()
    points = trial.reference.points
    saved = [number for number, point in enumerate(points) if point.label == "checkpoint renamed"]
    first = saved[0] + 1 if saved else len(points) // 3
    trial.expect_killed(trial.strike(trial.pick(points, _between(first, points)), kill))
    pattern, damages = FILES[label]
    found = sorted(path for path in trial.work.glob(pattern) if path.is_file())
    if not found:
        trial.detail = "no such file at that moment"
        trial.finish()
        return
    path = found[-1] if trial.draw.random() < 0.75 else trial.draw.choice(found)
    how = trial.draw.choice(damages)
    backup = trial.work.with_name(f"{trial.work.name}-backup")
    shutil.copy2(path, backup)
    how(path, trial.draw)
    name = str(path.relative_to(trial.work))
    trial.detail = f"{how.__name__} {name}"
    before = raw(trial.run)
    # where the settings are gone, those of the run folder are what is continued
    ended = trial.seen(resume(trial.work, "--run.output_dir", "run"))
    if ended.code == DONE:
        trial.expect_equal(_may_differ(trial, name.removeprefix("run/"), backup, before))
    else:
        trial.expect_line(ended, REFUSED)
        trial.was_refused = True
        damage.restore(path, backup)
        trial.finish()
    backup.unlink()


def _between(first: int, points: Sequence[Point]) -> Callable[[int, Point], bool]:
    """After ``first``, and before the last step has trained: something is left to do that a damage could change."""
    last = max(number for number, point in enumerate(points) if point.label == "optimiser step")
    return lambda number, point: first < number < last


def _may_differ(trial: Trial, name: str, backup: Path, before: Mapping[str, str]) -> Callable[[str], bool]:
    """The damaged file itself may stay as damaged as it was; of a log, only the lines that were damaged may."""
    untouched = before.get(name) is not None and raw(trial.run).get(name) == before[name]
    if not name.endswith(".jsonl") or name == "tasks.jsonl":
        return lambda line: line.startswith(f"{name} ") and untouched
    path = trial.run / name
    lines = set(backup.read_text().splitlines())
    expected = (trial.reference.folder / "run" / name).read_text().splitlines()
    kept = path.read_text(errors="replace").splitlines() if path.is_file() else []
    steps = [json.loads(line)["step"] for line in expected]
    later = [step for step in steps if step > max((json.loads(line)["step"] for line in lines), default=0)]
    has = [json.loads(line)["step"] for line in kept] if _all_readable(kept) else []
    return lambda line: line.startswith(f"{name} ") and (untouched or has[len(has) - len(later) :] == later)


def _all_readable(lines: Sequence[str]) -> bool:
    try:
        return all(isinstance(json.loads(line), dict) for line in lines)
    except ValueError:
        return False


def _expect_unchanged(trial: Trial, before: Mapping[str, str]) -> None:
    """A refusal has changed nothing in the run folder, leftovers of the kill apart."""
    trial.was_refused = True
    after = raw(trial.run)
    changed = sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name) and ".vpd-" not in name
    )
    if changed:
        trial.complaints.append(f"the refusal changed {', '.join(changed[:4])}")


# --- graders --------------------------------------------------------------------------------------------------


def struck_by_grader(trial: Trial, label: str) -> None:
    """The user's grader does what none should, at one of its calls or from it on; then it is mended."""
    trial.make()
    where = trial.draw.choice(_places(label, trial.reference.variant))
    calls = trial.reference.calls("grading")
    call = 1 + trial.draw.randrange({"grade": calls, "task": 3, "respond": 2, "feedback": 2}[where])
    lasting = label in grader.HANGS or label in grader.ASYNC or trial.draw.random() < 0.3
    if label in grader.TEXTS:  # every call, so that a continued run reads the same texts
        call, lasting = 1, True
    ended = _graded_badly(trial, label, call, where, lasting)
    if not (trial.work / "struck").exists():  # a grader without any answer to grade is not called
        shutil.rmtree(trial.work)
        trial.make()
        ended = _graded_badly(trial, label, 1, where, lasting)
    if not (trial.work / "struck").exists():
        trial.complaints.append("never struck")
    if ended.code == DONE and label in grader.TEXTS:
        _compare_with_killed(trial)
        return
    if ended.code == DONE and trial.run.joinpath("model").is_dir():
        trial.expect_equal()
        return
    if ended.code == DONE:
        trial.complaints.append("exit code 0 without a model")
    elif label not in grader.DIES or label == "KeyboardInterrupt":
        interrupted = ON_SIGNAL[signal.SIGINT] if "KeyboardInterrupt" in label else frozenset()
        trial.expect_line(ended, REFUSED | interrupted)
        trial.was_refused = True
    (trial.work / "fault.json").unlink()
    trial.finish()


def _graded_badly(trial: Trial, label: str, call: int, where: str, lasting: bool) -> Ended:
    """A run whose grader misbehaves from a call on, or at it alone."""
    trial.detail = f"{where}, call {call}{' and later' if lasting else ''}"
    fault = {"kind": label, "call": call, "where": where, "lasting": lasting}
    (trial.work / "fault.json").write_text(json.dumps(fault))
    return trial.seen(start(trial.work, memory=1 << 30 if label == "memory" else None).wait(60))


def _compare_with_killed(trial: Trial) -> None:
    """Other texts make another run: it is compared with one that was killed and continued with the same texts."""
    other = trial.work.with_name(f"{trial.work.name}-killed")
    make_workplace(other, trial.reference.variant)
    shutil.copy(trial.work / "fault.json", other / "fault.json")
    at = trial.draw.randrange(len(trial.reference.points) // 2)
    trial.seen(start(other, watch=Watch(other / "run", at, kill)).wait())
    again = trial.seen(resume(other))
    trial.losses += [f"cannot be continued: {' | '.join(again.lines)[-300:]}"] if again.code != DONE else []
    trial.losses += differences(left_by(trial.run), left_by(other / "run"))[:5]


def _places(label: str, variant: str) -> list[str]:
    anywhere = label in grader.SPOILS or label in grader.DIES or label.startswith(("raise", "sys.exit", "exit"))
    if not anywhere:
        return ["grade"]
    places = ["grade", "grade"]
    if WORDS in VARIANTS[variant]:
        places += ["task", "respond"]
    if any("feedback" in changes for changes in VARIANTS[variant]):
        places += ["feedback"]
    return places


def _graded_by(label: str) -> Callable[[Reference], bool]:
    """Which variants have the grader that a fault needs."""
    if label in grader.ASYNC:
        return lambda reference: reference.variant == "grpo-async"
    if label in grader.HANGS:
        return lambda reference: LIMIT in VARIANTS[reference.variant] and reference.variant != "grpo-async"
    if label in grader.TEXTS:
        return lambda reference: reference.variant not in ("grpo-async", "vpd-turns")
    return lambda reference: reference.variant != "grpo-async"


# --- two processes, other settings ------------------------------------------------------------------------------


def two_processes(trial: Trial, label: str) -> None:
    """A second process comes while the first stands still at some point; then the first goes on, or dies."""
    trial.make()
    points = trial.reference.points
    at = trial.pick(points, lambda number, point: True)
    trial.detail = f"at {at}: {points[at].label}, {points[at].detail}"
    first = start(trial.work, watch=Watch(trial.run, at, stop))
    if not first.stopped():
        trial.complaints.append("was not stopped there")
    before = raw(trial.run)
    words = () if label == "both begin" else ("--run.resume", "true")
    second = trial.seen(train(trial.work, *words))
    if second.code != DONE:
        trial.expect_line(second, REFUSED)
        _expect_unchanged(trial, before)
    if label == "the first dies":
        first.signal(signal.SIGKILL)
    first.signal(signal.SIGCONT)
    ended = trial.seen(first.wait())
    if label != "the first dies":
        if ended.code != DONE:
            trial.expect_line(ended, REFUSED)
        if DONE not in (ended.code, second.code):
            trial.complaints.append("neither process went on")
        if ended.code == DONE and second.code == DONE and "nothing to do" not in ended.out + second.out:
            trial.losses.append("both processes trained")
    trial.finish()


CHANGES: Mapping[str, Sequence[str]] = {
    "seed": ("--run.seed", "5"),
    "learning rate": ("--optim.learning_rate", "0.02"),
    "temperature": ("--rollout.temperature", "0.7"),
    "group size": ("--rollout.num_generations", "4"),
    "held-out share": ("--env.eval_share", "0.4"),
    "model": ("--model.name_or_path", "./teacher"),
    "algorithm": ("--algorithm", "{name: grpo, clip_low: 0.1}"),
    "data": (),
}


def other_settings(trial: Trial, label: str) -> None:
    """Continued with another setting than it was begun with."""
    trial.make()
    points = trial.reference.points
    begun = next(number for number, point in enumerate(points) if point.label == "line appended")
    trial.expect_killed(trial.strike(trial.pick(points, _between(begun + 2, points)), kill))
    trial.detail = f"{label} {trial.detail}"
    tasks = trial.work / "tasks.jsonl"
    data = tasks.read_text()
    if label == "data":
        tasks.write_text(data.replace("apply rule A", "apply rule C"))
    before = raw(trial.run)
    words = ["--algorithm.name", "grpo"] if label == "algorithm" else CHANGES[label]
    ended = trial.seen(resume(trial.work, *words))
    if ended.code == DONE:
        trial.expect_equal()
        return
    trial.expect_line(ended, REFUSED)
    _expect_unchanged(trial, before)
    tasks.write_text(data)
    trial.finish()


# --- the deck -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of fault.  ``cards``: how many of it are in a deck; ``labels``: what it is done at, or with."""

    name: str
    cards: int
    strike: Strike
    labels: Callable[[Mapping[str, Reference]], Sequence[str]]
    fits: Callable[[str], Callable[[Reference], bool]] = lambda label: lambda reference: True
    at_points: Literal["points", "points_resumed"] | None = None

    def variants(self, label: str, references: Mapping[str, Reference]) -> list[str]:
        """The variants that a label can be tried on."""
        fitting = [name for name, reference in references.items() if self.fits(label)(reference)]
        if self.at_points is None or label == "a new process":
            return fitting
        return [n for n in fitting if any(p.label == label for p in vars(references[n])[self.at_points])]


def _labels_of(which: str, *more: str) -> Callable[[Mapping[str, Reference]], Sequence[str]]:
    def labels(references: Mapping[str, Reference]) -> Sequence[str]:
        found = {point.label for reference in references.values() for point in vars(reference)[which]}
        return [*sorted(found), *more]

    return labels


def _given(*labels: str) -> Callable[[Mapping[str, Reference]], Sequence[str]]:
    return lambda references: labels


def _fits_settings(label: str) -> Callable[[Reference], bool]:
    if label in ("held-out share", "data"):
        return lambda reference: WORDS not in VARIANTS[reference.variant]
    if label == "algorithm":
        return lambda reference: not reference.variant.startswith("grpo")
    return lambda reference: True


def _fits_damage(label: str) -> Callable[[Reference], bool]:
    if label == "the teacher's weights":
        return lambda reference: reference.variant.startswith("gkd")
    if label == "the data":
        return lambda reference: WORDS not in VARIANTS[reference.variant]
    if label == "alarms.jsonl":
        return lambda reference: label in reference.left
    if label.startswith("checkpoint"):
        return lambda reference: reference.variant != "vpd-no-checkpoints"
    return lambda reference: True


KINDS: Sequence[Kind] = (
    Kind("killed at a point", 26, killed, _labels_of("points"), at_points="points"),
    Kind("killed again while it resumes", 8, killed_resuming, _labels_of("points_resumed"), at_points="points_resumed"),
    Kind("killed at any time", 4, killed_any_time, _given("in a step", "in a step", "in a step", "a new process")),
    Kind("disk full", 9, disk_full, _labels_of("points"), at_points="points"),
    Kind("read-only", 5, read_only, _labels_of("points"), at_points="points"),
    Kind("damaged file", 15, damaged, _given(*FILES), _fits_damage),
    Kind("grader", 16, struck_by_grader, _given(*grader.FAULTS), _graded_by),
    Kind("SIGTERM", 3, signalled(signal.SIGTERM), _labels_of("points", "a new process"), at_points="points"),
    Kind("SIGINT", 3, signalled(signal.SIGINT), _labels_of("points", "a new process"), at_points="points"),
    Kind("two processes", 3, two_processes, _given("one resumes", "both begin", "the first dies")),
    Kind("other settings", 2, other_settings, _given(*CHANGES), _fits_settings),
)


@cache
def deck() -> tuple[tuple[Kind, int], ...]:
    """The order in which kinds come, each spread evenly; with the how-manieth of its kind a card is."""
    cards = [((place + 0.5) / kind.cards, kind, place) for kind in KINDS for place in range(kind.cards)]
    return tuple((kind, place) for _, kind, place in sorted(cards, key=lambda card: card[0]))


@dataclass(frozen=True)
class Fault:
    """Fault ``number`` of the campaign with this seed: what it is follows from these two."""

    seed: int
    number: int
    references: Mapping[str, Reference]

    @property
    def kind(self) -> Kind:
        return deck()[self.number % len(deck())][0]

    @cached_property
    def turn(self) -> int:
        """How many faults of its kind came before it."""
        return self.number // len(deck()) * self.kind.cards + deck()[self.number % len(deck())][1]

    @cached_property
    def label(self) -> str:
        """The labels of a kind take turns, in an order that the seed shuffles."""
        labels = list(self.kind.labels(self.references))
        random.Random(f"{self.seed}/{self.kind.name}").shuffle(labels)
        return labels[self.turn % len(labels)]

    @cached_property
    def variant(self) -> str:
        return random.Random(f"{self.seed}/{self.number}/variant").choice(
            self.kind.variants(self.label, self.references)
        )

    def strike(self, folder: Path, *, mounts: bool) -> Trial:
        draw = random.Random(f"{self.seed}/{self.number}")
        trial = Trial(self.references[self.variant], folder / f"{self.number:04d}", draw, mounts)
        self.kind.strike(trial, self.label)
        if trial.run.is_dir():
            trial.check_user_files()
        return trial
