"""``vpd.train`` and ``vpd.evaluate``: the command line's ``train`` and ``eval`` for objects of Python."""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from vpd.api.arguments import FeedbackLike, GraderLike, ModelLike, More, Tasks, read_arguments, read_options
from vpd.api.callbacks import as_observers
from vpd.api.runs import Run
from vpd.errors import ConfigError
from vpd.evaluation import EvalOptions, Evaluation
from vpd.recipes import evaluation
from vpd.recipes import train as training


def train(
    model: ModelLike = None,
    tasks: Tasks | None = None,
    grader: GraderLike | None = None,
    *,
    tokenizer: Any = None,
    algorithm: Any = None,
    feedback: FeedbackLike | Sequence[FeedbackLike] | None = None,
    callbacks: Any = (),
    **more: Unpack[More],
) -> Run:
    """Train a model and return its run; what there is to say goes to the logger ``vpd``.

    ``model``: a Hub id, a folder, ``"tiny"``, or a causal language model of transformers with its ``tokenizer`` (it is
    trained in place); a mapping sets more of the section, as ``{"name_or_path": ..., "lora": {"r": 16}}``; a config
    stands for itself (``vpd.train(vpd.load_config("run.yaml"))``).  Tasks of your own need one, unless a run goes on.

    ``tasks``: a list, a generator, a ``datasets.Dataset``, a table or a file of records; an entry is a text, messages,
    a mapping with ``prompt`` or ``messages``, or a :class:`vpd.Task`.

    ``grader``: a function ``(text, task)`` of the answer and the entry as it was passed; it returns the reward (a
    number; from ``rollout.success_threshold`` on a success), ``(reward, feedback)`` or a :class:`vpd.Grade`.  Reward
    functions of TRL and verl are taken as they are.

    ``algorithm``: a name, a mapping with ``name`` and settings, or settings of a method of your own; default ``gated``.

    ``feedback``: where the teacher's context comes from: names, mappings and functions ``(groups, writer)``; default
    ``["environment"]``, the grader's text.

    ``callbacks``: functions ``(step, metrics, groups)``, observers, callbacks of transformers.

    ``more``: ``eval_tasks`` (tasks, or a share of ``tasks``), ``env`` in the place of tasks and grader, ``config``, and
    the sections ``prompts``, ``rollout``, ``engine``, ``optim``, ``run`` with the keys of the file, which
    ``vpd train --help`` lists.

    Everything is loaded and checked before the run folder, ``run={"output_dir": ...}``, is made.  Raises a VPDError of
    one line: ConfigError, DataError, ModelError, EnvError where the grader raises, StorageError where the folder holds
    a run (``run={"resume": True}`` continues it).  Method: arXiv 2605.15113.

    >>> import contextlib, io
    >>> def grade(text, task):
    ...     right = text.strip() == task["answer"]
    ...     return 1.0 if right else (0.0, f"wrong : the answer is {task['answer']}")
    >>> tasks = [{"prompt": "apply rule A to 1 2 3", "answer": "3 2 1"}]
    >>> small = {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 6}
    >>> with contextlib.redirect_stdout(io.StringIO()):  # a line of a table for each step
    ...     run = train("tiny", tasks, grade, rollout=small, run={"max_steps": 1, "output_dir": "out"})
    >>> run
    Run('out': done, step 1)
    """
    arguments = read_arguments(
        model, tasks, grader, tokenizer=tokenizer, algorithm=algorithm, feedback=feedback, more=more
    )
    observers = as_observers(callbacks, arguments.config.run)
    return Run(training.train(arguments.config, **arguments.objects, observers=observers))


def evaluate(
    model: ModelLike = None,
    tasks: Tasks | None = None,
    grader: GraderLike | None = None,
    *,
    options: EvalOptions | Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    algorithm: Any = None,
    feedback: FeedbackLike | Sequence[FeedbackLike] | None = None,
    **more: Unpack[More],
) -> Evaluation:
    """Answer tasks and grade the answers; the arguments are those of :func:`train`, and nothing is written.

    All ``tasks`` are answered; of an environment its held-out tasks.  ``options`` are an :class:`vpd.EvalOptions` or a
    mapping of its fields: ``num_samples`` answers a task, ``temperature``, ``top_p``, ``limit``, and ``teacher`` to
    answer failed attempts again with their feedback.  ``Evaluation.student`` has ``avg@k`` and ``pass@k`` with their
    standard errors over tasks; ``Evaluation.groups`` the answers.  Raises as :func:`train` does.

    >>> tasks = ["apply rule A to 1 2 3"]
    >>> short = {"max_completion_length": 6}
    >>> result = evaluate("tiny", tasks, lambda text, task: 0.0, options={"num_samples": 2}, rollout=short)
    >>> result.student["answers"], result.student["avg@2"]
    (2.0, 0.0)
    """
    chosen = read_options(EvalOptions, options)
    if "eval_tasks" in more:
        raise ConfigError("vpd.evaluate answers tasks=", got="eval_tasks=", do="Pass them as tasks.")
    arguments = read_arguments(
        model,
        tasks,
        grader,
        tokenizer=tokenizer,
        algorithm=algorithm,
        feedback=feedback,
        more=more,
        all_held_out=True,
    )
    return evaluation.evaluate(arguments.config, chosen, **arguments.objects)
