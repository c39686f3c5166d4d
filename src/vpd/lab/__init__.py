"""Experiments that ship with the library: the demo, the paper in miniature, and the models they start from.

``demo`` and ``demo_smollm2`` are ``vpd demo``, ``reproduce`` is ``vpd reproduce``; ``tiny`` makes the tiny bases,
``packaged`` is ``vpd model``; ``runs`` and ``processes`` do the work of many runs.
"""
