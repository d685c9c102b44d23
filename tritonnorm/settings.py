"""Every environment variable that tritonnorm reads, in one place."""

from __future__ import annotations

import logging
import os

#: Names and meanings, as documented in docs/environment.md.
VARIABLES = {
    "TRITONNORM_LOG": "Level of the `tritonnorm` logger: DEBUG, INFO, WARNING (default), ERROR.",
    "TRITONNORM_DISABLE": "1 sends every call to PyTorch's own implementation.",
}

logger = logging.getLogger("tritonnorm")


def log_level() -> int:
    """The level asked for by TRITONNORM_LOG; WARNING if it is unset or not a level."""
    level = logging.getLevelName(os.environ.get("TRITONNORM_LOG", "WARNING").upper())
    return level if isinstance(level, int) else logging.WARNING


def disabled() -> bool:
    """Whether TRITONNORM_DISABLE=1 asks for PyTorch's own implementation everywhere."""
    return os.environ.get("TRITONNORM_DISABLE", "0") == "1"


def interpreting() -> bool:
    """Whether Triton's interpreter is on (TRITON_INTERPRET=1, read by Triton when it is
    imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


logger.setLevel(log_level())
