"""A few held-out answers that a run keeps, from before and after training: what does the model write?"""

import dataclasses
from typing import Any

from vpd.envs import held_out_tasks
from vpd.evaluation import EvalSettings, evaluate
from vpd.recipes.assemble import Parts


def held_out_samples(parts: Parts, count: int) -> list[dict[str, Any]]:
    """One answer to each of the first ``count`` held-out tasks, from the engine's weights.

    Each has ``task`` (the last message), ``answer``, ``reward`` and ``feedback``.  They are the first answers of the
    evaluation of the same weights: an answer is drawn by its task and place, whatever is sampled beside it.
    """
    source = dataclasses.replace(parts.source, feedback=())
    settings = EvalSettings(sampling=parts.config.rollout.sampling, num_samples=1, teacher=False, control=False)
    found = evaluate(source, held_out_tasks(parts.env, count), settings)
    return [
        {
            "task": str(rollout.task.messages[-1]["content"]),
            "answer": rollout.completion.text,
            "reward": rollout.grade.reward,
            "feedback": rollout.grade.feedback,
        }
        for group in found.groups
        for rollout in group.rollouts
    ]
