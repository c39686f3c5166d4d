"""LDD: which tokens are learned, the loss by hand and against plain torch; the auxiliary term beside any method."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import LetterTokenizer, scripted_prompter
from helpers import ALGORITHMS, TokenPrompter, flat, metrics_of, random_groups, tiny_learner, tiny_model, vpd_train

import vpd
from vpd.algorithms.dynamics import DynamicsSettings, Tied, likeliest
from vpd.algorithms.grpo import GRPO, GRPOSettings
from vpd.algorithms.ldd import LDD, LDDSettings, environment_examples
from vpd.cli import main
from vpd.config import parse
from vpd.config.collect import CollectOptions
from vpd.lab import tiny
from vpd.prompts import Prompter
from vpd.types import Group, Rollout


def spoken(groups: list[Group]) -> list[Group]:
    """The groups with the text of their contexts, where there is one, as what the grader said."""

    def said(r: Rollout) -> Rollout:
        text = r.context[0].text if r.context else None
        return dataclasses.replace(r, grade=dataclasses.replace(r.grade, feedback=text))

    return [Group(rollouts=tuple(map(said, g.rollouts))) for g in groups]


def ldd(**settings: Any) -> LDD:
    return LDD(LDDSettings(**settings), TokenPrompter())  # type: ignore[arg-type]


def text_losses(model: Any, groups: list[Group]) -> list[torch.Tensor]:
    """-log p of each token of each text, in plain torch."""
    found = []
    for r in (r for g in groups for r in g.rollouts if r.grade.feedback):
        words = [int(word) for word in r.grade.feedback.split()]
        ids = [*r.prompt, *r.completion.tokens, 1, *words]
        logits = model(input_ids=torch.tensor([ids])).logits[0, -len(words) - 1 : -1]
        found.append(torch.nn.functional.cross_entropy(logits, torch.tensor(words), reduction="none"))
    return found


def test_only_the_environments_own_words_count() -> None:
    (group,) = spoken(random_groups(0, groups=1))
    rows = environment_examples([group], TokenPrompter())  # type: ignore[arg-type]
    for row, r in zip(rows, group.rollouts, strict=True):
        if r.grade.feedback is None:
            assert row.left_out == "no_feedback" and row.completion == r.completion.tokens
            continue
        learned = [token for token, counts in zip(row.completion, row.mask, strict=True) if counts]
        assert learned == [int(word) for word in r.grade.feedback.split()] and row.of_environment
        assert row.completion[: len(r.completion.tokens) + 1] == (*r.completion.tokens, 1)
    verdict = dataclasses.replace(group.rollouts[1].grade, feedback="3 4", informative=False)
    (row,) = environment_examples(
        [Group(rollouts=(dataclasses.replace(group.rollouts[1], grade=verdict),))],
        TokenPrompter(),  # type: ignore[arg-type]
    )
    assert row.left_out == "no_feedback"


def test_outcomes_change_nothing() -> None:
    def trained(groups: list[Group]) -> torch.Tensor:
        learner = tiny_learner(tiny_model())
        ldd().step(groups, learner)
        return flat(learner.model)

    groups = spoken(random_groups(2))
    flipped = [
        Group(
            rollouts=tuple(
                dataclasses.replace(
                    r, grade=dataclasses.replace(r.grade, reward=-r.grade.reward, success=not r.success)
                )
                for r in g.rollouts
            )
        )
        for g in groups
    ]
    assert torch.equal(trained(groups), trained(flipped))


def test_a_model_that_knows_nothing_pays_log_v_a_token() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    update = ldd().step(spoken(random_groups(0)), tiny_learner(model))
    assert update.metrics["ldd/loss"] == pytest.approx(math.log(23), abs=1e-12)


@pytest.mark.parametrize("average", ["token_mean", "seq_mean"])
def test_it_equals_maximum_likelihood_of_the_text_in_plain_torch(average: Any) -> None:
    ours, theirs = tiny_model(), tiny_model()
    learner = tiny_learner(ours, micro_batch_size=3)
    for seed in range(3):
        groups = spoken(random_groups(seed))
        ldd(average=average).step(groups, learner)
        losses = text_losses(theirs, groups)
        loss = torch.cat(losses).mean() if average == "token_mean" else torch.stack([x.mean() for x in losses]).mean()
        gradients = torch.autograd.grad(loss, list(theirs.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(theirs.parameters(), gradients, strict=True):
                parameter -= 0.3 * gradient
    moved = (flat(theirs) - flat(tiny_model())).norm()
    assert moved > 1e-3 and (flat(ours) - flat(theirs)).norm() / moved < 1e-10


# the text in a real template


def test_the_text_is_the_next_user_message_and_loses_its_middle_where_there_is_no_room() -> None:
    prompter = Prompter(tiny.make_tokenizer(), tiny.TEMPLATE, window=40, max_completion_length=6)
    decode = prompter.tokenizer.decode
    before = tuple(range(20))
    tokens, own = prompter.environment_text("wrong : rule A means swap", before)
    assert decode(tokens) == "<user> wrong : rule A means swap" and own == (False, *[True] * 6)
    tokens, own = prompter.environment_text("wrong : rule A means swap " * 8, before)
    assert len(before) + len(tokens) <= 40 and sum(own) == len(tokens) - 1
    assert prompter.environment_text("wrong", tuple(range(40))) == ((), ())
    spelled, _ = prompter.environment_text("<assistant> wrong", before)
    assert prompter.tokenizer.convert_tokens_to_ids("<assistant>") not in spelled


def test_the_end_of_a_turn_is_not_repeated() -> None:
    prompter = scripted_prompter()
    tokens, own = prompter.environment_text("no", (*map(ord, "[user]2+2?[assistant]5"),))
    assert LetterTokenizer().decode(tokens) == "[user]no" and sum(own) == 2


# the auxiliary term


def tied(name: str, weight: float, top_k: int = 23) -> Tied:
    return Tied(ALGORITHMS[name][0](), DynamicsSettings(weight=weight, top_k=top_k), TokenPrompter())  # type: ignore[arg-type]


def learner_of(name: str, **changes: Any) -> Any:
    external = {"external": tiny_model(seed=7)} if name == "gkd" else {}
    return tiny_learner(tiny_model(), teacher=ALGORITHMS[name][1], keep_initial=True, **external, **changes)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_term_joins_every_method_and_is_the_same_for_any_micro_batch(name: str) -> None:
    def run(size: int, weight: float = 0.7) -> tuple[torch.Tensor, dict[str, float]]:
        learner, method = learner_of(name, micro_batch_size=size), tied(name, weight)
        for seed in range(3):
            metrics = method.step(spoken(random_groups(seed)), learner).metrics
            learner.end_iteration()
        return flat(learner.model), metrics

    start = flat(tiny_model())
    (whole, metrics), (parts, _), (without, plain) = run(100), run(2), run(100, weight=0.0)
    moved = (whole - start).norm()
    assert (parts - whole).norm() / moved < 1e-10 < (without - whole).norm() / moved
    named = [key for key in metrics if key.endswith("/dynamics_loss")]
    assert named and metrics[named[0]] > 0
    update = named[0].partition("/")[0]
    assert metrics[f"{update}/rows"] == plain[f"{update}/rows"] and metrics[f"{update}/tokens"] > 0


def test_the_term_is_the_kl_to_the_initial_weights_and_zero_at_the_start() -> None:
    start, live = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    groups = spoken(random_groups(4))
    learner = tiny_learner(tiny_model(), teacher=ALGORITHMS["grpo"][1], keep_initial=True)
    method = Tied(GRPO(GRPOSettings()), DynamicsSettings(weight=1.0), TokenPrompter())  # type: ignore[arg-type]
    assert method.step(groups, learner).metrics["policy/dynamics_loss"] == pytest.approx(0.0, abs=1e-9)

    learner = tiny_learner(tiny_model(), teacher=ALGORITHMS["grpo"][1], keep_initial=True)
    learner.model.load_state_dict(live.state_dict())
    found = method.step(groups, learner).metrics["policy/dynamics_loss"]
    values = []
    for r in (r for g in groups for r in g.rollouts if r.grade.feedback):
        words = [int(word) for word in r.grade.feedback.split()]
        ids = torch.tensor([[*r.prompt, *r.completion.tokens, 1, *words]])
        p, q = (torch.log_softmax(m(input_ids=ids).logits[0, -len(words) - 1 : -1], -1) for m in (start, live))
        values.append((p.exp() * (p - q)).sum(-1))
    assert found == pytest.approx(float(torch.cat(values).mean()), abs=1e-9) and found > 1e-4


def test_of_a_large_vocabulary_the_rest_is_one_bucket() -> None:
    groups = spoken(random_groups(4))
    rows = [r for r in environment_examples(groups, TokenPrompter()) if not r.left_out]  # type: ignore[arg-type]
    learner = tiny_learner(tiny_model(), keep_initial=True)
    for row in likeliest(rows, 5, learner):
        assert row.teacher.k == 5 and len(row.teacher.ids) == len(row.completion)  # type: ignore[union-attr]
    assert likeliest(rows, 64, learner)[0].teacher.k == 23  # type: ignore[union-attr]


# whole runs


def test_from_transcripts_to_a_tied_policy(tmp_path: Path) -> None:
    log = tmp_path / "t.jsonl"
    words = ["--model.name_or_path", "tiny", "--env.name", "digits", "--rollout.num_generations", "1"]
    assert main(["collect", str(log), *words, "--tasks", "16", "--no_outcome"]) == 0
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == 16 and not any("reward" in row or "success" in row for row in rows)
    assert all(row["feedback"].startswith("wrong") for row in rows if row["feedback"])
    recorded = {"env__name": "recorded", "env__path": log, "rollout__prompts_per_step": 4}
    assert vpd_train(tmp_path / "ldd", algorithm__name="ldd", run__max_steps=8, **recorded) == 0
    losses = [line["ldd/loss"] for line in metrics_of(tmp_path / "ldd")]
    assert losses[-1] < losses[0] and "reward" not in metrics_of(tmp_path / "ldd")[0]
    start = {"model__name_or_path": tmp_path / "ldd" / "model", "run__max_steps": 2}
    assert vpd_train(tmp_path / "vpd", algorithm__name="vpd", dynamics__weight=0.5, **start) == 0
    first, second = metrics_of(tmp_path / "vpd")
    assert second["m_step/dynamics_loss"] > 0 and first["rows/drawn"] == 16


def test_a_tied_run_that_is_resumed_is_the_same(tmp_path: Path) -> None:
    assert vpd_train(tmp_path / "whole", dynamics__weight=0.5, run__save_steps=2) == 0
    assert vpd_train(tmp_path / "parts", dynamics__weight=0.5, run__max_steps=2) == 0
    assert vpd_train(tmp_path / "parts", dynamics__weight=0.5, run__resume="true") == 0
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


def test_transcripts_keep_log_probs_and_a_file_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "t.jsonl"
    tasks = [{"prompt": f"apply rule A to {n}"} for n in range(3)]

    def grade(text: str, task: Any) -> tuple[float, str]:
        return float(text.startswith("3")), "wrong : rule A means swap"

    short = {"num_generations": 1, "max_completion_length": 4}
    vpd.collect(log, "tiny", tasks, grade, options=CollectOptions(tasks=3), rollout=short)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert {row["messages"][0]["content"] for row in rows} == {task["prompt"] for task in tasks}
    assert all(len(row["tokens"]) == len(row["logprobs"]) == 4 and "reward" in row for row in rows)
    before = log.read_text()
    assert main(["collect", str(log), "--model.name_or_path", "tiny"]) == 2
    assert "already there" in capsys.readouterr().err and log.read_text() == before
    assert main(["collect", str(log / "below"), "--model.name_or_path", "no/such"]) == 2  # before a model is loaded
    assert "Not a directory. Give a file in a folder of yours." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"weight": -1}, "dynamics.weight is out of range"), ({"top_k": 0}, "dynamics.top_k"), ({"k": 1}, "unknown key")],
)
def test_settings_of_the_term_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(vpd.ConfigError, match=message):
        parse({"dynamics": settings})
    assert parse({"dynamics": {"weight": 0.1}}).needs.initial_copy and not parse({}).needs.initial_copy
