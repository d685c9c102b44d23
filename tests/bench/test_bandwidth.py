"""Part 4 of the demo, as it is on a GPU."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from bench.demo import bandwidth, view
from bench.record.rows import SkippedRow
from tests.bench.simulated import SimulatedGpu


def test_the_harness_runs_and_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import layers, session, suites
    from bench.roofs import measured_roofs

    monkeypatch.setattr(suites, "NETWORKS", {"resnet50": (layers.Layer(64, (112, 112)),)})
    small = replace(suites.SUITES["quick"], batches=(1,))
    monkeypatch.setitem(suites.SUITES, "quick", small)
    monkeypatch.setattr(layers.Layer, "shape", lambda self, batch: (batch, 4, 4, 4))
    monkeypatch.setattr(
        session, "measured_roofs", lambda machine: measured_roofs(machine, least=1 << 20)
    )
    record = bandwidth.run(machine=SimulatedGpu())
    assert {row.layout for row in record.ops} == {"NHWC", "NCHW"}
    assert {row.provider for row in record.ops} == {"tritonnorm", "eager"}
    assert all(row.host_us is None and row.x_eager for row in record.ops)
    console = Console(width=200, file=io.StringIO())
    assert view.bandwidth(console, record)
    assert "Simulated GPU" in console.file.getvalue()
    wrong = SkippedRow("tritonnorm", "a case", "wrong y: error 1e-1, more than 1e-2")
    assert not view.bandwidth(console, replace(record, skipped=[wrong]))
    assert not view.bandwidth(console, replace(record, ops=[]))
