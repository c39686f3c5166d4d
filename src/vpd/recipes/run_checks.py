"""What is looked at before the first step: settings without effect, and sources of feedback that ask a model."""

import logging
from collections.abc import Sequence

from vpd.config import Config
from vpd.feedback import Feedback, Remote
from vpd.feedback.critique import Critic, SelfCritique
from vpd.feedback.judge import Judge
from vpd.recipes.assemble import Parts

LOG = logging.getLogger("vpd")


def warn_of_idle_settings(config: Config) -> None:
    """Settings that have no effect, or another than they say, beside others."""
    optim, steps, prompts = config.optim, config.run.max_steps, config.rollout.prompts_per_step
    if optim.lr_scheduler_type == "constant" and optim.warmup_steps:
        LOG.warning("optim.lr_scheduler_type constant has no warm-up (constant_with_warmup has): warmup_steps is idle")
    elif 0 < steps < optim.warmup_steps:
        reached = optim.learning_rate * steps / optim.warmup_steps
        text = "optim.warmup_steps %d is beyond run.max_steps %d: the learning rate ends at %.2g and not at its peak"
        LOG.warning(text, optim.warmup_steps, steps, reached)
    if (updates := getattr(config.algorithm, "updates_per_batch", 1)) > prompts:
        text = (
            "algorithm.updates_per_batch %d splits a batch by whole groups, of which rollout.prompts_per_step makes %d"
        )
        LOG.warning(text, updates, prompts)


def check_critics(parts: Parts) -> None:
    """Ask every service among the sources once, and warn of models that write for nobody.  Raises FeedbackError."""
    if unread := _unread(parts.feedback, parts.config):
        LOG.warning(
            "%s reads no feedback, and a model is asked for some at every step all the same: take %s out of feedback",
            *(parts.config.method, " and ".join(unread)),
        )
    for source in parts.feedback:
        if isinstance(source, Remote):
            source.contact()


def _unread(sources: Sequence[Feedback], config: Config) -> list[str]:
    """The sources for which a model writes context that the method has no use for; a judge may give preferences too."""
    needs = config.algorithm.needs
    if needs.feedback or config.rollout.retries:
        return []
    judges = [source for source in sources if isinstance(source, Judge) and source.judge != "reward"]
    unread = [judge.name for judge in judges if judge.use == "context" or not needs.preferences]
    return unread + [source.name for source in sources if isinstance(source, (Critic, SelfCritique))]
