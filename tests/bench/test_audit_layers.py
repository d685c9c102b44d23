"""The layers of the networks: all of them, planned for all GPUs; what is said of them counted."""

from __future__ import annotations

import math

import pytest

from bench.audit.compile import GPUS
from bench.audit.layers import (
    BATCHES,
    LAUNCHES,
    LayerRow,
    count_twins,
    layer_cases,
    layer_rows,
    layer_table,
)
from bench.call import DIRECTIONS
from bench.layers import NETWORKS
from bench.processes import silent
from bench.report.terminal import plain
from tritonnorm.device import KNOWN


@pytest.fixture(scope="module")
def rows() -> list[LayerRow]:
    return layer_rows()


def test_every_layer_of_every_network(rows: list[LayerRow]) -> None:
    found = {(row.call.shape, row.call.channels_last, row.direction) for row in rows}
    for name in ("resnet50", "efficientnet_b0", "unet3d", "densenet121"):
        for layer in NETWORKS[name]:
            for channels_last in (False, True):
                for direction in DIRECTIONS:
                    assert (layer.shape(BATCHES[name]), channels_last, direction) in found
    assert len({(row.call, row.direction) for row in rows}) == len(rows)
    assert all(row.plans.keys() == KNOWN.keys() for row in rows)


def test_how_close_to_the_floor(rows: list[LayerRow]) -> None:
    """Never below; through DRAM no more than by the model; large NHWC strips are read again."""
    for row in rows:
        for gpu, plan in row.plans.items():
            model, dram = row.over_floor(gpu)
            assert 1.0 <= dram <= model
            assert plan.algorithm in LAUNCHES and plan.algorithm != "affine"
            size = row.call.problem(row.direction).bytes
            if size <= KNOWN[gpu].l2_bytes // 4:
                assert dram == 1.0, (row, gpu)
            if size <= 8 << 20:
                assert LAUNCHES[plan.algorithm] == 1, (row, gpu)


def test_the_table(rows: list[LayerRow]) -> None:
    text = plain(layer_table(rows))
    lines = text.splitlines()
    assert len(lines) == len(rows) + 2
    assert lines[1].split()[-5:] == list(KNOWN)
    last = next(line for line in lines if "64x2048x7x7 NCHW" in line and "forward" in line)
    assert "BN+add+relu" in last and last.count("resident 1.00 1.00") == 4
    assert "persistent 1.33 1.00" in last  # b200, where `resident` would spill


@pytest.mark.slow
def test_twins(rows: list[LayerRow]) -> None:
    """A small layer for each algorithm and layout: counted is what the model says."""
    picked: dict[tuple[bool, str], LayerRow] = {}
    for row in sorted(rows, key=lambda row: math.prod(row.call.shape[2:])):
        picked.setdefault((row.call.channels_last, row.plans["h200"].algorithm), row)
    counted = count_twins(silent, list(picked.values()))
    assert {c.algorithm for c in counted} >= {"resident", "persistent"}
    assert all(c.exact for c in counted), [c for c in counted if not c.exact]
    for row in counted:
        assert len(row.kernels) == LAUNCHES[row.algorithm]


def test_cases_are_distinct_and_enough(rows: list[LayerRow]) -> None:
    cases = layer_cases(rows)
    assert {case.target for case in cases} == set(GPUS)
    assert len(cases) < len(rows) * len(GPUS) / 2
    quick = layer_rows(quick=True)
    few = layer_cases(quick, ("sm_90",))
    assert {(c.algorithm, c.directions[0]) for c in few} == {
        (row.plans["h200"].algorithm, row.direction) for row in quick
    }
