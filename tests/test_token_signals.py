"""Per-token signals of an update reach an observer, rollout by rollout."""

from collections.abc import Mapping, Sequence
from typing import Any

from fakes import RecordingObserver
from helpers import SMALL

from vpd.config import load
from vpd.recipes.assemble import assemble
from vpd.recipes.loops import make_loop
from vpd.types import Group


class Listening(RecordingObserver):
    """Also keeps the signals of every step."""

    def on_token_signals(self, step: int, signals: Mapping[str, Sequence[Any]], groups: Sequence[Group]) -> None:
        self.log.append(f"signals {step}")
        self.received = (step, signals, groups)


def test_an_observer_that_wants_them_gets_the_signals_of_every_rollouts_tokens() -> None:
    settings = SMALL | {"run.max_steps": 1, "algorithm.name": "vpd", "algorithm.e_every": 1}
    parts = assemble(load(None, [word for key, value in settings.items() for word in (f"--{key}", str(value))]))
    plain, listening = RecordingObserver([]), Listening([])
    make_loop(parts, [plain, listening], output=None).run()
    assert plain.log == ["observe 1"] and listening.log == ["observe 1", "signals 1"]
    step, signals, groups = listening.received
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert step == 1 and {"m_step/divergence", "m_step/teacher_minus_student"} <= set(signals)
    for values in signals.values():
        assert len(values) == len(rollouts)
    metrics = listening.seen[0][1]
    total = 0.0
    for rollout, values in zip(rollouts, signals["m_step/divergence"], strict=True):
        assert (values is None) == (rollout.teacher_prompt is None)
        if values is not None:
            assert len(values) == len(rollout.completion.tokens)
            total += float(values.sum())
    assert abs(total / metrics["m_step/tokens"] - metrics["m_step/divergence"]) < 1e-6
