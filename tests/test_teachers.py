"""A teacher's copy in another dtype: what it costs and what it says (averages: tests/test_precision.py)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TokenPrompter, flat, metrics_of, random_groups, tiny_learner, tiny_model, vpd_train

from vpd.algorithms.distill import SDPOSettings
from vpd.algorithms.examples import teacher_logprobs, to_examples
from vpd.algorithms.vpd import VPD, VPDSettings
from vpd.errors import ConfigError
from vpd.learners.teachers import TeacherSettings


def bytes_of(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("share_prefixes", [False, True])
@pytest.mark.parametrize("kind", ["frozen", "trust_region"])
def test_a_bfloat16_copy_is_half_as_large_and_says_nearly_the_same(kind: Any, share_prefixes: bool) -> None:
    model = tiny_model(dtype=torch.float32)
    examples = [e for e in to_examples(random_groups(0)) if e.teacher_prompt]
    scores, sizes = {}, {}
    for dtype in (None, "bfloat16"):
        teacher = TeacherSettings(kind=kind, dtype=dtype)  # type: ignore[arg-type]
        learner = tiny_learner(model, teacher=teacher, share_prefixes=share_prefixes)
        scores[dtype] = torch.cat(
            [torch.tensor(row) for row in learner.score(examples, teacher_logprobs, model="teacher")]
        )
        sizes[dtype] = bytes_of(learner.teacher.mixture("initial")[0][0])
    assert sizes["bfloat16"] * 2 == sizes[None] == bytes_of(model) and model.dtype == torch.float32
    error = (scores["bfloat16"] - scores[None]).abs()
    assert error.max() > 0 and error.mean() < 0.05


def test_the_live_weights_and_a_live_teacher_are_untouched_by_a_fixed_priors_dtype() -> None:
    """The prior enters as a number for each row, so training goes nearly the same way."""
    ends = []
    for dtype in (None, "bfloat16"):
        settings = VPDSettings(e_every=1, teacher="live", prior="fixed", teacher_dtype=dtype)  # type: ignore[arg-type]
        learner = tiny_learner(
            tiny_model(dtype=torch.float32), teacher=settings.teacher_settings(), keep_initial=True, learning_rate=0.03
        )
        for seed in range(2):
            VPD(settings, TokenPrompter()).step(random_groups(seed), learner)  # type: ignore[arg-type]
        assert {p.dtype for p in learner.model.parameters()} == {torch.float32}
        ends.append(flat(learner.model))
    moved = (ends[0] - flat(tiny_model(dtype=torch.float32))).norm()
    assert 0 < (ends[0] - ends[1]).norm() < 0.05 * moved


def test_a_dtype_that_makes_no_sense_is_refused() -> None:
    for make in (VPDSettings, SDPOSettings):
        with pytest.raises(ConfigError, match="round to nothing"):
            make(teacher_dtype="bfloat16")
        with pytest.raises(ConfigError, match="keeps none"):
            make(teacher="live", teacher_dtype="bfloat16")
    assert VPDSettings(teacher="live", prior="fixed", teacher_dtype="bfloat16").teacher_settings().dtype == "bfloat16"


def test_a_run_with_a_bfloat16_teacher_resumes_bit_for_bit(tmp_path: Path) -> None:
    extra: dict[str, object] = {"algorithm__name": "sdpo", "algorithm__teacher": "frozen", "run__save_steps": 2}
    extra["algorithm__teacher_dtype"] = "bfloat16"
    assert vpd_train(tmp_path / "whole", **extra) == 0
    assert vpd_train(tmp_path / "parts", **(extra | {"run__max_steps": 2})) == 0
    assert vpd_train(tmp_path / "parts", **(extra | {"run__resume": "true"})) == 0
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")
    state = torch.load(tmp_path / "whole" / "checkpoint-4" / "state.pt", weights_only=True)
    assert {value.dtype for value in state["teacher"]["initial"].values()} == {torch.bfloat16}
