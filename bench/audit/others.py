"""What the audits take besides batch norm: the other norms, and batch norm of padded sequences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bench.audit.compile import CompileCase
from bench.call import Call
from bench.masked_call import MaskedCall
from bench.norm_call import NormCall

__all__ = ["COMPILED", "other_calls", "other_cases"]

FUSED: dict[str, Any] = {"activation": "silu", "residual": True}
PAIRS = (("sm_80", "gfx942"), ("sm_90", "sm_100"))
SEQUENCES = (32, 256, 512)
#: Rows, groups and channels, in both orders, by both algorithms; sequences in both layouts. Each
#: for two targets in turn.
COMPILED: tuple[tuple[NormCall | MaskedCall, str], ...] = (
    (NormCall("layer", (4096, 1024), **FUSED), "group_resident"),
    (NormCall("rms", (4096, 4096), dtype=torch.float32), "group_resident"),
    (NormCall("layer", (4096, 8192)), "group_resident"),
    (NormCall("layer", (1 << 14, 64), dtype=torch.float16), "group_resident"),
    (NormCall("rms", (64, 1 << 17), activation="gelu", residual=True), "group_split"),
    (NormCall("layer", (64, 1 << 15), dtype=torch.float64, activation="relu"), "group_split"),
    (NormCall("group", (4, 1280, 16, 16), **FUSED), "group_resident"),
    (NormCall("group", (4, 640, 16, 16), channels_last=True, **FUSED), "group_resident"),
    (NormCall("group", (4, 320, 64, 64), **FUSED), "group_split"),
    (NormCall("group", (4, 320, 64, 64), channels_last=True, **FUSED), "group_split"),
    (NormCall("instance", (8, 64, 32, 32), **FUSED), "group_resident"),
    (NormCall("instance", (8, 64, 16, 16), channels_last=True, **FUSED), "group_resident"),
    (NormCall("instance", (2, 64, 96, 96), dtype=torch.float32, **FUSED), "group_split"),
    (MaskedCall(SEQUENCES, activation="relu"), "masked"),
    (MaskedCall(SEQUENCES, channels_last=True, activation="silu"), "masked"),
    (MaskedCall(SEQUENCES, dtype=torch.float64, activation="relu"), "masked"),
    (MaskedCall(SEQUENCES, dtype=torch.float32, activation="mish"), "masked"),
    (MaskedCall(SEQUENCES, channels_last=True, training=False, activation="relu"), "masked"),
)


def other_cases(quick: bool = False) -> list[CompileCase]:
    """What is compiled, in the formula's configuration; ``quick``: one for each algorithm."""
    found = [
        CompileCase(call, algorithm, target, every_config=False)
        for i, (call, algorithm) in enumerate(COMPILED)
        for target in PAIRS[i % 2]
    ]
    return list({case.algorithm: case for case in found}.values()) if quick else found


def other_calls(quick: bool = False) -> list[Call | NormCall]:
    """Twins of such calls, small enough to be interpreted; ``quick``: one of each kind."""
    return list(_few() if quick else _all())


def _few() -> Iterator[Call | NormCall]:
    yield NormCall("group", (2, 8, 4, 4), 2, **FUSED)
    yield NormCall("layer", (6, 40))
    yield MaskedCall((3, 6, 20), activation="relu")


def _all() -> Iterator[Call | NormCall]:
    kinds: tuple[dict[str, Any], ...] = ({}, {"activation": "silu"}, FUSED)
    for kind in kinds:
        for last in (False, True):
            yield NormCall("group", (2, 8, 4, 4), 2, channels_last=last, **kind)
            yield NormCall("instance", (2, 18, 3, 3), channels_last=last, **kind)
        yield NormCall("layer", (6, 40), **kind)
        yield NormCall("rms", (3, 3, 33), **kind)
    for last in (False, True):
        for activation, training in ((None, True), ("silu", True), ("relu", False)):
            yield MaskedCall((3, 6, 20), last, activation=activation, training=training)
