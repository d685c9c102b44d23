"""The folded weight of the modules of `conv_nn`: when it is made again, and no copy of it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from unittest import mock

import pytest
import torch

import tritonnorm
from tests.blocks import (
    Block,
    apart,
    close,
    folded,
    make,
    sample,
)
from tritonnorm import folding


def _ema(m: Block) -> None:
    for p in m.parameters():
        p.data = p.data * 0.5


def _replace_parameter(m: Block) -> None:
    m.conv.weight = torch.nn.Parameter(m.conv.weight.detach() * 2)


def _replace_buffer(m: Block) -> None:
    m.bn.running_mean = m.bn.running_mean + 1


def _load(m: Block) -> None:
    m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()})


def _assign(m: Block) -> None:
    m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True)


def _in_place(name: str) -> Callable[[Block], None]:
    def change(m: Block) -> None:
        with torch.no_grad():
            m.get_parameter(name).mul_(1.5) if "running" not in name else m.get_buffer(name).add_(1)

    return change


def _step(m: Block) -> None:
    m.train()
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    m(sample(2)).square().sum().backward()
    optimizer.step()
    m.eval()


def _eps(m: Block) -> None:
    m.bn.eps = 0.5


def _data_then_eval(m: Block) -> None:
    m.conv.weight.data.mul_(2)
    m.eval()


def _data_then_refresh(m: Block) -> None:
    m.bn.running_var.data.mul_(2)
    m.refresh()


def _remove_bias(m: Block) -> None:
    m.conv.bias = None


TENSORS = ["conv.weight", "conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"]


@pytest.mark.parametrize(
    "change",
    [
        *(pytest.param(_in_place(name), id=name) for name in TENSORS),
        _ema, _replace_parameter, _replace_buffer, _load, _assign, _step, _eps, _remove_bias,
        _data_then_eval, _data_then_refresh,
    ],
)  # fmt: skip
def test_a_change_is_noticed(change: Callable[[Block], None]) -> None:
    m, x = make(tritonnorm.ConvBatchNorm2d, 2), sample(2)
    before = folded(m, x)
    change(m)
    with torch.no_grad():
        close(folded(m, x), apart(m, x))
        assert not torch.allclose(folded(m, x), before)


def test_an_address_that_comes_back_is_another_tensor() -> None:
    """Swapping back and forth: new memory must not be taken for what lay at its address."""
    m, x = make(tritonnorm.ConvBatchNorm2d, 2), sample(2)
    for i in range(20):
        m.conv.weight.data = torch.zeros_like(m.conv.weight)  # lets go of what is folded now
        m.conv.weight.data = torch.full_like(m.conv.weight, float(i))  # may lie where that lay
        with torch.no_grad():
            close(folded(m, x), apart(m, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_change_of_dtype_is_noticed(dtype: torch.dtype) -> None:
    m = make(tritonnorm.ConvBatchNorm2d, 2)
    folded(m, sample(2))
    assert folded(m.to(dtype), sample(2, dtype)).dtype == dtype
    assert folded(m.double(), sample(2)).dtype == torch.float64


def test_the_fold_is_kept() -> None:
    m, x = make(tritonnorm.ConvBatchNorm2d, 2), sample(2)
    folded(m, x)
    with mock.patch.object(folding, "fold", side_effect=AssertionError):
        first = folded(m, x)
        assert torch.equal(first, folded(m, x))
        m.zero_grad()
        m.requires_grad_(False)
        m(x)


def test_what_cannot_be_noticed() -> None:
    """The limit that the documentation states: a write through `.data` in eval mode."""
    m, x = make(tritonnorm.ConvBatchNorm2d, 2), sample(2)
    before = folded(m, x)
    m.conv.weight.data.mul_(2)
    assert torch.equal(folded(m, x), before)


def test_copies_and_pickles_have_no_cache() -> None:
    m, x = make(tritonnorm.ConvBatchNorm2d, 2), sample(2)
    bare = len(pickle.dumps(m))
    y = folded(m, x)
    assert len(pickle.dumps(m)) == bare
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    for other in (
        copy.deepcopy(m),
        pickle.loads(pickle.dumps(m)),
        torch.load(file, weights_only=False),
    ):
        assert other._folded is None
        assert torch.equal(folded(other, x), y)
        other.conv.weight.data.zero_()
        assert torch.equal(folded(m, x), y)


def test_inference_mode_and_then_gradients() -> None:
    m, x = make(tritonnorm.ConvBatchNorm2d, 2), sample(2)
    m.requires_grad_(False)
    with torch.inference_mode():
        y = m(x)
    (dx,) = torch.autograd.grad(m(x.requires_grad_()).sum(), x)
    assert dx.isfinite().all() and torch.equal(m(x).detach(), y)
    with torch.inference_mode():
        other = make(tritonnorm.ConvBatchNorm2d, 2)
        close(other(sample(2)), y)
        assert other._folded is None
    with torch.no_grad():
        close(m(x), y)
    assert m._folded is not None
    with torch.inference_mode():  # from remembered to not memorable
        m.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=True)
    assert m.conv.weight.is_inference()
    with torch.inference_mode():
        close(m(sample(2)), y)


class Tagged(torch.Tensor):
    """A subclass that shares the memory of a plain tensor."""


def test_a_subclass_of_the_same_memory_is_not_taken_for_it() -> None:
    m, x = make(tritonnorm.ConvBatchNorm2d, 2).requires_grad_(False), sample(2)
    folded(m, x)
    tagged = m.conv.weight.detach().as_subclass(Tagged)
    del m.conv._parameters["weight"]
    m.conv._parameters["weight"] = tagged
    assert type(m(x)) is Tagged
