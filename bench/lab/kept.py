"""Where compiled kernels are kept: a folder for each state of their sources.

A kept kernel names the source lines that it was compiled from. Triton finds it again when the
kernel has only moved in its file, and what reads access widths by line would look at other lines.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

__all__ = ["kept_kernels"]

KERNELS = Path(__file__).resolve().parent.parent.parent / "tritonnorm" / "kernels"


def kept_kernels(base: Path | str | None = None) -> str:
    """The value of TRITON_CACHE_DIR for the sources as they are now.

    Args:
        base: the folder around it; by default what the variable says, or Triton's own.
    """
    sources = b"\0".join(path.read_bytes() for path in sorted(KERNELS.glob("*.py")))
    place = hashlib.sha256(str(KERNELS).encode() + sources).hexdigest()[:16]
    around = Path(base or os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    return str(around if around.name == place else around / place)
