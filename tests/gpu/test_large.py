"""Tensors of more than 2^31 elements: every offset in 64 bits, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import matrix
from tritonnorm import functional
from tritonnorm.plan import force_plan

LIMIT = 2**31
CHUNK = 1 << 26


def moments(x: Tensor, channel: int) -> tuple[float, float]:
    """Mean and biased variance of a channel in float64, a sample at a time."""
    parts = [part.double() for part in x.select(1, channel).reshape(-1).split(CHUNK)]
    count = sum(p.numel() for p in parts)
    mean = sum(float(p.sum()) for p in parts) / count
    return mean, sum(float((p - mean).square().sum()) for p in parts) / count


@pytest.mark.parametrize("gibibytes", [44])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 3, 20000, 18000), "contiguous"),  # > 2^31 in total, a plane below
        ((1, 2, 40000, 27000), "contiguous"),  # few channels: the splits go far
        ((2, 3, 20000, 18000), "channels_last"),
        ((36_000_000, 60), "contiguous"),  # (N, C), rows not a multiple of 16 channels
        ((5, 400, 1039, 1039), "contiguous"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("room")
def test_beyond_int32(shape: tuple[int, ...], layout: str, gibibytes: int) -> None:
    """Output and input gradient at both ends of the first and last channel, against float64."""
    assert torch.Size(shape).numel() > LIMIT
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    x.normal_().requires_grad_()
    mean, var = torch.zeros(shape[1], device="cuda"), torch.zeros(shape[1], device="cuda")
    with matrix.ran() as ran:
        y = functional.batch_norm(x, mean, var, training=True, momentum=1.0, activation="relu")
        dy = torch.full_like(y, 1.0)
        (dx,) = torch.autograd.grad(y, x, dy)
    assert len(ran) == 2
    count = x.numel() // shape[1]
    for channel in (0, shape[1] - 1):
        m, v = moments(x.detach(), channel)
        assert abs(float(mean[channel]) - m) <= 1e-5
        assert abs(float(var[channel]) - v * count / (count - 1)) <= 1e-4
        xs, ys, ds = (t.detach().select(1, channel).reshape(-1) for t in (x, y, dx))
        rstd = (v + 1e-5) ** -0.5
        open_, weighted = 0.0, 0.0
        for part in xs.split(CHUNK):
            hat = (part.double() - m) * rstd
            open_ += float((hat > 0).sum())
            weighted += float(hat.clamp(min=0).sum())
        for part in (
            slice(0, 4096),
            slice(count // 2, count // 2 + 4096),
            slice(count - 4096, count),
        ):
            hat = (xs[part].double() - m) * rstd
            assert (ys[part] - hat.clamp(min=0)).abs().max() <= 2 * 2.0**-8 * 8
            expected = rstd * ((hat > 0).double() - open_ / count - hat * weighted / count)
            away = hat.abs() > 1e-2  # from the gate, where rounding may decide
            assert (ds[part] - expected)[away].abs().max() <= 2.0**-7 * 2


@pytest.mark.parametrize("gibibytes", [24])
@pytest.mark.usefixtures("room")
def test_inference_beyond_int32(gibibytes: int) -> None:
    """The last elements of a sliced input, whose strides reach further than the output's."""
    base = torch.empty((3, 5, 16000, 9000), dtype=torch.bfloat16, device="cuda").normal_()
    x = base[:, 1:]
    assert base.numel() > LIMIT
    mean, var = torch.zeros(4, device="cuda"), torch.ones(4, device="cuda")
    with torch.no_grad(), matrix.ran() as ran:
        y = functional.batch_norm(x, mean, var, activation="leaky_relu", eps=0.0)
    assert ran == ["affine"]
    for n in range(3):
        for c in range(4):
            expected = torch.nn.functional.leaky_relu(x[n, c, -1].float()).bfloat16()
            assert torch.equal(y[n, c, -1], expected)


@pytest.mark.parametrize("gibibytes", [44])
@pytest.mark.usefixtures("room")
def test_mask_beyond_int32(gibibytes: int) -> None:
    """A bit mask of a tensor beyond 2^31 elements opens and shuts the right gates."""
    shape = (1, 2, 33000, 33000)
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    x[..., ::2] = 1.0
    residual = torch.zeros_like(x)
    residual[:, :, -1] = 9.0  # the last row is open everywhere
    residual.requires_grad_()
    with force_plan("split"):
        y = functional.batch_norm(
            x, None, None, training=True, activation="relu", residual=residual
        )
        (dresidual,) = torch.autograd.grad(y, residual, torch.ones_like(y))
    for row in (0, 16500, 32998):
        assert (dresidual[:, :, row, ::2] == 1).all() and (dresidual[:, :, row, 1::2] == 0).all()
    assert (dresidual[:, :, -1] == 1).all()
