"""What to tune: the norms of a network by name, of a file, or of a model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tritonnorm.activation import ACTIVATIONS
from tritonnorm.device import Device, simulated
from tritonnorm.norms.problem import GroupProblem
from tritonnorm.norms.problem import described as group_described
from tritonnorm.observe import observe
from tritonnorm.problem import Problem
from tritonnorm.recipe import activity, described
from tritonnorm.tune.key import Key, Shape
from tritonnorm.tune.networks import NETWORKS, NORM_NETWORKS, NormLayer

__all__ = [
    *("DTYPES", "LAYOUTS", "PRESETS", "from_file", "from_model", "of_layer", "of_norm", "preset"),
]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = ("NHWC", "NCHW")
#: Name -> the batch that it is usually trained with on one GPU.
PRESETS = {
    "resnet50": 32,
    "efficientnet_b0": 128,
    "densenet121": 64,
    "unet3d": 2,
    "mobilenet_v3": 128,
    "diffusion_unet": 8,
    "transformer": 8,
}


def of_layer(
    sizes: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool = False,
    activation: str | None = None,
    residual: bool = False,
) -> list[Problem]:
    """Training forward and backward, and inference, of one batch norm."""
    size, strides = tuple(sizes), _strides(sizes, channels_last)
    two_valued = activation is not None and ACTIVATIONS[activation].two_valued
    mask = residual and two_valued
    kept = residual and activation is not None  # what the backward knows of the residual
    name = activation or ""
    needs = (True, kept, True, True)
    return [
        described("forward", size, strides, dtype, True, name, residual, mask)[0],
        described("backward", size, strides, dtype, True, name, kept, mask, needs)[0],
        described("forward", size, strides, dtype, False, name, residual, False)[0],
    ]


def of_norm(
    layer: NormLayer, batch: int, dtype: torch.dtype, channels_last: bool = False
) -> list[GroupProblem]:
    """Forward and backward of one of the other norms."""
    sizes = layer.shape(batch)
    strides, groups = _strides(sizes, channels_last), layer.groups or 1
    kind = activity(layer.activation or "")
    described = (sizes, strides, dtype, groups, layer.centred, kind, False)
    return [group_described(d, *described)[0] for d in ("forward", "backward")]


def _strides(sizes: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    """Of a dense tensor; only those of four or five dimensions have a format."""
    x = torch.empty(tuple(sizes), device="meta")
    if channels_last and x.dim() in (4, 5):
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        x = x.contiguous(memory_format=last)
    return x.stride()


def preset(
    name: str, dtypes: Sequence[str], layouts: Sequence[str], batch: int | None = None
) -> Iterator[Shape]:
    """The problems of a network in `PRESETS`, each once: the backward of an addition without an
    activation is that of the batch norm alone."""
    return iter(dict.fromkeys(_layers(name, dtypes, layouts, batch or PRESETS[name])))


def _layers(
    name: str, dtypes: Sequence[str], layouts: Sequence[str], batch: int
) -> Iterator[Shape]:
    for norm in NORM_NETWORKS.get(name, ()):
        for dtype in dtypes:
            for layout in layouts if norm.groups else layouts[:1]:
                yield from of_norm(norm, batch, DTYPES[dtype], layout == "NHWC")
    for layer in NETWORKS.get(name, ()):
        sizes = layer.shape(batch)
        for dtype in dtypes:
            for layout in layouts:
                yield from of_layer(
                    *(sizes, DTYPES[dtype], layout == "NHWC", layer.activation, layer.residual)
                )


def from_file(path: Path, dtypes: Sequence[str], layouts: Sequence[str]) -> Iterator[Shape]:
    """The problems of a file: what TRITONNORM_RECORD wrote, or shapes ``32x64x56x56``, one a line.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is neither.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        line = line.strip()
        try:
            if line.startswith("{"):
                yield Key.from_json(json.loads(line)).problem()
            elif line:
                sizes = [int(size) for size in line.split("x")]
                if len(sizes) < 2 or min(sizes) < 1:
                    raise ValueError("expected at least N and C")
                for dtype in dtypes:
                    for layout in layouts if len(sizes) in (4, 5) else ("NCHW",):
                        yield from of_layer(sizes, DTYPES[dtype], layout == "NHWC")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number}: {error}") from None


def from_model(
    model: nn.Module,
    inputs: Sequence[Any],
    device: Device,
    dtypes: Sequence[str],
    layouts: Sequence[str],
) -> Iterator[Shape]:
    """The problems that a model on the CPU would have on ``device``, with mixed precision."""
    for dtype in dtypes:
        for layout in layouts:
            with simulated(device), _autocast(DTYPES[dtype]):
                for call in observe(_ordered(model, layout), *_ordered_inputs(inputs, layout)):
                    yield from (problem for problem, _ in call.problems)


def _autocast(dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=dtype)


def _ordered(model: nn.Module, layout: str) -> nn.Module:
    """The model, its weights of four dimensions in a memory format."""
    last = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    return model.to(memory_format=last)  # type: ignore[call-overload]


def _ordered_inputs(inputs: Sequence[Any], layout: str) -> list[Any]:
    last = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    return [
        t.contiguous(memory_format=last) if isinstance(t, torch.Tensor) and t.dim() == 4 else t
        for t in inputs
    ]
