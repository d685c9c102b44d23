"""Where collectives hold some of a GPU, programs that wait for each other leave that free."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests import tuned
from tritonnorm.device import KNOWN, Device
from tritonnorm.explanation import explain
from tritonnorm.kernels import BY_NAME
from tritonnorm.kernels.persistent import WARPS
from tritonnorm.plan import HELD, in_company, plan
from tritonnorm.problem import Problem
from tritonnorm.tune import agree, standing
from tritonnorm.tune.store import UserCache

H200 = KNOWN["h200"]
PERSISTENT = BY_NAME["persistent"]
LAYERS = [
    tuned.problem(64, 256, 3136, channels_last=True),
    tuned.problem(64, 256, 196, channels_last=True, direction="backward"),
    tuned.problem(64, 64, 112 * 112, activity="two_valued"),
    tuned.problem(256, 2048, 49, direction="backward"),
]


def fullest(problem: Problem, device: Device) -> float:
    """The most multiprocessors that a configuration needs at once."""
    configs = PERSISTENT.configs(problem, device)
    return max(c.at_once * c.splits / WARPS[c.num_warps] for c in configs)


@pytest.mark.parametrize(
    ("phase", "backends", "expected"),
    [
        ("alone", "", 0),
        ("job", "cpu:gloo,cuda:gloo", 0),
        ("job", "cpu:gloo,cuda:nccl", HELD),
        ("before", "", HELD),
    ],
)
def test_when_there_is_company(monkeypatch, phase: str, backends: str, expected: int) -> None:
    monkeypatch.setattr(agree, "phase", lambda: phase)
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    assert in_company(H200).held == expected
    assert in_company(Device("slice", "sm_90", sms=16, l2_bytes=1 << 20)).held == min(expected, 4)
    assert in_company(H200).identity == H200.identity  # its tuned results are found


@pytest.mark.parametrize("problem", LAYERS, ids=str)
def test_they_leave_it_free(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = plan(problem, H200)
    monkeypatch.setattr(agree, "has_collectives", lambda: True)
    device = in_company(H200)
    assert fullest(problem, device) <= H200.sms - HELD < fullest(problem, H200) <= H200.sms
    chosen = plan(problem, H200)
    assert (chosen.algorithm, chosen.source) == (alone.algorithm, "formula")
    config = chosen.config
    assert config.at_once * config.splits <= (H200.sms - HELD) * WARPS[config.num_warps]
    assert explain(problem, H200).plan == chosen
    # What is left is enough for the bandwidth; it keeps less of the data.
    seconds = [
        PERSISTENT.predict(problem, p.config, d) for p, d in ((alone, H200), (chosen, device))
    ]
    assert seconds[0] <= 1.001 * seconds[1] and seconds[1] < 1.35 * seconds[0]


def test_nothing_is_left_of_a_small_part() -> None:
    device = Device("slice", "sm_90", sms=4, l2_bytes=1 << 20, held=3)
    assert PERSISTENT.supports(LAYERS[0], device) is not None


def test_a_tuned_result_becomes_one_that_fits(cache: UserCache, monkeypatch) -> None:
    problem = LAYERS[0]
    config = max(PERSISTENT.configs(problem, H200), key=lambda c: c.at_once * c.splits)
    cache.put(tuned.entry(problem, "persistent", config))
    standing.reload()
    assert plan(problem, H200).config == config
    monkeypatch.setattr(agree, "has_collectives", lambda: True)
    chosen = plan(problem, H200)
    assert (chosen.algorithm, chosen.source) == ("persistent", "user cache")
    assert chosen.config in PERSISTENT.configs(problem, in_company(H200))
