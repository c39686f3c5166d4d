"""Adapters for graders that were written for other libraries.

* :mod:`vpd.envs.adapters.trl_verl`: TRL's reward functions and verl's ``compute_score``;
* :mod:`vpd.envs.adapters.verifiers`: a taskset of the package ``verifiers``;
* :mod:`vpd.envs.adapters.reward_functions`: how any of them is called: time limits, retries, failed rows, weights.

With data in one file and a reward function in another, :class:`vpd.envs.dataset.Dataset` needs no class of yours.
"""
