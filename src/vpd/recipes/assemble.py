"""From settings to objects: the one place that knows every part."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from vpd.algorithms import Algorithm
from vpd.algorithms.distill import Distill, DistillSettings, GKDSettings
from vpd.algorithms.gated import GatedSettings, GatedVPD
from vpd.algorithms.grpo import GRPO, GRPOSettings
from vpd.algorithms.hybrid import Hybrid, HybridSettings
from vpd.algorithms.vpd import VPD, VPDSettings
from vpd.bundled import BUNDLED, load_bundled
from vpd.config import Config, ModelSettings
from vpd.engines import Engine
from vpd.engines.mixed_engine import MixedEngine
from vpd.engines.torch_engine import TorchEngine
from vpd.envs import Env, Finite, FixedLength, all_train_tasks, draw_tasks, held_out_tasks
from vpd.envs.loading import announcements, make_env
from vpd.errors import ConfigError, ModelError
from vpd.learners.accelerate_learner import AccelerateLearner
from vpd.learners.teachers import TeacherSettings
from vpd.model import lora
from vpd.prompts import Prompter, PromptSettings, saved_settings


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything a run is made of."""

    config: Config
    env: Env
    tokenizer: Any
    prompter: Prompter
    engine: Engine
    learner: AccelerateLearner
    algorithm: Algorithm

    @property
    def fixed_length(self) -> bool:
        """Whether every answer fills max_completion_length by nature."""
        return isinstance(self.env, FixedLength) and self.env.fixed_length


def assemble(config: Config, *, env: Env | None = None) -> Parts:
    """Build and check everything; nothing is written.  Raises a VPDError for whatever does not fit."""
    env = env or make_env(config.env)
    announce(env)
    model, tokenizer = load_model(config.model)
    if config.model.lora is not None:
        lora.attach(model, config.model.lora, seed=config.run.seed)
    prompter = make_prompter(config, model, tokenizer)
    vocabulary = model.config.get_text_config().vocab_size
    algorithm = config.algorithm
    top_k = algorithm.distillation_topk if isinstance(algorithm, DistillSettings) else None
    if top_k is not None and top_k > vocabulary:
        raise ConfigError(
            "algorithm.distillation_topk is larger than the vocabulary",
            got=top_k,
            expected=f"at most {vocabulary}",
            do="Use null for the whole vocabulary.",
        )
    check_prompts(env, prompter, config)
    external = load_external(algorithm, config.model, tokenizer) if isinstance(algorithm, GKDSettings) else None
    learner = AccelerateLearner(
        model,
        config.optim,
        temperature=config.rollout.temperature,
        teacher=TeacherSettings(kind="live") if isinstance(algorithm, GRPOSettings) else algorithm.teacher_settings(),
        external=external,
        keep_initial=isinstance(algorithm, VPDSettings) and algorithm.prior == "fixed",
        total_iterations=config.run.max_steps,
    )
    if learner.accelerator.num_processes > 1:
        raise ConfigError("vpd train runs in one process for now", got=f"{learner.accelerator.num_processes} processes")
    engine: Engine = make_engine(config, tokenizer, model, learner)
    if isinstance(algorithm, GKDSettings) and algorithm.student_fraction < 1:
        teacher_engine = make_engine(config, tokenizer, external, learner)
        teacher_engine.load(external, 0)
        engine = MixedEngine(engine, teacher_engine, first_fraction=algorithm.student_fraction)
    engine.load(learner.weights(), 0)
    return Parts(
        config=config,
        env=env,
        tokenizer=tokenizer,
        prompter=prompter,
        engine=engine,
        learner=learner,
        algorithm=make_algorithm(config, prompter),
    )


def make_algorithm(config: Config, prompter: Prompter) -> Algorithm:
    """The algorithm that a config names."""
    settings = config.algorithm
    if isinstance(settings, GatedSettings):
        return GatedVPD(settings, prompter)
    if isinstance(settings, VPDSettings):
        return VPD(settings, prompter)
    if isinstance(settings, GRPOSettings):
        return GRPO(settings)
    if isinstance(settings, HybridSettings):
        return Hybrid(settings)
    return Distill(settings, own_prompt=isinstance(settings, GKDSettings))


def announce(env: Env) -> None:
    """Print what the environment has to say at the start."""
    for line in announcements(env):
        print(line)


def source_of(name: str) -> str:
    """Where a model is loaded from: a Hub id or folder as it is, a shipped base's folder."""
    return str(load_bundled(name)) if name in BUNDLED else name


def load_model(settings: ModelSettings) -> tuple[Any, Any]:
    """Model and tokenizer of a Hub id, a folder, or the shipped base."""
    name = settings.name_or_path
    source = source_of(name)
    transformers.utils.logging.disable_progress_bar()
    if source.startswith(("/", ".", "~")) and not Path(source).is_dir():
        raise ModelError(f"model.name_or_path: no folder {source}", expected="a folder that from_pretrained loads")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, settings.dtype))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot load the model {settings.name_or_path!r}",
            got=str(error).split("\n")[0][:160],
            expected=f"a Hub id, a folder that from_pretrained loads, or one of {', '.join(BUNDLED)}",
        ) from error
    if tokenizer.chat_template is None:
        raise ModelError(
            f"the tokenizer of {settings.name_or_path!r} has no chat template",
            do="Take an instruction-tuned model, or set tokenizer.chat_template and save it.",
        )
    return model, tokenizer


def load_external(settings: GKDSettings, model: ModelSettings, tokenizer: Any) -> Any:
    """GKD's teacher; its vocabulary must be the student's."""
    external, other = load_model(ModelSettings(name_or_path=settings.teacher_model, dtype=model.dtype))
    if other.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            "GKD compares distributions over tokens: teacher and student need one tokenizer",
            got=f"{len(other.get_vocab())} entries in the teacher's, {len(tokenizer.get_vocab())} in the student's",
        )
    return external


def make_prompter(config: Config, model: Any, tokenizer: Any) -> Prompter:
    """The prompter of a config; without a section ``prompts`` the model's folder may say how it was trained."""
    settings = config.prompts or saved_settings(Path(source_of(config.model.name_or_path))) or PromptSettings()
    window = model.config.get_text_config().max_position_embeddings
    return Prompter(tokenizer, settings, window=window, max_completion_length=config.rollout.max_completion_length)


def make_engine(config: Config, tokenizer: Any, model: Any, learner: AccelerateLearner) -> TorchEngine:
    """The embedded engine, ending at the model's own end-of-sequence tokens, in the learner's precision."""
    ends = model.generation_config.eos_token_id
    eos_ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    return TorchEngine(
        tokenizer, eos_ids=sorted(eos_ids), max_rows=config.rollout.max_rows, autocast=learner.accelerator.autocast
    )


def check_prompts(env: Env, prompter: Prompter, config: Config) -> None:
    """Render the prompts that can be known beforehand: a finite data set's, else the first batch's; evaluation's."""
    first = range(config.rollout.prompts_per_step)
    tasks = all_train_tasks(env) if isinstance(env, Finite) else draw_tasks(env, first, seed=config.run.seed)
    for task in [*tasks, *held_out_tasks(env, config.run.eval_limit)]:
        prompter.build_student_prompt(task)
