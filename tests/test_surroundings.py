"""What lies around a call, or in the bits of a tensor, and must not change its result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import tritonnorm
from bench.launches import observe

SHAPE = (4, 6, 3, 5)
NORMS = {
    "batch": (lambda: tritonnorm.BatchNorm2d(6), lambda: nn.BatchNorm2d(6)),
    "group": (lambda: tritonnorm.GroupNorm(2, 6), lambda: nn.GroupNorm(2, 6)),
    "layer": (lambda: tritonnorm.LayerNorm(5), lambda: nn.LayerNorm(5)),
    "instance": (lambda: tritonnorm.InstanceNorm2d(6), lambda: nn.InstanceNorm2d(6)),
}


def negative(*shape: int) -> Tensor:
    """A tensor whose memory holds its values with the other sign."""
    found = torch.randn(*shape, dtype=torch.complex64).conj().imag
    assert found.is_neg()
    return found


@pytest.fixture(params=NORMS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    ours, plain = (make() for make in NORMS[request.param])
    for module in (ours, plain):
        torch.manual_seed(0)
        with torch.no_grad():
            for p in module.parameters():
                p.uniform_(0.5, 1.5)
    return ours, plain


def test_the_negative_bit(pair: Any) -> None:
    x, grad = negative(*SHAPE), torch._neg_view(torch.randn(SHAPE))
    found = []
    for module in pair:
        at = x.detach().requires_grad_()
        y = module(at)
        found.append((y, *torch.autograd.grad(y, [at, *module.parameters()], grad)))
    torch.testing.assert_close(*found)


def test_the_negative_bit_of_a_residual_and_of_parameters() -> None:
    x, z, weight, bias = torch.randn(SHAPE), negative(*SHAPE), negative(6), negative(6)
    found = tritonnorm.functional.batch_norm(
        x, None, None, weight, bias, True, residual=z, activation="relu"
    )
    plain = nn.functional.batch_norm(x, None, None, weight, bias, True)
    torch.testing.assert_close(found, (plain + z).relu())


@pytest.mark.parametrize("by_context", [False, True])
def test_a_default_device_is_no_override(pair: Any, by_context: bool) -> None:
    ours, plain = pair
    x = torch.randn(SHAPE)
    expected = plain(x)
    if not by_context:
        torch.set_default_device("cpu")
    try:
        with torch.device("cpu") if by_context else torch.no_grad(), observe() as seen:
            y = ours(x)
    finally:
        torch.set_default_device(None)
    assert sum(seen.interpreted.values()) == 1 and not seen.torch
    torch.testing.assert_close(y, expected)


def test_checks_are_made_under_a_default_device() -> None:
    module = tritonnorm.BatchNorm2d(6)
    with torch.device("cpu"):
        with pytest.raises(ValueError, match="expected 4D input"):
            module(torch.randn(4, 6))
        with pytest.raises(ValueError, match="residual: expected the shape"):
            module(torch.randn(SHAPE), torch.randn(4, 6, 3, 1))


def test_other_overrides_under_a_default_device_count() -> None:
    class Tagged(Tensor):
        pass

    x = torch.randn(SHAPE).as_subclass(Tagged)
    with torch.device("cpu"):
        assert type(tritonnorm.BatchNorm2d(6)(x)) is type(nn.BatchNorm2d(6)(x)) is Tagged


def test_a_replaced_block_under_a_default_device() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU())
    x = torch.randn(SHAPE)
    expected = model(x)
    tritonnorm.replace(model)
    with torch.device("cpu"), observe() as seen:
        y = model(x)
    assert seen.interpreted and not seen.torch
    torch.testing.assert_close(y, expected)


@pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")  # torch's own
def test_forward_mode_derivatives(pair: Any) -> None:
    x, tangent = torch.randn(2, *SHAPE).unbind()
    found = []
    for module in pair:
        with forward_ad.dual_level():
            y = module(forward_ad.make_dual(x, tangent))
            found.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")  # torch's own
def test_forward_mode_derivatives_by_a_weight_in_front_of_a_norm() -> None:
    conv = tritonnorm.ConvBatchNorm2d(6, 6, 1).eval()
    x, weight = torch.randn(SHAPE), conv.conv.weight
    tangent = torch.randn_like(weight)

    def of(by: Tensor) -> Tensor:
        return torch.func.functional_call(conv, {"conv.weight": by}, (x,))

    with torch.no_grad(), forward_ad.dual_level():
        y = of(forward_ad.make_dual(weight.detach(), tangent))
        found = forward_ad.unpack_dual(y).tangent
    assert found is not None
    torch.testing.assert_close(found, torch.func.jvp(of, (weight.detach(),), (tangent,))[1])


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor(layout: torch.layout) -> None:
    x = torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)], layout=layout)
    ours, plain = (make() for make in NORMS["layer"])
    for mine, theirs in zip(ours(x).unbind(), plain(x).unbind(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_counter_of_another_dtype(dtype: torch.dtype, momentum: float | None) -> None:
    """As some checkpoints have it; torch's module adds 1 to whatever is there."""
    found = []
    for kind in (tritonnorm.BatchNorm2d, nn.BatchNorm2d):
        module = kind(6, momentum=momentum)
        module.num_batches_tracked = torch.tensor(2, dtype=dtype)
        torch.manual_seed(0)
        y = module(torch.randn(SHAPE))
        found.append((y, module.running_mean, module.running_var, module.num_batches_tracked))
    torch.testing.assert_close(*found)
