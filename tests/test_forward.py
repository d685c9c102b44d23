"""The forward, without gradients: the matrix in Triton's interpreter, and the candidates."""

from __future__ import annotations

import pytest
import torch

from tests import cases, matrix
from tests.cases import Case, Way
from tritonnorm import functional
from tritonnorm.device import INTERPRETER
from tritonnorm.kernels import BY_NAME
from tritonnorm.problem import Problem, View

FORWARD = [*cases.OF_LAYOUT, *cases.OF_DTYPE, *cases.OF_OPTIONS, *cases.OF_SIZE]


@pytest.mark.parametrize(("case", "way"), cases.one_way_each(FORWARD, "forward"), ids=str)
def test_matrix(case: Case, way: Way) -> None:
    algorithm, tiles = way
    matrix.check(case, "cpu", algorithm, tiles=tiles, gradients=False)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("algorithm", ["split", "resident", "affine"])
def test_candidates(algorithm: str, layout: str) -> None:
    """What a tuner may time must be right."""
    case = Case(
        (2, 9, 3, 8), layout, training=algorithm != "affine", activation="relu", residual=layout
    )
    x = matrix.build(case).x
    view = View.of(x.shape, x.stride(), x.stride())
    problem = Problem(
        "forward", case.training, view, case.dtype, "two_valued", residual=True, mask=True
    )
    candidates = BY_NAME[algorithm].configs(problem, INTERPRETER)
    for config in candidates[:: max(1, len(candidates) // 4)]:
        matrix.check(case, "cpu", algorithm, config=config)


def test_grad_mode_changes_nothing() -> None:
    case = Case((3, 5, 4, 6), activation="relu", residual="contiguous")
    data = matrix.build(case)
    without = matrix.results(matrix.by_tritonnorm, case, data, gradients=False)
    recorded = matrix.results(matrix.by_tritonnorm, case, data, gradients=True)
    for name, value in without.items():
        assert torch.equal(value, recorded[name]), name


def test_eval_leaves_the_counter_alone() -> None:
    x, mean, var, counter = torch.randn(3, 2, 4), torch.zeros(2), torch.ones(2), torch.tensor(7)
    functional.batch_norm(x, mean, var, training=False, num_batches_tracked=counter)
    assert counter.item() == 7


def test_poison_reaches_what_the_operators_allocate() -> None:
    """The instrument itself: an allocation that nobody writes is NaN, a mask 0xA5."""
    with matrix.poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(2, 2)).isnan().all()
        assert torch.empty_strided((2, 2), (1, 2)).isnan().all()
        assert torch.zeros(1).new_empty((2, 3), dtype=torch.float64).isnan().all()
        assert (torch.zeros(1).new_empty(4, dtype=torch.uint8) == 0xA5).all()


@pytest.mark.parametrize("wrong", ["y", "running_mean", "counter"])
def test_the_check_itself_sees_errors(wrong: str) -> None:
    """One element off by a percent, one statistic, or one count too many is an error."""
    case = Case((3, 5, 4, 6))
    data = matrix.build(case)
    right = matrix.results(matrix.by_torch, case, data, gradients=True)
    matrix.compare(case, data, right, right)
    off = right[wrong].clone()
    off.view(-1)[-1] += 1 if wrong == "counter" else 0.01
    with pytest.raises(AssertionError, match=wrong):
        matrix.compare(case, data, right | {wrong: off}, right)
