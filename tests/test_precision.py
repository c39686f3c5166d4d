"""16-bit weights: the optimiser trains fp32 masters, averages are fp32, and sums over the vocabulary stay wide."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TokenPrompter, flat, metrics_of, random_groups, tiny_learner, tiny_model, vpd_train
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vpd import losses
from vpd.algorithms import Algorithm
from vpd.algorithms.distill import Distill, GKDSettings, SDPOSettings
from vpd.algorithms.examples import own_logprobs, probe_rows, student_logprobs, to_examples, with_loss_weights
from vpd.algorithms.gated import GatedSettings, GatedVPD
from vpd.algorithms.vpd import VPD, VPDSettings
from vpd.config import parse
from vpd.errors import ConfigError, StorageError, TrainingError
from vpd.learners.teachers import TeacherSettings, TeacherWeights
from vpd.model import head
from vpd.model.batch import Batch, collate
from vpd.model.scorer import Scorer
from vpd.recipes.assemble import check_speed
from vpd.types import Example, Group


def bfloat16_model(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Weights that bfloat16 holds exactly, kept in ``dtype``."""
    return tiny_model(seed, dtype=torch.bfloat16).to(dtype)


def likelihood(scorer: Scorer, batch: Batch) -> Tensor:
    """-log pi of each token [B,T]."""
    return -scorer.logprobs("student")


def rows_to_learn() -> list[Example]:
    made = to_examples(random_groups(0))
    return with_loss_weights(made, a=[1.0 / len(made)] * len(made))


def masters(learner: Any) -> Tensor:
    return torch.cat([value.double().flatten() for value in learner.state()["master_weights"].values()])


def step(learner: Any, count: int = 1) -> None:
    for _ in range(count):
        learner.update("x", rows_to_learn(), {"a": likelihood})
        learner.end_iteration()


def steps_by_hand(model: Any, make: Callable[[list[Tensor]], Any], limit: float | None, count: int) -> list[Tensor]:
    """fp32 masters of a model after ``count`` updates: autograd's gradients, summed, clipped, applied."""
    weights = list(model.parameters())
    trained = [p.detach().float().requires_grad_() for p in weights]
    optimizer = make(trained)
    sums = [torch.zeros_like(p) for p in trained]

    def adding(total: Tensor) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            total.add_(gradient.float())

        return add

    for weight, total in zip(weights, sums, strict=True):
        weight.register_hook(adding(total))
    learner = tiny_learner(model, micro_batch_size=3, learning_rate=0.0)
    for _ in range(count):
        for total in sums:
            total.zero_()
        learner.update("x", rows_to_learn(), {"a": likelihood})
        for master, total in zip(trained, sums, strict=True):
            master.grad = total.clone()
        if limit is not None:
            nn.utils.clip_grad_norm_(trained, limit)
        optimizer.step()
        named = zip(dict(model.named_parameters()), trained, strict=True)
        learner.restore(learner.state() | {"master_weights": dict(named)})
    return trained


@pytest.mark.parametrize("limit", [None, 0.05])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_masters_take_the_steps_of_an_fp32_optimiser(optimizer: str, limit: float | None) -> None:
    model, rate = bfloat16_model(), {"adamw": 1e-5, "sgd": 1e-3}[optimizer]
    learner = tiny_learner(
        model, optimizer=optimizer, learning_rate=rate, weight_decay=0.01, max_grad_norm=limit, micro_batch_size=3
    )
    step(learner, 4)

    def make(trained: list[Tensor]) -> Any:
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
        return kind(trained, lr=rate, weight_decay=0.01)

    by_hand = steps_by_hand(bfloat16_model(), make, limit, 4)
    for (name, master), expected in zip(learner.state()["master_weights"].items(), by_hand, strict=True):
        assert master.dtype == torch.float32 and torch.equal(master, expected.detach()), name
        assert torch.equal(model.state_dict()[name], master.bfloat16())


def test_the_movement_is_that_of_fp32_training() -> None:
    """AdamW at 1e-5: bfloat16 weights themselves move by 8 % in number, their masters all and as far as they should."""
    start, moved = flat(bfloat16_model()), []
    for dtype in (torch.float32, torch.bfloat16):
        learner = tiny_learner(bfloat16_model(dtype=dtype), optimizer="adamw", learning_rate=1e-5)
        step(learner, 20)
        moved.append((flat(learner.model) if dtype == torch.float32 else masters(learner)) - start)
    exact, ours = moved
    assert (ours != 0).double().mean() > 0.99
    assert (ours - exact).norm() < 0.2 * exact.norm()  # what is left is the rounding of the gradients themselves
    assert float(ours.norm() / exact.norm()) == pytest.approx(1.0, abs=0.02)


def test_only_16_bit_weights_have_masters() -> None:
    for dtype in (torch.float32, torch.float64):
        learner = tiny_learner(tiny_model(dtype=dtype), master_weights=False)
        assert "master_weights" not in learner.state()
    learner = tiny_learner(bfloat16_model())
    assert {value.dtype for value in learner.state()["master_weights"].values()} == {torch.float32}
    assert {value.dtype for _, value in learner.policy().tensors()} == {torch.bfloat16}


def test_16_bit_weights_without_masters_are_refused() -> None:
    with pytest.raises(ConfigError, match="most steps round to nothing"):
        tiny_learner(bfloat16_model(), master_weights=False)
    with pytest.raises(ConfigError, match="float16 cannot be trained"):
        tiny_learner(tiny_model(dtype=torch.float16))
    frozen = bfloat16_model()
    frozen.requires_grad_(False)
    nn.Parameter.requires_grad_(frozen.lm_head.weight)
    with pytest.raises(ConfigError, match="most steps round to nothing"):
        tiny_learner(frozen, master_weights=False)


def test_an_update_that_is_not_finite_changes_nothing() -> None:
    learner = tiny_learner(bfloat16_model(), optimizer="adamw")
    step(learner)
    before = masters(learner)
    with pytest.raises(TrainingError, match="No step was taken"):
        learner.update("x", rows_to_learn(), {"a": lambda s, b: likelihood(s, b) * float("nan")})
    assert torch.equal(masters(learner), before)
    other = tiny_learner(bfloat16_model(), optimizer="adamw")
    step(other, 2)
    step(learner)
    assert torch.equal(masters(learner), masters(other))  # and no gradient of it is left


def test_a_saved_learner_continues_bit_for_bit(tmp_path: Path) -> None:
    learner = tiny_learner(bfloat16_model(), optimizer="adamw", learning_rate=1e-4)
    step(learner, 2)
    learner.save(tmp_path)
    step(learner, 2)
    other = tiny_learner(bfloat16_model(seed=1), optimizer="adamw", learning_rate=1e-4)
    other.load(tmp_path)
    step(other, 2)
    assert torch.equal(masters(learner), masters(other)) and torch.equal(flat(learner.model), flat(other.model))
    for kind in ("average", "initial"):
        saved, loaded = (one.teacher.state().get(kind, {}) for one in (learner, other))
        assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_a_model_of_two_dtypes_is_read_back_exactly(tmp_path: Path) -> None:
    """A norm in fp32 amid bfloat16 weights."""
    made = []
    for seed in (0, 1):
        model = bfloat16_model(seed)
        model.model.norm.float()
        model.model.norm.weight.data.fill_(1.0 + 2**-20 * (1 - seed))
        model.model.norm.register_forward_hook(lambda module, inputs, output: output.bfloat16())
        made.append(tiny_learner(model, teacher=TeacherSettings(kind="live")))
    made[0].save(tmp_path)
    made[1].load(tmp_path)
    for name, value in made[0].model.state_dict().items():
        assert torch.equal(made[1].model.state_dict()[name], value), name


def test_a_checkpoint_without_masters_is_refused() -> None:
    learner = tiny_learner(bfloat16_model())
    state = learner.state()
    del state["master_weights"]
    with pytest.raises(StorageError, match="master weights are not this model's; got 0 tensors"):
        learner.restore(state)
    plain = tiny_learner(tiny_model())
    plain.restore(plain.state())


@pytest.mark.parametrize("name", ["vpd", "gated"])
def test_a_bfloat16_run_end_to_end_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    """E-step, importance ratio, gate, checkpoint and export, of whole-model training in bfloat16."""
    extra: dict[str, object] = {"model__dtype": "bfloat16", "algorithm__name": name, "algorithm__e_every": 2}
    extra |= {"run__save_steps": 2, "optim__learning_rate": 1e-5}
    assert vpd_train(tmp_path / "whole", **extra) == 0
    assert vpd_train(tmp_path / "parts", **(extra | {"run__max_steps": 2})) == 0
    assert vpd_train(tmp_path / "parts", **(extra | {"run__resume": "true"})) == 0
    steps = metrics_of(tmp_path / "whole")
    assert steps == metrics_of(tmp_path / "parts")
    assert all(0.5 < line["m_step/importance_ratio"] < 1.5 for line in steps if "m_step/importance_ratio" in line)
    assert steps[0]["e_step/sampler_logp_difference"] < 0.5
    assert steps[0]["e_step/rows_scored"] < steps[0]["m_step/rows"] + 4
    state = torch.load(tmp_path / "whole" / "checkpoint-4" / "state.pt", weights_only=True)
    exported = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert {value.dtype for value in exported.values()} == {torch.bfloat16}
    for key, master in state["master_weights"].items():
        assert master.dtype == torch.float32 and torch.equal(exported[key], master.bfloat16())
    assert {value.dtype for value in state["teacher"]["average"].values()} == {torch.float32}


class Exact:
    """An EMA in float64 of the live weights."""

    def __init__(self, live: Any, rate: float):
        self.rate = rate
        self.value = flat(live)

    def follow(self, live: Tensor) -> None:
        self.value = self.value + self.rate * (live - self.value)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_average_of_a_bfloat16_model_follows_the_exact_one(dtype: Any) -> None:
    """A jump of 1 % and 100 iterations; kept in bfloat16 the average would stay where it is."""
    live = bfloat16_model()
    teacher = TeacherWeights(TeacherSettings(ema_rate=0.05, dtype=dtype), live)
    exact = Exact(live, 0.05)
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.mul_(1.01)
    for _ in range(100):
        teacher.end_iteration()
        exact.follow(flat(live))
    average = torch.cat([value.double().flatten() for value in teacher.state()["average"].values()])
    assert (average - exact.value).norm() < 1e-6 * exact.value.norm()
    ((plays, share),) = teacher.mixture("teacher")
    assert share == 1.0 and plays.dtype == (torch.bfloat16 if dtype is None else torch.float32)
    assert torch.equal(flat(plays), average.bfloat16().double() if dtype is None else average)


def test_the_average_follows_the_masters() -> None:
    """Steps that leave nearly every bfloat16 weight where it is still reach the average."""
    learner = tiny_learner(bfloat16_model(), teacher=TeacherSettings(ema_rate=0.5), optimizer="sgd", learning_rate=1e-4)
    start = flat(learner.model)
    exact = Exact(learner.model, 0.5)
    for _ in range(3):
        learner.update("x", rows_to_learn(), {"a": likelihood})
        exact.follow(masters(learner))
        learner.end_iteration()
    average = torch.cat([value.double().flatten() for value in learner.teacher.state()["average"].values()])
    assert (flat(learner.model) != start).double().mean() < 0.1
    assert (average - exact.value).norm() < 1e-3 * (exact.value - start).norm()


def test_an_average_is_restored_with_the_weights_that_play_the_teacher() -> None:
    models = [bfloat16_model(seed) for seed in (0, 1)]
    first, second = (TeacherWeights(TeacherSettings(ema_rate=0.3), model) for model in models)
    second.restore(first.state())
    assert torch.equal(flat(second.mixture("teacher")[0][0]), flat(models[0]))


def test_a_teacher_that_never_moves_is_refused_where_it_is_to_be_trained() -> None:
    still: list[dict[str, Any]] = [
        {"teacher": "frozen"},
        {"teacher": "ema", "teacher_ema_rate": 0.0},
        {"teacher": "trust_region", "teacher_trust_region_mix": 0.0},
    ]
    for settings in still:
        for make in (VPDSettings, GatedSettings):
            with pytest.raises(ConfigError, match="never moves"):
                make(**settings)
            make(**settings, e_every=None)
        assert not SDPOSettings(**settings).teacher_settings().moves


def test_without_an_e_step_a_trust_region_of_mix_0_is_the_frozen_teacher() -> None:
    ends = []
    for settings in (SDPOSettings(teacher="frozen"), SDPOSettings(teacher="trust_region", teacher_trust_region_mix=0)):
        learner = tiny_learner(tiny_model(), teacher=settings.teacher_settings())
        assert len(learner.teacher.mixture("teacher")) == 1
        for seed in range(2):
            Distill(settings).step(random_groups(seed), learner)
        ends.append(flat(learner.model))
    assert torch.equal(*ends)


BANNED = [1, 4, 5]
OPTIONS: list[dict[str, Any]] = [
    {"alpha": alpha, "top_k": top_k, "tail": tail}
    for alpha in (0.0, 0.3, 1.0)
    for top_k, tail in ((None, True), (4, True), (4, False), (11, True), (12, False))
]


def random_logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(6, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_gradient(function: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = function(logits)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_that_both_rule_out_add_nothing(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Value, gradient and what comes with them are those of the vocabulary without them."""
    student, teacher = random_logits(0, dtype), random_logits(1, dtype)
    kept = [token for token in range(12) if token not in BANNED]
    cut = options | {"top_k": None if options["top_k"] is None else min(options["top_k"], len(kept))}
    value, gradient = with_gradient(lambda s: losses.divergence(s, teacher[:, kept], **cut), student[:, kept])
    masked_student, masked_teacher = student.clone(), teacher.clone()
    masked_student[:, BANNED] = masked_teacher[:, BANNED] = -torch.inf
    whole = torch.zeros_like(student)
    whole[:, kept] = gradient
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    if options["top_k"] in (11, 12) and options["tail"]:
        close["atol"] = 2e-6 if dtype == torch.float64 else 1e-5  # a bucket of the smallest rest instead of none
    plain = with_gradient(lambda s: losses.divergence(s, masked_teacher, **options), masked_student)
    tokens = torch.tensor([0, 2, 3, 6, 7, 11])
    fast = losses.divergence_and_grad(masked_student, masked_teacher, tokens, **options)
    for found in (plain, fast[:2]):
        torch.testing.assert_close(found[0], value, **close)
        torch.testing.assert_close(found[1], whole, **close)
    for found_N, logits in zip(fast.aux[2:], (student, teacher), strict=True):
        torch.testing.assert_close(found_N, losses.entropy(logits[:, kept]), **close)
    for found_N, logits in zip(fast.aux[:2], (masked_student, masked_teacher), strict=True):
        torch.testing.assert_close(found_N, losses.token_logprobs(logits, tokens), **close)


def test_entropies_and_log_probs_of_a_masked_vocabulary() -> None:
    logits = random_logits(0)
    kept = [token for token in range(12) if token not in BANNED]
    value, gradient = with_gradient(losses.entropy, logits[:, kept])
    logits[:, BANNED] = -torch.inf
    found = with_gradient(losses.entropy, logits)
    torch.testing.assert_close(found[0], value)
    torch.testing.assert_close(found[1][:, kept], gradient)
    assert not found[1][:, BANNED].any()
    tokens = torch.tensor([0, 2, 3, 6, 7, 1])
    fast = losses.logprobs_and_grad(logits, tokens)
    torch.testing.assert_close(fast.aux[0], value)
    torch.testing.assert_close(fast.value_N, losses.token_logprobs(logits, tokens))
    assert fast.value_N[5] == -torch.inf and fast.gradient_NV.isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_what_one_rules_out_and_the_other_can_say_is_infinite_for_kl_alone(who: str, alpha: float) -> None:
    """KL(pi || q) where q is 0, KL(q || pi) where pi is 0; otherwise the value of the definition."""
    logits = {"student": random_logits(0), "teacher": random_logits(1)}
    logits[who][:, BANNED] = -torch.inf
    student, teacher = logits["student"], logits["teacher"]
    p, q = student.softmax(-1), teacher.softmax(-1)

    def kl(left: Tensor, right: Tensor) -> Tensor:
        return torch.where(left > 0, left * (left / right).log(), 0.0).sum(-1)

    mixture = (1 - alpha) * p + alpha * q
    expected = {0.0: kl(q, p), 1.0: kl(p, q)}.get(alpha, (1 - alpha) * kl(p, mixture) + alpha * kl(q, mixture))
    assert bool(expected.isinf().all()) == ((who, alpha) in (("student", 0.0), ("teacher", 1.0)))
    plain, gradient = with_gradient(lambda s: losses.divergence(s, teacher, alpha=alpha), student)
    fast = losses.divergence_and_grad(student, teacher, torch.zeros(6, dtype=torch.long), alpha=alpha)
    for value in (plain, fast.value_N):
        torch.testing.assert_close(value, expected)
    if expected.isfinite().all():
        torch.testing.assert_close(fast.gradient_NV, gradient)
        assert gradient.isfinite().all()


def test_a_logit_that_is_not_a_number_stays_one() -> None:
    student, teacher = random_logits(0), random_logits(1)
    student[0, 0] = teacher[1, 0] = torch.nan
    for alpha in (0.0, 0.3, 1.0):
        fast = losses.divergence_and_grad(student, teacher, torch.zeros(6, dtype=torch.long), alpha=alpha)
        for value in (losses.divergence(student, teacher, alpha=alpha), fast.value_N):
            assert value[:2].isnan().all() and value[2:].isfinite().all()


def with_banned_tokens(model: Any) -> Any:
    """The model with a head whose bias rules out the banned tokens."""
    plain = model.lm_head
    model.lm_head = nn.Linear(plain.in_features, plain.out_features, bias=True, dtype=plain.weight.dtype)
    model.lm_head.weight = plain.weight
    with torch.no_grad():
        model.lm_head.bias.zero_()[BANNED] = -torch.inf
    return model


def test_a_masked_vocabulary_trains_or_says_what_is_wrong() -> None:
    def said(example: Example) -> Example:
        allowed = tuple(token if token not in BANNED else 0 for token in example.completion)
        return dataclasses.replace(example, completion=allowed, teacher=example.prompt, loss_weights={"distill": 0.1})

    rows = [said(example) for example in to_examples(random_groups(0))]
    for alpha, both in ((1.0, True), (0.0, True), (0.5, True), (0.5, False), (1.0, False)):
        student = with_banned_tokens(tiny_model()) if both else tiny_model()
        loss = Distill(GKDSettings(teacher_model="given", distillation_alpha=alpha), own_prompt=True).loss
        learner = tiny_learner(
            student, teacher=TeacherSettings(kind="external"), external=with_banned_tokens(tiny_model(seed=7))
        )
        if alpha == 1.0 and not both:
            with pytest.raises(TrainingError, match=r"got loss inf.*teacher that gives probability 0"):
                learner.update("m_step", rows, {"distill": loss})
            assert torch.equal(flat(learner.model), flat(tiny_model()))
            continue
        metrics = learner.update("m_step", rows, {"distill": loss}).metrics
        assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())
        assert metrics["m_step/divergence"] > 0 and metrics["m_step/grad_norm"] > 0


def test_under_autocast_a_gradient_that_is_formed_late_is_as_good_as_one_formed_early() -> None:
    """The backward pass ran sums over the vocabulary in bfloat16 when it had to compute the logits again."""
    s, t = (torch.randn(6, 5000, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    hidden, head_weight = torch.eye(6), s.T.contiguous()
    gradients = []
    for known in (True, False):
        weight = head_weight.clone().requires_grad_()

        def of_chunk(rows: slice) -> Any:
            def of_block(logits_nV: Tensor, place: slice, wanted: bool) -> Any:
                tokens = torch.zeros(len(logits_nV), dtype=torch.long)
                found = losses.divergence_and_grad(logits_nV, t[place], tokens, alpha=1.0)
                return head.BlockResult(found.value_N, found.gradient_NV, (), torch.ones(len(logits_nV)))

            return of_block

        with torch.autocast("cpu", dtype=torch.bfloat16):
            inputs = head.HeadInputs(hidden, weight, head.LogitFunction(), 1.0)
            (value,) = head.apply_in_chunks(inputs, of_chunk, chunk=6, weights_known=known)
            value.sum().backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)


class Casts(TorchDispatchMode):
    """Counts how often each of these weights is rounded to bfloat16."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self.counts = dict.fromkeys(weights, 0)
        self._names = {weight.data_ptr(): name for name, weight in weights.items()}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            name = self._names.get(args[0].data_ptr())
            if name is not None:
                self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("analytic", [True, False], ids=["head", "autograd"])
def test_under_autocast_a_teacher_with_the_students_own_weights_takes_no_gradient_from_it(
    analytic: bool,
) -> None:
    """Torch 2.6 gives a pass with gradient the rounded weights that one without has left in autocast's cache.

    Newer ones give them a history, so it is also counted that the student's pass takes over nothing of the teacher's.
    """
    rows = [row for row in rows_to_learn() if row.teacher_prompt]
    batch = collate(rows, device=torch.device("cpu"), dtype=torch.float32)
    gradients, rounded = [], []
    for copied in (True, False):
        model = tiny_model(dtype=torch.float32)
        teacher = copy.deepcopy(model).requires_grad_(False) if copied else model
        with torch.autocast("cpu", torch.bfloat16), Casts(dict(model.named_parameters())) as casts:
            scorer = Scorer(
                batch, student=((model, 1.0),), teacher=((teacher, 1.0),), train="student", temperature=1.0,
                chunk_tokens=8, analytic=analytic,
            )  # fmt: skip
            scorer.entropy("teacher")
            scorer.divergence(alpha=0.5).value.square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        rounded.append(
            [count for name, count in casts.counts.items() if name.endswith(("proj.weight", "lm_head.weight"))]
        )
    assert torch.equal(*gradients)
    assert rounded[1] == [count + 1 for count in rounded[0]] and min(rounded[0]) == 1


def sampled_by(groups: Sequence[Group], learner: Any, shift: Callable[[int, int], float]) -> list[Group]:
    """The groups with the learner's log-probs as the sampler's, plus ``shift(group, index)``."""
    scores = iter(learner.score(to_examples(groups), student_logprobs))
    made = []
    for number, group in enumerate(groups):
        rollouts = []
        for index, rollout in enumerate(group.rollouts):
            logprobs = tuple(score + shift(number, index) for score in next(scores))
            completion = dataclasses.replace(rollout.completion, logprobs=logprobs)
            rollouts.append(dataclasses.replace(rollout, completion=completion))
        made.append(Group(rollouts=tuple(rollouts)))
    return made


def test_the_probe_holds_the_longest_row_and_one_of_every_group() -> None:
    examples = to_examples(random_groups(0, groups=9, size=5))
    longest = dataclasses.replace(examples[23], prompt=examples[23].prompt * 4)
    examples = [*examples[:23], longest, *examples[24:]]
    probe = probe_rows(examples)
    assert 23 in probe and {examples[row].group for row in probe} == set(range(9))
    assert set(range(0, 45, 16)) <= set(probe) and len(probe) <= 9 + 3 + 1
    assert len({row % 5 for row in probe}) == 5  # not always a group's first
    assert probe_rows(examples[:1]) == [0]
    whole = to_examples(random_groups(1, groups=1, size=40))
    assert len(probe_rows(whole)) <= 3 + 2


def steps_of(algorithm: Callable[[], Algorithm], shift: Callable[[int, int], float]) -> tuple[Tensor, dict[str, float]]:
    learner = tiny_learner(tiny_model(), teacher=TeacherSettings())
    groups = sampled_by(random_groups(0, groups=6, size=3), learner, shift)
    metrics = algorithm().step(groups, learner).metrics
    return flat(learner.model), metrics


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("e_step", lambda: VPD(VPDSettings(e_every=1), TokenPrompter())),  # type: ignore[arg-type]
        ("gate", lambda: GatedVPD(GatedSettings(e_every=None), TokenPrompter())),  # type: ignore[arg-type]
    ],
)
def test_a_sampler_that_is_wrong_in_any_one_group_is_found(name: str, make: Callable[[], Algorithm]) -> None:
    """As where one rank's engine is stale: every row is then scored, and training goes as with the right sampler."""
    right, metrics = steps_of(make, lambda group, index: 0.0)
    assert metrics[f"{name}/sampler_logp_difference"] < 1e-12
    few, found = metrics[f"{name}/rows_scored"], 0
    for wrong in range(6):
        weights, metrics = steps_of(make, lambda group, index, wrong=wrong: (1.0 + index) * (group == wrong))
        assert (weights - right).norm() < 1e-9
        found += metrics[f"{name}/rows_scored"] > few
    assert found >= 4  # the other groups hold no row that is read


def test_a_sampler_that_is_wrong_on_the_longest_row_alone_is_found() -> None:
    """As one that goes wrong beyond a window."""
    learner = tiny_learner(tiny_model())
    examples = to_examples(sampled_by(random_groups(0, groups=1, size=10), learner, lambda group, index: 0.0))
    examples[7] = dataclasses.replace(examples[7], prompt=examples[7].prompt * 3)
    scores = learner.score(examples, student_logprobs)
    own, metrics = own_logprobs(examples, learner)
    assert own == [tuple(score) for score in scores] and metrics["rows_scored"] == len(examples)
    assert metrics["sampler_logp_difference"] > 1e-2


def test_the_tolerance_follows_the_precision() -> None:
    assert tiny_learner(tiny_model()).logprob_tolerance == 1e-3
    assert tiny_learner(tiny_model(dtype=torch.float32)).logprob_tolerance == 1e-3
    assert tiny_learner(bfloat16_model()).logprob_tolerance == 0.5


@pytest.mark.parametrize(
    ("sections", "device", "warned"),
    [
        ({"optim": {"mixed_precision": "bf16"}}, "cpu", ("optim.mixed_precision bf16", "optim.mixed_precision: no")),
        ({"model": {"dtype": "bfloat16"}}, "cpu", ("model.dtype bfloat16", "model.dtype: float32")),
        (
            {"model": {"dtype": "bfloat16"}, "optim": {"mixed_precision": "bf16"}},
            "cpu",
            (
                "optim.mixed_precision bf16 and model.dtype bfloat16",
                "optim.mixed_precision: no and model.dtype: float32",
            ),
        ),
        ({"optim": {"mixed_precision": "bf16"}}, "cuda", ()),
        ({}, "cpu", ()),
    ],
)
def test_a_cpu_that_is_slow_in_bfloat16_is_named_at_the_start(
    sections: dict[str, Any], device: str, warned: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    check_speed(parse(sections), device, lambda device: 1.4)
    assert not caplog.messages
    check_speed(parse(sections), device, lambda device: 9.6)
    said = "{}: this CPU takes 9.6 times as long for products in bfloat16 as in float32; set {}"
    assert caplog.messages == ([said.format(*warned)] if warned else [])
