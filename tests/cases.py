"""What a batch norm can be asked for: the cases of the matrix, and the layouts of their tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from tritonnorm.activation import ACTIVATIONS


@dataclass(frozen=True)
class Case:
    """One call. Its name lists what differs from the defaults.

    Attributes:
        shape, layout, dtype: of the input; layouts are the keys of `LAYOUTS`.
        parameters: dtype of weight, bias and running statistics; None is that of the input.
        activation, args: the epilogue.
        residual: its layout, or None for no residual.
        affine: "both", "weight", "bias" or "none".
        track: running statistics are given.
        momentum, training: as in `torch.nn.functional.batch_norm`; momentum None is cumulative.
        grad: layout of the upstream gradient.
        needs: which gradients are asked for: x, r(esidual), w(eight), b(ias), s(lope).
        slope: of a prelu: "shared" by all channels or one for each "channel".
        mean, std: of the input.
    """

    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype | None = None
    activation: str | None = None
    args: tuple[float, ...] = ()
    residual: str | None = None
    affine: str = "both"
    track: bool = True
    momentum: float | None = 0.1
    training: bool = True
    grad: str = "contiguous"
    needs: str = "xrwbs"
    slope: str | None = None
    mean: float = 1.0
    std: float = 2.0

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape))]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                text = str(value).removeprefix("torch.").replace(" ", "")
                parts.append(text if field.name in ("layout", "dtype") else f"{field.name}={text}")
        return "-".join(parts)


def _embedded(values: Tensor, dims: tuple[int, ...], step: int = 1) -> Tensor:
    """The values as a slice of a larger tensor, NaN outside of it."""
    sizes, at = list(values.shape), [slice(None)] * values.dim()
    for d in dims:
        at[d] = slice(1, 1 + step * sizes[d], step)
        sizes[d] = step * sizes[d] + 2
    view = values.new_full(sizes, float("nan"))[tuple(at)]
    return view.copy_(values)


def _reordered(values: Tensor, source: int, target: int) -> Tensor:
    """The values with dimension ``source`` at place ``target`` of the memory order."""
    return values.movedim(source, target).contiguous().movedim(target, source)


def _misaligned(values: Tensor) -> Tensor:
    return values.new_full((values.numel() + 1,), float("nan"))[1:].view(values.shape).copy_(values)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda v: v.contiguous(),
    "channels_last": lambda v: _reordered(v, 1, -1),
    "channel_slice": lambda v: _embedded(v, (1,)),
    "channels_last_slice": lambda v: _embedded(v.movedim(1, -1), (v.dim() - 1,)).movedim(-1, 1),
    "crop": lambda v: _embedded(v, (v.dim() - 2, v.dim() - 1)),
    "channels_last_crop": lambda v: _embedded(v.movedim(1, -1), (1, 2)).movedim(-1, 1),
    "every_other": lambda v: _embedded(v, (v.dim() - 1,), step=2),
    "every_other_sample": lambda v: _embedded(v, (0,), step=2),
    "transposed": lambda v: v.mT.contiguous().mT,
    "batch_inner": lambda v: _reordered(v, 0, -1),
    "expanded": lambda v: v[:1].expand(v.shape),
    "expanded_positions": lambda v: v[..., :1].expand(v.shape),
    "misaligned": _misaligned,
}


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RANKS = ((9, 5), (3, 5, 7), (3, 5, 4, 6), (2, 3, 2, 3, 4))
RESIDUAL: dict[str, Any] = {"residual": "contiguous"}


def _fits(layout: str, shape: tuple[int, ...]) -> bool:
    if layout in ("crop", "channels_last_crop", "transposed"):
        return len(shape) >= 4
    return len(shape) > 2 or layout not in (
        "channels_last",
        "channels_last_slice",
        "expanded_positions",
    )


ACTIVATION_ARGS: dict[str, tuple[tuple[float, ...], ...]] = {
    "leaky_relu": ((), (0.2,)),
    "elu": ((), (0.5,)),
    "softplus": ((), (2.0, 5.0)),
}
_KINDS = (
    {},
    {"activation": "relu"},
    {"activation": "relu", **RESIDUAL},
    {"activation": "silu", **RESIDUAL},
)

#: Every layout at every rank, with the kinds of epilogue in turn.
OF_LAYOUT = [
    Case(shape, layout, training=training, **_KINDS[(i + j) % 4])
    for i, shape in enumerate(RANKS)
    for j, layout in enumerate(LAYOUTS)
    for training in (True, False)
    if _fits(layout, shape)
]
#: Every dtype, and 16-bit inputs with fp32 parameters, in the three orders of memory.
OF_DTYPE = [
    Case(shape, layout, dtype, parameters, training=training, **kind)
    for dtype in FLOATS
    for parameters in ((None, torch.float32) if dtype.itemsize == 2 else (None,))
    for shape, layout in (
        ((3, 5, 4, 6), "contiguous"),
        ((3, 16, 2, 3), "channels_last"),
        ((9, 5), "contiguous"),
    )
    for kind, training in (
        (_KINDS[0], True),
        (_KINDS[2], True),
        (_KINDS[3], True),
        (_KINDS[1], False),
    )
]
#: Every activation with its default and other parameters, with and without residual.
OF_ACTIVATION = [
    Case(
        shape, layout, dtype, activation=name, args=args, residual=residual,
        training=training,
    )
    for name in ACTIVATIONS
    for args in ACTIVATION_ARGS.get(name, ((),))
    for residual in (None, "contiguous")
    for shape, layout, dtype, training in (
        ((3, 5, 4, 6), "contiguous", torch.float32, True),
        ((3, 5, 2, 3), "channels_last", torch.float32, False),
        ((3, 16, 2, 3), "channels_last", torch.bfloat16, True),
        ((3, 3, 2, 8), "contiguous", torch.float64, False),
    )
]  # fmt: skip
#: Parameters, buffers and momentum that may be there or not.
OF_OPTIONS = [
    Case(shape, affine=affine, track=track, momentum=momentum, training=training, activation="relu")
    for shape in ((3, 5, 4, 6), (9, 5))
    for affine in ("both", "weight", "bias", "none")
    for track, momentum, training in (
        (True, 0.1, True), (True, None, True), (True, 0.0, True), (True, 1.0, True),
        (False, 0.1, True), (True, 0.1, False),
    )
]  # fmt: skip
#: Extents that fit no block: odd channels and planes, single samples and positions, primes.
OF_SIZE = [
    Case(shape, layout, dtype, training=training, **_KINDS[2])
    for shape in (
        (3, 7, 1, 1), (2, 3, 7, 7), (1, 2, 14, 14), (1, 5, 3, 3), (1, 1, 5), (2, 1, 1), (17, 1),
        (2, 1), (2, 13), (31, 37), (5, 11, 13), (1, 3, 1, 17), (2, 17, 3, 1), (2, 33, 2, 2),
        (2, 65),
    )
    for layout in ("contiguous", "channels_last")
    if layout == "contiguous" or len(shape) == 4
    for dtype, training in ((torch.float32, True), (torch.float16, True), (torch.float32, False))
]  # fmt: skip
#: Tiny planes whose rows of all channels are read in wider accesses, with enough rows for sums.
OF_SIZE += [
    Case(shape, "contiguous", dtype, torch.float32, kind, training=False, needs=needs)
    for shape, dtype, kind, needs in (
        ((33, 16, 7, 7), torch.bfloat16, "silu", "xwb"),
        ((33, 8, 5, 3), torch.float32, None, "wb"),
        ((3, 16, 7, 7), torch.float16, "gelu", "x"),
    )
]  # fmt: skip
#: Residuals and upstream gradients in other layouts than the input.
OF_COMPANIONS = [
    Case(shape, layout, residual=residual, grad=grad, activation=activation)
    for shape, layout, residual, grad in (
        ((3, 5, 4, 6), "contiguous", "channels_last", "channels_last"),
        ((3, 5, 4, 6), "channels_last", "contiguous", "contiguous"),
        ((3, 5, 4, 6), "channels_last", "channels_last", "channels_last"),
        ((3, 5, 4, 6), "crop", "crop", "every_other"),
        ((3, 5, 4, 6), "contiguous", "expanded", "expanded_positions"),
        ((3, 5, 4, 6), "channel_slice", "misaligned", "transposed"),
        ((9, 5), "channel_slice", "every_other_sample", "expanded"),
    )
    for activation in (None, "relu", "gelu")
]
#: Every subset of gradients that can be asked for.
OF_NEEDS = [
    Case(
        (3, 5, 2, 4),
        layout,
        activation=activation,
        residual="contiguous",
        needs=needs,
        training=training,
    )
    for needs in ("x", "r", "w", "b", "xr", "xw", "rw", "rb", "wb", "xrb", "rwb")
    for activation in (None, "relu", "silu")
    for layout, training in (("contiguous", True), ("channels_last", False))
]
#: A learned slope: layouts, dtypes, tiny planes, residuals, gradients that are asked for.
OF_SLOPE = [
    Case(
        shape, layout, dtype, parameters, "prelu", slope=slope, residual=residual,
        training=training,
    )
    for i, (shape, layout, dtype, parameters) in enumerate((
        ((3, 5, 4, 6), "contiguous", torch.float32, None),
        ((3, 5, 4, 6), "channels_last", torch.float32, None),
        ((3, 16, 2, 3), "channels_last", torch.bfloat16, torch.float32),
        ((3, 16, 2, 8), "contiguous", torch.float16, None),
        ((3, 3, 2, 8), "contiguous", torch.float64, None),
        ((3, 5, 4, 6), "channel_slice", torch.float32, None),
        ((3, 5, 4, 6), "crop", torch.float32, None),
        ((3, 5, 7), "misaligned", torch.float32, None),
        ((9, 5), "contiguous", torch.float32, None),
        ((3, 16, 7, 7), "contiguous", torch.bfloat16, torch.float32),
        ((33, 8, 5, 3), "contiguous", torch.float32, None),
        ((17, 1), "contiguous", torch.float32, None),
    ))
    for training in (True, False)
    for slope, residual in (
        (("shared", None), ("channel", "contiguous")),
        (("channel", None), ("shared", "contiguous")),
    )[i % 2]
]  # fmt: skip
OF_SLOPE += [
    Case((3, 5, 2, 4), activation="prelu", slope="channel", residual="contiguous", needs=needs,
         training=training, affine=affine)
    for needs, affine in (
        ("s", "both"), ("xs", "none"), ("x", "both"), ("rs", "both"), ("wb", "both"),
    )
    for training in (True, False)
]  # fmt: skip
CASES = list(dict.fromkeys([
    *OF_SLOPE, *OF_LAYOUT, *OF_DTYPE, *OF_ACTIVATION, *OF_OPTIONS, *OF_SIZE, *OF_COMPANIONS,
    *OF_NEEDS,
]))  # fmt: skip

Way = tuple[str | None, str]  # algorithm (None: free choice) and tiles


def ways(case: Case) -> list[Way]:
    """Every way to compute a case."""
    algorithms = ("split", "resident") if case.training else ("affine",)
    return [(None, "formula"), *((a, tiles) for a in algorithms for tiles in ("formula", "small"))]


def one_way_each(cases: list[Case], salt: str) -> list[tuple[Case, Way]]:
    """Each case with one of its ways, picked by a hash: the interpreter is too slow for all."""
    hashed = ((case, crc32(f"{salt} {case}".encode())) for case in cases)
    return [(case, ways(case)[h % len(ways(case))]) for case, h in hashed]
