"""The masked batch norm and the recurrent one on a GPU."""

from __future__ import annotations

import pytest
import torch

import tritonnorm
from tests.test_masked import DTYPES, check, padded

SIZES = [(16, 256, 300), (64, 48, 1), (5, 7, 4001)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["NCL", "NLC"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matrix(
    size: tuple[int, int, int], dtype: torch.dtype, layout: str, training: bool
) -> None:
    kind = "mask" if size[2] == 1 else "lengths"
    check(*padded(*size, kind=kind), layout, dtype, training, "cuda", activation="silu")


def test_no_wait_for_the_gpu(no_waiting) -> None:
    """Neither forward nor backward asks the GPU for the number of valid positions."""
    bn = tritonnorm.MaskedBatchNorm1d(32, layout="NLC").cuda()
    x = torch.randn(8, 50, 32, device="cuda", requires_grad=True)
    lengths = torch.arange(8, device="cuda") * 6
    bn(x, lengths=lengths).sum().backward()  # compiles
    with no_waiting():
        bn(x, lengths=lengths).sum().backward()


def test_an_lstm_on_the_gpu_is_that_on_the_cpu() -> None:
    layer = tritonnorm.BatchNormLSTM(6, 16, 8)
    x, lengths = torch.randn(10, 12, 6), torch.randint(0, 11, (12,))
    expected, (h, _) = layer(x, lengths)
    layer.cell.apply(
        lambda m: m.reset_running_stats() if hasattr(m, "reset_running_stats") else None
    )
    found, (own_h, _) = layer.cuda()(x.cuda(), lengths.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(own_h.cpu(), h, rtol=1e-3, atol=1e-4)
