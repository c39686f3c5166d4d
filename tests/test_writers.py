"""The model as an author of text: which seed a text has, what it reads, and what it costs."""

from fakes import RecordingEngine, model_writer, scripted_prompter, write

from vpd.feedback.writers import ModelWriter
from vpd.types import SampleKey


def named(prompt: str, seed: int) -> str:
    return f"{prompt}#{seed}"


def seeds(*, source: int = 0, step: int = 0, seed: int = 0) -> list[int]:
    """The seeds of three texts with equal prompts, each about an attempt of its own."""
    engine = RecordingEngine(lambda prompt, seed: "x")
    keys = [SampleKey(phase="train", step=step, task=n // 2, sample=n % 2) for n in range(3)]
    write(ModelWriter(engine, scripted_prompter(), seed=seed, source=source), ["b", "b", "b"], keys)
    return [sample.seed for sample in engine.samples]


def test_every_text_has_a_seed_of_its_own_also_where_the_prompts_are_equal() -> None:
    assert len(set(seeds())) == 3


def test_seeds_differ_by_source_and_step_and_by_the_runs_seed_and_are_the_same_again() -> None:
    drawn = [seeds(source=n, step=step, seed=seed) for n in (0, 1) for step in (0, 1) for seed in (0, 1)]
    assert len({seed for texts in drawn for seed in texts}) == 24
    assert seeds(source=1, step=1, seed=1) == drawn[-1]


def test_a_text_does_not_share_its_randomness_with_the_attempt_that_it_is_about() -> None:
    assert not {SampleKey(phase="train", step=0, task=n // 2, sample=n % 2).seed(0) for n in range(3)} & set(seeds())


def test_texts_come_back_in_order_with_their_cost() -> None:
    engine = RecordingEngine(lambda prompt, seed: prompt.removeprefix("[user]").removesuffix("[assistant]").upper())
    written = write(model_writer(engine), ["why", "because"])
    assert [(w.text, w.tokens) for w in written] == [("WHY", 3), ("BECAUSE", 7)]


def test_the_engine_is_asked_once_for_all_texts_with_the_sources_settings() -> None:
    engine = RecordingEngine(named)
    writer = model_writer(engine)
    assert write(writer, []) == [] and engine.calls == []
    [cut, _] = write(writer, ["a", "b"], max_tokens=4, temperature=0.3)
    assert len(engine.calls) == 1
    assert {(s.max_tokens, s.temperature, s.top_p, s.top_k) for s in engine.samples} == {(4, 0.3, 1.0, None)}
    assert cut.text == "[use" and cut.tokens == 4
