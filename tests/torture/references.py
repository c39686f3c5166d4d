"""The uninterrupted run of each variant: what a tortured run is compared with, and the points to strike at."""

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torture.compare import differences, left_by
from torture.points import Point, Watch, end_with_parent, kill
from torture.runs import VARIANTS, import_all, make_workplace, resume, start, train


@dataclass(frozen=True)
class Reference:
    """One variant without a fault.

    ``points`` of its run; ``first_kill`` is one of them, after which something has to be rewound, and
    ``points_resumed`` are those of the run that continues from there.  ``seconds`` is how long the run took.
    """

    folder: Path
    variant: str
    points: Sequence[Point]
    points_resumed: Sequence[Point]
    first_kill: int
    seconds: float

    @cached_property
    def left(self) -> dict[str, Any]:
        return left_by(self.folder / "run")

    def calls(self, label: str) -> int:
        """How often a function whose call is a point before and after it was called."""
        return sum(point.label == label for point in self.points) // 2


def code_hash() -> str:
    """A hash of the code that is tortured and of what tortures it: results of other code are not used again."""
    tested = importlib.util.find_spec("vpd")
    assert tested is not None and tested.origin is not None
    files = [path for root in (Path(tested.origin), Path(__file__)) for path in sorted(root.parent.rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def prepare(root: Path, jobs: int, code: str) -> dict[str, Reference]:
    """The references of all variants, made by so many processes; what the same code made before is used again."""
    root.mkdir(parents=True, exist_ok=True)
    _import(root)
    names = [name for name in VARIANTS if _code_of(root / name) != code]
    workers = []
    for job in range(jobs):
        pid = os.fork()
        if pid == 0:
            end_with_parent()
            status = 1
            try:
                for name in names[job::jobs]:
                    _make(root, name, code)
                status = 0
            except SystemExit as end:
                print(end, flush=True)
            finally:
                os._exit(status)
        workers.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]
    if any(codes):
        raise SystemExit("torture: a run without any fault is not what it should be; see above")
    return {name: _load(root, name) for name in VARIANTS}


def _import(root: Path) -> None:
    """Import everything that a run imports, into this process, of which the others are forks."""
    work = root / "first"
    shutil.rmtree(work, ignore_errors=True)
    make_workplace(work, "vpd-lora")
    ended = train(work, traced=True)
    if ended.code != 0:
        raise SystemExit(f"torture: a run without any fault ended with {ended.code}: {ended.err}")
    import_all([name for name in ended.modules if not name.startswith(("grader_", "__"))])
    shutil.rmtree(work)


def _make(root: Path, name: str, code: str) -> None:
    folder, other = root / name, root / f"{name}-resumed"
    for work in (folder, other):
        shutil.rmtree(work, ignore_errors=True)
        make_workplace(work, name)
    whole = train(folder, traced=True)
    if whole.code != 0:
        raise SystemExit(f"torture: {name} ended with {whole.code}: {whole.err}")
    first = first_kill(whole.passed)
    start(other, watch=Watch(other / "run", first, kill)).wait()
    resumed = resume(other, traced=True)
    found = differences(left_by(folder / "run"), left_by(other / "run"))
    if resumed.code != 0 or found:
        raise SystemExit(f"torture: {name}, resumed, ended with {resumed.code}: {resumed.err} {'; '.join(found)}")
    data = {
        "code": code,
        "points": [[point.label, point.detail] for point in whole.passed],
        "points_resumed": [[point.label, point.detail] for point in resumed.passed],
        "first_kill": first,
        "seconds": whole.seconds,
    }
    shutil.rmtree(other)
    (folder / "reference.json").write_text(json.dumps(data))


def _code_of(folder: Path) -> str | None:
    path = folder / "reference.json"
    return json.loads(path.read_text())["code"] if path.exists() else None


def first_kill(points: Sequence[Point]) -> int:
    """Just before the last checkpoint is written; without any, at the last line of the metrics."""
    saves = [number for number, point in enumerate(points) if point.detail == "before AccelerateLearner.save"]
    lines = [number for number, point in enumerate(points) if point.label == "line appended"]
    return saves[-1] if saves else lines[-1]


def _load(root: Path, name: str) -> Reference:
    data = json.loads((root / name / "reference.json").read_text())
    return Reference(
        folder=root / name,
        variant=name,
        points=[Point(*pair) for pair in data["points"]],
        points_resumed=[Point(*pair) for pair in data["points_resumed"]],
        first_kill=data["first_kill"],
        seconds=data["seconds"],
    )
