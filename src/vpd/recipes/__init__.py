"""Whole jobs, assembled from the parts; most are a command of the same name.

``assemble`` builds the parts of a run from its settings.  ``train`` is one run from settings to folder: ``loops`` makes
its loop, ``resume`` compares it with the run in the folder, ``endings`` stops and saves it, ``best_step`` chooses what
``export`` writes.  What is looked at before anything is made: ``prompt_checks``, ``round_trip``, ``run_checks``.
``dry_run`` says what a run would need, by ``estimate``.
"""
