"""The masked batch norm, compiled: no spills, no stack, sequences in accesses of 128 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.lab.fake_driver import fake_driver
from tritonnorm.device import KNOWN, simulated
from tritonnorm.sequences.masked import masked_batch_norm


def run(
    layout: str, dtype: torch.dtype, activation: str | None, training: bool = True
) -> tuple[Tensor, ...]:
    shape = (32, 256, 512) if layout == "NCL" else (32, 512, 256)
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    w, b = (torch.ones(256, dtype=kind, requires_grad=True) for _ in range(2))
    lengths = torch.arange(32) * 16
    running = torch.zeros(256, dtype=kind), torch.ones(256, dtype=kind)
    y = masked_batch_norm(
        x, *running, w, b, training, lengths=lengths, layout=layout, activation=activation
    )
    return torch.autograd.grad(y, (x, w, b), torch.ones_like(y))


def test_the_number_of_valid_positions_is_no_new_kernel() -> None:
    with simulated(KNOWN["h200"]), fake_driver() as log:
        run("NLC", torch.bfloat16, "relu")
        known = log.variant_count()
        x = torch.ones(16, 384, 256, dtype=torch.bfloat16)
        w, b = torch.ones(256), torch.ones(256)
        for lengths in (torch.full((16,), 7), torch.arange(16)):
            masked_batch_norm(
                x, w.clone(), b.clone(), w, b, True, lengths=lengths, layout="NLC",
                activation="relu",
            )  # fmt: skip
        assert log.variant_count() == known
