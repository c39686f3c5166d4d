"""From settings to objects: builds every part of a run and puts them together."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpd.algorithms import Algorithm, Needs
from vpd.bundled import BUNDLED, source_of
from vpd.config import Config, ModelSettings, check_together
from vpd.config.passed import Passed, missing
from vpd.config.sections import announce, make_env, named_or_passed
from vpd.engines import Abandonable, Engine
from vpd.engines.settings import EngineParts
from vpd.envs import (
    AnswerLength,
    Conversational,
    Env,
    Finite,
    FixedLength,
    RecordedTasks,
    all_train_tasks,
    draw_tasks,
    held_out_tasks,
    recorded_answers,
    required_held_out_tasks,
)
from vpd.envs.recorded import RecordedAndFresh
from vpd.errors import ConfigError
from vpd.feedback import Feedback
from vpd.learners.accelerate_learner import AccelerateLearner
from vpd.learners.settings import OptimSettings, TeacherSettings
from vpd.loop import Observer
from vpd.model import loading, lora
from vpd.model.forward import longest_input
from vpd.model.number_types import SLOW, bfloat16_ratio
from vpd.prompts import Prompter
from vpd.prompts.recorded import check_answers
from vpd.prompts.settings import PromptSettings, saved_settings
from vpd.ranks import Digests, OneProcess, Ranks, agree, start_ranks, together
from vpd.recipes.external_teacher import ExternalTeacher, LoadedTeacher, load_teacher
from vpd.recipes.prompt_checks import answer_ends, check_prompts
from vpd.recipes.round_trip import check_round_trip, warn_of_missing_header
from vpd.rollout import LONGEST_COMPLETION, RolloutSource
from vpd.types import Task

log = logging.getLogger("vpd")

OBJECT = "(object) "  # begins model.name_or_path where a model was passed, before the name of its class


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything a run is made of.

    ``config`` is resolved: it holds the completion length and the prompt settings that are used, and in the place of a
    section that an object was passed for (``given``: "model", "env", "feedback") the name of the object's class.
    """

    config: Config
    env: Env
    feedback: tuple[Feedback, ...]
    tokenizer: Any
    prompter: Prompter
    engine: Engine
    source: RolloutSource
    learner: AccelerateLearner
    algorithm: Algorithm
    observers: tuple[Observer, ...] = ()
    given: tuple[str, ...] = ()
    ranks: Ranks = dataclasses.field(default_factory=OneProcess)

    @property
    def fixed_length(self) -> bool:
        """Whether every answer fills max_completion_length by nature."""
        return isinstance(self.env, FixedLength) and self.env.fixed_length


def assemble(
    config: Config,
    *,
    model: Any = None,
    tokenizer: Any = None,
    env: Env | None = None,
    feedback: Sequence[Feedback] | None = None,
    observers: Sequence[Observer] = (),
    ranks: Ranks | None = None,
) -> Parts:
    """Build and check everything; nothing is written.  Raises a VPDError for whatever does not fit.

    An object takes the place of its section: ``model`` (a causal language model of transformers, together with its
    ``tokenizer``), ``env``, ``feedback`` (functions ``(groups, writer) -> groups``).  ``observers`` watch the run
    besides those that ``train`` adds.  ``ranks`` are the processes of the run (None: those that the launcher of this
    one has started), which all call this.
    """
    passed = {name: part for name, part in (("model", model), ("env", env), ("feedback", feedback)) if part is not None}
    config = with_passed(config, passed)
    check_together(config)
    ranks = ranks or start_ranks(config.run.rank_timeout)
    loaded = together(ranks, "loading", lambda: _loaded(config, model, tokenizer, env, feedback))
    config, model, tokenizer, env = loaded.config, loaded.model, loaded.tokenizer, loaded.env
    agree(ranks, "settings and tasks", lambda: _digests(config, loaded.tasks))
    if config.rollout.prompts_per_step < ranks.world:
        log.warning(
            "rollout.prompts_per_step %d is less than the %d processes: the others wait while answers are made",
            *(config.rollout.prompts_per_step, ranks.world),
        )
    recorded = isinstance(env, RecordedTasks) and config.needs.on_policy
    teacher = load_teacher(config, model, tokenizer)
    external = ExternalTeacher(config, teacher, env, loaded.prompter, loaded.tasks)
    learner = make_learner(config, model, teacher, ranks, keep_initial=recorded)
    check_speed(config, learner.accelerator.device.type)
    engine = make_engine(config, tokenizer, model, learner, longest=lambda: longest_row(loaded.prompter, loaded.tasks))
    if config.rollout.overlap and not isinstance(engine, Abandonable):
        raise ConfigError(
            "rollout.overlap: this engine does not say that it samples on weights of its own",
            got=type(engine).__name__,
            expected="a method abandon() (vpd.engines.Abandonable)",
        )
    needs = config.algorithm.needs
    return Parts(
        config=config,
        env=env,
        feedback=loaded.feedback,
        tokenizer=tokenizer,
        prompter=loaded.prompter,
        engine=engine,
        source=RolloutSource(
            env=env,
            engine=engine,
            prompter=loaded.prompter,
            feedback=loaded.feedback,
            settings=config.rollout,
            seed=config.run.seed,
            training_engine=external.training_engine(engine, learner, _engine_parts(config, tokenizer, model, learner)),
            teacher=external.remote,
            own_prompt=external.own_prompt,
            teacher_reads_context=needs.remote_teacher is not None and needs.remote_teacher.reads_context,
            ranks=ranks,
        ),
        learner=learner,
        algorithm=config.build_algorithm(loaded.prompter),
        observers=tuple(observers),
        given=tuple(passed),
        ranks=ranks,
    )


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """What each process loads and checks by itself."""

    config: Config
    env: Env
    feedback: tuple[Feedback, ...]
    model: Any
    tokenizer: Any
    prompter: Prompter
    tasks: list[Task]


def _loaded(
    config: Config, model: Any, tokenizer: Any, env: Env | None, feedback: Sequence[Feedback] | None
) -> _Loaded:
    """Environment, sources, model and prompter, loaded and checked with the tasks that are known."""
    env = make_env(config.env) if env is None else env
    sources = _sources(config) if feedback is None else tuple(feedback)
    announce(env)
    model, tokenizer = _model_and_tokenizer(config.model, model, tokenizer)
    config = resolve(config, env, model, tokenizer)
    prompter = make_prompter(config, model, tokenizer)
    tasks = known_tasks(env, config)
    replies, needs = isinstance(env, Conversational), config.needs
    check_prompts(
        prompter,
        tasks,
        vocabulary=model.get_input_embeddings().weight.shape[0],
        replies=replies,
        feedback=sources if needs.feedback or needs.preferences else (),
        context=needs.feedback,
    )
    warn_of_missing_header(prompter, tasks)
    if replies:
        check_round_trip(prompter, tasks)
    fresh = isinstance(env, RecordedAndFresh) and env.share > 0
    check_answers(
        prompter,
        [(task, answer) for task in tasks for answer in recorded_answers(env, task)],
        learned=needs.learns_answers and isinstance(env, Finite) and not fresh,
    )
    return _Loaded(
        config=config, env=env, feedback=sources, model=model, tokenizer=tokenizer, prompter=prompter, tasks=tasks
    )


def _digests(config: Config, tasks: Sequence[Task]) -> Digests:
    """Digests of each section of the settings, and of the messages of each task."""
    found = [(f"the section {name}", repr(section)) for name, section in config.as_dict().items()]
    found += [(f"the task {number} ({task.id})", repr(task.messages)) for number, task in enumerate(tasks)]
    return [(name, hashlib.blake2b(text.encode(errors="replace")).digest()) for name, text in found]


def with_passed(config: Config, passed: dict[str, Any]) -> Config:
    """The config with the classes of the objects that were passed in the places of their sections."""
    changes: dict[str, Any] = {}
    if "model" in passed:
        name = OBJECT + Passed.of(passed["model"]).object
        changes["model"] = dataclasses.replace(config.model, name_or_path=name)
        usual = {key: vars(OptimSettings())[key] for key in config.for_shipped_base}
        changes["optim"] = dataclasses.replace(config.optim, **usual)
    if "env" in passed:
        changes["env"] = named_or_passed("env", passed["env"])
    if "feedback" in passed:
        changes["feedback"] = tuple(named_or_passed("feedback", source) for source in passed["feedback"])
    return dataclasses.replace(config, **changes)


def resolve(config: Config, env: Env, model: Any, tokenizer: Any) -> Config:
    """The config with what it leaves to the model and the environment: prompt settings and completion length.

    ``rollout.max_completion_length`` null is the length of the environment's answers if it has one, else 256 tokens or
    half of what the longest known prompt leaves of the model's window, whichever is less; the other half is for the
    context in the teacher's prompt.  RecordedTasks answers have room for the longest.
    """
    prompts = prompt_settings(config, model)
    config = dataclasses.replace(config, prompts=prompts)
    if config.rollout.max_completion_length is not None:
        return config
    answering = env.fresh if isinstance(env, RecordedAndFresh) else env
    if isinstance(answering, AnswerLength):
        length = answering.answer_length
    else:
        probe = Prompter(tokenizer, prompts, window=longest_input(model), max_completion_length=1)
        length = _length_that_fits(config, env, probe)
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, max_completion_length=length))


def _length_that_fits(config: Config, env: Env, probe: Prompter) -> int:
    """Tokens of an answer: those of the longest recorded one, or 256, as far as the model's window has room."""
    tasks = known_tasks(env, config)
    longest = max((len(probe.build_student_prompt(task)) for task in tasks), default=0)
    recorded = [answer for task in tasks for answer in recorded_answers(env, task)]
    wanted = max((len(probe.answer(answer.text)) for answer in recorded), default=0)
    if not recorded or isinstance(env, RecordedAndFresh):
        wanted = max(wanted, LONGEST_COMPLETION)
    if probe.window is None:
        return max(wanted, 1)
    room = probe.window - longest
    return max(min(wanted, room if recorded and not config.needs.feedback else room // 2), 1)


def known_tasks(env: Env, config: Config) -> list[Task]:
    """Tasks that can be known beforehand: all of a finite data set's, else the first batch's; and evaluation's."""
    first = range(config.rollout.prompts_per_step)
    tasks = all_train_tasks(env) if isinstance(env, Finite) else draw_tasks(env, first, seed=config.run.seed)
    held_out = required_held_out_tasks if config.run.eval_steps else held_out_tasks
    return [*tasks, *held_out(env, config.run.eval_limit)]


def load_model(settings: ModelSettings, *, finite: bool = True) -> tuple[Any, Any]:
    """Model and tokenizer of a Hub id, a folder, or a shipped base; ``finite``: every weight must be.

    Raises ModelError.
    """
    return loading.load(source_of(settings.name_or_path), settings, known=BUNDLED, finite=finite)


def prompt_settings(config: Config, model: Any) -> PromptSettings:
    """The section ``prompts`` of a config; what nobody set in it is as the model's folder says that it was trained."""
    saved = saved_settings(Path(model.name_or_path)) if model.name_or_path else None
    given, made = config.given.get("prompts", (None, None))
    if config.prompts is None or saved is None:
        return config.prompts or saved or PromptSettings()
    return config.prompts.over(saved, given) if made is config.prompts else config.prompts


def make_prompter(config: Config, model: Any, tokenizer: Any) -> Prompter:
    """The prompter of a resolved config."""
    settings = config.prompts or PromptSettings()
    length = config.rollout.sampling.max_completion_length
    return Prompter(tokenizer, settings, window=longest_input(model), max_completion_length=length)


def make_learner(
    config: Config,
    model: Any,
    teacher: LoadedTeacher | None,
    ranks: Ranks | None = None,
    *,
    keep_initial: bool = False,
) -> AccelerateLearner:
    """The learner of what the algorithm needs; ``teacher`` is what :func:`load_teacher` gives.

    ``keep_initial`` keeps the initial weights in any case.
    """
    needs = config.needs
    if config.model.lora is not None:
        lora.attach(model, config.model.lora, seed=config.run.seed)
    _check_top_k(needs, model)
    return AccelerateLearner(
        model,
        config.optim,
        temperature=config.rollout.temperature,
        teacher=needs.teacher or TeacherSettings(kind="live"),
        external=None if teacher is None else teacher.model,
        keep_initial=needs.initial_copy or keep_initial,
        total_iterations=config.run.max_steps,
        ranks=ranks,
    )


def check_speed(config: Config, device: str, ratio: Callable[[str], float] = bfloat16_ratio) -> None:
    """Warn where a run computes in bfloat16 on a CPU that takes much longer for it than for float32."""
    chosen = {
        ("optim.mixed_precision bf16", "optim.mixed_precision: no"): config.optim.mixed_precision == "bf16",
        ("model.dtype bfloat16", "model.dtype: float32"): config.model.dtype == "bfloat16",
    }
    names = [pair for pair, is_set in chosen.items() if is_set]
    if names and device == "cpu" and (times := ratio(device)) > SLOW:
        asked, instead = (" and ".join(words) for words in zip(*names, strict=True))
        log.warning(
            "%s: this CPU takes %.1f times as long for products in bfloat16 as in float32; set %s",
            asked,
            times,
            instead,
        )


def longest_row(prompter: Prompter, tasks: Sequence[Task]) -> int:
    """Tokens of the longest of the tasks' prompts, with an answer of full length."""
    prompts = (len(prompter.build_student_prompt(task)) for task in tasks)
    return max(prompts, default=0) + prompter.max_completion_length


def make_engine(
    config: Config, tokenizer: Any, model: Any, learner: AccelerateLearner, *, longest: Callable[[], int] = lambda: 0
) -> Engine:
    """The student's engine: that of a config with the learner's weights; ``longest``: see EngineParts."""
    parts = _engine_parts(config, tokenizer, model, learner)
    engine = config.engine.build(dataclasses.replace(parts, longest=functools.cache(longest)))
    engine.load(learner.policy())
    return engine


def _engine_parts(config: Config, tokenizer: Any, model: Any, learner: AccelerateLearner) -> EngineParts:
    """What an engine is built from; answers end at the model's own end-of-sequence tokens."""
    eos_ids = answer_ends(make_prompter(config, model, tokenizer), loading.end_tokens(model, tokenizer))
    return EngineParts(
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        max_rows=config.rollout.max_rows,
        ranks=learner.ranks,
        learner_is_narrow=learner.is_narrow,
    )


def _model_and_tokenizer(settings: ModelSettings, model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The objects that were passed, or what the settings name."""
    if model is None and settings.name_or_path.startswith(OBJECT):
        raise missing("the model", settings.name_or_path.removeprefix(OBJECT), "model= and tokenizer=")
    if model is None:
        model, own = load_model(settings)
        return model, own if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ConfigError("a model that is passed as an object needs its tokenizer", do="Pass tokenizer= too.")
    loading.check(model, tokenizer, "the model that was passed")
    return model, tokenizer


def _sources(config: Config) -> tuple[Feedback, ...]:
    for source in config.feedback:
        if isinstance(source, Passed):
            raise missing("a feedback source", source.object, "feedback=")
    return config.feedback


def _check_top_k(needs: Needs, model: Any) -> None:
    vocabulary = model.config.get_text_config().vocab_size
    if needs.top_k is not None and needs.top_k > vocabulary:
        raise ConfigError(
            "algorithm.distillation_topk is larger than the vocabulary",
            got=needs.top_k,
            expected=f"at most {vocabulary}",
            do="Use null for the whole vocabulary.",
        )
