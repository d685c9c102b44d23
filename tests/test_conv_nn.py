"""Convolution and batch norm as one module: the fold in eval mode, and when it is made again."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tritonnorm
from tests.blocks import (
    Block,
    apart,
    close,
    every,
    folded,
    layer_of,
    make,
    randomize,
    sample,
)
from tritonnorm import folding
from tritonnorm.activated import torch_class
from tritonnorm.fold import algebra


@every
def test_constructor_and_keys_are_those_of_the_layer(kind: Any, rank: int) -> None:
    ours = inspect.signature(kind).parameters
    theirs = inspect.signature(kind._layer_class).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[n].default == theirs[n].default for n in theirs)
    m = make(kind, rank, activation="leaky_relu", activation_args=(0.3,), eps=1e-3, momentum=None)
    name = "conv" if rank else "linear"
    layer = ["weight", "bias"]
    bn = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(m.state_dict()) == [*(f"{name}.{k}" for k in layer), *(f"bn.{k}" for k in bn)]
    assert (m.bn.eps, m.bn.momentum, m.bn.activation) == (1e-3, None, "leaky_relu")
    assert m.bn.activation_args == (0.3,)
    with pytest.raises(ValueError, match="activation"):
        make(kind, rank, activation="nothing")


@every
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_one_layer_in_eval_mode(
    kind: Any, rank: int, activation: str | None, residual: bool
) -> None:
    m, x = make(kind, rank, activation=activation), sample(rank)
    z = torch.randn_like(layer_of(m)(x)) if residual else None
    with torch.no_grad():
        close(folded(m, x, z), apart(m, x, z))


@every
def test_training_is_the_layer_and_the_fused_batch_norm(kind: Any, rank: int) -> None:
    m, x = make(kind, rank, activation="relu").train(), sample(rank)
    twin = copy.deepcopy(m)
    y = m(x)
    close(y, twin.bn(layer_of(twin)(x)))
    y.sum().backward()
    assert m.bn.num_batches_tracked == 1
    assert all(p.grad is not None for p in m.parameters())
    close(m.bn.running_var, twin.bn.running_var)


options = st.fixed_dictionaries(
    {
        "groups": st.sampled_from([1, 2, 4]),
        "stride": st.sampled_from([1, 2, (1, 2)]),
        "dilation": st.sampled_from([1, 2]),
        "padding": st.sampled_from([0, 1, (2, 1)]),
        "bias": st.booleans(),
        "eps": st.sampled_from([1e-5, 0.1]),
    }
)


@settings(max_examples=40, deadline=None)
@given(options, st.sampled_from(["zeros", "reflect", "replicate", "circular"]), st.booleans())
def test_every_convolution(chosen: dict[str, Any], padding_mode: str, channels_last: bool) -> None:
    m = make(tritonnorm.ConvBatchNorm2d, 2, **chosen, padding_mode=padding_mode)
    _same_in_both_formats(m, channels_last)


@settings(max_examples=40, deadline=None)
@given(options, st.sampled_from([0, (0, 1)]), st.booleans())
def test_every_transposed_convolution(
    chosen: dict[str, Any], output_padding: Any, channels_last: bool
) -> None:
    chosen["stride"] = 2
    m = make(tritonnorm.ConvTransposeBatchNorm2d, 2, **chosen, output_padding=output_padding)
    _same_in_both_formats(m, channels_last)


def _same_in_both_formats(m: Block, channels_last: bool) -> None:
    x = sample(2)
    if channels_last:
        m.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        close(folded(m, x), apart(m, x))
    assert m._folded.folded.weight.stride() == m.conv.weight.stride()


def test_padding_by_name_and_output_size() -> None:
    m, x = make(tritonnorm.ConvBatchNorm2d, 2, padding="same", dilation=2), sample(2)
    close(folded(m, x), apart(m, x).detach())
    t = make(tritonnorm.ConvTransposeBatchNorm2d, 2, stride=2)
    y = folded(t, x, None, [14, 12])
    assert y.shape[2:] == (14, 12)
    with torch.no_grad():
        close(y, t.bn(t.conv(x, [14, 12])))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounded_once(kind: Any, rank: int, dtype: torch.dtype) -> None:
    """The weight is the float64 fold of the parameters as they are stored, rounded once."""
    m, x = make(kind, rank, dtype), sample(rank, dtype)
    folded(m, x)
    bn, layer = m.bn, layer_of(m)
    affine = algebra.scale_shift(bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    if isinstance(layer, folding.TRANSPOSED):
        exact = algebra.fold_conv_transpose(layer.weight, layer.bias, layer.groups, affine)
    else:
        exact = algebra.fold_conv(layer.weight, layer.bias, affine)
    for ours, wanted in zip(m._folded.folded, (exact.weight, exact.bias), strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - wanted).abs()
        assert (error <= torch.finfo(dtype).eps / 2 * 1.0001 * wanted.abs() + 1e-7).all()


def test_statistics_in_float32_under_half_weights() -> None:
    m = make(tritonnorm.ConvBatchNorm2d, 2, torch.float32)
    m.conv.half()
    folded(m, sample(2, torch.float16))
    assert m._folded.folded.weight.dtype == torch.float16


@every
def test_gradients_in_eval_mode(kind: Any, rank: int) -> None:
    m, x = make(kind, rank, activation="silu"), sample(rank).requires_grad_()
    folded(m, x.detach())
    wanted = [x, *m.parameters()]
    mine = torch.autograd.grad(m(x).square().sum(), wanted)
    theirs = torch.autograd.grad(apart(m, x).square().sum(), wanted)
    for a, b in zip(mine, theirs, strict=True):
        close(a, b, 1e-11)
    m.requires_grad_(False)
    (dx,) = torch.autograd.grad(m(x).square().sum(), x)
    close(dx, theirs[0], 1e-11)
    assert m._folded is not None, "without gradients of parameters the folded layer runs"


@every
def test_from_modules_shares_the_parameters(kind: Any, rank: int) -> None:
    m = make(kind, rank)
    layer, norm = layer_of(m), torch_class(kind._norm_class)(12, eps=1e-2).double()
    randomize(norm, 5)
    joined = kind.from_modules(layer, norm.eval(), activation="relu")
    assert layer_of(joined) is layer and not joined.training
    assert joined.bn.weight is norm.weight and joined.bn.running_var is norm.running_var
    x = sample(rank)
    with torch.no_grad():
        close(folded(joined, x), torch.relu(norm(layer(x))))
    again = kind.from_modules(layer, joined.bn)
    assert again.bn is joined.bn
    with pytest.raises(ValueError, match="activation: expected None"):
        kind.from_modules(layer, joined.bn, activation="relu")
    with pytest.raises(ValueError, match="layer: expected"):
        kind.from_modules(torch.nn.Identity(), norm)
    with pytest.raises(ValueError, match="expected 12 channels, got 5"):
        kind.from_modules(layer, type(norm)(5))


def test_what_is_not_plain_runs_as_two_modules() -> None:
    x, ran = sample(2), []
    m = make(tritonnorm.ConvBatchNorm2d, 2)
    with torch.no_grad():
        y = folded(m, x)
        handle = m.conv.register_forward_hook(lambda *_: ran.append("conv"))
        close(m(x), y)
        handle.remove()
        assert ran == ["conv"] and m(x).equal(y)
        torch.nn.utils.parametrizations.weight_norm(m.conv)
        close(m(x), apart(m, x))
        without = make(tritonnorm.ConvBatchNorm2d, 2)
        without.bn = tritonnorm.BatchNorm2d(12, track_running_stats=False).double().eval()
        close(without(x), without.bn(without.conv(x)))
        linear = make(tritonnorm.LinearBatchNorm1d, 0)
        cube = torch.randn(2, 12, 8, dtype=torch.float64)
        close(linear(cube), linear.bn(linear.linear(cube)))
        with pytest.raises(ValueError, match="expected 4D input"):
            m(x[0])


def test_a_fold_that_does_not_fit_its_dtype_is_not_made(caplog: Any) -> None:
    m, x = make(tritonnorm.ConvBatchNorm2d, 2, torch.float16), sample(2, torch.float16)
    with torch.no_grad(), caplog.at_level("INFO", logger="tritonnorm"):
        m.bn.running_var[3] = 0.0
        m.bn.weight[3] = 300.0
        m.conv.weight[3] = 1.0
        m.conv.weight[3, ::2] = -1.0
        y = m(x)
    assert m._folded.folded is None and "not finite in float16" in caplog.text
    assert torch.equal(y, m.bn(m.conv(x)))


@pytest.mark.parametrize("what", ["shape", "dtype"])
def test_a_residual_that_does_not_fit(what: str) -> None:
    m, x = make(tritonnorm.ConvBatchNorm2d, 2), sample(2)
    z = folded(m, x)
    z = z[:, :1] if what == "shape" else z.float()
    for module in (m, copy.deepcopy(m).train()):
        with torch.no_grad(), pytest.raises(ValueError, match=f"residual: expected the {what}"):
            module(x, z)


def test_fold_and_replace_take_it() -> None:
    model = torch.nn.Sequential(
        make(tritonnorm.ConvBatchNorm2d, 2, torch.float32, activation="relu"), torch.nn.Flatten()
    ).eval()
    x = sample(2, torch.float32)
    with torch.no_grad():
        y = model(x)
        for inputs in (None, x):
            done, report = tritonnorm.fold(model, inputs)
            assert report.counts == {"folded": 1}, report
            assert not any("running" in name for name in done.state_dict())
            close(done(x), y, 1e-6)
            z = torch.randn_like(done[0](x))
            close(done[0](x, z), model[0](x, z), 1e-6)
    _, report = tritonnorm.replace(model)
    assert report.counts == {"left": 1}


def test_compile_and_export_follow_the_parameters() -> None:
    m, x = make(tritonnorm.ConvBatchNorm2d, 2), sample(2)
    with torch.no_grad():
        y = folded(m, x)
        compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
        close(compiled(x), y)
        m.bn.running_mean.add_(1)
        close(compiled(x), apart(m, x))
    torch._dynamo.reset()
