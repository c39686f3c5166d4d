"""``vpd reproduce``: the paper in miniature, every claim of it tested on a CPU.

``regimes`` say what the environment is like, ``methods`` who learns in it, ``bases`` from which weights; ``run`` makes
the runs of a plan in processes and keeps them, ``claims`` reads verdicts off their numbers (``paper`` lists them),
``report`` and ``pictures`` show them, ``suite`` is the command.
"""
