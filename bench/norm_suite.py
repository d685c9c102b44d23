"""The suite ``norms``: group, layer, instance and RMS norm in the sizes that networks have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from bench.norm_call import NormCall

__all__ = ["NORM_MODES", "norm_calls"]

NORM_MODES = ("forward", "backward", "forward+backward")
_BATCH = 8

#: For a batch of 8: the U-Net of a latent diffusion model (64 x 64 latents), a transformer of
#: 4096 channels, a vision transformer, a style transfer network, and rows that fill no program.
#: Activations are smooth: a check of gradients needs no care for where one bends.
_CALLS = (
    *(
        NormCall("group", (_BATCH, c, side, side), 32, channels_last=last, activation="silu")
        for c, side in ((320, 64), (640, 32), (1280, 16), (1280, 8))
        for last in (False, True)
    ),
    NormCall("group", (_BATCH, 256, 56, 56), 32, activation="silu", residual=True),
    NormCall("layer", (_BATCH, 2048, 4096)),
    NormCall("layer", (_BATCH, 197, 768)),
    NormCall("layer", (_BATCH, 1 << 18)),
    NormCall("rms", (_BATCH, 2048, 4096)),
    NormCall("rms", (_BATCH, 2048, 32, 128)),  # queries and keys by head
    NormCall("instance", (_BATCH, 64, 128, 128), activation="gelu"),
    NormCall("instance", (_BATCH, 64, 128, 128), channels_last=True, activation="gelu"),
)


def norm_calls(
    dtypes: Sequence[torch.dtype],
    layouts: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
) -> list[NormCall]:
    """The calls of the suite; rows are in every choice of layouts."""
    return [
        replace(call, dtype=dtype, shape=(batch, *call.shape[1:]))
        for call in _CALLS
        for batch in batches or (_BATCH,)
        for dtype in dtypes
        if layouts is None or call.rows or call.layout in layouts
    ]
