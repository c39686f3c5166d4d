"""House styles that nobody wrote down: each client wants something in every text, and only a reviewer's note says what.

    Write a sentence about dogs. Client: Aldo.                     <- the task
    For Aldo, write about green dogs.                              <- the note on an attempt that does not
    Accepted.                                                      <- a bare verdict, for people only

    env = Conventions(clients=4, kinds=("word", "closing"))
    [grade] = env.grade([env.task(0, seed=0)], ["Green dogs are rare."])

An untold model fails almost always; ``vpd eval --teacher`` says how often the same model succeeds when it reads the
note.  What is learned about a client holds for every topic, so evaluation asks for topics that training never names.
``held_out_kinds`` adds clients whose *kind* of wish training never shows: there only reading the note can help.

An answer must keep the convention, speak about the topic, and be a text of its own: one that puts the wanted words in
quotation marks, speaks of "the word" or "the client", or repeats the note is refused, so that quoting the note earns
nothing.  So is one that repeats itself ("green cats are green cats are"), and one that names what several clients want
keeps the convention of none: trained without these two rules, SmolLM2-135M came to write little else.
"""

import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from vpd.envs import per_row
from vpd.errors import ConfigError, nearest
from vpd.settings import Settings, Share
from vpd.types import Grade, Task

QUOTES = "\"'“”‘’«»`*_"
JOB_WORDS = ("word", "words", "sentence", "sentences", "client", "text", "texts")  # of the job, not of a topic
MOST_OF_ONE_WORD = 3  # times that an answer may use a word that is not little
MOST_THEMES = 3  # of those that clients may want, in one answer
LONGEST_REPEAT = 4  # words of a note in a row, beyond the task's own, that an answer may repeat


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of wish: does an answer keep it, how a reviewer says it ({client}, {value}, {topic}), what may be wanted.

    ``apply`` makes a plain sentence keep it.
    """

    keeps: Callable[[str, str], bool]
    notes: tuple[str, ...]
    values: tuple[str, ...]
    apply: Callable[[str, str], str]


def has_word(answer: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) is not None


def has_only(answer: str, word: str) -> bool:
    """Whether an answer holds this word, and none that another client wants."""
    others = (value for value in KINDS["word"].values if value != word)
    return has_word(answer, word) and not any(has_word(answer, other) for other in others)


def has_theme(answer: str, theme: str) -> bool:
    """Whether an answer speaks of a theme, and not of all at once."""
    found = [name for name, words in THEMES.items() if any(has_word(answer, word) for word in words)]
    return theme in found and len(found) <= MOST_THEMES


def begins(answer: str, words: str) -> bool:
    return _plain(answer).startswith(_plain(words) + " ")


def ends(answer: str, words: str) -> bool:
    return _plain(answer).endswith(" " + _plain(words))


def ends_with_mark(answer: str, mark: str) -> bool:
    return answer.rstrip().rstrip(QUOTES).endswith(mark)


def is_short(answer: str, most: str) -> bool:
    return len(answer.split()) <= int(most)


def has_digits(answer: str, _: str) -> bool:
    return any(map(str.isdigit, answer))


def is_upper(answer: str, _: str) -> bool:
    return answer.upper() == answer


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


# What a model's sentences often speak of anyway, and words for it, none of which is a topic.
THEMES = {
    "food": _listed(
        "food meal meals dish dishes delicious cuisine culinary restaurant kitchen taste tasty flavor flavors chef"
        " baker bakery wine ingredients treat treats cake chocolate dinner eat"
    ),
    "tradition": _listed(
        "tradition traditions traditional old ancient years century centuries classic heritage historic timeless"
        " culture cultural legacy legendary generations iconic"
    ),
    "countries": _listed(
        "country countries world nation global international italy italian france french spain spanish america american"
        " europe european england english"
    ),
    "art": _listed(
        "art arts artist artists artistic artful music musician story stories creative creativity design designs"
        " beautiful beauty actor actress director inspiration inspired masterpiece"
    ),
    "skill": _listed(
        "skill skills skilled skillful renowned expert master talent talented experience experienced craft crafted"
        " seasoned passion passionate dedicated"
    ),
}
KINDS = {
    "word": Kind(
        has_only,
        (
            "{client} wants it about {value} {topic}.",
            "For {client}, write about {value} {topic}.",
            "The {topic} must be {value}: {client} expects that.",
        ),
        ("green", "tiny", "summer", "magical", "golden", "sunny", "winter", "silver"),
        lambda sentence, value: f"{sentence[:-1]}, the {value} ones.",
    ),
    "theme": Kind(
        has_theme,
        (
            "{client} wants it about {topic} and {value}.",
            "For {client}, write about {topic} and {value}.",
            "Write about {topic} and {value}: {client} expects that.",
        ),
        tuple(THEMES),
        lambda sentence, value: f"{sentence[:-1]}, and {value} too.",
    ),
    "opening": Kind(
        begins,
        (
            'Texts for {client} begin with "{value},".',
            '{client} wants every text to start with "{value},".',
            'Start with "{value}," please: {client} expects this address.',
        ),
        ("Dear friends", "Good morning", "Hello everyone", "Dear neighbours"),
        lambda sentence, value: f"{value}, {sentence[0].lower()}{sentence[1:]}",
    ),
    "closing": Kind(
        ends,
        (
            '{client} wants every text to end with "{value}."',
            'The text must close with "{value}." when it is for {client}.',
            'Add "{value}." at the end: {client} never goes without it.',
        ),
        ("Thank you", "Best wishes", "See you soon", "Stay well"),
        lambda sentence, value: f"{sentence} {value}.",
    ),
    "mark": Kind(
        ends_with_mark,
        (
            'Texts for {client} end with "{value}".',
            '{client} wants "{value}" at the end of every sentence.',
            'This must end with "{value}" and not with a full stop: {client} insists on it.',
        ),
        ("!", "?", "..."),
        lambda sentence, value: sentence[:-1] + value,
    ),
    "length": Kind(
        is_short,
        (
            "{client} wants at most {value} words.",
            "Too long: texts for {client} have {value} words or fewer.",
            "Use no more than {value} words for {client}.",
        ),
        ("5", "6", "7"),
        lambda sentence, value: " ".join(sentence.split()[: int(value)]),
    ),
    "number": Kind(
        has_digits,
        (
            "{client} wants a number, in digits, in every sentence.",
            "There is no number in this; {client} asks for one in digits.",
            "Put a number (in digits) into it: {client} likes facts.",
        ),
        ("7",),
        lambda sentence, value: f"{sentence[:-1]} and {value} more.",
    ),
    "capitals": Kind(
        is_upper,
        (
            "{client} wants everything in capital letters.",
            "Texts for {client} are written in capital letters only.",
            "Use capital letters throughout for {client}.",
        ),
        ("",),
        lambda sentence, value: sentence.upper(),
    ),
}
VAGUE = (
    "{client} was not happy with this one.",
    "This is not yet in the style of {client}.",
    "Please have another look at what {client} expects.",
)
CLIENTS = ("Aldo", "Bruna", "Carlo", "Delia", "Ettore", "Flora", "Guido", "Ines")
NEW_CLIENTS = ("Livia", "Marco", "Nora", "Pietro")


@dataclass(frozen=True, slots=True)
class Wish:
    """What one client wants."""

    client: str
    kind: str
    value: str

    def keeps(self, answer: str) -> bool:
        return KINDS[self.kind].keeps(answer, self.value)

    def note(self, topic: str, rng: random.Random) -> str:
        return rng.choice(self.notes(topic))

    def notes(self, topic: str) -> tuple[str, ...]:
        """Every wording of the note on a text about ``topic``."""
        return tuple(note.format(client=self.client, value=self.value, topic=topic) for note in KINDS[self.kind].notes)


@dataclass(frozen=True, slots=True)
class Request:
    """A task's payload: a sentence about ``topic``, as ``wish`` has it."""

    topic: str
    wish: Wish


@dataclass(frozen=True, kw_only=True)
class Conventions(Settings, section="env"):
    """The environment.  Raises ConfigError for settings that leave no task, or shares of more than 1 together."""

    name: Literal["conventions"] = "conventions"
    clients: Annotated[int, Interval(ge=1, le=len(CLIENTS)), "clients, each with one convention"] = 4
    kinds: Annotated[tuple[str, ...], "kinds of convention that clients have, in turn"] = ("word",)
    held_out_kinds: Annotated[
        tuple[str, ...], "kinds of four more clients, whom only evaluation asks about; empty: none"
    ] = ()
    draw: Annotated[int, Ge(0), "which of the possible wishes each client has: another number, other wishes"] = 0
    notes: Annotated[
        Literal["note", "verdict", "none"], "what a reviewer writes: the wish, 'Not accepted.', or nothing"
    ] = "note"
    wrong_share: Annotated[float, Share, "share of notes that tell another client's wish"] = 0.0
    vague_share: Annotated[float, Share, "share of notes that do not say what is wanted"] = 0.0
    silent_share: Annotated[float, Share, "share of refused attempts without a note"] = 0.0

    def check(self) -> None:
        super().check()
        for key, kinds in (("kinds", self.kinds), ("held_out_kinds", self.held_out_kinds)):
            for kind in kinds:
                if kind not in KINDS:
                    raise ConfigError(f"unknown kind {kind!r} in env.{key}", do=nearest(str(kind), KINDS))
        if not self.kinds:
            raise ConfigError("env.kinds names no kind", expected=f"some of {', '.join(KINDS)}")
        if shared := set(self.kinds) & set(self.held_out_kinds):
            raise ConfigError("env.held_out_kinds names a kind that training shows", got=", ".join(sorted(shared)))
        shares = self.wrong_share + self.vague_share + self.silent_share
        if shares > 1:
            raise ConfigError(
                "env.wrong_share, vague_share and silent_share are more than 1 together", got=f"{shares:g}"
            )
        if self.wrong_share and len({(wish.kind, wish.value) for wish in self.wishes}) < 2:
            raise ConfigError("env.wrong_share needs a second client with another wish", got=f"clients {self.clients}")

    @cached_property
    def wishes(self) -> tuple[Wish, ...]:
        """What each client of training wants."""
        return _assign(CLIENTS[: self.clients], self.kinds, self.draw)

    @cached_property
    def new_wishes(self) -> tuple[Wish, ...]:
        """What the clients want whom only evaluation asks about."""
        return _assign(NEW_CLIENTS, self.held_out_kinds, self.draw) if self.held_out_kinds else ()

    def task(self, index: int, *, seed: int) -> Task:
        """A topic and a client, drawn by (seed, index) alone."""
        rng = random.Random(f"conventions/{seed}/{index}")
        return _make(f"train/{seed}/{index}", rng.choice(TOPICS), rng.choice(self.wishes))

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        """Each held-out topic for each client, shuffled once."""
        pairs = list(itertools.product(HELD_OUT, self.wishes + self.new_wishes))
        random.Random("conventions/eval").shuffle(pairs)
        return [_make(f"eval/{topic}/{wish.client}", topic, wish) for topic, wish in pairs[:limit]]

    @per_row
    def grade(self, task: Task, text: str) -> Grade:
        request: Request = task.payload
        wish, keeps = request.wish, request.wish.keeps(text)
        complaint = _complaint(request, text)
        metrics = {f"kept_{wish.kind}": float(keeps), "quoted": float(quotes_note(request, text))}
        if complaint is None and keeps:
            return Grade(reward=1.0, success=True, feedback="Accepted.", informative=False, metrics=metrics)
        remarks = [complaint, None if keeps else self._note(task, text)]
        feedback = " ".join(remark for remark in remarks if remark is not None)
        return Grade(reward=0.0, success=False, feedback=feedback or None, metrics=metrics)

    def solution(self, task: Task) -> str:
        """A sentence about the topic that keeps the convention."""
        request: Request = task.payload
        sentence = f"Everybody here likes {request.topic}."
        return KINDS[request.wish.kind].apply(sentence, request.wish.value)

    def _note(self, task: Task, text: str) -> str | None:
        """What the reviewer writes, drawn by the task and the answer."""
        if self.notes == "none":
            return None
        if self.notes == "verdict":
            return "Not accepted."
        wish: Wish = task.payload.wish
        rng = random.Random(hashlib.blake2b(f"{task.id}\n{text}".encode("utf-8", "replace"), digest_size=8).digest())
        place = rng.random()
        if place < self.wrong_share:
            other = rng.choice([w for w in self.wishes if (w.kind, w.value) != (wish.kind, wish.value)])
            return Wish(wish.client, other.kind, other.value).note(task.payload.topic, rng)
        if place < self.wrong_share + self.vague_share:
            return rng.choice(VAGUE).format(client=wish.client)
        if place < self.wrong_share + self.vague_share + self.silent_share:
            return None
        return wish.note(task.payload.topic, rng)


def _complaint(request: Request, answer: str) -> str | None:
    """What is wrong with an answer before its convention is looked at; None where it is a sentence about the topic."""
    if quotes_note(request, answer):
        return f"This repeats instructions: write the sentence about {request.topic} itself."
    if not has_word(answer, request.topic) and not has_word(answer, _singular(request.topic)):
        return f"Write about {request.topic}, please."
    if len(re.findall(r"\w+", answer)) < 3:
        return "This is too short for a sentence."
    if repeats_itself(answer):
        return f"This repeats itself: write one plain sentence about {request.topic}."
    return None


def repeats_itself(answer: str) -> bool:
    """Whether a word stands twice in a row, three words come again in the same order, or one word comes too often."""
    words = _words(answer)
    threes = list(zip(words, words[1:], words[2:], strict=False))
    counts = Counter(word for word in words if word not in LITTLE_WORDS)
    return (
        any(first == second for first, second in itertools.pairwise(words))
        or len(set(threes)) < len(threes)
        or max(counts.values(), default=0) > MOST_OF_ONE_WORD
    )


def quotes_note(request: Request, answer: str) -> bool:
    """Whether an answer quotes what is wanted, speaks about the job, or repeats the note in place of writing."""
    wish = request.wish
    if any(has_word(answer, word) for word in JOB_WORDS):
        return True
    if wish.value and re.search(rf"[\"“'‘«`]{re.escape(wish.value)}[.,]?[\"”'’»`]", answer, re.IGNORECASE):
        return True
    repeated = set(_runs(answer, LONGEST_REPEAT))
    wanted = _words(wish.value)
    return any(
        run in repeated and not _contains(wanted, run)
        for note in wish.notes(request.topic)
        for run in _runs(note, LONGEST_REPEAT)
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def _runs(text: str, length: int) -> list[tuple[str, ...]]:
    """All runs of ``length`` words."""
    words = _words(text)
    return [words[start : start + length] for start in range(len(words) - length + 1)]


def _contains(words: tuple[str, ...], run: tuple[str, ...]) -> bool:
    return any(words[start : start + len(run)] == run for start in range(len(words) - len(run) + 1))


def _plain(text: str) -> str:
    """Lower-case words with one space between them, without marks."""
    return " ".join(_words(text))


def _singular(topic: str) -> str:
    return topic[:-3] + "y" if topic.endswith("ies") else topic.removesuffix("s")


def _assign(clients: Sequence[str], kinds: Sequence[str], draw: int) -> tuple[Wish, ...]:
    """Each client's wish: the kinds in turn, the values of a kind in an order that ``draw`` shuffles."""
    values = {}
    for kind in kinds:
        order = list(KINDS[kind].values)
        random.Random(f"conventions/{draw}/{kind}").shuffle(order)
        values[kind] = itertools.cycle(order)
    return tuple(
        Wish(client, kind, next(values[kind])) for client, kind in zip(clients, itertools.cycle(kinds), strict=False)
    )


def _make(key: str, topic: str, wish: Wish) -> Task:
    content = f"Write a sentence about {topic}. Client: {wish.client}."
    return Task(id=key, messages=({"role": "user", "content": content},), payload=Request(topic, wish))


TOPICS = _listed(
    "dogs bread trains schools rain books cooking cities friends work sleep horses mountains coffee painting bicycles"
    " history children markets ships stars doctors farms games letters bridges birds shoes clocks rivers maps windows"
)
HELD_OUT = _listed("cats cheese airports libraries snow films baking villages lakes teachers chairs tea")
LITTLE_WORDS = _listed(
    "a an the and or but of to in on at for with as by from is are was were be can it that this i you we they"
)
