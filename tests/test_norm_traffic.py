"""The algorithms for group norms move exactly the bytes that their models say.

The interpreter counts. An access out of bounds or a race fails the count itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.audit.compile import GPUS
from bench.audit.others import other_calls, other_cases
from bench.audit.traffic import count, count_all
from bench.masked_call import MaskedCall
from bench.norm_call import NormCall
from tritonnorm.device import KNOWN
from tritonnorm.explanation import explain
from tritonnorm.kernels import BY_NAME, GROUP_ALGORITHMS
from tritonnorm.kernels.base import Config
from tritonnorm.plan import fewest_bytes

H200 = KNOWN["h200"]
ALGORITHMS = [a.name for a in GROUP_ALGORITHMS]
CALLS = {
    "group": NormCall("group", (2, 8, 4, 4), 2),
    "group-nhwc": NormCall("group", (2, 8, 3, 3), 2, channels_last=True),
    "ragged": NormCall("group", (3, 10, 3, 5), 5),
    "ragged-nhwc": NormCall("group", (2, 9, 3, 5), 3, channels_last=True),
    "layer": NormCall("layer", (6, 40)),
    "rms": NormCall("rms", (3, 3, 33), dtype=torch.float32),
    "instance": NormCall("instance", (2, 5, 3, 3), dtype=torch.float64),
    "instance-nhwc": NormCall("instance", (2, 18, 3, 3), channels_last=True),
}
# docs/kernels.md, in units of S: (forward, backward) of the norm, with an activation, with both.
TABLE = {
    "group_resident": ((2, 3), (2, 3), (3, 5)),
    "group_split": ((3, 5), (3, 5), (4, 8)),
}
KINDS = ({}, {"activation": "silu"}, {"activation": "relu", "residual": True})


def with_options(call: Any, **options: object) -> Any:
    from dataclasses import replace

    return replace(call, **options)


def check(call: NormCall, algorithm: str, config: Config | None = None) -> list:
    rows = count(call, algorithm, H200, config)
    assert [row.direction for row in rows] == ["forward", "backward"]
    for row in rows:
        assert row.counted == row.model, row
        assert row.minimum == fewest_bytes(call.problem(row.direction)) <= row.model
        if algorithm == "group_resident":
            assert row.model == row.minimum, row
    return rows


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", range(3))
def test_the_table_of_the_design(algorithm: str, name: str, kind: int) -> None:
    call = with_options(CALLS[name], **KINDS[kind])
    size = call.problem("forward").bytes
    for row, units in zip(check(call, algorithm), TABLE[algorithm][kind], strict=True):
        assert row.counted == units * size


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("needs", ["x", "r", "w", "xw", "rb"])
def test_only_the_gradients_asked_for(algorithm: str, needs: str) -> None:
    call = NormCall("group", (2, 4, 3, 5), 2, activation="silu", residual=True, needs=needs)
    check(call, algorithm)


@pytest.mark.parametrize("name", ["ragged", "ragged-nhwc", "layer", "instance-nhwc"])
def test_many_tiles_and_uneven_splits(name: str) -> None:
    call = with_options(CALLS[name], activation="silu", residual=True)
    check(call, "group_split", Config(4, 1, 4, splits=3))


@pytest.mark.parametrize("name", ["group-nhwc", "layer"])
def test_every_configuration(name: str) -> None:
    """What a tuner may time."""
    for algorithm in GROUP_ALGORITHMS:
        for config in algorithm.configs(CALLS[name].problem("backward"), H200):
            check(CALLS[name], algorithm.name, config)


SEQUENCES = MaskedCall((3, 6, 20), dtype=torch.float32)


@pytest.mark.parametrize("channels_last", [False, True])
def test_sequences(channels_last: bool) -> None:
    """Without padding, with every configuration, and for whatever is asked for."""
    call = with_options(SEQUENCES, channels_last=channels_last)
    for config in BY_NAME["masked"].configs(call.problem("backward"), H200):
        assert all(row.exact for row in count(call, "masked", H200, config))
    for options in (
        *({"needs": needs, "activation": "silu"} for needs in ("x", "w", "xb")),
        *({"needs": needs, "training": False} for needs in ("x", "w", "xwb")),
    ):
        rows = count(with_options(call, **options), "masked", H200)
        assert all(row.exact and row.minimum <= row.model for row in rows), rows


def test_padding_is_not_read() -> None:
    """The model is that of a batch without padding, the most there can be."""
    call = with_options(SEQUENCES, channels_last=True, padding=0.5)
    assert call.tensors().lengths.tolist() == [20, 17, 14]
    assert all(row.counted < row.model for row in count(call, "masked", H200))


def test_what_the_audit_lists() -> None:
    """Every algorithm that is not of a plain batch norm."""
    rows = count_all(calls=other_calls(quick=True))
    assert all(row.exact for row in rows)
    assert {row.algorithm for row in rows} == {*ALGORITHMS, "masked"}
    assert {case.algorithm for case in other_cases(quick=True)} == {*ALGORITHMS, "masked"}
    assert {case.target for case in other_cases()} == set(GPUS)


def test_launches() -> None:
    """One forward in one launch; dweight and dbias take a second one, or none if not asked for."""
    forward, backward = count(CALLS["group"], "group_resident", H200)
    assert forward.kernels == ("forward_kernel",)
    assert backward.kernels == ("backward_kernel", "combine_parameters_kernel")
    few = with_options(CALLS["group"], needs="x")
    assert count(few, "group_resident", H200)[1].kernels == ("backward_kernel",)
    forward, backward = count(CALLS["layer"], "group_split", H200)
    assert forward.kernels == ("moments_kernel", "combine_moments_kernel", "apply_kernel")
    assert len(backward.kernels) == 4


def test_a_model_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(BY_NAME["group_split"])
    right = kind.model_bytes
    monkeypatch.setattr(kind, "model_bytes", lambda *args: right(*args) - 1)
    assert not any(row.exact for row in count(CALLS["group"], "group_split", H200))


@pytest.mark.parametrize(
    ("call", "forward", "backward"),
    [
        (NormCall("layer", (8192, 4096)), "group_resident", "group_resident"),
        (NormCall("layer", (1, 1 << 20)), "group_split", "group_split"),
        (NormCall("rms", (4096, 64)), "group_resident", "group_resident"),
        (NormCall("group", (8, 320, 64, 64)), "group_resident", "group_split"),
        (NormCall("group", (8, 1280, 8, 8), channels_last=True), *("group_resident",) * 2),
        (NormCall("group", (8, 320, 64, 64), channels_last=True), *("group_split",) * 2),
        (NormCall("instance", (1, 64, 512, 512)), "group_split", "group_split"),
        (NormCall("instance", (8, 64, 32, 32)), "group_resident", "group_resident"),
    ],
    ids=str,
)
def test_the_plan(call: NormCall, forward: str, backward: str) -> None:
    for direction, expected in (("forward", forward), ("backward", backward)):
        found = explain(call.problem(direction), H200)
        assert found.plan.algorithm == expected, found
        assert f"{expected} (formula)" in str(found)
        assert "groups" in str(found)
