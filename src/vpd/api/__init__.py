"""What ``import vpd`` gives: training and evaluation from Python objects, and runs read afterwards.

``entry``: ``vpd.train`` and ``vpd.evaluate``; ``sft``, ``collect`` and ``solve``: the commands of these names;
``arguments``: their arguments as a config and objects; ``callbacks``: what watches a run; ``runs``: ``vpd.Run``.
"""
