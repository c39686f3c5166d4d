"""One rank of the two-process test: trains with every algorithm and writes what came out.

Launched by tests/test_ranks.py.
"""

import os
import sys

import torch
from accelerate import Accelerator
from helpers import ALGORITHMS, flat, random_groups, tiny_learner, tiny_model

from vpd.algorithms.examples import student_logprobs, to_examples

accelerator = Accelerator(cpu=True)
OWN = ("time/", "e_step/padding", "m_step/padding", "policy/padding")  # of this rank's own micro-batches
out: dict[str, object] = {"world": accelerator.num_processes}
for name, (make, teacher) in ALGORITHMS.items():
    external = tiny_model(seed=7) if teacher.kind == "external" else None
    learner = tiny_learner(
        tiny_model(), teacher=teacher, external=external, micro_batch_size=2, accelerator=accelerator
    )
    algorithm = make()
    metrics, tokens = [], []
    for seed in range(3):
        update = algorithm.step(random_groups(seed, groups=3, size=3), learner)
        metrics.append({key: value for key, value in update.metrics.items() if not key.startswith(OWN)})
        tokens.append(update.tokens)
        learner.end_iteration()
    scores = learner.score(to_examples(random_groups(8, groups=1, size=3)), student_logprobs)
    out[name] = {"weights": flat(learner.model), "metrics": metrics, "scores": scores, "tokens": tokens}
learner = tiny_learner(
    tiny_model(dtype=torch.bfloat16), optimizer="adamw", learning_rate=1e-3, max_grad_norm=0.1, micro_batch_size=1,
    accelerator=accelerator,
)  # fmt: skip
grpo = ALGORITHMS["grpo"][0]()
for seed in range(3):
    grpo.step(random_groups(seed, groups=3, size=3), learner)
    learner.end_iteration()
out["masters"] = learner.state()["master_weights"]
torch.save(out, f"{sys.argv[1]}-{accelerator.process_index}.pt")
sys.stdout.flush()
os._exit(0)  # gloo's destructor may hang at exit (pytorch issue 56297)
