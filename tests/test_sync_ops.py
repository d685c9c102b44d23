"""The operators around the collectives: schema, fakes, and what they add up to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests import cases, matrix
from tritonnorm import force_plan
from tritonnorm import ops as _ops  # noqa: F401  registers torch.ops.tritonnorm
from tritonnorm.kernels.base import Config
from tritonnorm.sync import ops as _sync_ops  # noqa: F401  and the four around collectives
from tritonnorm.sync.functional import sync_batch_norm

OPS = torch.ops.tritonnorm


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


KINDS = [
    ("contiguous", "", (), False),
    ("channels_last", "relu", (), True),
    ("crop", "leaky_relu", (0.2,), False),
    ("contiguous", "gelu", (), True),
]
SHAPE = (3, 5, 4, 6)


def samples(layout: str, act: str, args: tuple[float, ...], residual: bool) -> dict[str, Any]:
    """Arguments of each operator, those after the first computed by the ones before."""
    x = cases.LAYOUTS[layout](tensor(*SHAPE))
    z = tensor(*SHAPE, seed=1) if residual else None
    weight, bias = tensor(5, seed=2), tensor(5, seed=3)
    buffers = (tensor(5, seed=4), tensor(5, seed=5).abs(), torch.tensor(2))
    mask = act == "relu"
    with matrix.poisoned():
        own = OPS.moments(x)
        found: dict[str, Any] = {"moments": (x,)}
        found["apply_moments"] = (
            x, z, weight, bias, own[None], *buffers, None, 1e-5, act, list(args), mask,
        )  # fmt: skip
        _, mean, rstd, merged, bits = OPS.apply_moments(
            *[t.clone() if isinstance(t, Tensor) else t for t in found["apply_moments"]]
        )
        kept = z if act and not mask else None
        saved = (tensor(*SHAPE, seed=6), x, kept, bits if mask else None, weight, bias, mean, rstd)
        found["gradient_sums"] = (*saved, act, list(args), [True, True])
        sums, _, _ = OPS.gradient_sums(*found["gradient_sums"])
    found["apply_gradient_sums"] = (*saved, sums, merged[0], act, list(args), [True, residual])
    return found


@pytest.mark.parametrize("kind", KINDS[1:2], ids=str)
@pytest.mark.parametrize(
    "name", ["moments", "apply_moments", "gradient_sums", "apply_gradient_sums"]
)
def test_opcheck(name: str, kind: Any) -> None:
    results = torch.library.opcheck(getattr(OPS, name).default, samples(*kind)[name])
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_rank_is_split(kind: Any) -> None:
    """With the moments of one rank, the four operators are the two of `split`."""
    _, act, args, residual = kind
    found = samples(*kind)
    x, z, weight, bias, moments, *_ = found["apply_moments"]
    buffers = (tensor(5, seed=4), tensor(5, seed=5).abs(), torch.tensor(2))
    twins = [t.clone() for t in buffers]
    mask = act == "relu"
    with force_plan("split"), matrix.poisoned():
        ours = OPS.apply_moments(
            x, z, weight, bias, moments, *buffers, None, 1e-5, act, list(args), mask
        )
        whole = OPS.batch_norm_training(
            x, z, weight, bias, *twins, None, 1e-5, act, list(args), mask
        )
        needs = [True, residual, True, True]
        gradients = OPS.batch_norm_backward(
            *found["gradient_sums"][:8], True, act, list(args), needs
        )
        _, dweight, dbias = OPS.gradient_sums(*found["gradient_sums"])
        dx, dresidual = OPS.apply_gradient_sums(*found["apply_gradient_sums"])
    y, mean, rstd, _, bits = ours
    pairs = [
        *zip((y, mean, rstd, bits), whole, strict=True),
        *zip((dx, dresidual, dweight, dbias), gradients[:4], strict=True),
        *zip(buffers, twins, strict=True),
    ]
    for a, b in pairs:
        assert a.shape == b.shape
        if a.numel():  # what is not asked for is empty
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_moments_of_many_splits() -> None:
    """The partial moments of a tensor are merged: count, mean, centred second moment."""
    x = tensor(7, 3, 5, 4) * 3 + 100
    with force_plan("split", Config(1, 1, 8, splits=5)), matrix.poisoned():
        count, mean, m2 = OPS.moments(x)
    assert count.eq(7 * 5 * 4).all()
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-13, atol=0)
    torch.testing.assert_close(m2, x.var((0, 2, 3), correction=0) * 140, rtol=1e-11, atol=0)


def test_a_hook_that_gives_back_another_memory_order() -> None:
    """Bits of the mask lie in the order of the forward."""
    x = tensor(4, 9, 5, 6).to(memory_format=torch.channels_last)
    residual, dy = tensor(4, 9, 5, 6, seed=1), tensor(4, 9, 5, 6, seed=2)

    def gradients() -> list[Tensor]:
        own, z = x.detach().requires_grad_(), residual.clone().requires_grad_()
        weight = torch.ones(9, dtype=torch.float64, requires_grad=True)
        y = sync_batch_norm(
            own, None, None, weight, None, 0.1, 1e-5, 1, group, "relu", (), z, None
        )  # fmt: skip
        return list(torch.autograd.grad(y, (own, z, weight), dy))

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD.group_name
        expected = gradients()
        with saved_tensors_hooks(lambda t: t.clone(memory_format=FORM), lambda t: t):
            found = gradients()
    finally:
        dist.destroy_process_group()
    for plain, hooked in zip(expected, found, strict=True):
        assert torch.equal(plain, hooked)


FORM = torch.contiguous_format
