"""The algebra of folding, held against torch's own operations in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritonnorm.fold.algebra import (
    Folded,
    FoldRefused,
    ScaleShift,
    cast,
    channel_maximum,
    fold_conv,
    fold_conv_transpose,
    scale_shift,
)

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _rand(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _bn(channels: int, affine: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    mean, var = _rand(channels, seed=1), _rand(channels, seed=2).abs() + 0.1
    gamma, beta = (_rand(channels, seed=3), _rand(channels, seed=4)) if affine else (None, None)
    return mean, var, gamma, beta


@settings(max_examples=40, deadline=None)
@given(
    rank=st.sampled_from([1, 2, 3]),
    groups=st.integers(1, 3),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    bias=st.booleans(),
    affine=st.booleans(),
    transposed=st.booleans(),
    stride=st.integers(1, 2),
)
def test_convolutions_of_every_shape(
    rank: int,
    groups: int,
    inputs: int,
    outputs: int,
    bias: bool,
    affine: bool,
    transposed: bool,
    stride: int,
) -> None:
    """Groups times (inputs -> outputs) channels, so c_in == c_out with groups > 1 is among them."""
    c_in, c_out = groups * inputs, groups * outputs
    operation = (TRANSPOSE if transposed else CONV)[rank]
    shape = (c_in, outputs) if transposed else (c_out, inputs)
    weight = _rand(*shape, *(2,) * rank)
    old_bias = _rand(c_out, seed=7) if bias else None
    x = _rand(2, c_in, *(4,) * rank)
    mean, var, gamma, beta = _bn(c_out, affine)
    raw = operation(x, weight, old_bias, stride=stride, groups=groups)
    expected = F.batch_norm(raw, mean, var, gamma, beta, eps=1e-3)
    affine_form = scale_shift(mean, var, 1e-3, gamma, beta)
    if transposed:
        folded = fold_conv_transpose(weight, old_bias, groups, affine_form)
    else:
        folded = fold_conv(weight, old_bias, affine_form)
    got = operation(x, folded.weight, folded.bias, stride=stride, groups=groups)
    assert folded.weight.shape == weight.shape
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    weight, old = _rand(5, 3), _rand(5, seed=9) if bias else None
    x = _rand(4, 3)
    mean, var, gamma, beta = _bn(5, True)
    folded = fold_conv(weight, old, scale_shift(mean, var, 1e-5, gamma, beta))
    expected = F.batch_norm(F.linear(x, weight, old), mean, var, gamma, beta, eps=1e-5)
    torch.testing.assert_close(
        F.linear(x, folded.weight, folded.bias), expected, rtol=0, atol=1e-12
    )


def test_arithmetic_is_float64_whatever_the_dtypes() -> None:
    mean, var = torch.full((2,), 0.1, dtype=torch.float16), torch.ones(2, dtype=torch.bfloat16)
    affine = scale_shift(mean, var, 1e-8, None, None)
    assert affine.scale.dtype == affine.shift.dtype == torch.float64
    # 1 + 1e-8 is 1 in any lower precision
    assert affine.scale[0].item() == pytest.approx((1 + 1e-8) ** -0.5, rel=1e-15)
    folded = fold_conv(torch.ones(2, 1, dtype=torch.float16), None, affine)
    assert folded.weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cast_is_off_by_half_a_unit_at_most(dtype: torch.dtype) -> None:
    weight = torch.rand(64, 64, dtype=torch.float64) + 1  # in [1, 2) one unit is eps
    folded = Folded(weight, torch.zeros(64).double())
    stored = cast(folded, weight.to(dtype), channel_maximum(weight)).weight
    assert stored.dtype == dtype
    worst = (stored.double() - weight).abs().max().item() / torch.finfo(dtype).eps
    assert 0.4 < worst < 0.5 * (1 + 2**-10)


def test_cast_keeps_the_memory_format() -> None:
    like = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    folded = Folded(like.double(), torch.zeros(4).double())
    got = cast(folded, like, channel_maximum(folded.weight)).weight
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got, like)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"var": torch.tensor([1.0, -1e-3, 1.0])}, r"running_var is negative \(channel 1\)"),
        ({"var": torch.tensor([0.0, 1.0, 0.0])}, r"running_var \+ eps is 0 \(channel 0, 2\)"),
        ({"var": torch.tensor([1.0, float("inf"), 1.0])}, r"running_var is not finite"),
        ({"mean": torch.tensor([float("nan"), 0, 0])}, r"running_mean is not finite \(channel 0\)"),
        ({"gamma": torch.full((3,), float("inf"))}, r"weight is not finite \(channel 0, 1, 2\)"),
        ({"beta": torch.tensor([0.0, 0.0, float("nan")])}, r"bias is not finite \(channel 2\)"),
    ],
)
def test_bad_statistics_are_refused(change: dict[str, Tensor], message: str) -> None:
    given_ = {"mean": torch.zeros(3), "var": torch.ones(3), "gamma": None, "beta": None} | change
    with pytest.raises(FoldRefused, match=message):
        scale_shift(given_["mean"], given_["var"], 0.0, given_["gamma"], given_["beta"])


def test_zero_eps_is_fine_while_the_variance_is_not_zero() -> None:
    affine = scale_shift(torch.zeros(2), torch.tensor([4.0, 0.25]), 0.0, None, None)
    assert affine.scale.tolist() == [0.5, 2.0]


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        ([1.0, 7e4], [0.0, 0.0], r"weight overflows in float16 \(channel 1\)"),
        ([1.0, 1.0], [-7e4, 0.0], r"bias overflows in float16 \(channel 0\)"),
        ([1e-6, 1.0], [0.0, 0.0], r"weight is subnormal in float16 \(channel 0\)"),
    ],
)
def test_what_does_not_fit_the_dtype_is_refused(
    weight: list[float], bias: list[float], message: str
) -> None:
    folded = Folded(
        torch.tensor(weight, dtype=torch.float64)[:, None], torch.tensor(bias, dtype=torch.float64)
    )
    half = torch.zeros(2, 1, dtype=torch.float16)
    with pytest.raises(FoldRefused, match=message):
        cast(folded, half, channel_maximum(folded.weight))
    single = cast(folded, half.float(), channel_maximum(folded.weight))
    assert torch.isfinite(single.weight).all()


def test_a_dead_channel_folds_to_zero() -> None:
    affine = ScaleShift(torch.tensor([0.0, 1.0]).double(), torch.tensor([3.0, 0.0]).double())
    folded = fold_conv(torch.randn(2, 3), None, affine)
    stored = cast(folded, torch.zeros(2, 3), channel_maximum(folded.weight))
    assert stored.weight[0].tolist() == [0, 0, 0]
    assert stored.bias[0].item() == 3


def test_channel_maximum_of_a_transposed_layer_is_per_output_channel() -> None:
    """Two groups of 1 -> 2 channels: the weight is (2, 2, 1), output channels in reading order."""
    weight = torch.tensor([[[1.0], [-2.0]], [[3.0], [4.0]]])
    assert channel_maximum(weight, groups=2).tolist() == [1, 2, 3, 4]
    assert channel_maximum(weight).tolist() == [2, 4]
