"""The machine code's PTX runs on the CPU and gives what the specification says.

What the interpreter cannot show: layouts, vector accesses, shuffles, shared memory and its
barriers, inline assembly, the order of the compiler's sums. Every access is checked.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tritonnorm
from bench.lab.ptx.driver import emulated
from bench.lab.ptx.memory import MemoryFault
from tests import cases, matrix, norm_cases, norms
from tests.cases import Case, Way
from tests.norms import NormCase
from tests.test_folding_kernel import check_all
from tests.test_folding_kernel import model as to_fold
from tests.test_masked import check as check_masked
from tests.test_masked import padded
from tritonnorm.device import KNOWN, Device
from tritonnorm.kernels import persistent
from tritonnorm.plan import force_plan

EVERY = [(case, way) for case in cases.CASES for way in cases.ways(case)]
EVERY_NORM = [(case, way) for case in norm_cases.CASES for way in norm_cases.WAYS]
#: A GPU so small that programs of tiny tensors have several chunks each, and share channels.
SMALL = Device("small", "sm_90", sms=4, l2_bytes=1 << 20, bandwidth=1e12)
WHOLE = {"activation": "relu", "residual": "contiguous"}
SMOOTH = {"activation": "silu", "residual": "contiguous"}
MEETING = [
    Case((8, 3, 6, 6), "contiguous", torch.bfloat16, torch.float32, **WHOLE),
    Case((3, 20, 5, 5), "channels_last", activation="silu", residual="channels_last"),
    Case((3, 9, 6, 6), activation="prelu", slope="channel"),
    Case((65, 20), momentum=None),
    Case((32, 4, 2, 3), "contiguous", torch.bfloat16, torch.float32, **WHOLE),  # rows of planes
]


# The step is prime, so that no parameter of the matrix is always left out.
@pytest.mark.parametrize(("case", "way"), EVERY[::53], ids=str)
def test_batch_norm(case: Case, way: Way) -> None:
    algorithm, tiles = way
    with emulated(KNOWN["h200"]) as found:
        matrix.check(case, "cpu", algorithm, tiles=tiles)
    assert found.launches


@pytest.mark.parametrize("name", ["a100", "b200"])
@pytest.mark.parametrize(("case", "way"), EVERY[11::331], ids=str)
def test_other_gpus(name: str, case: Case, way: Way) -> None:
    algorithm, tiles = way
    with emulated(KNOWN[name]):
        matrix.check(case, "cpu", algorithm, tiles=tiles)


@pytest.mark.parametrize("case", MEETING, ids=str)
def test_programs_that_meet(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistent, "TILE", 16)
    with emulated(SMALL) as found:
        matrix.check(case, "cpu", "persistent")
    assert [name for name, _ in found.launches] == ["forward_kernel", "backward_kernel"]


@pytest.mark.parametrize(("case", "way"), EVERY_NORM[::53], ids=str)
def test_other_norms(case: NormCase, way: norm_cases.Way) -> None:
    algorithm, tiles = way
    with emulated(KNOWN["h200"]):
        norms.check(case, "cpu", algorithm, norm_cases.small(case) if tiles else None)


@pytest.mark.parametrize(
    ("case", "algorithm"),
    [
        (NormCase("group", (2, 6, 3, 5), 6, "contiguous", **WHOLE), "group_split"),
        (NormCase("group", (2, 6, 3, 5), 6, "channel_slice", **SMOOTH), "group_resident"),
        (NormCase("group", (2, 40, 1, 3), 2, "channels_last", torch.bfloat16, **SMOOTH), None),
    ],
    ids=str,
)
def test_threads_agree_on_sums(case: NormCase, algorithm: str | None) -> None:
    """A product fused with an addition of another thread's rounds in two ways."""
    with emulated(KNOWN["h200"]):
        norms.check(case, "cpu", algorithm)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["NCL", "NLC"])
def test_masked(layout: str, training: bool) -> None:
    with emulated(KNOWN["h200"]):
        check_masked(
            *padded(5, 7, 41, kind="lengths"), layout, torch.bfloat16, training, "cpu",
            activation="silu",
        )  # fmt: skip


def test_folding() -> None:
    """Its kernels find their tensors in a table of addresses."""

    def alive() -> list[torch.Tensor]:
        return [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]

    with emulated(KNOWN["h200"], besides=alive):
        check_all(to_fold())


def test_a_training_step_of_a_model() -> None:
    """A replaced model, its compiled kernels and an optimiser, beside PyTorch's."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(8)
            self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(8)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.relu(self.bn1(self.conv1(x)))
            return self.relu(self.bn2(self.conv2(y)) + x)

    def trained(change: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Block(), Block())
        model = change(model.double().to(memory_format=torch.channels_last))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            x = torch.randn(4, 3, 9, 9, dtype=torch.float64)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return dict(model.state_dict()) | {"y": model.eval()(x)}

    with emulated(KNOWN["h200"]) as found:
        ours = trained(lambda m: tritonnorm.replace(m)[0])
    assert len(found.launches) >= 3 * 5 * 2 + 5
    expected = trained(lambda m: m)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels_last", [False, True])
def test_accesses_are_wide_and_whole(channels_last: bool) -> None:
    """Of aligned data every sector is moved once, by 128-bit accesses; and little is beside it."""
    x = torch.randn(64, 64, 8, 8, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    x.requires_grad_()
    bn = tritonnorm.BatchNorm2d(64, activation="relu")
    algorithm = "split" if channels_last else "resident"
    with emulated(KNOWN["h200"]) as found, force_plan(algorithm):
        torch.autograd.grad(bn(x).sum(), x)
    size = x.numel() * 2
    reads = {"forward_kernel": 1, "backward_kernel": 2, "moments_kernel": 1, "apply_kernel": 1}
    reads["gradient_kernel"] = 2
    launches = [(reads[name], counts) for name, counts in found.launches if name in reads]
    assert len(launches) == (4 if channels_last else 2)
    for loads, counts in launches:
        if not channels_last:  # there, what is known of 8 channels is read by 128 bits as well
            assert counts.moved["ld", 16] == counts.sectors["ld", 16] * 32 == loads * size
        assert counts.sectors["st", 16] * 32 == counts.moved["st", 16]
    assert sum(counts.moved["st", 16] for _, counts in launches) == 2 * size


def test_code_without_its_barriers_is_found_out() -> None:
    """The check itself: taken away, a race is reported."""
    x = torch.randn(64, 64, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    bn = tritonnorm.BatchNorm2d(64, activation="relu")

    def without_barriers(ptx: str) -> str:
        return re.sub(r"bar\.sync\s+0;", "", ptx)

    with emulated(KNOWN["h200"], without_barriers), pytest.raises(MemoryFault, match="barrier"):
        bn(x)
