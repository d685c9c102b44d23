"""The suites: which cases they are, and what options make of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.call import Call
from bench.layers import NETWORKS
from bench.suites import MODES, SUITES, Case, cases
from tritonnorm.problem import minimum_bytes


def test_every_suite_has_cases_each_once() -> None:
    for name in SUITES:
        found = cases(name)
        assert found and len(found) == len(set(found))
        assert {case.mode for case in found} <= set(MODES)
        for case in found:
            assert case.call.training == (case.mode != "inference")
            assert 0 < case.footprint <= case.bytes_past(0)


def test_quick_is_small_and_covers_the_planes() -> None:
    found = cases("quick")
    assert 10 <= len(found) <= 20
    assert {case.call.shape[2] for case in found} == {112, 56, 28, 14, 7}
    assert {case.call.op for case in found} == {"BN+relu", "BN+add+relu"}


def test_a_suite_of_a_network_has_its_layers() -> None:
    found = cases("resnet50", modes=["forward"], layouts=["NHWC"], batches=[8])
    expected = {
        (layer.shape(8), layer.activation, layer.residual) for layer in NETWORKS["resnet50"]
    }
    assert {(c.call.shape, c.call.activation, c.call.residual) for c in found} == expected
    assert all(case.call.channels_last and case.call.dtype == torch.bfloat16 for case in found)


def test_operations_in_place_of_the_layers_own() -> None:
    found = cases("resnet50", ops=["BN", "bn+add+silu"], modes=["forward"], batches=[4])
    assert {case.call.op for case in found} == {"BN", "BN+add+silu"}
    both = cases("quick", ops=["own", "BN+relu"], modes=["forward"])
    assert len(both) == len(set(both)) and {"BN+relu", "BN+add+relu"} == {c.call.op for c in both}


def test_inputs_of_one_memory_order_are_taken_once() -> None:
    found = cases("sequence", layouts=["NHWC", "NCHW"], modes=["forward"], batches=[4])
    assert all(not case.call.channels_last for case in found if len(case.call.shape) < 4)
    assert len(found) == len({(case.call.shape, case.call.op) for case in found})


def test_bytes_by_mode() -> None:
    by_mode = {c.mode: c for c in cases("quick", modes=MODES, dtypes=["fp16"])[:4]}
    call = by_mode["forward"].call
    forward, backward = (minimum_bytes(call.problem(d)) for d in ("forward", "backward"))
    assert by_mode["forward"].bytes_past(1 << 40) == forward
    assert by_mode["backward"].bytes_past(1 << 40) == backward
    both = by_mode["forward+backward"]
    assert both.bytes_past(0) == forward + backward
    assert both.bytes_past(100) == forward + backward - 100
    x = call.problem("forward").bytes
    assert both.bytes_past(1 << 40) == both.footprint == forward + backward - x


def test_bytes_of_an_addition_without_an_activation() -> None:
    """The residual's gradient is that of the output: nobody writes it."""
    x = 4 * 8 * 2 * 2 * 2
    call = Call((4, 8, 2, 2), residual=True)
    assert Case(call, "forward").footprint == 3 * x
    assert Case(call, "backward").footprint == 3 * x
    assert Case(call, "forward+backward").footprint == 5 * x  # x, residual, y, dy, dx


def test_a_mask_is_read_once_it_is_written() -> None:
    call = Call((4, 8, 2, 2), activation="relu", residual=True)
    x, mask = call.problem("forward").bytes, call.problem("forward").view.mask_bytes
    assert Case(call, "forward+backward").footprint == 6 * x + mask
    assert Case(replace(call, training=False, needs=""), "inference").footprint == 3 * x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "resnet"}, r"suite: expected one of quick, .* got 'resnet'"),
        ({"dtypes": ["bf8"]}, r"dtype: expected one of bf16, .* got 'bf8'"),
        ({"layouts": ["nhwc"]}, "layout: expected one of NHWC, NCHW; got 'nhwc'"),
        ({"modes": ["training"]}, "mode: expected one of forward"),
        ({"ops": ["BN+gleu"]}, r"ops: expected own, BN, .* got 'BN\+gleu'"),
        ({"ops": ["relu"]}, "ops: expected own, BN"),
        ({"ops": ["BN+relu+add"]}, "ops: expected own, BN"),
        ({"batches": [0]}, "batch: expected positive numbers, got 0"),
    ],
)
def test_unknown_names(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cases(**({"suite": "quick"} | options))
