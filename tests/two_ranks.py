"""One rank of the two-process test: trains and writes its weights.  Launched by tests/test_ranks.py."""

import os
import sys

import torch
from accelerate import Accelerator
from helpers import TokenPrompter, flat, random_groups, tiny_model

from vpd.algorithms.examples import student_logprobs, to_examples
from vpd.algorithms.vpd import VPD, VPDSettings
from vpd.learners.accelerate_learner import AccelerateLearner, OptimSettings

accelerator = Accelerator(cpu=True)
optim = OptimSettings(
    optimizer="sgd", learning_rate=0.3, weight_decay=0.0, max_grad_norm=None, micro_batch_size=2, share_prefixes=False
)
settings = VPDSettings(e_every=2)
learner = AccelerateLearner(tiny_model(), optim, teacher=settings.teacher_settings(), accelerator=accelerator)
algorithm = VPD(settings, TokenPrompter())  # type: ignore[arg-type]
metrics = []
for seed in range(3):
    told = algorithm.step(random_groups(seed, groups=3, size=3), learner)
    own = ("time/", "e_step/padding", "m_step/padding")  # of this rank's own micro-batches
    metrics.append({name: value for name, value in told.items() if not name.startswith(own)})
    learner.end_iteration()
scores = learner.score(to_examples(random_groups(8, groups=1, size=3)), student_logprobs)
out = {"world": accelerator.num_processes, "weights": flat(learner.weights()), "metrics": metrics, "scores": scores}
torch.save(out, f"{sys.argv[1]}-{accelerator.process_index}.pt")
sys.stdout.flush()
os._exit(0)  # gloo's destructor may hang at exit (pytorch issue 56297)
