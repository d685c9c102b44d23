"""What a provider is: somebody's way to compute a batch norm, with its addition and activation."""

from __future__ import annotations

import contextlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import ModuleType

from torch import Tensor

from bench.call import Tensors
from bench.norm_call import NormCall
from bench.processes import one_line
from bench.suites import Case

__all__ = ["Forward", "Provider"]

Forward = Callable[[Tensors], Tensor]


class Provider(ABC):
    """Everything that a peer needs to be measured.

    Attributes:
        name: what ``--providers`` and the results call it.
        what: one line for people.
        norms: whether it computes group, layer, instance and RMS norms too.
        kernels: whether it is these kernels or nothing: Triton must be seen to launch one.
        in_place: whether its output overwrites the input.
    """

    name: str
    what: str
    norms = False
    kernels = False
    in_place = False

    def absent(self) -> str | None:
        """Why it cannot run here at all, or None."""
        return None

    def declines(self, case: Case) -> str | None:
        """Why it cannot compute this case, or None."""
        return None

    def refuses(self, case: Case) -> str | None:
        """`declines`, and a norm that it does not have."""
        if isinstance(case.call, NormCall) and not self.norms:
            return "batch norm only"
        return self.declines(case)

    @abstractmethod
    def setup(self, case: Case) -> Forward:
        """All that happens once, not timed.

        What comes back is timed: it maps tensors to the output, which autograd can walk back.
        """

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Entered around every call, forward and backward, and timed on the host only."""
        yield

    def plan(self, case: Case, tensors: Tensors) -> str:
        """What it chose for a case, as far as it tells."""
        return ""


def missing(module: str) -> str | None:
    """Why a module does not import, or None."""
    try:
        importlib.import_module(module)
    except Exception as error:  # an extension built for another torch fails in many ways
        return f"{module} does not import: {one_line(error)}"
    return None


def imported(module: str) -> ModuleType:
    return importlib.import_module(module)
