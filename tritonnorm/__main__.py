"""``python -m tritonnorm``."""

from __future__ import annotations

import sys

from tritonnorm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
