"""The model as an author of text: which seed a text has, what it reads, and what it costs."""

from helpers import RecordingEngine, model_writer, write


def named(prompt: str, seed: int) -> str:
    return f"{prompt}#{seed}"


def seeds(*calls: list[str], **stream: int) -> list[int]:
    engine = RecordingEngine(named)
    writer = model_writer(engine, **stream)
    for texts in calls:
        write(writer, texts)
    return [sample.seed for sample in engine.samples]


def test_every_text_has_a_seed_of_its_own_also_where_the_prompts_are_equal() -> None:
    assert len(set(seeds(["a", "b", "b"]))) == 3
    assert len(set(seeds(["a", "b"], ["a", "b"], ["a"]))) == 5  # a second source of the same step draws anew


def test_seeds_differ_by_step_and_by_the_runs_seed_and_are_the_same_again() -> None:
    drawn = [seeds(["a", "b"], step=step, seed=seed) for step in (0, 1) for seed in (0, 1)]
    assert len({seed for texts in drawn for seed in texts}) == 8
    assert seeds(["a", "b"], step=1, seed=1) == drawn[-1]


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
