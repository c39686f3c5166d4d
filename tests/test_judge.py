"""The judge: both orders are asked, what is not clear is unsure, and its words may be the teacher's context."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fakes import chat_completion, endpoint
from helpers import metrics_of, vpd_train
from test_critique import rollout

from vpd.bundled import load_bundled
from vpd.errors import ConfigError
from vpd.feedback import ScriptedWriter, Written
from vpd.feedback.judge import Judge, rounds, verdict_of
from vpd.report.rollout_metrics import rollout_metrics
from vpd.types import Comparison, Group, Message, SampleKey


def group_of(*texts: str, rewards: Sequence[float] = ()) -> Group:
    made = [rollout(text == "good", text) for text in texts]
    return Group(
        rollouts=tuple(
            dataclasses.replace(
                r,
                key=dataclasses.replace(r.key, sample=index),
                grade=dataclasses.replace(r.grade, reward=rewards[index] if rewards else r.grade.reward),
            )
            for index, r in enumerate(made)
        )
    )


def comparisons(group: Group) -> list[list[Comparison]]:
    return [list(r.comparisons) for r in group.rollouts]


def fair(conversation: Sequence[Message], key: SampleKey) -> str:
    """Prefers the attempt that says good, wherever it stands."""
    text = conversation[0]["content"]
    first = text.index("The first attempt")
    second = text.index("The second attempt")
    return f"One of them is right.\n{'first' if first < text.find('good', first) < second else 'Second.'}"


@pytest.mark.parametrize(("texts", "preferred"), [(("good", "bad"), True), (("bad", "good"), False)])
def test_both_orders_are_asked_and_must_agree(texts: tuple[str, str], preferred: bool) -> None:
    writer = ScriptedWriter(fair)
    (made,) = Judge()([group_of(*texts)], writer)
    assert comparisons(made) == [[Comparison(other=1, preferred=preferred, tokens=12)], []]
    shown = [conversation[0]["content"] for conversation, _ in writer.asked]
    assert shown[0].index(texts[0]) < shown[0].index(texts[1]) and shown[1].index(texts[1]) < shown[1].index(texts[0])
    assert "What is 2+2?" in shown[0]
    assert len({key for _, key in writer.asked}) == 2  # each text has its own randomness
    assert not any(r.context for r in made.rollouts)


@pytest.mark.parametrize(
    ("answer", "disagree", "unreadable"),
    [
        (lambda c, k: "I like it.\nfirst", True, 0),
        (lambda c, k: "Hard to say.\nunsure", False, 0),
        (lambda c, k: "The first attempt is better because it", False, 2),
        (lambda c, k: "", False, 2),
    ],
)
def test_what_is_not_clear_is_unsure(
    answer: Callable[[Sequence[Message], SampleKey], str], disagree: bool, unreadable: int
) -> None:
    (made,) = Judge()([group_of("good", "bad")], ScriptedWriter(answer))
    (found,) = made.rollouts[0].comparisons
    assert (found.preferred, found.disagree, found.unreadable) == (None, disagree, unreadable)
    assert not any(r.context for r in Judge(use="both")([group_of("a", "b")], ScriptedWriter(answer))[0].rollouts)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("first", "first"),
        ("Both fail.\n\n**Second**\n", "second"),
        ("x\nVerdict: unsure.", "unsure"),
        ("x\nThe first attempt.", "first"),
        ("first\nbut I may be wrong", None),
        ("first or second", None),
        ("", None),
    ],
)
def test_the_verdict_stands_on_the_last_line(text: str, verdict: str | None) -> None:
    assert verdict_of(text) == verdict


def test_every_attempt_meets_another_before_one_meets_a_second() -> None:
    assert list(rounds(5))[:2] == [(0, 1), (2, 3)]
    assert sorted(rounds(5)) == [(i, j) for i in range(5) for j in range(i + 1, 5)]
    for count, most in ((4, None), (4, 5), (4, 99), (1, None)):
        writer = ScriptedWriter(fair)
        Judge(max_pairs=most)([group_of(*map(str, range(count)))], writer)
        assert len(writer.asked) == 2 * min(most or count // 2, count * (count - 1) // 2)


def test_attempts_that_say_the_same_are_not_compared() -> None:
    writer = ScriptedWriter(fair)
    (made,) = Judge(max_pairs=9)([group_of("bad", "bad", "good")], writer)
    assert len(writer.asked) == 4
    assert [[c.other for c in r.comparisons] for r in made.rollouts] == [[2], [2], []]


def test_what_the_judge_wrote_is_context_for_both_attempts() -> None:
    (made,) = Judge(use="context")([group_of("bad", "good")], ScriptedWriter(fair))
    assert comparisons(made) == [[], []]
    texts = [[section.text for section in r.context] for r in made.rollouts]
    assert texts[0][0].endswith("One of them is right.\nSecond.")  # each is the first in what it reads
    assert texts[1][0].endswith("One of them is right.\nfirst")
    assert all("called the first here" in text for (text,) in texts)
    (both,) = Judge(use="both")([group_of("bad", "good")], ScriptedWriter(fair))
    assert comparisons(both) != comparisons(made) and [r.context for r in both.rollouts] == [
        r.context for r in made.rollouts
    ]


def test_the_reward_can_be_the_judge_and_writes_nothing() -> None:
    writer = ScriptedWriter(fair)
    group = group_of("a", "b", "c", "d", rewards=(0.0, 1.0, 0.5, 0.5))
    (made,) = Judge(judge="reward")([group], writer)
    assert [[c.preferred for c in r.comparisons] for r in made.rollouts] == [[False], [], [None], []]
    assert not writer.asked


def test_the_reward_as_judge_gives_the_graders_text_as_context() -> None:
    told = group_of("a", "b", "c")
    graded = Group(
        rollouts=tuple(
            dataclasses.replace(r, grade=dataclasses.replace(r.grade, feedback=f"about {r.completion.text}"))
            for r in told.rollouts
        )
    )
    (made,) = Judge(judge="reward", use="context", max_pairs=3)([graded], ScriptedWriter(fair))
    assert [[s.text for s in r.context] for r in made.rollouts] == [["about a"], ["about b"], ["about c"]]  # once each


def test_metrics_say_how_sure_the_judge_is_and_how_often_it_is_right() -> None:
    def answer(conversation: Sequence[Message], key: SampleKey) -> str:
        return fair(conversation, key) if "good" in conversation[0]["content"] else "first"

    groups = Judge()([group_of("good", "bad", "x", "y")], ScriptedWriter(answer))
    found = rollout_metrics(groups)
    assert (found["judge/pairs"], found["judge/unsure"], found["judge/disagree"]) == (2.0, 0.5, 0.5)
    assert found["judge/agrees_with_reward"] == 1.0
    assert "judge/pairs" not in rollout_metrics([group_of("good", "bad")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "compare {first}"}, "does not show both attempts"),
        ({"template": "{first} {secund}"}, r"the judge's template has no field {secund}.*Did you mean 'second'\?"),
        ({"judge": "model"}, "judge model and judge_model go together"),
        ({"judge_model": "x"}, "judge model and judge_model go together"),
        ({"endpoint": "here"}, "the endpoint is no URL"),
        ({"max_pairs": 0}, "max_pairs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Judge(**settings)  # type: ignore[arg-type]


def test_another_model_is_the_judge() -> None:
    judge = Judge(
        judge="model", judge_model=str(load_bundled("tiny")), max_comparison_length=3, template="{first} {second}"
    )
    judge.contact()
    writer = ScriptedWriter(fair)
    groups = judge([group_of("1 2 3", "4 5 6")], writer)
    (found,) = groups[0].rollouts[0].comparisons
    assert (found.tokens, found.unreadable, writer.asked) == (6, 2, [])


def test_a_model_behind_an_endpoint_is_the_judge() -> None:
    with endpoint(lambda body: (200, chat_completion("x\nfirst", usage={"completion_tokens": 4}))) as (url, posted):
        judge = Judge(judge="endpoint", endpoint=url, model="m", concurrency=1)
        judge.contact()
        (found,) = judge([group_of("a", "b")], ScriptedWriter(fair))[0].rollouts[0].comparisons
    assert (found.disagree, found.tokens, len(posted)) == (True, 8, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm.name": "plare"}, "no feedback source gives any; got feedback: [environment]"),
        ({"algorithm.name": "plare", "feedback": "[{name: judge, use: context}]"}, "no feedback source gives any"),
        ({"algorithm.name": "sdpo", "feedback": "[environment, {name: judge}]"}, "sdpo learns from no preferences"),
        (
            {"algorithm.name": "sdpo", "feedback": "[{name: judge, use: context}]", "rollout.num_generations": 1},
            "the judge compares the attempts at a task",
        ),
    ],
)
def test_a_judge_and_a_method_that_do_not_fit_leave_no_folder(
    settings: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vpd_train(tmp_path / "out", **settings) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_learns_from_the_rewards_preferences_and_keeps_them(tmp_path: Path) -> None:
    judge = "[{name: judge, judge: reward, use: both, max_pairs: 6}]"
    settings = {"algorithm.name": "plare", "feedback": judge, "model.name_or_path": "tiny-mid", "run.max_steps": 1}
    assert vpd_train(tmp_path / "out", **settings) == 0
    last = metrics_of(tmp_path / "out")[-1]
    assert last["judge/pairs"] <= 24 and last["judge/agrees_with_reward"] == 1.0
    assert last["rows/trained"] + last["rows/no_preference"] == last["rows/drawn"]
    assert last["preference/pairs"] == pytest.approx(last["judge/pairs"] * (1 - last["judge/unsure"]))
    rows = pq.read_table(tmp_path / "out" / "rollouts").to_pylist()
    kept = [json.loads(row["comparisons"]) for row in rows if row["comparisons"]]
    assert {one["preferred"] for row in kept for one in row} <= {"this", "other", "unsure"}


def test_a_comparison_that_its_limit_ended_is_kept_as_such() -> None:
    class Clipped(ScriptedWriter):
        def write(self, *arguments: Any, **options: Any) -> list[Written]:
            return [dataclasses.replace(one, clipped=True) for one in super().write(*arguments, **options)]

    for clipped, writer in {True: Clipped(fair), False: ScriptedWriter(fair)}.items():
        (made,) = Judge(use="context")([group_of("bad", "good")], writer)
        assert [section.clipped for r in made.rollouts for section in r.context] == [clipped] * 2
