"""The operators by name: what a call of one runs, for the dispatcher and for rehearsals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def implement(library: torch.library.Library, name: str, run: Callable[..., Any]) -> None:
    """Make ``run`` the operator's implementation on GPUs, and on the CPU for the interpreter.

    `observe` rehearses calls by it: it may read of its tensors, before its launches, only what
    tensors without values have.
    """
    IMPLEMENTATIONS[name] = run
    for key in ("CUDA", "CPU"):
        library.impl(name, run, key)
