"""Programs that meet, on a GPU: right, the same bits twice, and undisturbed by other streams."""

from __future__ import annotations

import pytest
import torch

import tritonnorm
from bench.call import Call
from tests import matrix
from tests.cases import Case
from tritonnorm.device import Device
from tritonnorm.kernels import BY_NAME
from tritonnorm.plan import force_plan
from tritonnorm.tune import agree, standing

LAYERS = [
    Case(shape, layout, dtype, torch.float32, activation=activation, residual=residual)
    for shape, layout in (
        ((8, 64, 56, 56), "contiguous"),
        ((8, 64, 56, 56), "channels_last"),
        ((16, 256, 14, 14), "channels_last"),
        ((20, 6, 16384), "contiguous"),
        ((4096, 1000), "contiguous"),
    )
    for dtype in (torch.float32, torch.bfloat16)
    for activation, residual in (("relu", None), ("relu", layout), ("silu", layout))
]


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layers(case: Case) -> None:
    matrix.check(case, "cuda", "persistent")


@pytest.mark.parametrize("case", LAYERS[::7], ids=str)
def test_every_configuration_and_the_same_bits_twice(case: Case) -> None:
    """What a tuner may time; the fiftieth launch too finds the semaphores as it needs them."""
    data = matrix.build(case, "cuda")
    call = Call(
        *(case.shape, case.layout == "channels_last", case.dtype, case.activation),
        residual=case.residual is not None,
    )
    device = Device.of(torch.device("cuda"))
    for config in BY_NAME["persistent"].configs(call.problem("backward"), device):
        with force_plan("persistent", config):
            first = matrix.results(matrix.by_tritonnorm, case, data, gradients=True)
            for _ in range(50):
                again = matrix.results(matrix.by_tritonnorm, case, data, gradients=True)
        for name, value in first.items():
            assert torch.equal(value, again[name]), (name, config)


def test_two_streams_at_once() -> None:
    """Launches of two streams and copies on a third, all in flight; none waits for ever."""
    case = LAYERS[2]
    data = matrix.build(case, "cuda")
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    blocks = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    found = []
    with force_plan("persistent"):
        expected = matrix.results(matrix.by_tritonnorm, case, data, gradients=True)
        for _ in range(100):
            with torch.cuda.stream(streams[2]):
                blocks.zero_()
            for stream in streams[:2]:
                with torch.cuda.stream(stream):
                    found.append(
                        matrix.results(matrix.by_tritonnorm, case, data, gradients=True)["y"]
                    )
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected["y"]) for y in found)


def test_in_a_job_a_launch_does_not_wait_for_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of another stream holds a multiprocessor for two seconds, as a collective may."""
    monkeypatch.setattr(agree, "has_collectives", lambda: True)
    standing.reload()  # plans are made anew
    try:
        bn = tritonnorm.BatchNorm2d(256, activation="relu", device="cuda")
        x = torch.randn(64, 256, 56, 56, device="cuda", dtype=torch.bfloat16)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        assert {e.plan.algorithm for e in tritonnorm.explain(bn, x)} == {"persistent"}
        for _ in range(2):  # compiles; the second adds to gradients, as the next does
            bn(x).sum().backward()
        torch.cuda.synchronize()
        other = torch.cuda.Stream()
        with torch.cuda.stream(other):
            torch.cuda._sleep(4_000_000_000)  # cycles
        bn(x).sum().backward()
        torch.cuda.current_stream().synchronize()
        assert not other.query()
    finally:
        torch.cuda.synchronize()
        monkeypatch.undo()
        standing.reload()
