"""The suite of the other norms: its cases, that wrong results are caught, and a run on a made-up
GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.check import WrongResult, check
from bench.norm_call import NormCall
from bench.providers import PROVIDERS, Provider, select
from bench.providers.base import Forward
from bench.runner import measure
from bench.suites import Case, cases
from tests.bench.simulated import FACTS, SimulatedGpu
from tritonnorm.device import simulated
from tritonnorm.plan import fewest_bytes

OURS_AND_EAGER = select(["tritonnorm", "eager"])
CALLS = [
    NormCall("group", (2, 8, 4, 4), 2, channels_last=True, activation="silu", residual=True),
    NormCall("layer", (2, 3, 24), activation="gelu"),
    NormCall("rms", (6, 16), dtype=torch.float32, residual=True),
    NormCall("instance", (2, 3, 4, 4)),
]


def test_the_suite() -> None:
    found = cases("norms")
    assert {case.call.norm for case in found} == {"group", "layer", "instance", "rms"}
    assert len(found) == len(set(found)) and all(case.bytes_past(0) > 0 for case in found)
    few = cases("norms", layouts=["NHWC"], modes=["forward"], batches=[2], dtypes=["fp32"])
    assert {case.call.layout for case in few} == {"NHWC", "rows"}
    assert {(case.call.shape[0], case.mode) for case in few} == {(2, "forward")}
    with pytest.raises(ValueError, match="mode: expected one of forward"):
        cases("norms", modes=["inference"])
    with pytest.raises(ValueError, match="ops: expected own with the suite norms"):
        cases("norms", ops=["BN"])


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_rows(call: NormCall) -> None:
    case = Case(call, "forward+backward")
    with simulated(FACTS):
        rows, skipped = measure(case, OURS_AND_EAGER, SimulatedGpu(), (4800.0, 4200.0))
    assert skipped == [] and [row.provider for row in rows] == ["tritonnorm", "eager"]
    fewest = [fewest_bytes(call.problem(d)) for d in ("forward", "backward")]
    kept = 1 + (call.residual and call.activation is not None)  # by the cache: x, and a residual
    size = call.problem("forward").bytes
    assert rows[0].bytes == sum(fewest) - kept * size and rows[0].op == call.op
    assert "group_" in rows[0].plan and rows[1].plan == ""


def test_who_has_no_other_norm_is_left_out() -> None:
    with simulated(FACTS):
        rows, skipped = measure(Case(CALLS[0], "forward"), [PROVIDERS["apex"]], SimulatedGpu())
    assert rows == [] and skipped[0].reason == "batch norm only"
    declines = PROVIDERS["liger"].declines
    assert declines(Case(CALLS[3], "forward")) and not declines(Case(CALLS[1], "forward"))


class Wrong(Provider):
    """Right but for one value of one result."""

    name = "wrong"
    what = "a test"
    norms = True

    def setup(self, case: Case) -> Forward:
        def forward(t) -> Tensor:
            y = t.forward()
            return y + torch.zeros_like(y).index_fill_(0, torch.tensor([0]), 0.5) * t.x.mean()

        return forward


def test_a_wrong_result_is_caught() -> None:
    case = Case(CALLS[2], "forward+backward")
    wrong = Wrong()
    tensors = case.call.tensors(generator=torch.Generator().manual_seed(0))
    with pytest.raises(WrongResult, match="wrong"):
        check(case, wrong, wrong.setup(case), tensors)
