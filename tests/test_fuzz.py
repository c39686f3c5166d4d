"""The fuzzer of the sandbox: the same seed makes the same programs, and what a program should not do is found."""

import sys
from pathlib import Path
from typing import Any

import pytest
from fuzz_sandbox import HEAD, LIMITS, Targets, caller_and_folder, fuzz, report, try_one

from vpd.errors import SandboxError
from vpd.sandbox import Program
from vpd.sandbox.local import LocalSandbox, probe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the local sandbox needs Linux")
TARGETS = Targets(folder="/nowhere", process=1, port=1, name="name")


def test_a_program_follows_from_its_seed_and_number_and_is_python() -> None:
    sources = [TARGETS.program(seed, number).source for seed in (0, 1) for number in range(50)]
    assert sources == [TARGETS.program(seed, number).source for seed in (0, 1) for number in range(50)]
    assert len(set(sources)) == 100
    for source in sources:
        compile(source, "main.py", "exec")


@pytest.mark.parametrize("kind", ["namespaces", "landlock"])
def test_random_programs_end_and_leave_nothing(kind: Any, tmp_path: Path) -> None:
    try:
        if violation := probe(LocalSandbox(protection=kind, workers=1)):
            pytest.skip(violation)
    except SandboxError as error:
        pytest.skip(str(error))
    ended, faults = fuzz(kind, 0, range(6), tmp_path / "out")
    assert ended.total() == 6 and not faults and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("attack", "found"),
    [
        ("print(open(FOLDER + '/secret').read())", "the caller's secret was read"),
        ("open(FOLDER + '/file', 'w').write('x')", "the caller's files have changed"),
        ("open(FOLDER + '/new', 'w').write('x')", "the caller's folder has changed"),
        ("os.kill(PROCESS, 9); time.sleep(.3)", "the caller's process was killed"),
        ("socket.create_connection(('127.0.0.1', PORT))", "a listener of the caller's was reached"),
        ("socket.socket(socket.AF_UNIX).connect('\\0' + NAME)", "a listener of the caller's was reached"),
        ("open(os.getcwd() + '/../../x', 'w')", "files left"),
    ],
)
def test_what_escapes_is_found_and_written_down(attack: str, found: str, tmp_path: Path) -> None:
    with caller_and_folder() as (caller, temporary):
        head = HEAD.format(**vars(caller.targets))
        program = Program(source=head + attack, limits=LIMITS)
        outcome, faults = try_one(LocalSandbox(protection="bare", workers=1), program, caller, temporary)
    assert any(line.startswith(found) for line in faults), (outcome, faults)
    report(tmp_path / "out", "bare", 0, 17, program, outcome, faults)
    written = (tmp_path / "out" / "seed-0-17-bare.py").read_text()
    assert found in written and written.endswith(attack)
    compile(written, "seed", "exec")
