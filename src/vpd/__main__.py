"""``python -m vpd`` is the command ``vpd``."""

import sys

from vpd.cli import main

if __name__ == "__main__":
    sys.exit(main())
