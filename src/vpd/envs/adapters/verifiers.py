"""A taskset of the package ``verifiers`` (0.4 or newer, https://github.com/PrimeIntellect-ai/verifiers, MIT).

    env = Verifiers(taskset="my-taskset")                            # an installed package
    env = Verifiers(taskset="my_taskset.py:MyTaskset", config={"split": "train"})

Here the model answers a task in one message, and the task's own ``@reward`` methods score the trace.  A task that needs
a container, tools, a judge, or a ``runtime`` to be scored is an error; it is not scored in part.  A text that a reward
leaves in ``trace.info["feedback"]`` becomes the feedback that the teacher reads.

The older interface of the package (``load_environment``, ``SingleTurnEnv``, ``Rubric``), which its version 0.4 has
dropped, is not supported: give its reward function to :class:`vpd.envs.dataset.Dataset`.
"""

import importlib.util
import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Ge

from vpd.envs import wrap_user_errors
from vpd.envs.adapters.callers import LocalCaller
from vpd.envs.adapters.reward_functions import Caller, GradedByFunctions, Row
from vpd.envs.loading import load_object
from vpd.envs.record_tasks import EvalShare, Part, RecordTasks
from vpd.errors import ConfigError, DataError, EnvError
from vpd.types import Grade, Message, Task

ONE = "a task with a prompt, answered in one message"


@dataclass(frozen=True, kw_only=True)
class Verifiers(GradedByFunctions, RecordTasks[Task]):
    """The environment; the taskset is loaded when the first task is asked for.

    Raises ConfigError for settings, a missing package, or tasks that need more than an answer in one message.
    """

    name: Literal["verifiers"] = "verifiers"
    taskset: Annotated[str, "an installed taskset's id, or my_taskset.py:MyTaskset"]
    config: Annotated[Mapping[str, Any], "keys of the taskset's own config"] = field(default_factory=dict)
    eval_share: EvalShare = 0.1
    limit: Annotated[int, Ge(1), "maximum number of tasks; a taskset may be endless"] = 10_000

    def check(self) -> None:
        super().check()
        if importlib.util.find_spec("verifiers") is None:
            raise ConfigError("the package verifiers is missing", do="pip install 'vpd-rl[verifiers]'")

    def announce(self) -> list[str]:
        if self.seconds is None:
            return [f"{self.taskset}: no limit of time for grading (env.seconds)"]
        return [
            f"{self.taskset}: env.seconds ({self.seconds:g} s an answer) cancels what awaits; it cannot end other code"
        ]

    def callers(self) -> list[tuple[Caller, float]]:
        return [(LocalCaller(_TaskRewards(), _read), 1.0)]

    @property
    def sources(self) -> tuple[str, str | None]:
        return self.taskset, None

    def split_key(self, item: Task) -> str:
        return str(item.messages)

    def make_task(self, part: Part, item: Task) -> Task:
        return item

    def read_items(self, source: str) -> list[Task]:
        from verifiers import v1
        from verifiers.v1.utils.generic import concrete_type
        from verifiers.v1.utils.loaders import taskset_class

        kind = load_object(self.taskset, "env.taskset") if ":" in self.taskset else None
        kind = kind or wrap_user_errors(partial(taskset_class, self.taskset), f"env.taskset {self.taskset!r}")
        config = wrap_user_errors(
            partial(concrete_type(kind, v1.TasksetConfig) or v1.TasksetConfig, **self.config),
            f"the config of {self.taskset}",
        )
        if wrap_user_errors(partial(kind.toolsets, config), f"the taskset {self.taskset}"):
            raise ConfigError(f"the taskset {self.taskset} needs tools", expected=ONE)
        found = wrap_user_errors(
            lambda: list(itertools.islice(iter(kind(config)), self.limit)), f"the taskset {self.taskset}"
        )
        if not found:
            raise DataError(f"the taskset {self.taskset} is empty")
        return [_task(task, number, v1.Task) for number, task in enumerate(found)]


def _task(task: Any, number: int, base: type) -> Task:
    """A ``verifiers`` task as a :class:`vpd.types.Task`.  Raises ConfigError if it needs more than one message."""
    where = f"task {number} of {type(task).__name__}"
    scorers = [*task.hooks("reward"), *task.hooks("metric")]
    needs = {
        "a container": task.NEEDS_CONTAINER or task.data.image is not None,
        "a runtime": type(task).setup is not vars(base)["setup"] or type(task).finalize is not vars(base)["finalize"],
        "tools": bool(task.toolsets(task.config)),
        "a judge": bool(task.config.judges),
        "a runtime to be scored": any(_needs_runtime(scorer) for scorer in scorers),
        "a user who speaks first": task.data.prompt is None,
    }
    for need, needed in needs.items():
        if needed:
            raise ConfigError(f"{where} needs {need}", expected=ONE)
    if not task.hooks("reward"):
        raise ConfigError(f"{where} has no @reward method", expected="at least one")
    prompt = task.data.prompt
    contents = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
    roles = ["user"] if isinstance(prompt, str) else [message.role for message in prompt]
    messages: list[Message] = []
    for role, content in zip(roles, contents, strict=True):
        if not isinstance(content, str):
            raise ConfigError(f"{where}: a message is not text", got=type(content).__name__)
        messages.append({"role": role, "content": content})
    if task.data.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": task.data.system_prompt})
    name = task.data.id or task.data.name or number
    return Task(id=str(name), messages=tuple(messages), payload=Row(prompt=task, columns={}))


def _needs_runtime(scorer: Any) -> bool:
    parameter = inspect.signature(scorer).parameters.get("runtime")
    return parameter is not None and parameter.default is parameter.empty


class _TaskRewards:
    """The tasks' own rewards, on a trace with the prompt and the answer."""

    name, batched, is_async = "verifiers", False, True

    async def __call__(self, rows: Sequence[Row], texts: Sequence[str]) -> list[Any]:
        from verifiers import v1
        from verifiers.v1.state import state_cls

        [row], [text] = rows, texts
        task = row.prompt
        prompt = task.data.prompt
        messages = [v1.UserMessage(content=prompt)] if isinstance(prompt, str) else list(prompt)
        if task.data.system_prompt is not None:
            messages.insert(0, v1.SystemMessage(content=task.data.system_prompt))
        nodes = [
            v1.MessageNode(parent=place - 1 if place else None, message=message)
            for place, message in enumerate(messages)
        ]
        answer = v1.AssistantMessage(content=text)
        nodes.append(v1.MessageNode(parent=len(nodes) - 1, message=answer, sampled=True))
        asked = v1.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
        agent = v1.AgentInfo(config=v1.AgentConfig())
        trace = v1.Trace(task=asked, agent=agent, nodes=nodes, state=state_cls(type(task))())
        await task.score(trace)
        return [trace]


def _read(trace: Any, what: str) -> Grade | None:
    """A scored trace as a grade."""
    missing = [name for name, reward in trace.rewards.items() if reward is None]
    if missing:
        raise EnvError(f"{what}: the reward {missing[0]!r} was not given")
    feedback = trace.info.get("feedback")
    metrics = {f"rewards/{name}": float(reward.score) for name, reward in trace.rewards.items()}
    metrics |= {name: float(value) for name, value in trace.metrics.items() if value is not None}
    return Grade(reward=float(trace.reward), feedback=feedback, metrics=metrics)
