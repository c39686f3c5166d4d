"""The run folder and its history: what a run leaves behind, and what makes it safe to kill and continue.

``files``: writes that are whole or not there; ``lock``: one process trains in a folder; ``state``: ``run.json``, the
settings and the phase; ``contents``: hashes of the files that settings name; ``checkpoint``: ``checkpoint-N/``;
``tables``: ``metrics.jsonl`` and ``rollouts/``; ``token_tables``: ``tokens/``; ``reading``: all of it, read afterwards.
"""
