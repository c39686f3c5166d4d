"""``vpd.solve``: the command line's ``solve`` for objects of Python."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

from vpd.api.arguments import FeedbackLike, GraderLike, ModelLike, More, Tasks, read_arguments, read_options
from vpd.errors import ConfigError
from vpd.recipes import solve as solving
from vpd.recipes.solve import Solution
from vpd.solving import SolveOptions


def solve(
    model: ModelLike = None,
    tasks: Tasks | None = None,
    grader: GraderLike | None = None,
    *,
    options: SolveOptions | Mapping[str, Any] | None = None,
    output: str | PathLike[str] | None = None,
    tokenizer: Any = None,
    algorithm: Any = None,
    feedback: FeedbackLike | Sequence[FeedbackLike] | None = None,
    **more: Unpack[More],
) -> Solution:
    """Adapt a model to one task from its own failed attempts, within a budget of sampled tokens.

    The other arguments are those of :func:`vpd.train`.  The first of ``tasks`` is solved; of an environment the first
    held-out task.  ``options`` are a :class:`vpd.SolveOptions` or a mapping of its fields: ``task`` (the place of
    another one), ``train`` (count among an environment's training tasks), ``budget`` (tokens that each way of solving
    may sample), ``repeats`` (runs of each way), ``compare`` (False: no best of k and no repair in turns).

    The task is attempted ``rollout.num_generations`` times; while no attempt succeeds, ``algorithm`` takes a step on
    them and their feedback.  A model on disk stays as it is, and ``output`` names a new folder for the adapted one
    (``output/model``); a model of transformers that is passed is adapted in place.  Raises as :func:`vpd.train` does.
    Method: arXiv 2601.20802, section on test time.

    >>> def grade(text, task):
    ...     return 1.0 if text == task["answer"] else (0.0, "wrong : rule A means swap")
    >>> tasks = [{"prompt": "apply rule A to 1 2 3 4 5 6", "answer": "0 3 2 5 4 7"}]
    >>> small = {"num_generations": 4, "max_completion_length": 6}
    >>> solution = solve("tiny", tasks, grade, options={"budget": 3000}, rollout=small, optim={"learning_rate": 1e-3})
    >>> solution.answer
    '0 3 2 5 4 7'
    >>> numbers = solution.numbers()
    >>> numbers["adapt"]["attempts"] < numbers["best_of"]["attempts"], numbers["repair"]["solved"]
    (True, 0.0)
    """
    if "eval_tasks" in more:
        raise ConfigError("vpd.solve solves one of tasks=", got="eval_tasks=", do="Pass it in tasks.")
    chosen = read_options(SolveOptions, options)
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
    folder = None if output is None else Path(output)
    return solving.solve(arguments.config, chosen, output=folder, **arguments.objects)
