"""House styles: what keeps each kind by hand, notes and their shares, and answers that only quote the note."""

from collections import Counter
from typing import Any

import pytest

from vpd.envs import grade_texts
from vpd.envs.check import check_env
from vpd.envs.conventions import HELD_OUT, KINDS, THEMES, TOPICS, VAGUE, Conventions, Request, Wish
from vpd.errors import ConfigError
from vpd.types import Grade, Task

HOSTILE = ["", "word " * 200_000, "\ud800 \x00\x1b[31m", "\u202e" * 1000 + "a", "9" * 100_000, "x" * 10 + "(a+)+" * 50]

# kind, value, answers that keep it, answers that do not
CASES: list[tuple[str, str, list[str], list[str]]] = [
    ("word", "ocean", ["Dogs love the ocean.", "OCEAN: dogs swim."], ["Dogs swim in oceans.", "Dogs like to swim."]),
    (
        "theme",
        "food",
        ["Dogs and food.", "The dogs of old artists enjoy a tasty meal."],
        ["Dogs bark here.", "Skilled dogs of old artists enjoy a tasty meal."],  # the second speaks of four themes
    ),
    ("opening", "Good morning", ["Good morning, dogs bark.", "good MORNING - dogs bark."], ["Dogs say good morning."]),
    (
        "closing",
        "Thank you",
        ["Dogs bark. Thank you.", "Dogs bark, thank you!"],
        ["Thank you, dogs.", "Dogs bark here."],
    ),
    ("mark", "!", ["Dogs bark here!", 'Dogs bark here!"'], ["Dogs bark here.", "Dogs! bark here"]),
    ("mark", "...", ["Dogs bark here..."], ["Dogs bark here.."]),
    ("length", "5", ["Dogs bark at the moon."], ["Dogs always bark at the moon."]),
    ("number", "7", ["Dogs have 4 legs."], ["Dogs have four legs."]),
    ("capitals", "", ["DOGS BARK AT 9."], ["DOGS bark AT 9."]),
]


def task_of(kind: str, value: str, topic: str = "dogs") -> Task:
    wish = Wish("Aldo", kind, value)
    message = {"role": "user", "content": f"Write a sentence about {topic}. Client: Aldo."}
    return Task(id=f"{topic}/{kind}", messages=(message,), payload=Request(topic, wish))  # type: ignore[arg-type]


def grade(task: Task, text: str, **settings: Any) -> Grade:
    [found] = grade_texts(Conventions(**settings), [task], [text])
    return found


@pytest.mark.parametrize(("kind", "value", "kept", "broken"), CASES)
def test_each_kind_by_hand(kind: str, value: str, kept: list[str], broken: list[str]) -> None:
    task = task_of(kind, value)
    for answer in kept:
        found = grade(task, answer)
        assert (found.success, found.reward, found.informative) == (True, 1.0, False), answer
    for answer in broken:
        found = grade(task, answer)
        assert found.success is False and found.feedback in Wish("Aldo", kind, value).notes("dogs"), answer
        assert found.metrics[f"kept_{kind}"] == 0


def all_wishes() -> list[Wish]:
    return [Wish("Aldo", kind, value) for kind, made in KINDS.items() for value in made.values]


def test_every_wish_has_a_solution_and_every_note_says_what_is_wanted() -> None:
    for wish in all_wishes():
        for topic in (*TOPICS, *HELD_OUT):
            task = task_of(wish.kind, wish.value, topic)
            assert grade(task, Conventions().solution(task)).success, (wish, topic)
        notes = wish.notes("dogs")
        assert len(set(notes)) == 3 and all("Aldo" in note for note in notes)
        shown = wish.value not in ("", "7")  # these two kinds want no particular value
        assert all(not shown or wish.value in note for note in notes)


def test_repeating_the_note_earns_nothing_whatever_stands_around_it() -> None:
    frames = ("{}", "Dogs: {}", "{} Dogs.", 'Dogs bark. "{}"', "I will write about dogs. {}", "DOGS! {}!")
    for wish in all_wishes():
        task = task_of(wish.kind, wish.value)
        for note in wish.notes("dogs"):
            for frame in frames:
                for text in (frame.format(note), frame.format(note).upper()):
                    found = grade(task, text)
                    assert not found.success or (wish.kind, found.metrics["quoted"]) == ("length", 0.0), text
    for text in ('Dogs and "ocean"', "Our client likes dogs and the ocean.", "The word ocean is for dogs."):
        found = grade(task_of("word", "ocean"), text)
        assert not found.success and found.metrics["quoted"] == 1 and found.feedback is not None
        assert "repeats instructions" in found.feedback


def test_an_answer_must_be_about_the_topic() -> None:
    found = grade(task_of("word", "ocean"), "Cats love the ocean.")
    assert not found.success and found.feedback == "Write about dogs, please." and found.metrics["kept_word"] == 1
    assert grade(task_of("word", "ocean"), "A dog at the ocean.").success
    assert grade(task_of("word", "ocean", "libraries"), "A library at the ocean.").success
    assert not grade(task_of("word", "ocean"), "dogs ocean").success  # no sentence


@pytest.mark.parametrize(
    "stutter",
    [
        "Green dogs are green green green.",
        "The dogs are green and the dogs are green.",
        "Green dogs like green cats, green birds and green fish.",
    ],
)
def test_an_answer_that_repeats_itself_earns_nothing(stutter: str) -> None:
    found = grade(task_of("word", "green"), stutter)
    assert not found.success and found.feedback == "This repeats itself: write one plain sentence about dogs."
    assert grade(task_of("word", "green"), "The green dogs of the town and the cats of the green house sleep.").success


def test_an_answer_with_what_every_client_wants_keeps_no_convention() -> None:
    found = grade(task_of("word", "green"), "The sunny green dogs like winter.")
    assert not found.success and found.metrics["kept_word"] == 0.0


def notes_of(env: Conventions, count: int = 400) -> list[tuple[Request, str | None]]:
    tasks = [env.task(index, seed=0) for index in range(count)]
    texts = [f"Number {index} says something about {task.payload.topic}." for index, task in enumerate(tasks)]
    grades = grade_texts(env, tasks, texts)
    assert grades == grade_texts(env, tasks, texts)
    return [(task.payload, found.feedback) for task, found in zip(tasks, grades, strict=True)]


def test_shares_of_wrong_vague_and_silent_notes() -> None:
    env = Conventions(wrong_share=0.3, vague_share=0.2, silent_share=0.1)
    kinds: Counter[str] = Counter()
    for request, note in notes_of(env):
        wish = request.wish
        true = wish.notes(request.topic)
        others = [Wish(wish.client, w.kind, w.value).notes(request.topic) for w in env.wishes if w != wish]
        vague = [text.format(client=wish.client) for text in VAGUE]
        kinds["silent" if note is None else "true" if note in true else "vague" if note in vague else "wrong"] += 1
        if kinds["wrong"] and note is not None and note not in true and note not in vague:
            assert any(note in notes for notes in others)
    for kind, share in (("wrong", 0.3), ("vague", 0.2), ("silent", 0.1), ("true", 0.4)):
        assert abs(kinds[kind] / 400 - share) < 0.08  # three standard errors
    assert all(note in request.wish.notes(request.topic) for request, note in notes_of(Conventions()))
    assert {note for _, note in notes_of(Conventions(notes="verdict"))} == {"Not accepted."}
    assert {note for _, note in notes_of(Conventions(notes="none"))} == {None}


def test_clients_have_the_kinds_in_turn_and_different_values() -> None:
    env = Conventions(clients=8, kinds=("word", "closing"), held_out_kinds=("opening",))
    assert [wish.kind for wish in env.wishes] == ["word", "closing"] * 4
    assert len({(wish.kind, wish.value) for wish in env.wishes}) == 8
    assert {wish.kind for wish in env.new_wishes} == {"opening"}
    assert env.wishes == Conventions(clients=8, kinds=("word", "closing")).wishes
    assert env.wishes != Conventions(clients=8, kinds=("word", "closing"), draw=1).wishes


def test_evaluation_asks_for_topics_and_kinds_that_training_never_shows() -> None:
    env = Conventions(held_out_kinds=("closing", "opening"))
    trained = [env.task(index, seed=1).payload for index in range(300)]
    held_out = [task.payload for task in env.eval_tasks(None)]
    assert len(held_out) == len(HELD_OUT) * 8 and not set(TOPICS) & set(HELD_OUT)
    assert {r.topic for r in trained} == set(TOPICS) and {r.topic for r in held_out} == set(HELD_OUT)
    assert {r.wish.kind for r in trained} == {"word"}
    assert Counter(r.wish.kind for r in held_out) == {"word": 48, "closing": 24, "opening": 24}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_answers_are_graded(text: str) -> None:
    for kind, value, _, _ in CASES:
        assert not grade(task_of(kind, value), text).success


def test_the_check_of_the_environment_finds_no_fault() -> None:
    for env in (
        Conventions(),
        Conventions(kinds=("theme",)),
        Conventions(clients=8, kinds=tuple(KINDS)),
        Conventions(held_out_kinds=("mark",)),
    ):
        check_env(env).require()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kinds": ("words",)}, "unknown kind 'words' in env.kinds"),
        ({"kinds": ()}, "names no kind"),
        ({"held_out_kinds": ("word",)}, "a kind that training shows"),
        ({"wrong_share": 0.7, "vague_share": 0.4}, "more than 1 together"),
        ({"wrong_share": 0.1, "clients": 1}, "a second client"),
        ({"wrong_share": 0.1, "clients": 2, "kinds": ("capitals",)}, "a second client"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Conventions(**settings)


def test_a_reviewer_says_all_that_is_wrong() -> None:
    env = Conventions(clients=1)
    task = env.task(0, seed=0)
    [grade] = env.grade([task], ["Nothing of the kind is here."])
    topic, wish = task.payload.topic, task.payload.wish
    assert grade.feedback in {f"Write about {topic}, please. {note}" for note in wish.notes(topic)}
    [grade] = env.grade([task], [f"Nothing but the {wish.value}."])
    assert grade.feedback == f"Write about {topic}, please."


def test_no_word_of_a_theme_is_a_topic() -> None:
    words = {word for theme in THEMES.values() for word in theme}
    assert not words & {form for topic in TOPICS + HELD_OUT for form in (topic, topic.removesuffix("s"))}
    assert not words & {topic[:-3] + "y" for topic in TOPICS + HELD_OUT if topic.endswith("ies")}
