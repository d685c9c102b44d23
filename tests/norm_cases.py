"""The cases of `tests.norms`, and the ways to compute them."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch

from tests.cases import ACTIVATION_ARGS, FLOATS
from tests.norms import NormCase
from tritonnorm.activation import ACTIVATIONS

_KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"activation": "silu"},
    {"activation": "relu", "residual": "contiguous"},
    {"activation": "silu", "residual": "contiguous"},
    {"residual": "contiguous"},
)
LAYOUTS = (
    "contiguous", "channels_last", "channel_slice", "channels_last_slice", "crop",
    "channels_last_crop", "every_other", "every_other_sample", "transposed", "batch_inner",
    "expanded", "expanded_positions", "misaligned",
)  # fmt: skip

#: Every layout, for groups of several channels, of one, and of all.
OF_LAYOUT = [
    NormCase("group", shape, groups, layout, **_KINDS[(i + j) % 5])
    for i, (shape, groups) in enumerate(
        (((2, 6, 3, 5), 2), ((2, 6, 3, 5), 6), ((3, 4, 3, 2), 1), ((2, 6, 2, 3, 2), 3))
    )
    for j, layout in enumerate(LAYOUTS)
]
#: Rows of a layer norm that lie in memory in unusual ways.
OF_ROWS = [
    NormCase(norm, (4, 3, 10), layout=layout, **_KINDS[j % 5])
    for norm in ("layer", "rms")
    for j, layout in enumerate(
        ("contiguous", "channels_last", "channel_slice", "crop", "every_other", "expanded",
         "every_other_sample", "expanded_positions", "misaligned")
    )
]  # fmt: skip
#: Every dtype, and 16-bit inputs with fp32 parameters.
OF_DTYPE = [
    NormCase(norm, shape, groups, layout, dtype, parameters, **kind)
    for dtype in FLOATS
    for parameters in ((None, torch.float32) if dtype.itemsize == 2 else (None,))
    for norm, shape, groups, layout in (
        ("group", (2, 8, 3, 4), 2, "contiguous"),
        ("group", (2, 8, 3, 3), 4, "channels_last"),
        ("layer", (5, 24), 1, "contiguous"),
        ("rms", (2, 3, 33), 1, "contiguous"),
        ("instance", (2, 3, 4, 4), 1, "channels_last"),
    )
    for kind in (_KINDS[1], _KINDS[2])
]
#: Every activation with its default and other parameters.
OF_ACTIVATION = [
    NormCase(norm, shape, 2, activation=name, args=args, residual=residual)
    for name in ACTIVATIONS
    for args in ACTIVATION_ARGS.get(name, ((),))
    for norm, shape, residual in (
        ("group", (2, 4, 3, 3), None),
        ("layer", (3, 7), "contiguous"),
    )
]
#: Parameters that may be there or not, and a large mean.
OF_OPTIONS = [
    NormCase(norm, shape, 2, affine=affine, mean=mean, **_KINDS[1])
    for norm, shape in (
        ("group", (2, 4, 3, 4)), ("layer", (4, 9)), ("rms", (4, 9)), ("instance", (2, 3, 5)),
    )
    for affine in ("both", "weight", "bias", "none")
    for mean in (0.0, 100.0)
]  # fmt: skip
#: Extents that fit no block: odd channels and planes, single values, primes.
OF_SIZE = [
    NormCase(norm, shape, groups, layout, dtype, **_KINDS[3])
    for norm, shape, groups in (
        ("group", (1, 7, 7, 7), 7), ("group", (2, 15, 3, 3), 3), ("group", (3, 10), 2),
        ("group", (3, 10), 1), ("group", (2, 9, 1, 1), 3), ("group", (1, 2, 1, 67), 1),
        ("group", (2, 40, 1, 3), 2), ("group", (2, 66, 5), 33), ("instance", (3, 5, 7, 7), 1),
        ("instance", (1, 1, 2, 2), 1), ("instance", (2, 70, 3), 1), ("instance", (2, 3, 131), 1),
        ("layer", (1, 1), 1), ("layer", (7, 1), 1), ("layer", (1, 1025), 1), ("layer", (67, 2), 1),
        ("layer", (2, 3, 5, 130), 1), ("rms", (9, 640), 1), ("rms", (1, 1), 1),
        ("rms", (37, 3), 1),
    )
    for layout in ("contiguous", "channels_last")
    if layout == "contiguous" or (len(shape) == 4 and norm not in ("layer", "rms"))
    for dtype in (torch.float32, torch.bfloat16)
]  # fmt: skip
#: Residuals and upstream gradients in other layouts than the input.
OF_COMPANIONS = [
    NormCase("group", (2, 6, 4, 3), 3, layout, residual=residual, grad=grad, activation=activation)
    for layout, residual, grad in (
        ("contiguous", "channels_last", "channels_last"),
        ("channels_last", "contiguous", "expanded"),
        ("crop", "crop", "every_other"),
        ("batch_inner", "misaligned", "transposed"),
    )
    for activation in (None, "gelu")
]
#: Every subset of gradients that can be asked for.
OF_NEEDS = [
    NormCase(norm, shape, 2, activation=activation, residual="contiguous", needs=needs)
    for norm, shape in (("group", (2, 4, 3, 3)), ("layer", (4, 9)))
    for needs in ("x", "r", "w", "b", "xr", "xw", "rw", "wb", "xrb", "rwb")
    for activation in (None, "relu", "silu")
]
CASES = list(dict.fromkeys([
    *OF_LAYOUT, *OF_ROWS, *OF_DTYPE, *OF_ACTIVATION, *OF_OPTIONS, *OF_SIZE, *OF_COMPANIONS,
    *OF_NEEDS,
]))  # fmt: skip

WAYS = ((None, None), ("group_resident", None), ("group_split", None), ("group_split", "small"))
WAYS += (("group_resident", "small"),)
Way = tuple[str | None, str | None]


def one_way_each() -> list[tuple[NormCase, Way]]:
    """Each case with one of its ways, picked by a hash: the interpreter is too slow for all."""
    return [(case, WAYS[crc32(str(case).encode()) % len(WAYS)]) for case in CASES]


def small(case: NormCase) -> Any:
    """A configuration with tiles so small that tiny tensors have several, in several splits."""
    from tritonnorm.kernels.base import Config

    if case.rows:
        return Config(1 << (case.shape[-1] - 1).bit_length(), 1, 2, splits=2)
    return Config(2, 1, 4, splits=3)
