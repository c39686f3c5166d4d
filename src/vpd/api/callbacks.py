"""What watches a run from Python: functions, observers, and callbacks of transformers.

* a function ``(step, metrics, groups)``, called after every step (and before the first with an evaluation alone);
* an :class:`vpd.Observer`, which may also remember something across a continued run;
* an object with the methods of ``transformers.TrainerCallback``.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

from vpd.config import RunSettings
from vpd.envs import wrap_user_errors
from vpd.errors import ConfigError
from vpd.loop import Observer
from vpd.printable import shown
from vpd.types import Group, Metrics

LOG = logging.getLogger("vpd")
OBSERVER = ("on_step", "rewind", "state", "restore")
CALLED = ("on_train_begin", "on_step_end", "on_log", "on_evaluate", "on_train_end")


class Function:
    """A function as an observer that keeps nothing."""

    def __init__(self, function: Callable[[int, Metrics, Sequence[Group]], Any]):
        self._function = function

    def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
        call = partial(self._function, step, metrics, groups)
        wrap_user_errors(call, f"the callback {_name(self._function)}", do="Correct it.")

    def rewind(self, step: int) -> None:
        """Nothing: a continued run calls the function again for the steps after ``step``."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class TrainerCallbacks(Function):
    """A callback of transformers as an observer.

    Called are ``on_train_begin``, ``on_step_end``, ``on_log`` (every step), ``on_evaluate`` and ``on_train_end``.
    ``args`` is the section ``run`` (max_steps, eval_steps, save_steps, output_dir, seed), ``state`` a TrainerState with
    ``global_step``, ``max_steps`` and ``log_history``, ``control`` a TrainerControl.  A callback cannot stop the run:
    ``run.max_steps`` and Ctrl-C do.
    """

    def __init__(self, callback: Any, settings: RunSettings):
        from transformers import TrainerControl, TrainerState

        super().__init__(callback)
        self._settings = settings
        self._state = TrainerState(max_steps=settings.max_steps)
        self._control = TrainerControl()

    def __enter__(self) -> Self:
        self._call("on_train_begin")
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        if kind is None:
            self._call("on_train_end")

    def on_step(self, step: int, metrics: Metrics, groups: Sequence[Group]) -> None:
        self._state.global_step = step
        self._state.log_history.append({**metrics, "step": step})
        if groups:
            self._call("on_step_end")
        self._call("on_log", logs=dict(metrics))
        evaluated = {name: value for name, value in metrics.items() if name.startswith(("eval/", "eval_teacher/"))}
        if evaluated:
            self._call("on_evaluate", metrics=evaluated)
        if self._control.should_training_stop:
            LOG.warning("%s asked to stop, which a callback cannot: run.max_steps does", _name(self._function))
            self._control.should_training_stop = False

    def rewind(self, step: int) -> None:
        self._state.log_history = [line for line in self._state.log_history if line["step"] <= step]

    def _call(self, event: str, **more: Any) -> None:
        if hasattr(self._function, event):
            call = partial(getattr(self._function, event), self._settings, self._state, self._control, **more)
            wrap_user_errors(call, f"{_name(self._function)}.{event}", do="Correct it.")


def as_observers(callbacks: Any, settings: RunSettings) -> tuple[Observer, ...]:
    """One callback or several as observers.  Raises ConfigError for what is none."""
    single = callable(callbacks) or not isinstance(callbacks, Sequence)
    return tuple(_observer(callback, settings) for callback in ([callbacks] if single else callbacks))


def _observer(callback: Any, settings: RunSettings) -> Observer:
    if all(hasattr(callback, name) for name in OBSERVER):
        observer: Observer = callback
        return observer
    if not inspect.isclass(callback) and any(hasattr(callback, name) for name in CALLED):
        return TrainerCallbacks(callback, settings)
    if callable(callback) and not inspect.isclass(callback):
        _check_function(callback)
        return Function(callback)
    raise ConfigError(
        "a callback cannot be used",
        got=shown(callback),
        expected="a function (step, metrics, groups), a vpd.Observer, or an object with on_step_end, on_log, ...",
    )


def _check_function(callback: Any) -> None:
    """Raise ConfigError for a function that nobody would await, or that takes other arguments."""
    if inspect.iscoroutinefunction(callback) or inspect.iscoroutinefunction(type(callback).__call__):
        raise ConfigError(f"the callback {_name(callback)} is async", expected="a plain function, which is waited for")
    try:
        inspect.signature(callback).bind(0, {}, [])
    except TypeError:
        got = str(inspect.signature(callback))
        what = f"the callback {_name(callback)} takes other arguments"
        raise ConfigError(what, got=got, expected="(step, metrics, groups)") from None
    except ValueError:  # a function in C without a signature
        return


def _name(callback: Any) -> str:
    return str(callback.__name__) if inspect.isroutine(callback) else type(callback).__name__
