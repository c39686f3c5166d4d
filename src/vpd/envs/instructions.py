"""Short questions with rules about the form of the answer, which a program can check.  No data is needed.

    Why do cats purr? Use at most 12 words.                        <- the task
    Your answer has 27 words; at most 12 are allowed.              <- feedback on an attempt
    All rules are kept.                                            <- a bare verdict, for people only

    env = Instructions(constraints=("max_words", "json", "forbid"), per_prompt=2)
    [grade] = env.grade([env.task(0, seed=0)], ["Because they are content."])

A family of rules is a sentence of the prompt, a function that checks an answer, and how its value is drawn.  Nothing
checks whether an answer is *true*.  Evaluation has its own questions, which training never asks.

A model of 135 M parameters sometimes follows the default families.  It almost never follows ``lowercase``,
``uppercase`` or ``json``: without a single success in a group, only feedback gives a learning signal.
"""

import itertools
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from annotated_types import Interval

from vpd.envs import per_row
from vpd.errors import ConfigError, nearest
from vpd.settings import Settings
from vpd.types import Grade, Task

EVAL_TASKS = 256
CLOSERS = "\"'”’)]*_"


# Each function returns how an answer breaks a rule, without quoting the answer, or None if it keeps the rule.


def max_words(answer: str, most: int) -> str | None:
    found = sum(map(_has_word, answer.split()))
    return f"Your answer has {found} words; at most {most} are allowed." if found > most else None


def sentences(answer: str, number: int) -> str | None:
    """A word that ends in ``.``, ``!`` or ``?`` ends a sentence; so does the end of the text."""
    found, is_open = 0, False
    for word in answer.split():
        is_open = is_open or _has_word(word)
        if is_open and word.rstrip(CLOSERS).endswith((".", "!", "?")):
            found, is_open = found + 1, False
    found += is_open
    if found == number:
        return None
    return f"Your answer has {_count(found, 'sentence')}; it must have exactly {number}."


def include(answer: str, word: str) -> str | None:
    return None if _occurrences(word, answer) else f'The word "{word}" is missing from your answer.'


def forbid(answer: str, word: str) -> str | None:
    found = _occurrences(word, answer)
    return f'The word "{word}" stands {_count(found, "time")} in your answer; it is not allowed.' if found else None


def no_commas(answer: str, _: None) -> str | None:
    found = answer.count(",")
    return f"Your answer has {_count(found, 'comma')}; none is allowed." if found else None


def start_with(answer: str, word: str) -> str | None:
    starts = re.match(rf"\W*{re.escape(word)}(?!\w)", answer, re.IGNORECASE)
    return None if starts else f'Your answer does not start with the word "{word}".'


def end_with(answer: str, mark: str) -> str | None:
    return None if answer.rstrip().endswith(mark) else f'Your answer does not end with "{mark}".'


def lowercase(answer: str, _: None) -> str | None:
    found = sum(map(str.isupper, answer))
    return f"Your answer has {_count(found, 'capital letter')}; none is allowed." if found else None


def uppercase(answer: str, _: None) -> str | None:
    found = sum(map(str.islower, answer))
    return f"Your answer has {_count(found, 'lowercase letter')}; none is allowed." if found else None


def json_object(answer: str, keys: tuple[str, ...]) -> str | None:
    """One JSON object with exactly these keys, no value empty, and no text around it."""
    if not answer.lstrip().startswith("{"):
        return "Your answer must be a JSON object and nothing else; it does not begin with {."
    try:
        found = json.loads(answer)
    except json.JSONDecodeError as error:
        return f"Your answer is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}."
    except (ValueError, RecursionError):
        return "Your answer is no JSON that can be read: it is nested too deep or holds too long a number."
    wrong = [f'the key "{key}" is missing' for key in keys if key not in found]
    wrong += [f'the value of "{key}" is empty' for key in keys if key in found and found[key] in ("", None, [], {})]
    others = len(found.keys() - set(keys))
    wrong += [f"there {_are(others, 'key')} too many"] if others else []
    return f"In your JSON object {', '.join(wrong)}." if wrong else None


def bullets(answer: str, number: int) -> str | None:
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    found = sum(line.startswith("- ") and _has_word(line) for line in lines)
    others = len(lines) - found
    wrong = [f'there {_are(found, "line")} that begin with "- ", exactly {number} must'] if found != number else []
    wrong += [f"there {_are(others, 'other line')}, none is allowed"] if others else []
    return f"In your list {'; '.join(wrong)}." if wrong else None


@dataclass(frozen=True, slots=True)
class Family:
    """The sentence in the prompt, the check of an answer, how the value is drawn (given a word that fits the topic)."""

    ask: Callable[[Any], str]
    complain: Callable[[str, Any], str | None]
    draw: Callable[[random.Random, str], Any]


FORBIDDEN = ("the", "is", "and", "of", "to", "it")
OPENINGS = ("Well", "Honestly", "Perhaps", "Actually", "Surely")
KEYS = ("answer", "reason", "example")
FAMILIES = {
    "max_words": Family("Use at most {} words.".format, max_words, lambda rng, _: rng.randint(10, 20)),
    "sentences": Family(
        lambda n: f"Write exactly {_count(n, 'sentence')}.", sentences, lambda rng, _: rng.randint(1, 3)
    ),
    "include": Family('Use the word "{}".'.format, include, lambda _, word: word),
    "forbid": Family('Do not use the word "{}".'.format, forbid, lambda rng, _: rng.choice(FORBIDDEN)),
    "no_commas": Family("Do not use any commas.".format, no_commas, lambda *_: None),
    "start_with": Family('Start with the word "{}".'.format, start_with, lambda rng, _: rng.choice(OPENINGS)),
    "end_with": Family('End your answer with "{}".'.format, end_with, lambda rng, _: rng.choice(("!", "?", "..."))),
    "lowercase": Family("Write in lowercase letters only.".format, lowercase, lambda *_: None),
    "uppercase": Family("Write in capital letters only.".format, uppercase, lambda *_: None),
    "json": Family(
        lambda keys: f"Answer with one JSON object and nothing else; its keys: {', '.join(keys)}.",
        json_object,
        lambda rng, _: KEYS[: rng.randint(1, 3)],
    ),
    "bullets": Family(
        'Answer with {} lines that each begin with "- ".'.format, bullets, lambda rng, _: rng.randint(2, 4)
    ),
}
CLASHES = {  # families that no sensible answer can satisfy together
    "json": {"sentences", "no_commas", "start_with", "end_with", "uppercase", "bullets"},
    "bullets": {"sentences", "start_with"},
    "lowercase": {"uppercase"},
}


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule for one answer, e.g. ``Rule("max_words", 12)``."""

    family: str
    value: Any

    @property
    def ask(self) -> str:
        return FAMILIES[self.family].ask(self.value)

    def complaint(self, answer: str) -> str | None:
        return FAMILIES[self.family].complain(answer, self.value)


@dataclass(frozen=True, kw_only=True)
class Instructions(Settings, section="env"):
    """The environment.  Raises ConfigError for settings that leave no task."""

    name: Literal["instructions"] = "instructions"
    constraints: Annotated[tuple[str, ...], "families of rules that tasks draw from"] = (
        "max_words",
        "sentences",
        "include",
        "forbid",
        "no_commas",
    )
    per_prompt: Annotated[int, Interval(ge=1, le=3), "rules in one prompt"] = 1
    reward: Annotated[Literal["all", "share"], "1 if all rules are kept else 0, or the share of rules kept"] = "all"

    def check(self) -> None:
        super().check()
        for family in self.constraints:
            if family not in FAMILIES:
                raise ConfigError(f"unknown family {family!r} in env.constraints", do=nearest(str(family), FAMILIES))
        if len(set(self.constraints)) < len(self.constraints):
            raise ConfigError("env.constraints names a family twice", got=", ".join(self.constraints))
        if not self.combinations:
            raise ConfigError(
                "no rules of env.constraints fit together",
                got=f"env.per_prompt {self.per_prompt} of {', '.join(self.constraints) or 'no families'}",
                do="Name more families or lower env.per_prompt.",
            )

    @cached_property
    def combinations(self) -> tuple[tuple[str, ...], ...]:
        """The families that may stand in one prompt together."""
        return tuple(
            combination
            for combination in itertools.combinations(self.constraints, self.per_prompt)
            if not any(b in CLASHES.get(a, ()) for a, b in itertools.permutations(combination, 2))
        )

    def task(self, index: int, *, seed: int) -> Task:
        """A question and its rules, drawn by (seed, index) alone."""
        key = f"train/{seed}/{index}"
        rng = random.Random(f"instructions/{key}")
        return _make(key, rng.choice(TRAINING), rng.choice(self.combinations), rng)

    def eval_tasks(self, limit: int | None) -> Sequence[Task]:
        """Each held-out question with each combination of families, shuffled once; the first ``EVAL_TASKS`` of them."""
        pairs = list(itertools.product(HELD_OUT, self.combinations))
        random.Random("instructions/eval").shuffle(pairs)
        keys = [f"eval/{place}" for place in range(min(len(pairs), EVAL_TASKS))][:limit]
        return [_make(key, *pair, random.Random(f"instructions/{key}")) for key, pair in zip(keys, pairs, strict=False)]

    @per_row
    def grade(self, task: Task, text: str) -> Grade:
        if not _has_word(text):
            words = "Your answer is empty: it holds no letter and no digit."
            return Grade(reward=0.0, success=False, feedback=words, metrics={"rules_kept": 0.0})
        rules: tuple[Rule, ...] = task.payload
        complaints = [complaint for rule in rules if (complaint := rule.complaint(text))]
        kept = 1 - len(complaints) / len(rules)
        return Grade(
            reward=kept if self.reward == "share" else float(not complaints),
            success=not complaints,
            feedback=" ".join(complaints) or "All rules are kept.",
            informative=bool(complaints),
            metrics={"rules_kept": kept},
        )

    def solution(self, task: Task) -> str:
        """An answer that keeps every rule: the required words, once for each sentence or line."""
        values = {rule.family: rule.value for rule in task.payload}
        word, mark = values.get("include", "yes"), values.get("end_with", ".")
        if "json" in values:
            answer = json.dumps({key: word for key in values["json"]})
        elif "bullets" in values:
            answer = "\n".join([f"- {word}"] * values["bullets"]) + mark
        else:
            opening = f"{values['start_with']} " if "start_with" in values else ""
            answer = f"{opening}{' '.join([word + '.'] * values.get('sentences', 1))}".rstrip(".") + mark
        if "lowercase" in values:
            return answer.lower()
        return answer.upper() if "uppercase" in values else answer


def _make(key: str, topic: str, families: Sequence[str], rng: random.Random) -> Task:
    question, _, word = topic.rpartition(" ")
    rules = tuple(Rule(family, FAMILIES[family].draw(rng, word)) for family in families)
    content = " ".join((question, *(rule.ask for rule in rules)))
    return Task(id=key, messages=({"role": "user", "content": content},), payload=rules)


def _has_word(text: str) -> bool:
    """Whether there is a letter or digit."""
    return any(map(str.isalnum, text))


def _occurrences(word: str, text: str) -> int:
    """How often a whole word stands in a text, in any case."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def _count(number: int, noun: str) -> str:
    """``1 word``, ``2 words``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _are(number: int, noun: str) -> str:
    """``is 1 word``, ``are 2 words``."""
    return f"{'is' if number == 1 else 'are'} {_count(number, noun)}"


def _topics(lines: str) -> tuple[str, ...]:
    return tuple(topic.strip() for line in lines.strip().splitlines() for topic in line.split("|"))


# A question, and after its question mark a word that fits an answer (for "include").
TRAINING = _topics("""
Why do cats purr? calm | How does a bicycle stay upright? balance | What makes bread rise? yeast
Why is the sky blue? light | What does a librarian do all day? books | How do bees make honey? flowers
Why do leaves fall in autumn? winter | What is a good breakfast? eggs | How do you brew tea? water
Why do people tell stories? listen | What is a mountain? high | How does a key open a lock? metal
What should one pack for the beach? towel | Why do dogs bark? strangers | How does rain form? clouds
What is the use of a map? road | Why do we sleep? rest | How do fish breathe? gills
What makes a friend a good one? trust | Why does ice float? lighter | How do you plant a tree? soil
What is a museum for? history | Why do birds sing? spring | How does a candle burn? wax
What can you see at night? moon | Why do people wear hats? sun | How do you learn a language? practice
What is a bridge for? river | Why does the moon change its shape? shadow | How do you boil an egg? minutes
What does a baker need? flour | Why do we have seasons? earth | How does a clock keep time? wheels
What is a desert like? sand | Why do cars need fuel? engine | How do you stay warm in winter? coat
What do farmers grow? wheat | Why is exercise healthy? heart | How do magnets work? poles
What is music good for? joy | Why do onions make us cry? eyes | How do you clean a window? cloth
What lives in a pond? frogs | Why do we shake hands? greeting | How is paper made? wood
What is a volcano? lava | Why do stars twinkle? air | How do you calm a crying baby? gently
What is chess about? king | Why does metal rust? oxygen | How do you write a letter? paper
What makes soup tasty? salt | Why do bats hang upside down? fly | How does a sailing boat move? wind
What is a garden for? plants | Why do we laugh? funny | How do you find north? compass
What should a tourist see in a city? square | Why is the sea salty? rivers | How do mirrors work? glass
What is a holiday for? family | Why do spiders spin webs? catch | How do you save money? spend
What does a doctor do? patients | Why does popcorn pop? steam | How do you make a salad? fresh
What is snow? cold | Why do we dream? mind | How does soap clean hands? dirt
""")
HELD_OUT = _topics("""
Why do owls hunt at night? dark | What is a lighthouse for? ships | How do you repair a flat tyre? pump
Why do wolves howl? pack | What is a waterfall? falls | How does a microwave heat food? waves
Why do camels have humps? fat | What does a carpenter build? tables | How do you choose a melon? sweet
Why does thunder follow lightning? sound | What is an island? land | How do you fold a shirt? sleeves
Why do people keep diaries? memory | What is a festival? dance | How does a zip work? teeth
Why do tomatoes turn red? ripe | What can a robot do? work | How do you wrap a present? ribbon
Why do geese fly south? warm | What is a good hobby? time | How does a thermometer work? heat
Why do towns have parks? trees | What is a cave? rock | How do you mend a torn sock? needle
""")
