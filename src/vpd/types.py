"""The data that flows down the loop: plain, frozen, and without tensors.

    Task -> Completion -> Grade -> Rollout -> Group -> Example

Each stage makes a new type.  A :class:`Rollout` is what happened (kept, logged, shown); an
:class:`Example` is what one update sees.  The same completion under two prompts is the heart of the
method: ``Example.prompt`` is what the student reads, ``Example.teacher`` what the teacher reads (its prompt) or, where
it runs elsewhere, what it answered (its K likeliest tokens).

Letters for lengths: P prompt, Q teacher's prompt, T completion, K likeliest tokens, G rollouts of one task.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict

from vpd.errors import EnvError, FeedbackError
from vpd.printable import shown
from vpd.scalars import finite_metrics, plain

Tokens: TypeAlias = tuple[int, ...]
Floats: TypeAlias = tuple[float, ...]

Metrics: TypeAlias = dict[str, float]

SECTION_KINDS = ("demonstration", "feedback")
LARGEST_REWARD = 1e30  # differences of rewards, over a deviation of 1e-4 at least, must fit 32 bits


class Message(TypedDict):
    """One message of a chat, as chat templates take it; the ``arguments`` of ``tool_calls`` are objects."""

    role: str
    content: str
    name: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[Any]]
    tool_call_id: NotRequired[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is asked.  ``payload`` belongs to the environment alone: nobody else reads it.

    ``tools`` are descriptions (JSON schemas) that the chat template shows the model.

    >>> Task(id="capital/Peru", messages=({"role": "user", "content": "The capital of Peru?"},), payload="Lima").payload
    'Lima'
    """

    id: str
    messages: tuple[Message, ...]
    payload: Any = None
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleKey:
    """Which text of a run this is: together with the run's seed, all that its randomness depends on.

    ``phase``: "train", "retry", "eval", "eval_retry" or "eval_control", followed by "/feedback-N" for what feedback
    source N asks a model;
    ``step``: iterations trained before it (0 in evaluation); ``task``: the task's place in the stream or in the
    evaluation set; ``sample``: which of the task's G answers, or which of all retries that these may have; ``turn``:
    which answer of an attempt with several turns.

    >>> SampleKey(phase="train", step=3, task=50, sample=1).seed(0) < 2**63
    True
    """

    phase: str
    step: int
    task: int
    sample: int
    turn: int = 0

    def seed(self, run_seed: int) -> int:
        """A 63-bit hash of the run's seed and this key (servers take signed 64-bit seeds)."""
        parts = (run_seed, self.phase, self.step, self.task, self.sample, self.turn)
        digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One attempt: a sampled answer, or several with the environment's replies between them.

    ``tokens`` [T] includes the end-of-sequence token where one was sampled; ``sampled`` [T] is False
    where the environment replied; ``logprobs`` [T] are the behaviour policy's (natural logarithm, at the
    sampling temperature, 0 where not sampled; none of a ``recorded`` answer, one that a log holds and that was not
    sampled in this run, where the log has none); ``text`` is the model's last answer, which is graded;
    ``turns`` counts its answers; ``version`` counts the weights that sampled it; ``by_teacher``: those of an external
    teacher (GKD with ``student_fraction`` below 1) and not the student's.  ``by_data``: nobody sampled it, it is the
    answer that the data gives (its log-probs are 0).  ``thinking_open``: the prompt ended
    in ``<think>``, so that ``text`` begins inside the thinking.  ``reply_cut`` and ``reply_control_tokens`` count the
    tokens cut from the environment's replies, and the control tokens in them that became plain text.

    Two answers of two tokens, with a reply of one token between them, which no loss sees:

    >>> attempt = Completion(
    ...     tokens=(5, 9, 7, 6, 9),
    ...     sampled=(True, True, False, True, True),
    ...     logprobs=(-0.2, -0.1, 0.0, -0.4, -0.1),
    ...     text="Lima",
    ...     finish="stop",
    ...     turns=2,
    ... )
    >>> sum(attempt.sampled)
    4
    """

    tokens: Tokens
    sampled: tuple[bool, ...]
    logprobs: Floats
    text: str
    finish: Literal["stop", "length"]
    version: int = 0
    by_teacher: bool = False
    by_data: bool = False
    turns: int = 1
    thinking_open: bool = False
    reply_cut: int = 0
    reply_control_tokens: int = 0
    recorded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """An environment's verdict on one answer.

    ``reward`` is a finite number, at most ``LARGEST_REWARD`` either way; ``success`` None means
    "reward >= success_threshold", resolved once when the rollouts are collected; scalars of NumPy and torch become
    Python's.  ``feedback`` is text about this attempt, ``metrics`` are finite numbers measured on it.
    ``informative=False`` marks a bare verdict ("wrong", "all tests passed"): people see it, the teacher does not.
    ``graded=False``: nobody has judged the answer (a row of a log without an outcome), so that ``reward`` is 0 and
    means nothing, and no success or failure is counted.  Raises EnvError for anything else.

    >>> Grade(reward=0.0, feedback="Your answer has three words; one was asked for.").informative
    True
    >>> Grade(reward=0.0, feedback="wrong", informative=False).success is None
    True
    """

    reward: float
    success: bool | None = None
    feedback: str | None = None
    informative: bool = True
    metrics: Mapping[str, float] = field(default_factory=dict)
    graded: bool = True

    def __post_init__(self) -> None:
        for name in ("reward", "success", "informative", "graded"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        number = isinstance(self.reward, (int, float)) and not isinstance(self.reward, bool)
        if not number or (isinstance(self.reward, float) and not math.isfinite(self.reward)):
            raise EnvError(
                "a grade's reward is not a finite number",
                got=shown(self.reward),
                expected="a float",
                do="Mend the grader; use Grade(reward=0.0, feedback=...) for an answer it cannot judge.",
            )
        if abs(self.reward) > LARGEST_REWARD:
            raise EnvError(
                "a grade's reward is too large to compute with",
                got=shown(self.reward),
                expected=f"at most {LARGEST_REWARD:g} either way",
            )
        for name, kind, words in (
            ("success", bool | None, "bool or None"),
            ("feedback", str | None, "str or None"),
            ("informative", bool, "bool"),
            ("graded", bool, "bool"),
        ):
            if not isinstance(value := getattr(self, name), kind):
                raise EnvError(f"a grade's {name} has the wrong type", got=shown(value), expected=words)
        object.__setattr__(self, "metrics", finite_metrics(self.metrics, LARGEST_REWARD))


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedAnswer:
    """An answer that a log holds, with its grade; one that nobody graded has ``Grade.graded`` False.

    ``logprobs`` [T] are those of ``tokens`` [T] when it was sampled (natural logarithm); None where the log has none,
    and the text is then tokenised.  ``where`` is its place in the log, for messages.

    >>> RecordedAnswer(text="Lima", grade=Grade(reward=1.0)).tokens is None
    True
    """

    text: str
    grade: Grade
    tokens: Tokens | None = None
    logprobs: Floats | None = None
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One piece of the diagnostic text C about an attempt.

    ``kind`` says where it appears in the teacher's prompt, ``source`` which feedback source wrote it,
    ``quotes`` which rollout of the group (an index) its text copies, None if it copies none, and ``tokens`` how many
    were generated to write it; ``clipped``: their limit ended it.  ``cut`` and ``control_tokens`` are about what its
    writer read: tokens cut from it, and control tokens in it that became plain text.

    >>> Section(kind="demonstration", source="sibling", text="Lima", quotes=3).quotes
    3
    """

    kind: Literal["demonstration", "feedback"]
    source: str
    text: str
    quotes: int | None = None
    tokens: int = 0
    cut: int = 0
    control_tokens: int = 0
    clipped: bool = False

    def __post_init__(self) -> None:
        if self.kind not in SECTION_KINDS:
            expected = " or ".join(map(repr, SECTION_KINDS))
            raise FeedbackError("a section is of no known kind", got=shown(self.kind), expected=expected)
        if not isinstance(self.text, str):
            do = "Leave the section out where there is nothing to say."
            raise FeedbackError("a section's text is no text", got=shown(self.text), expected="a str", do=do)

    @property
    def is_blank(self) -> bool:
        """Whether it says nothing."""
        return not self.text.strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherPrompt:
    """The task and C, as tokens [Q]; the ``sources`` of its sections; how many tokens were ``cut`` from them.

    Without sources it is the task alone, as an external teacher reads it.

    ``control_tokens`` counts the control tokens that the sections spelled, which are plain text in the prompt, and
    ``unknown_tokens`` the tokenizer's unknown tokens that they were read as.

    >>> TeacherPrompt(tokens=(1, 2, 3), sources=("environment", "sibling")).cut
    0
    """

    tokens: Tokens
    sources: tuple[str, ...]
    cut: int = 0
    control_tokens: int = 0
    unknown_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a judge said of an attempt beside another one of its group, asked in both orders.

    ``other`` is the other's index in the group; ``preferred`` True: this attempt, False: the other, None: unsure, as
    where the two orders disagree (``disagree``).  ``unreadable`` counts answers of the judge without a verdict, and
    ``tokens`` what it generated.

    >>> Comparison(other=2, preferred=True).disagree
    False
    """

    other: int
    preferred: bool | None
    disagree: bool = False
    unreadable: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One attempt, with everything that is known about it; ``key`` says which one it is.

    ``retries`` are further attempts at the same task, sampled from ``teacher_prompt`` (it is their ``prompt``) by the
    weights that sampled this one: the teacher's own samples, where the student failed.  ``teacher_logprobs`` is what a
    remote teacher said of the completion's tokens.  ``comparisons`` are a judge's with attempts of the group; each pair
    stands at one of its two attempts.  ``silent`` are the sources of critiques that were asked about this attempt and
    wrote nothing.

    >>> attempt = Rollout(
    ...     key=SampleKey(phase="train", step=0, task=7, sample=1),
    ...     task=Task(id="capital/Peru", messages=({"role": "user", "content": "The capital of Peru?"},)),
    ...     prompt=(1, 2, 3),
    ...     completion=Completion(tokens=(5,), sampled=(True,), logprobs=(-0.2,), text="Lima", finish="stop"),
    ...     grade=Grade(reward=1.0, success=True),
    ... )
    >>> attempt.success, attempt.teacher_prompt
    (True, None)
    """

    key: SampleKey
    task: Task
    prompt: Tokens
    completion: Completion
    grade: Grade
    context: tuple[Section, ...] = ()
    teacher_prompt: TeacherPrompt | None = None
    retries: tuple["Rollout", ...] = ()
    teacher_logprobs: "TopKLogprobs | None" = None
    comparisons: tuple[Comparison, ...] = ()
    silent: tuple[str, ...] = ()

    @property
    def success(self) -> bool:
        """Whether the attempt counts as solved."""
        if self.grade.success is None:
            raise ValueError("success is resolved when completions are graded (vpd.rollout.grade_completions)")
        return self.grade.success

    @property
    def external_prompt(self) -> Tokens:
        """What an external teacher reads: the task alone, as its own chat template or else the student's writes it."""
        own = self.teacher_prompt
        return self.prompt if own is None or own.sources else own.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The G attempts at one task.

    >>> len(Group(rollouts=()).rollouts)
    0
    """

    rollouts: tuple[Rollout, ...]


def attempts_and_retries(groups: Iterable[Group]) -> Iterator[tuple[int, Literal["student", "teacher"], Rollout]]:
    """Every attempt, the student's, and after it its retries, the teacher's: the group's place, the role, the rollout.

    This is the order of the rows in ``rollouts/*.parquet``.
    """
    for number, group in enumerate(groups):
        for attempt in group.rollouts:
            yield number, "student", attempt
            for retry in attempt.retries:
                yield number, "teacher", retry


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKLogprobs:
    """A remote teacher's K likeliest next tokens at each of the T tokens of a completion.

    ``ids`` [T,K] are distinct within a row of K; ``logprobs`` [T,K] are natural logarithms over the whole vocabulary
    (so a row's probabilities sum to at most 1), at the sampling temperature.  Entries where the mask is False are
    ignored but present.  Raises ValueError: shapes that differ, a token twice, or numbers that
    are not log-probabilities.

    >>> TopKLogprobs(ids=((4, 7), (7, 2)), logprobs=((-0.1, -3.0), (-0.7, -0.7))).k
    2
    """

    ids: tuple[Tokens, ...]
    logprobs: tuple[Floats, ...]

    def __post_init__(self) -> None:
        widths = {len(row) for rows in (self.ids, self.logprobs) for row in rows}
        if len(self.ids) != len(self.logprobs) or len(widths) != 1 or 0 in widths:
            raise ValueError(
                "ids and logprobs must both be [T,K] with T, K >= 1; "
                f"got {len(self.ids)} and {len(self.logprobs)} rows of length {sorted(widths)}"
            )
        if any(len(set(row)) < len(row) for row in self.ids):
            raise ValueError("a token occurs twice among the K ids of one position")
        if not all(math.isfinite(value) and value <= 1e-3 for row in self.logprobs for value in row):
            raise ValueError("logprobs must be finite natural logarithms of probabilities (at most 0)")

    @property
    def k(self) -> int:
        """K, how many tokens are known of each distribution."""
        return len(self.ids[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row of one update.

    ``behaviour`` [T] are the sampler's log-probs, ``reference`` [T] the learner's own before the E-step
    (None: the row is scored for the first time, its reference is itself); ``version`` counts the weights that
    sampled the row, which were the external teacher's if it is ``by_teacher``, and nobody's if it is ``by_data``.
    ``teacher`` is the teacher's prompt
    [Q], or a remote teacher's top-k log-probs of this completion, or None for a row without a teacher.
    ``loss_weights`` holds one number for each term of the loss and carries *all* normalisation.  Raises ValueError if
    top-k log-probs are of another length than the completion.  ``key`` says which rollout it was made of (None: of
    none), ``failed_grade`` whether its grader failed, ``graded`` whether anybody judged it, ``left_out`` why it takes
    no part in an update (empty: it does).  ``of_environment``: the completion is the attempt with the environment's
    text behind it, and only tokens of the environment count.

    A row of two tokens in a mean over three such rows: each token weighs 1 / (3 * 2).

    >>> row = Example(
    ...     prompt=(1, 2), completion=(5, 9), mask=(True, True), behaviour=(-0.2, -0.1), teacher=(1, 2, 8),
    ...     loss_weights={"distill": 1 / 6},
    ... )
    >>> row.teacher_prompt, row.reference
    ((1, 2, 8), None)
    """

    prompt: Tokens
    completion: Tokens
    mask: tuple[bool, ...]
    behaviour: Floats
    reference: Floats | None = None
    teacher: Tokens | TopKLogprobs | None = None
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    advantage: float = 0.0
    success: bool = False
    group: int = 0
    version: int = 0
    by_teacher: bool = False
    by_data: bool = False
    key: SampleKey | None = None
    failed_grade: bool = False
    graded: bool = True
    of_environment: bool = False
    left_out: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.teacher, TopKLogprobs) and len(self.teacher.ids) != len(self.completion):
            raise ValueError(
                f"top-k log-probs of {len(self.teacher.ids)} tokens for a completion of {len(self.completion)}"
            )

    @property
    def name(self) -> str:
        """What messages call the row: the place of its task in the stream, and which of the task's answers it is."""
        return "a row" if self.key is None else f"the row of task {self.key.task}, sample {self.key.sample}"

    @property
    def teacher_prompt(self) -> Tokens | None:
        """What the teacher reads [Q]; None for a row without a teacher, or with a remote one."""
        return None if isinstance(self.teacher, TopKLogprobs) else self.teacher
