"""The correctness matrix on a GPU: every case in every way, every activation at its edges."""

from __future__ import annotations

import pytest
import torch

from tests import cases, matrix
from tests.cases import Case, Way
from tests.test_activations import PARAMETERS, check_activation

EVERY = [(case, way) for case in cases.CASES for way in cases.ways(case)]
#: Sizes of real layers, small enough for float64 on the CPU.
LAYERS = [
    Case(
        shape, layout, dtype, torch.float32, training=training, activation="relu", residual=residual
    )
    for shape, layout in (
        ((8, 64, 56, 56), "contiguous"),
        ((8, 64, 56, 56), "channels_last"),
        ((16, 512, 7, 7), "contiguous"),
        ((16, 512, 7, 7), "channels_last"),
        ((4, 256, 14, 14), "channels_last"),
        ((1024, 1000), "contiguous"),
        ((2, 32, 8, 28, 28), "channels_last"),
        ((2, 1, 300, 301), "contiguous"),
    )
    for dtype in (torch.float32, torch.bfloat16)
    for training, residual in ((True, None), (True, layout), (False, layout))
]


@pytest.mark.parametrize(("case", "way"), EVERY, ids=str)
def test_matrix(case: Case, way: Way) -> None:
    algorithm, tiles = way
    matrix.check(case, "cuda", algorithm, tiles=tiles)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layers(case: Case) -> None:
    matrix.check(case, "cuda")


@pytest.mark.parametrize("case", LAYERS[::6], ids=str)
def test_same_bits_twice(case: Case) -> None:
    data = matrix.build(case, "cuda")
    a, b = (matrix.results(matrix.by_tritonnorm, case, data, gradients=True) for _ in range(2))
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "args"), PARAMETERS)
def test_epilogue(name: str, args: tuple[float, ...], dtype: torch.dtype) -> None:
    check_activation(name, args, dtype, "cuda")


def test_runs_on_the_tensors_device() -> None:
    """Not on the current one."""
    last = torch.cuda.device_count() - 1
    with torch.cuda.device(0):
        matrix.check(Case((3, 5, 4, 6), activation="relu", residual="contiguous"), f"cuda:{last}")


def test_side_stream() -> None:
    """Kernels go to the current stream; what runs on the default one does not matter."""
    case = Case((3, 5, 4, 6), momentum=None)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        matrix.check(case, "cuda")
