"""Adapters for graders that exist already, written for other libraries.

* :mod:`vpd.envs.adapters.rewards`: TRL's reward functions and verl's ``compute_score``;
* :mod:`vpd.envs.adapters.verifiers`: a taskset of the package ``verifiers``.

With data in a file and a reward function in another, :class:`vpd.envs.dataset.Dataset` needs no class of the user's.
"""
