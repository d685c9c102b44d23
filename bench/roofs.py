"""The bandwidth that can be had: what the product promises, and what a copy and a sum reach."""

from __future__ import annotations

import torch

from bench.machine import Machine
from bench.record.rows import RoofRow
from tritonnorm.timing import Timing, interleaved

__all__ = ["measured_roofs", "theoretical_roof"]

CACHES = 8  # times the last-level cache: what is left of the last run in it is at most an eighth


def theoretical_roof(machine: Machine) -> RoofRow | None:
    """Memory clock and bus width, or the data sheet (`Device.bandwidth`); None if unknown."""
    if not machine.facts.bandwidth:
        return None
    gb_s = machine.facts.bandwidth * 1e-9
    return RoofRow("theoretical", 0, gb_s, gb_s, gb_s)


def measured_roofs(
    machine: Machine, sizes: tuple[int, ...] = (), rounds: int = 30, least: int = 1 << 28
) -> list[RoofRow]:
    """Measure a plain copy and a read-only sum.

    Args:
        machine: where.
        sizes: bytes of the buffers; by default one of `CACHES` times the last-level cache, and at
            least ``least``; a multiple of 64 KiB.
        rounds: samples of each.
    """
    rows = []
    for size in sizes or (max(CACHES * machine.facts.l2_bytes, least),):
        rows += _measured(machine, size, rounds)
    return rows


def _measured(machine: Machine, size: int, rounds: int) -> list[RoofRow]:
    source = torch.empty(size // 4, device=machine.device).normal_()
    target = torch.empty_like(source)
    # Rows long enough for one program each, and so many that all multiprocessors have several.
    table = source.view(-1, min(source.numel(), 1 << 14))
    timings = interleaved(
        {"copy": [lambda: target.copy_(source)], "read": [lambda: table.sum(1)]},
        machine.clock,
        rounds,
        accept=machine.accept,
    )
    return [
        _row("copy", 2 * source.nbytes, timings["copy"]),
        _row("read", source.nbytes, timings["read"]),
    ]


def _row(kind: str, moved: int, timing: Timing) -> RoofRow:
    rate = moved * 1e-9
    return RoofRow(kind, moved, rate / timing.median, rate / timing.p80, rate / timing.p20)
