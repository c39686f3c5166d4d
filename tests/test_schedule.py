"""The learning rate of each iteration: a warm-up begins above 0, a longer schedule goes on where it is."""

from pathlib import Path

import pytest
import torch
from helpers import metrics_of, tiny_learner, tiny_model, vpd_train
from safetensors.torch import load_file
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vpd.bundled import load_bundled
from vpd.errors import ConfigError
from vpd.learners.schedule import advance, make_schedule, restore


def optimizer() -> Optimizer:
    return SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)


def rates(schedule: LambdaLR, iterations: int) -> list[float]:
    """The optimiser's rate in each iteration; what is reported is the same."""
    found = []
    for _ in range(iterations):
        assert schedule.get_last_lr() == [schedule.optimizer.param_groups[0]["lr"]]
        found.append(schedule.optimizer.param_groups[0]["lr"])
        advance(schedule)
    return found


@pytest.mark.parametrize(
    ("name", "warmup", "expected"),
    [
        ("constant_with_warmup", 0, [0.5, 0.5, 0.5, 0.5]),
        ("constant_with_warmup", 2, [0.25, 0.5, 0.5, 0.5]),
        ("constant_with_warmup", 4, [0.125, 0.25, 0.375, 0.5]),
        ("linear", 0, [0.5, 0.375, 0.25, 0.125]),
        ("linear", 2, [0.25, 0.5, 0.5 * 2 / 3, 0.5 / 3]),  # 0 comes after the last iteration in both
        ("linear", 1, [0.5, 0.375, 0.25, 0.125]),
    ],
)
def test_rates_by_hand(name: str, warmup: int, expected: list[float]) -> None:
    schedule = make_schedule(name, optimizer(), warmup_steps=warmup, total_iterations=4)
    assert rates(schedule, 4) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "inverse_sqrt", "cosine_with_restarts", "constant"])
def test_no_iteration_of_any_schedule_is_trained_at_rate_0(name: str) -> None:
    schedule = make_schedule(name, optimizer(), warmup_steps=3, total_iterations=8)
    assert min(rates(schedule, 8)) > 0


def test_a_warm_up_moves_the_weights_in_the_first_iteration_in_both_steps(tmp_path: Path) -> None:
    settings = {"optim__warmup_steps": 2, "optim__learning_rate": 1e-3, "run__max_steps": 3, "run__save_steps": 1}
    settings["run__save_total_limit"] = 3
    assert vpd_train(tmp_path / "run", **settings) == 0
    steps = metrics_of(tmp_path / "run")
    assert [step["learning_rate"] for step in steps] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert steps[0]["e_step/student_drift_kl"] > 1e-9  # the student moved in the E-step, before the M-step
    before, after = (load_file(f / "model.safetensors") for f in (load_bundled(), tmp_path / "run" / "checkpoint-1"))
    assert max(float((after[name] - before[name]).abs().max()) for name in after if name in before) > 1e-5


@pytest.mark.parametrize("iteration", [1, 2, 5, 8])
def test_a_run_that_goes_on_for_longer_is_at_the_rate_of_its_new_schedule_at_once(iteration: int) -> None:
    """The state holds the rate of the schedule that ended earlier, and the optimiser's too."""
    before, continued = optimizer(), optimizer()
    shorter = make_schedule("linear", before, warmup_steps=1, total_iterations=8)
    longer = rates(make_schedule("linear", optimizer(), warmup_steps=1, total_iterations=16), 16)
    for _ in range(iteration):
        advance(shorter)
    assert before.param_groups[0]["lr"] == pytest.approx(0.0625 * (8 - iteration)) != longer[iteration]
    schedule = make_schedule("linear", continued, warmup_steps=1, total_iterations=16)
    continued.load_state_dict(before.state_dict())
    restore(schedule, shorter.state_dict())
    assert rates(schedule, 16 - iteration) == pytest.approx(longer[iteration:])


def test_a_learner_continues_at_its_rate() -> None:
    options = {"warmup_steps": 4, "lr_scheduler_type": "linear", "total_iterations": 8}
    learner, other = tiny_learner(tiny_model(), **options), tiny_learner(tiny_model(), **options)
    assert learner.learning_rate == pytest.approx(0.3 / 4) and learner.version == 0
    learner.end_iteration()
    other.restore(learner.state())
    assert other.learning_rate == pytest.approx(0.3 / 2) and other.version == 1


@pytest.mark.parametrize(
    ("name", "total"), [("reduce_lr_on_plateau", 8), ("cosine_with_min_lr", 8), ("warp", 8), ("linear", 0)]
)
def test_a_schedule_that_does_not_fit_is_one_line(name: str, total: int) -> None:
    with pytest.raises(ConfigError, match=f"optim.lr_scheduler_type '{name}' cannot be used") as caught:
        make_schedule(name, optimizer(), warmup_steps=2, total_iterations=total)
    assert "\n" not in str(caught.value) and "constant_with_warmup" in str(caught.value)
