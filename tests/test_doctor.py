"""``vpd doctor``: what it finds here, and what it says of machines that lack something."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from vpd.cli import main
from vpd.errors import VPDError
from vpd.recipes import doctor
from vpd.recipes.doctor import Finding, require_whole


def found(parts: Any) -> dict[str, Finding]:
    return {finding.part: finding for finding in parts}


def test_this_machine_is_examined_without_a_fault(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--no_network", "--no_run", "--json", "--output_dir", str(tmp_path / "new" / "out")]) == 0
    findings = {finding["part"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert {"vpd", "packages", "memory", "bfloat16", "disk", "sandbox"} <= findings.keys()
    assert all(finding["do"] for finding in findings.values() if finding["status"] != "ok")
    assert not (tmp_path / "new").exists()


def test_each_line_is_shown_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--no_network", "--no_run"]) == 0
    shown = capsys.readouterr().out
    assert "ok      vpd: vpd 0.1.0 in" in shown and "disk: " in shown


def test_the_smoke_run_trains(tmp_path: Path) -> None:
    [finding] = list(doctor._smoke_run())
    assert finding.status in ("ok", "warning") and "two iterations" in finding.detail


def test_a_smoke_run_that_fails_or_hangs_is_a_fault_with_its_last_line() -> None:
    failing = [sys.executable, "-c", "import sys; print('one', file=sys.stderr); sys.exit('the end')"]
    assert doctor._run(failing) == "exit code 1: the end"
    assert (
        doctor._run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2) == "it did not end within 0 s"
    )
    assert str(doctor._run(["/nowhere/python"])).startswith("it could not be started")


def test_a_folder_that_cannot_be_written_is_a_fault(tmp_path: Path) -> None:
    [finding] = doctor._disk(Path("/proc/1/x"))
    assert finding.status == "fault" and finding.do is not None
    assert next(doctor._disk(tmp_path)).status in ("ok", "warning")


@pytest.mark.parametrize(
    ("line", "fault"),
    [("torch>=2", None), ("torch>=99", "torch is "), ("no-such-package>=1", "no-such-package is missing")],
)
def test_a_requirement_holds_or_is_named(line: str, fault: str | None) -> None:
    said = doctor._fault_of(doctor.Requirement(line))
    assert (said is None) if fault is None else str(said).startswith(fault)


def test_every_extra_says_what_it_is_for() -> None:
    named = {extra for r in doctor._requirements() for extra in doctor.WITHOUT if f'"{extra}"' in str(r.marker)}
    assert named == set(doctor.WITHOUT) or not doctor._requirements()


def test_a_fault_ends_with_its_line() -> None:
    findings = [
        Finding(part="a", status="ok", detail="fine"),
        Finding(part="b", status="fault", detail="gone", do="Mend it."),
        Finding(part="c", status="fault", detail="gone too"),
    ]
    with pytest.raises(VPDError, match=r"^b is broken \(and 1 more\); got gone. Mend it.$"):
        require_whole(findings)
    require_whole(findings[:1])


def test_a_missing_package_that_the_doctor_needs_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "vpd.recipes.doctor")
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    assert main(["doctor", "--no_run", "--no_network"]) == 2
    assert capsys.readouterr().err.startswith("vpd: error: the package packaging is missing. Install")
