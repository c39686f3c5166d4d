"""The learning rate of each iteration: a schedule of transformers, without the iteration at rate 0 before a warm-up."""

import warnings
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from vpd.errors import ConfigError


def make_schedule(name: str, optimizer: Optimizer, *, warmup_steps: int, total_iterations: int) -> LambdaLR:
    """The schedule ``name`` of transformers, counted in iterations; ``total_iterations`` 0: not known.

    With a warm-up iteration i (from 1) is trained at i / ``warmup_steps`` of the peak, up to 1.  Transformers' own
    schedule trains the first at 0, so this is the one of an iteration more, without its first: a decay that ends at 0
    gets there after the last iteration too.  Raises ConfigError for a schedule that is no function of the iteration.
    """
    skipped = 1 if warmup_steps else 0
    try:
        schedule = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup_steps,
            num_training_steps=total_iterations + skipped if total_iterations else None,
        )
    except (ValueError, TypeError) as error:
        raise _unfit(name, " ".join(str(error).split())[:160]) from error
    if not isinstance(schedule, LambdaLR):
        raise _unfit(name, "a schedule that follows a metric")
    if skipped:
        schedule.lr_lambdas = [_later(factor, skipped) for factor in schedule.lr_lambdas]
        set_rates(schedule)
    return schedule


def advance(schedule: LambdaLR) -> None:
    """The rate of the next iteration."""
    with warnings.catch_warnings():  # an iteration without any row takes no optimiser step, and that is meant
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        schedule.step()


def restore(schedule: LambdaLR, state: dict[str, Any]) -> None:
    """Continue at the iteration of ``state``, at the rate of this schedule, which may end later than the saved one."""
    schedule.load_state_dict(state)
    set_rates(schedule)


def set_rates(schedule: LambdaLR) -> None:
    """Give the optimiser the rates of the schedule's iteration."""
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    rates = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def _later(factor: Callable[[int], float], iterations: int) -> Callable[[int], float]:
    return lambda iteration: factor(iteration + iterations)


def _unfit(name: str, got: str) -> ConfigError:
    return ConfigError(
        f"optim.lr_scheduler_type {name!r} cannot be used",
        got=got,
        expected="a schedule of transformers that needs no more than warmup_steps and max_steps",
        do="Take constant_with_warmup, linear, cosine, polynomial or inverse_sqrt.",
    )
