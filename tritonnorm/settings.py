"""Every environment variable that tritonnorm reads, in one place."""

from __future__ import annotations

import logging
import os
from pathlib import Path

#: Names and meanings, as documented in docs/environment.md.
VARIABLES = {
    "TRITONNORM_LOG": "Level of the `tritonnorm` logger: DEBUG, INFO, WARNING (default), ERROR.",
    "TRITONNORM_DISABLE": "1 sends every call to PyTorch's own implementation.",
    "TRITONNORM_TUNE": "When tuning happens: off (default), on, force, or heuristic.",
    "TRITONNORM_CACHE_DIR": "Folder of the user's tuned results.",
    "TRITONNORM_TABLES": "Files of tuned results that come before the shipped ones.",
    "TRITONNORM_RECORD": "File to which calls without a tuned result are appended.",
    "TRITONNORM_STRICT": "1 raises an error for a call without a tuned result.",
}

TUNE_MODES = ("off", "on", "force", "heuristic")

# What os.environ wraps. Every call of this library asks for one variable, and os.environ.get costs
# it 6 microseconds where the variable is not set, an exception within an exception.
_variables, _DISABLE, _ONE = (
    (os.environ._data, *map(os.environ.encodekey, ("TRITONNORM_DISABLE", "1")))
    if hasattr(os.environ, "_data")
    else (os.environ, "TRITONNORM_DISABLE", "1")
)

logger = logging.getLogger("tritonnorm")


def log_level() -> int:
    """The level asked for by TRITONNORM_LOG; WARNING if it is unset or not a level."""
    level = logging.getLevelName(os.environ.get("TRITONNORM_LOG", "WARNING").upper())
    return level if isinstance(level, int) else logging.WARNING


def disabled() -> bool:
    """Whether TRITONNORM_DISABLE=1 asks for PyTorch's own implementation everywhere."""
    return _variables.get(_DISABLE) == _ONE


def tune_mode() -> str:
    """One of `TUNE_MODES`, by TRITONNORM_TUNE.

    Raises:
        ValueError: it is something else.
    """
    mode = os.environ.get("TRITONNORM_TUNE", "").lower() or "off"
    if mode not in TUNE_MODES:
        raise ValueError(f"TRITONNORM_TUNE: expected one of {', '.join(TUNE_MODES)}; got {mode!r}")
    return mode


def cache_dir() -> Path | None:
    """The folder that TRITONNORM_CACHE_DIR names, or None."""
    named = os.environ.get("TRITONNORM_CACHE_DIR", "")
    return Path(named) if named else None


def table_files() -> list[Path]:
    """The files that TRITONNORM_TABLES names, separated as in PATH."""
    named = os.environ.get("TRITONNORM_TABLES", "").split(os.pathsep)
    return [Path(name) for name in named if name]


def record_file() -> Path | None:
    """The file that TRITONNORM_RECORD names, or None."""
    named = os.environ.get("TRITONNORM_RECORD", "")
    return Path(named) if named else None


def strict() -> bool:
    """Whether TRITONNORM_STRICT=1 asks for an error where there is no tuned result."""
    return os.environ.get("TRITONNORM_STRICT", "0") == "1"


def interpreting() -> bool:
    """Whether Triton's interpreter is on (TRITON_INTERPRET=1, read by Triton when it is
    imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


logger.setLevel(log_level())
