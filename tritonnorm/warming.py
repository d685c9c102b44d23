"""`warmup`: compile what a model will need before its first step."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from triton.runtime import driver

from . import fold_ops
from .frozen import launches_of
from .kernels.base import Launch, launches_to
from .observe import observe
from .settings import interpreting, logger

__all__ = ["Warm", "warmup"]


@dataclass(frozen=True)
class Warm:
    """What `warmup` did.

    Attributes:
        calls: distinct calls of norms and folds that the model makes.
        launches: kernel launches that they consist of, each with its own sizes.
        compiled: of these, how many were compiled now; the others were ready.
    """

    calls: int
    launches: int
    compiled: int

    def __str__(self) -> str:
        return f"{self.calls} calls, {self.launches} launches, {self.compiled} compiled now"


def warmup(model: nn.Module, example: Any) -> Warm:
    """Compile every kernel that a model's norms will need, ahead of the first step.

    Forward and backward, in training, in eval mode, and in the mode that the modules are in. No
    kernel runs, no weight or statistic changes, and no memory for activations is needed: the model
    is copied without its weights, and the copy is run on tensors without values. Call it where the
    model and the example lie on the GPU, and with autocast on if training has it on. An input that
    is not aligned to 16 bytes is compiled when it comes. The first step still looks up each kernel
    once in what Triton compiled.

    Args:
        model: with norms of this library, or frozen (`tritonnorm.freeze`).
        example: its input, or a tuple of its inputs: shape, dtype, memory format and device of a
            batch as it will come.

    Returns:
        How much there was to do; all zeros where no kernel will run.

    Raises:
        RuntimeError: the model cannot run on tensors without values.
        ValueError: a problem has no plan (see `plan`).
    """
    inputs = tuple(example) if isinstance(example, Sequence) else (example,)
    calls = observe(model, *inputs)
    made: dict[Launch, bool] = {}
    if interpreting():
        logger.info("warmup: Triton's interpreter is on, and compiles nothing")
        return Warm(len(calls), 0, 0)
    for call in calls:
        compile_one = _compiler(call.where, made)
        for launch, dtypes in call.rehearse():
            compile_one(launch, tuple(d and torch.empty(0, dtype=d, device="meta") for d in dtypes))
    folds = launches_of(model)
    for sources in folds:
        with launches_to(_compiler(sources[0].weight.device, made)):
            fold_ops.rehearse(sources)
    return Warm(len(calls) + len(folds), len(made), sum(made.values()))


def _compiler(where: torch.device, made: dict[Launch, bool]) -> Any:
    """Compiles launches for a device, and loads what it compiled onto it."""

    def compile_one(launch: Launch, tensors: tuple[Any, ...]) -> None:
        with torch.cuda.device(where) if where.type == "cuda" else contextlib.nullcontext():
            new = launch.compile(driver.active.get_current_device(), tensors)
        made[launch] = made.get(launch, False) or new

    return compile_one
