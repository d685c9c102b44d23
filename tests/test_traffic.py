"""Every algorithm moves exactly the bytes that its model says, and what the design asks for.

The interpreter counts. An access out of bounds or a race fails the count itself.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from bench.audit.traffic import count, count_all, layer_calls
from bench.call import DIRECTIONS, Call
from bench.launches import observe
from bench.layers import RESNET50, twin
from tritonnorm.device import KNOWN
from tritonnorm.kernels import ALGORITHMS, BY_NAME
from tritonnorm.kernels.base import Config
from tritonnorm.problem import FEW_ROWS, minimum_bytes

ROOT = Path(__file__).resolve().parent.parent
H200 = KNOWN["h200"]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BN: dict = {}
BN_ACT: dict = {"activation": "relu"}
BN_ADD: dict = {"residual": True}
BN_ADD_ACT: dict = {"activation": "relu", "residual": True}
BN_ADD_SMOOTH: dict = {"activation": "silu", "residual": True}
KINDS = (BN, BN_ACT, BN_ADD, BN_ADD_ACT, BN_ADD_SMOOTH)

#: Those whose programs may run one after another; tests/test_persistent.py counts the other.
APART = [a.name for a in ALGORITHMS if a.name != "persistent"]
# docs/kernels.md, in units of S: (forward, backward) of BN, BN+act, BN+add+act; the last with
# a mask, which the streaming backward reads twice.
TABLE = {
    "resident": ((2, 3), (2, 3), (3, 4)),
    "split": ((3, 5), (3, 5), (4, 6)),
    "affine": ((2, 3), (2, 3), (3, 4)),
}
MASKS = {"resident": (1, 1), "split": (1, 2), "affine": (1, 1)}


def supported(call: Call, algorithm: str) -> bool:
    problems = [call.problem(direction) for direction in DIRECTIONS]
    return all(BY_NAME[algorithm].supports(p, H200) is None for p in problems)


def training(algorithm: str) -> bool:
    return algorithm != "affine"


def check(call: Call, algorithm: str, config: Config | None = None) -> None:
    rows = count(call, algorithm, H200, config)
    assert [row.direction for row in rows] == ["forward", "backward"]
    for row in rows:
        assert row.counted == row.model, row
        assert row.minimum == minimum_bytes(call.problem(row.direction))
        assert row.model >= row.minimum
        if algorithm != "split":
            assert row.model == row.minimum, row


@pytest.mark.parametrize("algorithm", APART)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", range(3))
def test_the_table_of_the_design(algorithm: str, channels_last: bool, kind: int) -> None:
    options = (BN, BN_ACT, BN_ADD_ACT)[kind]
    call = Call((2, 16, 4, 4), channels_last, training=training(algorithm), **options)
    size = 2 * 16 * 4 * 4 * 2
    for i, row in enumerate(count(call, algorithm, H200)):
        expected = TABLE[algorithm][kind][i] * size
        if kind == 2:
            assert call.problem("forward").view.mask_bytes * 16 == size
            expected += MASKS[algorithm][i] * size // 16
        assert row.counted == row.model == expected
        assert row.minimum == TABLE["resident"][kind][i] * size + (kind == 2) * size // 16


SHAPES = [
    ((3, 5, 3, 5), False),  # nothing divides anything
    ((3, 5, 3, 5), True),
    ((2, 3, 7, 7), False),
    ((2, 24, 3, 3), True),  # channels that no block of 16 divides
    ((9, 20), False),
    ((2, 3, 17), False),
    ((2, 3, 2, 3, 4), False),
    ((2, 9, 2, 3, 2), True),
    ((1, 1, 3, 3), False),
]


@pytest.mark.parametrize("algorithm", APART)
@pytest.mark.parametrize(("shape", "channels_last"), SHAPES)
@pytest.mark.parametrize("kind", [BN_ACT, BN_ADD_ACT, BN_ADD_SMOOTH], ids=["act", "mask", "smooth"])
def test_ragged_sizes(algorithm: str, shape: tuple, channels_last: bool, kind: dict) -> None:
    check(Call(shape, channels_last, training=training(algorithm), **kind), algorithm)


@pytest.mark.parametrize("algorithm", APART)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dtypes_and_kinds(
    algorithm: str, channels_last: bool, dtype: torch.dtype, kind: dict
) -> None:
    shape = (2, 16, 3, 3) if channels_last else (2, 2, 4, 8)
    check(Call(shape, channels_last, dtype, training=training(algorithm), **kind), algorithm)


@pytest.mark.parametrize("algorithm", ["split", "affine"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", [BN, BN_ADD_ACT, BN_ADD_SMOOTH], ids=str)
def test_many_tiles_and_uneven_splits(algorithm: str, channels_last: bool, kind: dict) -> None:
    """Three splits of four tiles that do not fill the tensor, two channel blocks."""
    shape, config = ((3, 2, 2, 9), Config(1, 2, 8, splits=3))
    if channels_last:
        shape, config = ((2, 20, 3, 5), Config(16, 1, 8, splits=3))
    check(Call(shape, channels_last, training=training(algorithm), **kind), algorithm, config)


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_configuration(channels_last: bool) -> None:
    """One shape through all that a tuner would try."""
    shape = (2, 40, 3, 3) if channels_last else (2, 2, 9, 9)
    seen = 0
    for algorithm in map(BY_NAME.get, APART):
        call = Call(shape, channels_last, training=training(algorithm.name), **BN_ADD_ACT)
        for config in algorithm.configs(call.problem("backward"), H200):
            check(call, algorithm.name, config)
            seen += 1
    assert seen > len(APART)


@pytest.mark.parametrize("algorithm", APART)
@pytest.mark.parametrize("needs", ["x", "r", "w", "xr", "rb", "wb", "xw"])
@pytest.mark.parametrize("kind", [BN_ADD, BN_ADD_ACT, BN_ADD_SMOOTH], ids=str)
def test_only_the_gradients_asked_for(algorithm: str, needs: str, kind: dict) -> None:
    call = Call((2, 3, 3, 5), training=training(algorithm), needs=needs, **kind)
    if not supported(call, algorithm):
        pytest.skip("the algorithm leaves this to another")
    if needs != "r" or call.activation is not None:
        check(call, algorithm)
        return
    t = call.tensors(generator=torch.Generator().manual_seed(0))
    y = t.forward()
    with observe() as seen:  # the residual's gradient is that of the output
        (gradient,) = t.backward(y)
    assert torch.equal(gradient, t.dy) and not seen.interpreted


@pytest.mark.parametrize("shape", [(33, 16, 7, 7), (3, 16, 7, 7), (33, 8, 5, 3)], ids=str)
@pytest.mark.parametrize("kind", [BN, {"activation": "silu"}, BN_ADD_SMOOTH], ids=str)
def test_tiny_planes_are_read_as_rows(shape: tuple, kind: dict) -> None:
    """Given statistics: 16 elements divide a row of planes where none divides a plane."""
    call = Call(shape, training=False, **kind)
    problem = call.problem("forward")
    assert problem.vector == 1 and problem.flat.vector >= 8
    assert problem.plane == shape[2] * shape[3] == problem.flat.view.c // shape[1]
    check(call, "affine")


@pytest.mark.parametrize("shape", [(33, 16, 7, 7), (3, 16, 7, 7), (33, 8, 5, 3), (33, 2, 3, 3)])
def test_masks_of_tiny_planes(shape: tuple) -> None:
    """They pack rows of planes where there are many, of whole bytes; in forward and backward."""
    call = Call(shape, **BN_ADD_ACT)
    rows = shape[0] >= FEW_ROWS and shape[1] >= 8
    for direction in DIRECTIONS:
        problem = call.problem(direction)
        assert problem.mask and (problem.flat is not problem) == rows
    check(call, "split")
    check(Call(shape, training=False, **BN_ADD_ACT), "affine")


@pytest.mark.parametrize("algorithm", APART)
@pytest.mark.parametrize("shape", [(2, 16, 3, 3), (33, 8, 5, 3), (2, 2, 9, 9)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_a_learned_slope_costs_vectors_only(algorithm: str, shape: tuple, residual: bool) -> None:
    """Its sum is made in the passes that there are: no tensor is read or written once more."""
    for channels_last in (False, True):
        found = {}
        for activation in ("silu", "prelu"):
            options = {"activation": activation, "residual": residual}
            call = Call(shape, channels_last, training=training(algorithm), **options)
            check(call, algorithm)
            found[activation] = count(call, algorithm, H200)
        for fixed, learned in zip(found["silu"], found["prelu"], strict=True):
            assert learned.tensors == fixed.tensors and learned.kernels == fixed.kernels
            assert learned.vectors > fixed.vectors


def test_what_is_counted_where() -> None:
    """By tensor, and apart from it what is per channel."""
    call = Call((2, 16, 4, 4), dtype=torch.float32, **BN_ADD_ACT)
    forward, backward = count(call, "resident", H200)
    size, mask = 2 * 16 * 16 * 4, 2 * 16 * 2
    assert forward.tensors == {
        "x": (size, 0),
        "y": (0, size),
        "residual": (size, 0),
        "mask": (0, mask),
    }
    assert backward.tensors == {
        "dy": (size, 0), "x": (size, 0), "mask": (mask, 0), "dx": (0, size), "dresidual": (0, size),
    }  # fmt: skip
    # mean, rstd written; weight, bias read; running mean and variance read and written; the
    # counter.
    assert forward.vectors == 8 * 16 * 4 + 2 * 8
    # mean, rstd and weight read, dweight and dbias written; a mask makes the bias unnecessary, not
    # unread.
    assert backward.vectors in (5 * 16 * 4, 6 * 16 * 4)
    assert forward.kernels == ("forward_kernel",) and backward.kernels == ("backward_kernel",)


def test_the_readme_has_these_numbers() -> None:
    """The README's table is what `python -m bench audit --quick` counts."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:42]
    written = {line for line in lines if line.startswith("| BN")}
    rows = {(r.call, r.algorithm, r.direction): r for r in count_all(calls=layer_calls(quick=True))}
    counted = set()
    for (call, algorithm, direction), forward in rows.items():
        if direction == "forward":
            backward = rows[call, algorithm, "backward"]
            cells = (
                call.op + ("" if call.training else " (inference)"),
                algorithm,
                f"{call.size} {call.layout}",
                *(f"{n:,}" for n in (forward.counted, forward.minimum)),
                *(f"{n:,}" for n in (backward.counted, backward.minimum)),
                f"{len(forward.kernels)} + {len(backward.kernels)}",
            )
            counted.add(f"| {' | '.join(cells)} |")
    assert written == counted


def test_one_direction_only() -> None:
    call = Call((2, 3, 3, 5))
    assert [r.direction for r in count(call, "split", H200, directions=("backward",))] == [
        "backward"
    ]
    (row,) = count(call, "split", H200, directions=("forward",))
    assert row.kernels == ("moments_kernel", "combine_moments_kernel", "apply_kernel")


def test_an_algorithm_that_cannot() -> None:
    with pytest.raises(
        ValueError, match=r"affine cannot run .* the statistics are those of the batch"
    ):
        count(Call((2, 3, 3, 5)), "affine", H200)


def test_a_model_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = type(BY_NAME["split"]).model_bytes
    monkeypatch.setattr(
        type(BY_NAME["split"]), "model_bytes", lambda *args: right(*args) - 1, raising=True
    )
    assert not any(row.exact for row in count(Call((2, 3, 3, 5)), "split", H200))


@pytest.mark.parametrize("layer", RESNET50)
def test_twins_are_tiled_like_the_layers(layer) -> None:
    shape = layer.shape(256)
    small = twin(shape)
    assert torch.Size(small).numel() < 3 * 17 * 29 * 29
    for channels_last in (False, True):
        large_problem, small_problem = (
            Call(s, channels_last).problem("forward") for s in (shape, small)
        )
        assert small_problem.vector == large_problem.vector
        ratio = Fraction(minimum_bytes(small_problem), small_problem.bytes)
        assert ratio == Fraction(minimum_bytes(large_problem), large_problem.bytes)
