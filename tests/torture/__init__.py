"""Random faults against whole runs: ``make torture``; see ``__main__.py``."""
