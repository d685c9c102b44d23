"""The forms of a model that inference compares: edited, compiled, captured in a CUDA graph."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import tritonnorm
from bench.demo.training import relative
from bench.e2e.clocks import captured
from bench.launches import Launches, observe
from bench.models import batch_norms, build, reorder, settle

__all__ = ["EDITS", "RUNNERS", "Form", "Subject", "parts_of"]


@dataclass(frozen=True)
class Subject:
    """What the forms are made of.

    Attributes:
        original: a model in eval mode, float32.
        exact: the same in float64.
        pixels: its input, float32.
        logits: what ``exact`` makes of it.
        launches: what computed the batch norms of that.
        dtype, order: of the model and the input that are timed.
    """

    original: nn.Module
    exact: nn.Module
    pixels: Tensor
    logits: Tensor
    launches: Launches
    dtype: torch.dtype
    order: torch.memory_format

    @classmethod
    def of(
        cls, model: str, device: str, shape: tuple[int, ...], dtype: str, channels_last: bool
    ) -> Subject:
        """A model of `bench.models.MODELS` with random weights, and a random input."""
        net = build(model)
        generator = torch.Generator().manual_seed(2)
        settle(net, torch.randn(16, 3, 64, 64, generator=generator))
        net.to(device)
        pixels = torch.randn(shape, generator=generator).to(device)
        exact = copy.deepcopy(net).double()
        with torch.no_grad(), observe() as launches:
            logits = exact(pixels.double())
        order = torch.channels_last if channels_last else torch.contiguous_format
        return cls(net, exact, pixels, logits, launches, getattr(torch, dtype), order)


def _as_it_is(net: nn.Module, pixels: Tensor) -> tuple[nn.Module, str]:
    return net, ""


def _folded(net: nn.Module, pixels: Tensor) -> tuple[nn.Module, str]:
    folded, report = tritonnorm.fold(net, pixels)
    return folded, str(report)


def _fused_by_torch(net: nn.Module, pixels: Tensor) -> tuple[nn.Module, str]:
    with warnings.catch_warnings():  # the module uses torch.jit when it is imported
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.fx.experimental.optimization import fuse

    return fuse(net), ""


#: Part of a variant's name -> what it makes of a model: the model, and a report of it.
EDITS: dict[str, Callable[[nn.Module, Tensor], tuple[nn.Module, str]]] = {
    "eager": _as_it_is,
    "folded": _folded,
    "torch.fx": _fused_by_torch,
}
#: Parts of a variant's name that tell how it runs, after an edit or by themselves.
RUNNERS = ("compile", "graph")


def parts_of(name: str) -> set[str]:
    """The parts of a variant's name: of `EDITS` and `RUNNERS`, joined by "+".

    Raises:
        ValueError: a part is unknown.
    """
    parts, known = set(name.split("+")), (*EDITS, *RUNNERS)
    if unknown := parts - set(known):
        raise ValueError(
            f"variant: expected parts of {', '.join(known)}; got {', '.join(sorted(unknown))}"
        )
    return parts


@dataclass(frozen=True)
class Form:
    """A form of the subject, ready to be timed.

    Attributes:
        forward: the logits, in the dtype that is timed; always of the same input.
        report: what the edit reports.
        batch_norms: how many are left.
        error: of the logits in float64, relative to the original's largest; None for a form that
            exists only in the dtype that is timed, compiled or in a CUDA graph.
        rounding: the same in the dtype that is timed, against the original in float64.
    """

    forward: Callable[[], Tensor]
    report: str
    batch_norms: int
    error: float | None
    rounding: float

    @classmethod
    def of(cls, name: str, subject: Subject, backend: str = "inductor") -> Form:
        """The form of that name, see `parts_of`; raises whatever an edit or a compiler raises."""
        parts = parts_of(name)
        edit = EDITS[next((part for part in EDITS if part in parts), "eager")]
        error = None
        if parts.isdisjoint(RUNNERS):
            in_float64, _ = edit(subject.exact, subject.pixels.double())
            with torch.no_grad():
                error = relative(in_float64(subject.pixels.double()), subject.logits)
        net, report = edit(subject.original, subject.pixels)
        net = copy.deepcopy(net).to(subject.dtype)
        reorder(net, subject.order)
        pixels = subject.pixels.to(dtype=subject.dtype, memory_format=subject.order)
        run: Callable[[Tensor], Tensor] = net
        if "compile" in parts:
            run = torch.compile(net, backend=backend, dynamic=False)

        def forward() -> Tensor:
            with torch.inference_mode():
                return run(pixels)

        call = captured(forward) if "graph" in parts else forward
        rounding = relative(call(), subject.logits)
        return cls(call, report, len(batch_norms(net)), error, rounding)
