"""The planner: pure, obedient in the right order, sensible on every known device."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tritonnorm import device as devices
from tritonnorm import plan as planning
from tritonnorm.device import INTERPRETER, KNOWN, Device
from tritonnorm.explanation import explain
from tritonnorm.kernels import ALGORITHMS, BY_NAME
from tritonnorm.kernels.base import Config
from tritonnorm.plan import Forced, choose, force_plan, plan
from tritonnorm.problem import Problem, View, minimum_bytes

VIEWS = {
    "stem": View(256, 64, 112 * 112, False),
    "stem_channels_last": View(1, 64, 256 * 112 * 112, True),
    "middle": View(64, 256, 14 * 14, False),
    "last": View(32, 2048, 7 * 7, False),
    "last_channels_last": View(1, 2048, 32 * 49, True),
    "linear": View(1, 1000, 128, True),
    "tiny": View(2, 3, 5, False),
    "one_channel": View(8, 1, 1 << 20, False),
    "one_position": View(1, 7, 1, True),
    "odd": View(3, 17, 31, False),
    "sliced": View(8, 64, 49, False, (128 * 49, 49, 1)),
    "huge": View(64, 64, 1024 * 1024, False),
}
PROBLEMS = [
    Problem(direction, statistics, view, dtype, activity, residual, mask, True, residual, True)
    for view in VIEWS.values()
    for direction in ("forward", "backward")
    for statistics in (True, False)
    for dtype in (torch.bfloat16, torch.float64)
    for activity, residual, mask in (
        ("none", False, False), ("two_valued", True, True), ("smooth", True, False),
    )
]  # fmt: skip
H100 = KNOWN["h100"]


def problem(view: str = "middle", **options: object) -> Problem:
    settings = {
        "direction": "forward",
        "batch_statistics": True,
        "dtype": torch.bfloat16,
        **options,
    }
    return Problem(view=VIEWS[view], **settings)


@dataclass(frozen=True)
class Answer:
    """A table with one answer to everything."""

    name: str
    answer: tuple[str, Config] | None

    def lookup(self, problem: Problem, device: Device) -> tuple[str, Config] | None:
        return self.answer


@pytest.mark.parametrize("device", [*KNOWN.values(), INTERPRETER], ids=lambda d: d.name)
def test_every_regime(device: Device) -> None:
    """A plan for everything: supported, with blocks of powers of two, the same when asked again."""
    for p in PROBLEMS:
        chosen = choose(p, device)
        assert chosen.source == "formula"
        assert chosen.runs.supports(p, device) is None
        config = chosen.config
        for extent in (config.block_c, config.block_n, config.block_p, config.num_warps):
            assert extent > 0 and extent & (extent - 1) == 0, (p, config)
        assert config.splits >= 1
        assert config.num_warps * device.warp <= 1024
        assert chosen == choose(p, device)


@pytest.mark.parametrize("device", [H100, KNOWN["mi300x"]], ids=lambda d: d.name)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_models_of_every_algorithm(algorithm: object, device: Device) -> None:
    """Never fewer bytes than the fewest, a time above 0, no candidate twice."""
    for p in PROBLEMS:
        if algorithm.supports(p, device) is None:
            candidates = algorithm.configs(p, device)
            assert candidates[0] == algorithm.heuristic(p, device)
            assert len(set(candidates)) == len(candidates)
            assert algorithm.model_bytes(p, candidates[0]) >= minimum_bytes(p)
            assert algorithm.predict(p, candidates[0], device) > 0


def test_needs_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*args: object) -> None:
        raise AssertionError("CUDA was asked for")

    for name in ("is_available", "current_device", "get_device_properties", "device_count"):
        monkeypatch.setattr(torch.cuda, name, touched)
    for p in PROBLEMS[:: len(PROBLEMS) // 10]:
        choose(p, H100)
        str(explain(p, H100))


def test_given_statistics_are_affine() -> None:
    for p in PROBLEMS:
        assert (choose(p, H100).algorithm == "affine") == (not p.batch_statistics)


def test_small_channels_stay_resident_and_programs_share_large_ones() -> None:
    assert choose(problem("last"), H100).algorithm == "resident"
    for view in ("stem", "stem_channels_last", "one_channel"):
        assert choose(problem(view), H100).algorithm in ("persistent", "split")
    assert BY_NAME["resident"].supports(problem("stem"), H100) is not None


def test_few_channels_do_not_mean_few_programs() -> None:
    for view in ("one_channel", "stem"):
        chosen = choose(problem(view), H100)
        config = chosen.config
        at_once = config.at_once or config.channel_blocks(problem(view))
        assert config.splits * at_once >= 0.9 * H100.sms


def test_order_of_authority() -> None:
    config, other = Config(1, 1, 64), Config(1, 2, 128)
    p = problem("last")
    tables = (
        Answer("user", None),
        Answer("shipped", ("split", config)),
        Answer("last", ("split", other)),
    )
    assert choose(p, H100).source == "formula"
    assert choose(p, H100, tables) == planning.Plan("split", config, "shipped")
    assert choose(p, H100, tables[::-1]).config == other
    forced = Forced("resident", other)
    assert choose(p, H100, tables, forced) == planning.Plan("resident", other, "forced")
    assert choose(p, H100, tables, Forced("split")).config == BY_NAME["split"].heuristic(p, H100)


def test_what_cannot_compute_is_passed_over() -> None:
    config = Config(1, 1, 64)
    p = problem("last")
    assert choose(p, H100, (Answer("wrong", ("affine", config)),)).source == "formula"
    assert (
        choose(p, H100, (Answer("table", ("split", config)),), Forced("affine")).source == "table"
    )


def test_unknown_algorithm() -> None:
    names = ".*persistent, split, affine, group_resident, group_split, masked, fold, formula"
    with pytest.raises(ValueError, match=f"algorithm: expected one of {names}; got 'fast'"):
        choose(problem(), H100, forced=Forced("fast"))
    with pytest.raises(ValueError, match="got 'fast'"), force_plan("fast"):
        raise AssertionError("entered")


def test_force_plan_nests_and_ends() -> None:
    p = problem("last")
    free = plan(p, H100)
    config = Config(1, 4, 64)
    with force_plan("split"):
        assert plan(p, H100).algorithm == "split"
        with force_plan("resident", config):
            assert plan(p, H100) == planning.Plan("resident", config, "forced")
        assert plan(p, H100).algorithm == "split"
    with pytest.raises(RuntimeError, match="inside"), force_plan("split"):
        raise RuntimeError("inside")
    assert plan(p, H100) == free
    assert free.source == "formula"


def test_explain() -> None:
    p = problem("stem", direction="backward")
    explanation = explain(p, H100)
    assert explanation.plan == choose(p, H100)
    assert explanation.minimum == minimum_bytes(p)
    assert [a.algorithm for a in explanation.alternatives] == [a.name for a in ALGORITHMS]
    text = str(explanation)
    assert (
        H100.name in text
        and f"{explanation.plan.algorithm} (formula)" in text
        and f"{explanation.minimum:,}" in text
    )
    for row in explanation.alternatives:
        algorithm = BY_NAME[row.algorithm]
        assert row.reason == algorithm.supports(p, H100)
        if row.reason is None:
            assert row.bytes == algorithm.model_bytes(p, row.config)
            assert f"{row.bytes:,}" in text
        else:
            assert row.reason in text and row.bytes is None
    forced = explain(p, H100, Forced("split", Config(1, 1, 128)))
    assert "split (forced)" in str(forced)


def test_known_devices() -> None:
    for known in KNOWN.values():
        assert known.sms > 50 and known.l2_bytes > 1 << 25 and known.bandwidth > 1e12
        assert known.warp == (64 if known.arch.startswith("gfx") else 32)


def test_device_of_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert Device.of(cpu) is INTERPRETER
    with devices.simulated(H100):
        assert Device.of(cpu) is H100 and devices.is_simulated()
    assert Device.of(cpu) is INTERPRETER and not devices.is_simulated()
    with pytest.raises(ValueError, match="device"):
        Device.of(torch.device("xpu", 0))
