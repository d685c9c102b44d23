"""Group, layer, instance and RMS norm in Triton's interpreter, forward and backward."""

from __future__ import annotations

import pytest
import torch

from tests import norm_cases, norms
from tests.norm_cases import Way
from tests.norms import NormCase
from tritonnorm import functional
from tritonnorm.kernels.base import Config
from tritonnorm.plan import force_plan


@pytest.mark.parametrize(("case", "way"), norm_cases.one_way_each()[::6], ids=str)
def test_matrix(case: NormCase, way: Way) -> None:
    algorithm, tiles = way
    config = norm_cases.small(case) if tiles else None
    norms.check(case, "cpu", algorithm, config)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_rows_in_several_tiles(norm: str) -> None:
    """Splits of a row, each of several tiles."""
    case = NormCase(norm, (5, 100), activation="silu")
    norms.check(case, "cpu", "group_split", Config(16, 1, 2, splits=3))


@pytest.mark.parametrize("size", [1, 2, 1 << 10, (1 << 14) + 1])
def test_rows_of_any_length(size: int) -> None:
    """The plan finds a way for rows from 1 to 2^20 elements; the longest below, in larger tiles."""
    norms.check(NormCase("layer", (2, size)))


@pytest.mark.slow
def test_a_row_of_a_million() -> None:
    """Split over programs. Tiles are larger than on a GPU: the interpreter is slow."""
    case = NormCase("layer", (1, 1 << 20), needs="xwb")
    norms.check(case, "cpu", "group_split", Config(1 << 17, 1, 1, splits=3))


def test_large_group_in_pieces() -> None:
    """A group of many tiles in both orders, by the formula's configuration."""
    for layout in ("contiguous", "channels_last"):
        for algorithm in ("group_resident", "group_split"):
            norms.check(NormCase("group", (1, 4, 50, 20), 2, layout), "cpu", algorithm)


@pytest.mark.parametrize("algorithm", ["group_resident", "group_split"])
def test_a_large_mean_costs_no_digits(algorithm: str) -> None:
    """Mean 1e4, deviation 2: E[x^2] - E[x]^2 would have no digit left of the variance."""
    norms.check(NormCase("group", (2, 4, 16, 16), 2, mean=1e4), "cpu", algorithm)
    norms.check(NormCase("layer", (4, 300), mean=1e4), "cpu", algorithm)


@pytest.mark.parametrize("algorithm", ["group_resident", "group_split"])
def test_same_bits_twice(algorithm: str) -> None:
    for case in (NormCase("group", (3, 6, 5, 5), 2), NormCase("layer", (33, 20))):
        data = norms.build(case)
        with force_plan(algorithm):
            a, b = (norms.results(norms.by_tritonnorm, case, data) for _ in range(2))
        for name in a:
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("wrong", ["y", "dx", "dweight"])
def test_the_check_itself_sees_errors(wrong: str) -> None:
    """One element off by a percent is an error."""
    case = NormCase("group", (2, 4, 3, 3), 2)
    data = norms.build(case)
    right = norms.results(norms.by_torch, case, data)
    norms.compare(case, data, right, right)
    off = right[wrong].clone()
    off.view(-1)[-1] += 0.01
    with pytest.raises(AssertionError, match=wrong):
        norms.compare(case, data, right | {wrong: off}, right)


def test_saves_no_activation() -> None:
    """Kept for backward: the input, the residual, and vectors."""
    x, residual = torch.randn(2, 2, 4, 8, 8).requires_grad_().unbind(0)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        functional.group_norm(x, 2, activation="silu", residual=residual)
    known = {x.data_ptr(), residual.data_ptr()}
    assert max(t.numel() for t in kept if t.data_ptr() not in known) <= 4


def test_input_changed_in_place_before_backward() -> None:
    """The backward recomputes from the input, so autograd must refuse one that has changed."""
    y = torch.randn(4, 3, requires_grad=True) * 1.0
    z = functional.layer_norm(y, (3,), activation="relu")
    y.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
