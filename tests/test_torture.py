"""The harness of ``make torture`` tells a loss from a refusal; the campaign itself is not part of the suite."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from helpers import vpd_train
from torture import damage
from torture.compare import differences, left_by, raw
from torture.faults import KINDS, REFUSED, Trial, deck
from torture.points import PLACES, Point, Watch, label_of, located
from torture.references import Reference, first_kill
from torture.runs import KEPT, VARIANTS, Ended, make_workplace, settings_of, user_files

from vpd.config import parse

FIXTURES = Path(__file__).parent / "fixtures"


def ended(code: int | None, err: str = "", left: int = 0) -> Ended:
    return Ended(code=code, out="", err=err, seconds=0.0, left=left)


def trial(tmp_path: Path) -> Trial:
    reference = Reference(FIXTURES, "grpo", points=(), points_resumed=(), first_kill=0, seconds=1.0)
    return Trial(reference, tmp_path / "work", random.Random(0), mounts=False)


def test_every_place_where_a_fault_strikes_is_still_there() -> None:
    for _, _, place in PLACES:
        owner, name = located(place)
        assert callable(getattr(owner, name))
    with pytest.raises(SystemExit, match="is not there any more"):
        located("vpd.loop:Loop.no_such_method")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_a_configuration(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_workplace(tmp_path / "work", variant)
    monkeypatch.chdir(tmp_path / "work")
    assert parse(settings_of(variant)).run.max_steps == 4


def test_the_variants_have_every_algorithm_and_teacher() -> None:
    sections = [settings_of(variant)["algorithm"] for variant in VARIANTS]
    assert {section["name"] for section in sections} == {"grpo", "sdpo", "gkd", "vpd", "gated", "hybrid", "plare"}
    assert {section.get("form") for section in sections} >= {"reshape", "reweight"}
    assert {section.get("teacher") for section in sections} >= {"frozen", "trust_region"}


def test_a_deck_holds_every_kind_as_often_as_it_says() -> None:
    assert Counter(kind.name for kind, _ in deck()) == {kind.name: kind.cards for kind in KINDS}
    assert {kind.name for kind, _ in deck()[: len(deck()) // 2]} == {kind.name for kind in KINDS}


def test_a_kill_comes_where_something_has_to_be_rewound() -> None:
    line = Point("line appended", "os.write metrics.jsonl")
    save = Point("checkpoint written", "before AccelerateLearner.save")
    assert first_kill([line, save, line, save, line]) == 3
    assert first_kill([line, line, Point("sampling", "before")]) == 1


def test_points_on_the_disk_are_named_by_what_is_done_to_which_file() -> None:
    cases = {
        ("open", ".checkpoint-2.vpd-partial/trainer.json", None): "checkpoint written",
        ("os.rename", "checkpoint-2", ".checkpoint-2.vpd-partial"): "checkpoint renamed",
        ("os.rename", ".checkpoint-1.vpd-partial", "checkpoint-1"): "checkpoint deleted",
        ("os.remove", ".checkpoint-1.vpd-partial/state.pt", None): "checkpoint deleted",
        ("os.write", "metrics.jsonl", None): "line appended",
        ("os.rename", "metrics.jsonl", ".metrics.jsonl.vpd-partial"): "folder rewound",
        ("os.rename", "rollouts/.step-000003.parquet.vpd-partial", "rollouts/step-000003.parquet"): "folder rewound",
        ("os.rename", "model", ".new.vpd-partial/model"): "model/ exported",
        ("open", ".run.json.vpd-partial", None): "run.json and config.yaml written",
    }
    for (event, path, source), label in cases.items():
        assert label_of(event, path, source) == label, path


def test_an_action_strikes_once_at_its_point(tmp_path: Path) -> None:
    struck: list[int] = []
    watch = Watch(tmp_path, at=1, action=lambda watch: struck.append(len(watch.passed)))
    for label in "abc":
        watch.point(label, label)
    assert struck == [2] and [point.label for point in watch.passed] == ["a", "b", "c"]


def test_a_difference_in_any_file_is_seen(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert vpd_train(one, run__max_steps=1, run__save_steps=1) == 0
    shutil.copytree(one, other)
    assert not differences(left_by(one), left_by(other)) and raw(one) == raw(other)
    for path in sorted(path for path in other.rglob("*") if path.is_file() and path.name != ".lock"):
        name, before = str(path.relative_to(other)), path.read_bytes()
        path.write_bytes(before[:-9])
        assert [line.split()[0] for line in differences(left_by(one), left_by(other))] == [name]
        path.unlink()
        assert differences(left_by(one), left_by(other)) == [f"{name} is missing"]
        path.write_bytes(before)
    (other / ".metrics.jsonl.vpd-partial").write_text("")
    assert differences(left_by(one), left_by(other)) == [".metrics.jsonl.vpd-partial is left over"]


def test_times_are_no_difference_and_numbers_are(tmp_path: Path) -> None:
    for name, seconds, loss in (("a", 1.0, 0.5), ("b", 2.0, 0.5), ("c", 1.0, 0.6)):
        (tmp_path / name).mkdir()
        line = {"step": 1, "time/update": seconds, "loss": loss}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    a, b, c = (left_by(tmp_path / name) for name in "abc")
    assert not differences(a, b) and differences(a, c) == ["metrics.jsonl differs from entry 0"]


@pytest.mark.parametrize("name", KEPT)
def test_a_file_of_the_users_that_is_touched_is_a_loss(name: str, tmp_path: Path) -> None:
    one = trial(tmp_path)
    one.make()
    assert not user_files(one.run) and not left_by(one.run)
    path = one.run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    one.check_user_files()
    assert one.verdict == "lost" and one.losses == [f"the user's {name} is gone"]


LINE = "vpd: error: the disk is full\n"
ENDINGS = {
    "refused": (ended(2, LINE), []),
    "code": (ended(1, LINE), ["exit code 1, not 2"]),
    "code 0": (ended(0), ["exit code 0, not 2"]),
    "silent": (ended(2), ["0 lines on stderr: ''"]),
    "two lines": (ended(2, f"a warning\n{LINE}"), ["2 lines on stderr: 'a warning | vpd: error: the disk is full'"]),
    "hung": (ended(None), ["hung"]),
    "escapes": (ended(2, "vpd: \x1b[2J\n"), ["control characters on the terminal"]),
    "left": (ended(2, LINE, left=1), ["left a process behind"]),
    "traceback": (
        ended(1, "Traceback (most recent call last):\nValueError: x\n"),
        ["traceback: ValueError: x", "exit code 1, not 2"],
    ),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_an_ending_is_clean_or_said_to_be_untidy(name: str, tmp_path: Path) -> None:
    one, (end, complaints) = trial(tmp_path), ENDINGS[name]
    one.expect_line(one.seen(end), REFUSED)
    one.was_refused = True
    assert one.complaints == complaints and one.verdict == ("untidy" if complaints else "refused")


@pytest.mark.parametrize("how", dict.fromkeys(damage.ANY), ids=lambda how: how.__name__)
def test_a_damage_changes_the_file_and_can_be_undone(how: damage.Damage, tmp_path: Path) -> None:
    path, backup = tmp_path / "file", tmp_path / "backup"
    path.write_bytes(bytes(range(1, 200)))
    shutil.copy2(path, backup)
    before = raw(tmp_path)
    how(path, random.Random(1))
    assert raw(tmp_path) != before
    damage.restore(path, backup)
    assert raw(tmp_path) == before
