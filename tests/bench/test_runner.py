"""A whole run on a made-up GPU: checks before times, rotation, ratios, flags, what is left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.call import Call, Tensors
from bench.check import WrongResult, check, tolerance
from bench.providers import DEFAULT, PROVIDERS, Provider, select
from bench.providers.base import Forward
from bench.providers.compiled import Compiled
from bench.record.file import Record
from bench.record.rows import OpRow
from bench.roofs import measured_roofs, theoretical_roof
from bench.runner import Options, Run, flags_of, measure
from bench.session import session, wrong
from bench.suites import MODES, Case
from tests.bench.simulated import COPY, FACTS, SimulatedClock, SimulatedGpu
from tritonnorm.device import simulated
from tritonnorm.problem import minimum_bytes

OURS_AND_EAGER = select(["tritonnorm", "eager"])


def case(mode: str = "forward+backward", **options: object) -> Case:
    given = {"shape": (4, 16, 4, 4), "channels_last": True, "activation": "relu"} | options
    return Case(Call(**given, training=mode != "inference"), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("residual", [False, True])
def test_rows_of_a_case(mode: str, residual: bool) -> None:
    gpu = SimulatedGpu()
    one = case(mode, residual=residual)
    with simulated(FACTS):
        rows, skipped = measure(one, OURS_AND_EAGER, gpu, (4800.0, 4200.0))
    assert skipped == [] and [row.provider for row in rows] == ["tritonnorm", "eager"]
    ours, eager = rows
    parts = {
        "forward": ["forward"],
        "inference": ["forward"],
        "backward": ["backward"],
        "forward+backward": ["forward", "backward"],
    }[mode]
    fewest = sum(minimum_bytes(one.call.problem(direction)) for direction in parts)
    if len(parts) == 2:  # x, or x and the mask, which the forward left in the cache
        view = one.call.problem("forward").view
        fewest -= one.call.problem("forward").bytes + residual * view.mask_bytes
    for row, share in ((ours, 0.9), (eager, 0.4)):
        assert row.bytes == fewest
        assert row.p50_us == pytest.approx(2 + 1e6 * fewest / (COPY * share), rel=0.01)
        assert row.gb_s == pytest.approx(fewest / row.p50_us * 1e-3)
        assert row.peak_percent == pytest.approx(row.gb_s / 48)
        assert row.copy_percent == pytest.approx(row.gb_s / 42)
        assert row.p20_us < row.p50_us < row.p80_us and 0 < row.noise < 0.01
        assert row.samples >= 20
        assert 0 < row.error < tolerance(torch.bfloat16)
        assert (row.host_us, row.peak_mb, row.sm_mhz) == (1.0, 1.0, 1980.0)
        assert (row.op, row.layout, row.shape) == (one.call.op, "NHWC", "4x16x4x4")
    assert ours.x_eager == pytest.approx(eager.p50_us / ours.p50_us) and eager.x_eager == 1.0
    assert ours.x_compile is None  # nobody of that name ran
    assert eager.plan == "native" and ours.plan.count("(formula)") == len(parts)


def test_buffers_take_turns_beyond_four_caches() -> None:
    gpu = SimulatedGpu()
    measure(case(), OURS_AND_EAGER, gpu)
    sets = gpu.clock.sets[0]
    assert gpu.clock.sets == [sets, sets]
    assert (sets - 1) * case().footprint < 4 * FACTS.l2_bytes <= sets * case().footprint
    warm = SimulatedGpu()
    rows, _ = measure(case(), OURS_AND_EAGER, warm, options=Options(warm=True))
    assert warm.clock.sets == [1, 1] and {row.cache for row in rows} == {"warm"}
    assert all("C" in row.flags for row in rows)


class Off(Provider):
    """PyTorch's batch norm with one result off by a little."""

    def __init__(self, result: str, by: float = 0.05) -> None:
        self.name, self.what, self.result, self.by = f"off {result}", "wrong", result, by

    def setup(self, case: Case) -> Forward:
        right = PROVIDERS["eager"].setup(case)

        def forward(t: Tensors) -> torch.Tensor:
            y = right(t)
            if self.result == "one element":
                y.data[0, 0, 0, 0] += 1.0
            elif self.result == "running_var":
                t.running_var.data.mul_(1 + self.by)
            elif self.result == "y":
                y = y * (1 + self.by)
            elif self.result == "dtype":
                y = y.float()
            elif self.result == "nan":
                y.data[-1, -1, -1, -1] = float("nan")
            elif self.result == "gradient":
                y.register_hook(lambda g: g * (1 + self.by))
            elif self.result == "raises":
                raise KeyError("no such kernel")
            return y

        return forward


@pytest.mark.parametrize(
    ("result", "named"),
    [
        ("one element", "wrong y"),
        ("y", "wrong y"),
        ("nan", "wrong y: error inf"),
        ("running_var", "wrong running_var"),
        ("gradient", "wrong d"),
        ("dtype", "y is torch.float32"),
        ("raises", "no such kernel"),
    ],
)
def test_nothing_wrong_is_timed(result: str, named: str) -> None:
    gpu = SimulatedGpu()
    rows, skipped = measure(case(), [Off(result), PROVIDERS["eager"]], gpu)
    assert [row.provider for row in rows] == ["eager"] and len(gpu.clock.sets) == 1
    assert len(skipped) == 1 and named in skipped[0].reason
    assert skipped[0].case == str(case())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [None, "relu6", "silu", "hardswish"])
def test_the_check_leaves_the_tensors_and_knows_the_error(dtype, activation) -> None:
    one = case(dtype=dtype, activation=activation, residual=True)
    t = one.call.tensors(generator=torch.Generator().manual_seed(0))
    before = [tensor.clone() for tensor in t.all if tensor is not None]
    error = check(one, PROVIDERS["eager"], PROVIDERS["eager"].setup(one), t)
    assert 0 < error < tolerance(dtype)
    after = [tensor for tensor in t.all if tensor is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    slightly = Off("y", by=3 * tolerance(dtype))
    with pytest.raises(WrongResult, match="wrong"):
        check(one, slightly, slightly.setup(one), t)


def test_the_check_goes_through_channels_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    one = case(residual=True)
    t = one.call.tensors(generator=torch.Generator().manual_seed(0))
    whole = check(one, PROVIDERS["eager"], PROVIDERS["eager"].setup(one), t)
    monkeypatch.setattr("bench.check.CHUNK", 3 * t.x.numel() // 16)
    assert check(one, PROVIDERS["eager"], PROVIDERS["eager"].setup(one), t) == whole


def test_pytorch_in_the_place_of_the_kernels_is_not_timed(monkeypatch) -> None:
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")
    rows, skipped = measure(case(), OURS_AND_EAGER, SimulatedGpu())
    assert [row.provider for row in rows] == ["eager"]
    assert "none of its kernels ran" in skipped[0].reason


def test_a_time_that_cannot_be_is_no_row() -> None:
    """Such a results file could not be saved, and the other rows would be lost with it."""
    gpu = SimulatedGpu(clock=SimulatedClock(shares={"tritonnorm": 0.9, "eager": 100.0}))
    gpu.facts = replace(FACTS, l2_bytes=1000)  # nothing comes from the cache
    one = case("forward", shape=(4, 64, 64, 64))  # 1 us at the bandwidth of a copy, and 2 us
    rows, skipped = measure(one, OURS_AND_EAGER, gpu, (1500.0, None))
    assert [row.provider for row in rows] == ["tritonnorm"]
    assert "% of the peak, and not from the cache" in skipped[0].reason


def test_what_works_in_place_has_an_input_of_its_own() -> None:
    class InPlace(Off):
        in_place = True

        def setup(self, case: Case) -> Forward:
            right = PROVIDERS["eager"].setup(case)
            return lambda t: t.x.detach().copy_(right(t).detach())

    seen = []
    one = case("inference")
    gpu = SimulatedGpu()
    prepare = gpu.clock.prepare
    gpu.clock.prepare = lambda runs: seen.append([run.tensors.x for run in runs]) or prepare(runs)
    rows, skipped = measure(one, [InPlace("nothing"), PROVIDERS["eager"]], gpu)
    assert len(rows) == 2 and skipped == []
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(seen[1][0], one.call.tensors(generator=generator).x)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_flags() -> None:
    row = OpRow(
        *("BN", "forward", "NHWC", "float32", "1x2", "eager", "cold", 10.0, 9.0, 11.0, 0.001, 20),
        *(1000, 0.1, 1.0, 1.0, 5.0, None, None, None, "", "", 0.0),
    )
    assert flags_of(row, throttled=False, fits=False) == ""
    assert flags_of(row, throttled=True, fits=True) == "TC"
    assert flags_of(replace(row, noise=0.021), False, False) == "N"
    assert flags_of(replace(row, host_us=10.1), False, False) == "H"
    assert flags_of(replace(row, peak_percent=None), False, False) == "?"


def test_a_throttled_round_is_measured_again_and_flagged() -> None:
    gpu = SimulatedGpu(refusals=3)
    rows, _ = measure(case(), OURS_AND_EAGER, gpu)
    assert all("T" in row.flags for row in rows) and gpu.refusals == 0
    rows, _ = measure(case(), OURS_AND_EAGER, gpu)
    assert not any("T" in row.flags for row in rows)


def test_noise_and_an_unknown_peak_are_flagged() -> None:
    gpu = SimulatedGpu(clock=SimulatedClock(noise=0.1), host=1.0)
    rows, _ = measure(case(), OURS_AND_EAGER, gpu, options=Options(rounds=30))
    assert all(set("NH?") <= set(row.flags) for row in rows)


def test_a_case_beyond_the_memory_is_left_out() -> None:
    gpu = SimulatedGpu(free=1000)
    rows, skipped = measure(case(), OURS_AND_EAGER, gpu)
    assert rows == [] and len(skipped) == 2 and "GB are free" in skipped[0].reason
    assert gpu.clock.sets == []


def test_backward_starts_from_the_output_of_the_first_call() -> None:
    """The graph behind it is made on the stream on which the calls are captured."""
    one = case("backward")
    t = one.call.tensors(generator=torch.Generator().manual_seed(0))
    run = Run(PROVIDERS["eager"], one, PROVIDERS["eager"].setup(one), t)
    assert run.kept == []
    first, second = run(), run()
    assert len(run.kept) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_roofs() -> None:
    gpu = SimulatedGpu()
    theoretical = theoretical_roof(gpu)
    assert theoretical is not None and theoretical.gb_s == 4800
    assert theoretical_roof(SimulatedGpu(facts=replace(FACTS, bandwidth=0.0))) is None
    rows = measured_roofs(gpu, least=1 << 20)
    assert [(row.kind, row.bytes) for row in rows] == [("copy", 2 << 20), ("read", 1 << 20)]
    assert all(row.p20_gb_s <= row.gb_s <= row.p80_gb_s for row in rows)
    big = replace(FACTS, l2_bytes=1 << 20)
    assert measured_roofs(SimulatedGpu(facts=big), least=1 << 20)[0].bytes == 2 * 8 * (1 << 20)


def test_a_session(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    small = measured_roofs(SimulatedGpu(), (1 << 16,))
    monkeypatch.setattr("bench.session.measured_roofs", lambda machine: small)
    kept: list[int] = []
    said: list[tuple[float, float, str]] = []
    cases = [case("forward"), case("inference", activation=None)]
    compiled = Compiled("compile", "without Inductor, which takes a minute", backend="aot_eager")
    record = session(
        *(cases, [*OURS_AND_EAGER, compiled, *select(["apex", "attorch"])]),
        *(SimulatedGpu(), Options()),
        progress=lambda *where: said.append(where),
        arguments=["run", "--suite", "quick", "--json", "/tmp/somewhere/out.json"],
        keep=lambda record: kept.append(len(record.ops)),
    )
    assert kept == [3, 6] and [row.provider for row in record.ops[:3]] == list(DEFAULT)
    assert all(row.x_compile and row.x_eager for row in record.ops)
    assert {(row.provider, row.case) for row in record.skipped} == {("apex", ""), ("attorch", "")}
    assert [done for done, _, _ in said] == [0, 1, 2, 3] and said[1][2] == str(cases[0])
    assert record.environment["command"] == "python -m bench run --suite quick --json out.json"
    assert wrong(record) == []
    record.save(tmp_path / "run.json")
    assert Record.read(tmp_path / "run.json") == record


def test_our_own_failures_are_named() -> None:
    record = session([], [], SimulatedGpu())
    one = case("forward")
    assert wrong(record) == []
    off = Off("y")
    off.name = "tritonnorm"
    _, record.skipped = measure(one, [off], SimulatedGpu())
    assert [row.case for row in wrong(record)] == [str(one)]
    _, record.skipped = measure(one, [off], SimulatedGpu(free=1))
    assert wrong(record) == []
