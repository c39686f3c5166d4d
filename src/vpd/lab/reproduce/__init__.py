"""``vpd reproduce``: the paper's claims, each tested on a CPU with tiny models.

A claim (``claims``, listed in ``paper``) compares methods (``methods``) in one experimental setting
(``settings_table``: environment, feedback and base).  ``plan`` has all runs made that the claims need, ``run`` makes
one and keeps it, ``report`` and ``pictures`` write the results, ``suite`` is the command.  ``tune`` chooses learning
rates, ``bases`` finds or makes the base models.
"""
