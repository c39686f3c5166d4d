"""GKD's teacher, a model of its own: loaded here or behind a server, what it reads, and who answers in its place."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vpd.bundled import BUNDLED, source_of
from vpd.config import Config
from vpd.engines import Engine
from vpd.engines.data_engine import DataEngine
from vpd.engines.mixed_engine import MixedEngine
from vpd.engines.settings import EngineParts, VLLMSettings, key_of
from vpd.engines.vllm_client import VLLMClient
from vpd.engines.vllm_teacher import VLLMTeacher
from vpd.envs import Conversational, Env, draw_tasks, solution_of
from vpd.errors import ConfigError, ModelError
from vpd.learners import TrainedLearner
from vpd.model import loading
from vpd.model.forward import longest_input
from vpd.prompts import Prompter
from vpd.types import SampleKey, Task, Tokens


@dataclass(frozen=True)
class LoadedTeacher:
    """The external teacher's model and tokenizer."""

    model: Any
    tokenizer: Any


def load_teacher(config: Config, student: Any, tokenizer: Any) -> LoadedTeacher | None:
    """The external teacher that the algorithm needs.  Raises ModelError unless its tokenizer is the student's.

    Heads are padded to different sizes in models of one family.  Where the teacher's is of another size than the
    student's, it is cut to the tokenizer's tokens, so that the two are compared on these.
    """
    name = config.needs.external_model
    if name is None:
        return None
    plain = dataclasses.replace(config.model, name_or_path=name, lora=None)
    external, other = loading.load(source_of(name), plain, known=BUNDLED)
    if other.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            "distributions over tokens are compared: teacher and student need one tokenizer",
            got=f"{len(other.get_vocab())} entries in the teacher's, {len(tokenizer.get_vocab())} in the student's",
            do="Take a teacher of the same family.",
        )
    rows, known = len(external.get_output_embeddings().weight), vocabulary_of(tokenizer)
    if rows > known and rows != len(student.get_output_embeddings().weight):
        external.resize_token_embeddings(known)
    return LoadedTeacher(external, other)


def vocabulary_of(tokenizer: Any) -> int:
    """How many tokens the tokenizer has; ids from there on are padding of a model's head."""
    return int(max(tokenizer.get_vocab().values())) + 1


class ExternalTeacher:
    """What a config needs of GKD's teacher beside its weights; nothing of it for another method.

    ``remote`` scores answers behind a server, ``own_prompt`` is a task as the teacher reads it, written by its own chat
    template or the student's; both are None where they are not needed.  ``tasks`` are the known ones.  Raises
    ConfigError, ModelError and EngineError.
    """

    def __init__(
        self, config: Config, loaded: LoadedTeacher | None, env: Env, prompter: Prompter, tasks: Sequence[Task]
    ):
        self._config = config
        self._needs = config.needs
        self._loaded = loaded
        self._env = env
        self._prompter = prompter
        self.remote = self._make_remote()
        self.own_prompt = self._make_own_prompt(tasks)
        if self._needs.other_answers == "data" and self._needs.student_fraction < 1:
            for task in tasks:
                solution_of(env, task)

    def training_engine(self, student: Engine, learner: TrainedLearner, parts: EngineParts) -> Engine | None:
        """What answers the training tasks where that is not the student alone: its mixture with teacher or data."""
        needs = self._needs
        if needs.student_fraction == 1:
            return None
        if needs.other_answers == "data":
            answers = DataEngine(self._answer, self._prompter.answer)
            return MixedEngine(student, answers, first_fraction=needs.student_fraction)
        if isinstance(self._config.engine, VLLMSettings):
            raise ConfigError(
                "a vLLM server serves one model: the teacher's answers cannot come from the student's",
                got=f"algorithm.student_fraction {needs.student_fraction} with engine vllm",
                do="Set algorithm.student_fraction to 1, algorithm.other_answers to data, or engine.name to embedded.",
            )
        teacher = self._config.engine.build(parts)
        teacher.load(learner.policy("teacher"))
        return MixedEngine(student, teacher, first_fraction=needs.student_fraction)

    def _answer(self, key: SampleKey) -> str:
        """The data's answer to the task at that place of the stream."""
        (task,) = draw_tasks(self._env, [key.task], seed=self._config.run.seed)
        return solution_of(self._env, task)

    def _make_remote(self) -> VLLMTeacher | None:
        """The teacher behind a server, if the algorithm needs one."""
        server, tokenizer = self._needs.remote_teacher, self._prompter.tokenizer
        if server is None or self._needs.top_k is None:
            return None
        key, engine = server.api_key_env, self._config.engine
        token = None if key is None else key_of(key, "algorithm.teacher_api_key_env")
        if key is None and isinstance(engine, VLLMSettings) and engine.is_at(server.url):
            token = engine.api_key()
        teacher = VLLMTeacher(
            client=VLLMClient(server.url, api_key=token),
            model=server.model,
            k=self._needs.top_k,
            at_once=self._config.rollout.max_rows,
            vocabulary=vocabulary_of(tokenizer),
        )
        teacher.check(tokenizer)
        return teacher

    def _make_own_prompt(self, tasks: Sequence[Task]) -> Callable[[Task], Tokens] | None:
        server = self._needs.remote_teacher
        if self._loaded is None and (server is None or server.reads_context):
            return None
        if not self._needs.own_chat_template:
            return self._prompter.build_student_prompt
        write = self._local_writer(self._loaded) if self._loaded else self._remote_writer()
        known = tasks if self.remote is None else tasks[:1]  # each would be a request
        differs = any(write(task) != self._prompter.build_student_prompt(task) for task in known)
        if differs and isinstance(self._env, Conversational):
            raise ConfigError(
                "the environment's replies are written in the student's chat template, and the teacher's is another",
                got="algorithm.teacher_chat_template own",
                do="Set it to student.",
            )
        return write

    def _local_writer(self, loaded: LoadedTeacher) -> Callable[[Task], Tokens]:
        length = self._prompter.max_completion_length
        prompter = Prompter(
            loaded.tokenizer,
            self._prompter.settings,
            window=longest_input(loaded.model),
            max_completion_length=length,
        )
        return prompter.build_student_prompt

    def _remote_writer(self) -> Callable[[Task], Tokens]:
        remote, thinking = self.remote, self._prompter.settings.enable_thinking
        assert remote is not None, "a teacher is here or behind a server"

        @functools.lru_cache(maxsize=512)
        def of_task(conversation: str) -> Tokens:
            return remote.prompt(*json.loads(conversation), enable_thinking=thinking)

        return lambda task: of_task(json.dumps(self._prompter.shown(task)))
