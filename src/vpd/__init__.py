"""vpd: post-train language models from language feedback (arXiv 2605.15113).

    from vpd.config import load
    from vpd.recipes.train import train

    train(load("run.yaml"))

The reading order of the code is the order of the data: types, prompts, engines, envs, feedback, algorithms, loop.
"""

__version__ = "0.1.0"
