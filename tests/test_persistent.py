"""Programs that meet: right in any order, free of races, exact in bytes, bounded in number."""

from __future__ import annotations

from dataclasses import replace
from zlib import crc32

import pytest
import torch
import triton
import triton.language as tl  # noqa: F401, the interpreter looks for it here

from bench.audit.traffic import count
from bench.call import DIRECTIONS, Call
from bench.lab.scheduler import interleaved
from bench.lab.traffic import RaceError, trace
from tests import matrix
from tests.cases import Case
from tests.test_plan import PROBLEMS
from tritonnorm.device import INTERPRETER, KNOWN, Device, simulated
from tritonnorm.kernels import BY_NAME, _barrier, persistent
from tritonnorm.kernels.base import Config, registers_kept
from tritonnorm.kernels.planes import blocks_of, seen_as
from tritonnorm.plan import choose, force_plan
from tritonnorm.problem import minimum_bytes

PERSISTENT = BY_NAME["persistent"]
#: A GPU so small that all of its programs are a handful of threads.
SMALL = Device("small", "sm_90", sms=4, l2_bytes=1 << 20, bandwidth=1e12)
WHOLE = {"activation": "relu", "residual": "contiguous"}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors have several chunks."""
    monkeypatch.setattr(persistent, "TILE", 16)


def configs(call: Call, direction: str) -> list[Config]:
    """What is kept in different ways: nothing, one chunk, all; with one set of programs and two."""
    tiling = PERSISTENT.heuristic(call.problem(direction), SMALL)
    own = -(-tiling.chunks(seen_as(call.problem(direction), tiling)) // 2)
    return [
        replace(tiling, splits=2, num_warps=4, kept=kept, at_once=at_once)
        for kept, at_once in ((0, 1), (min(1, own), 2), (own, 2))
    ]


CASES = [
    *(
        Case(shape, layout, dtype, torch.float32 if dtype.itemsize == 2 else None, **kind)
        for shape, layout in (((8, 3, 6, 6), "contiguous"), ((3, 20, 5, 5), "channels_last"))
        for dtype, kind in (
            (torch.float16, {"activation": "silu", "residual": layout}),
            (torch.bfloat16, {"activation": "relu", "residual": layout}),
            (torch.float64, {"momentum": None}),
        )
    ),
    Case((65, 20), **WHOLE),
    Case((8, 3, 6, 6), activation="prelu", slope="channel"),
    Case((3, 20, 5, 5), "channels_last", activation="prelu", slope="shared", residual="contiguous"),
    Case((3, 9, 6, 6), activation="prelu", slope="channel", needs="xs", affine="none"),
    Case((3, 5, 70), activation="hardswish", affine="none", track=False),
    Case((2, 18, 3, 3, 4), "channels_last", activation="relu"),
    Case((9, 3, 5, 6), "channel_slice", **WHOLE),
    Case((3, 10, 6, 6), "channels_last_slice", needs="xr", **WHOLE),
    Case((3, 9, 6, 6), "contiguous", mean=1e4, std=1.0),
    # Tiny planes, as rows of all channels.
    Case((34, 8, 3, 3), "contiguous", torch.float16, torch.float32, **WHOLE),
    Case((33, 24, 5, 3), "contiguous", torch.bfloat16, activation="silu", residual="contiguous"),
    Case((37, 16, 3, 3), activation="prelu", slope="channel"),
    Case((37, 16, 3, 3), mean=1e4, std=1.0),
    Case((12, 8, 5, 5), "contiguous", activation="relu", momentum=None),
    Case((3, 10, 6, 6), "channels_last", mean=1e4, std=1.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matrix(case: Case) -> None:
    """Forward and backward in an order of steps of its own for every case."""
    with simulated(SMALL), trace() as traffic, interleaved(crc32(str(case).encode())):
        matrix.check(case, "cpu", "persistent")
    traffic.raise_on_race()
    assert [launch.kernel for launch in traffic.launches] == ["forward_kernel", "backward_kernel"]


def test_a_slope_where_nothing_is_kept() -> None:
    """Its sum over chunks that are read twice."""
    case = Case((8, 3, 6, 6), activation="prelu", slope="channel")
    config = configs(Call(case.shape, False, torch.float32, "prelu"), "backward")[0]
    with simulated(SMALL), interleaved(3):
        matrix.check(case, "cpu", "persistent", config=config)


CALLS = [
    Call((12, 3, 3, 20), False, torch.bfloat16, "silu", True),
    Call((3, 20, 4, 5), True, torch.float32, "relu", True),
    Call((12, 3, 3, 20), False, torch.bfloat16, "prelu"),
    Call((6, 3, 5, 20), False, torch.bfloat16, "relu", True),  # rows of a mask: 12.5 bytes
    Call((36, 16, 3, 3), False, torch.bfloat16, "relu", True),  # tiny planes
    Call((35, 24, 3, 5), False, torch.float32, "relu", True),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("which", range(3), ids=["nothing kept", "one kept", "all kept"])
def test_bytes(call: Call, which: int) -> None:
    """Counted is what the model says; the fewest where everything is kept. Races fail the count."""
    for i, direction in enumerate(DIRECTIONS):
        config = configs(call, direction)[which]
        row = count(call, "persistent", SMALL, config)[i]
        assert row.counted == row.model, row
        assert (row.counted == row.minimum) == (which == 2), row


@pytest.mark.parametrize("act", ["silu", "relu"])
@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [((64, 96, 56, 56), False), ((30, 64, 16, 24), False), ((64, 240, 28, 28), True)],
)
def test_no_program_is_without_chunks(monkeypatch, shape, channels_last, act: str) -> None:
    """It would read what lies behind the tensor where everything else exists."""
    monkeypatch.undo()  # tiles of the usual size
    for direction in DIRECTIONS:
        problem = Call(shape, channels_last, activation=act).problem(direction)
        for device in KNOWN.values():
            for config in PERSISTENT.configs(problem, device):
                chunks = config.chunks(seen_as(problem, config))
                own = -(-chunks // config.splits)
                assert -(-chunks // own) == config.splits, (device.name, config, chunks)


def test_any_order_gives_the_same_bits() -> None:
    data = matrix.build(CASES[1])
    found = []
    for seed in range(2):
        with simulated(SMALL), interleaved(seed), force_plan("persistent"):
            found.append(matrix.results(matrix.by_tritonnorm, CASES[1], data, gradients=True))
    for name, first in found[0].items():
        assert all(torch.equal(first, other[name]) for other in found[1:]), name


def test_semaphores_need_no_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launch leaves, whatever its splits, serves the next one on the stream."""
    used = torch.zeros(8, dtype=torch.int32)
    monkeypatch.setattr(persistent._semaphores, "of", lambda x, count: used)
    call = CALLS[1]
    x = call.tensors(generator=torch.Generator().manual_seed(0))
    seen = set()
    for config in [*configs(call, "forward"), replace(configs(call, "forward")[0], splits=3)]:
        with simulated(SMALL), interleaved(1), force_plan("persistent", config):
            y = x.forward()
        assert (y - x.forward()).abs().max() < 1e-5  # the same by what the plan takes for a CPU
        assert set(used.tolist()) <= {0, -(2**31)}
        seen |= set(used.tolist())
    assert seen == {0, -(2**31)}  # an odd number of meetings leaves the top bit


@pytest.mark.parametrize("seed", range(8))
def test_programs_that_run_ahead(seed: int) -> None:
    """One may have begun the third group after that whose moments another is about to read."""
    call = Call((8, 9, 3, 20), False, torch.float32)
    for i, direction in enumerate(DIRECTIONS):
        config = configs(call, direction)[0]
        with simulated(SMALL), trace() as traffic, interleaved(seed):
            x = call.tensors(generator=torch.Generator().manual_seed(seed))
            with force_plan("persistent", config):
                y = x.forward()
                if i:
                    x.backward(y)
        traffic.raise_on_race()


@triton.jit
def no_meeting(semaphore_ptr, before):
    """Nobody waits."""


def test_without_the_meeting_it_is_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """The instrument itself: the same launches without the barrier are caught."""
    monkeypatch.setattr(_barrier, "wait", no_meeting)
    with pytest.raises(RaceError, match="partial_ptr"):
        count(CALLS[0], "persistent", SMALL, configs(CALLS[0], "forward")[0])


def test_plain_interpreter_is_refused() -> None:
    """One after another, the first program would wait for ever: no plan, and no launch."""
    call = CALLS[0]
    assert "one after another" in PERSISTENT.supports(call.problem("forward"), INTERPRETER)
    refused = pytest.raises(RuntimeError, match="cannot meet")
    with refused, simulated(SMALL), force_plan("persistent"):
        call.tensors().forward()


@pytest.mark.parametrize("device", KNOWN.values(), ids=lambda d: d.name)
def test_never_more_programs_than_fit(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    """Eight warps on each multiprocessor, and no program without work."""
    monkeypatch.undo()
    payload = next(max(n) for a, n in persistent.PAYLOAD.items() if device.arch.startswith(a))
    seen = 0
    for problem in PROBLEMS:
        if PERSISTENT.supports(problem, device) is not None:
            continue
        for config in PERSISTENT.configs(problem, device):
            chunks, blocks = config.chunks(seen_as(problem, config)), blocks_of(problem, config)
            own = -(-chunks // config.splits)
            assert config.splits >= 2 and 1 <= config.at_once <= blocks
            each = 8 // config.num_warps  # 8 warps of 255 registers fill a register file
            assert config.at_once * config.splits <= device.sms * each
            assert config.num_warps in (4, 8) and (config.splits - 1) * own < chunks
            assert 0 <= config.kept <= own
            kept = config.kept * config.tile * registers_kept(seen_as(problem, config))
            assert kept <= payload * config.num_warps * device.warp
            moved = PERSISTENT.dram_bytes(problem, config, device)
            spared = config.overlaps or moved > minimum_bytes(problem)
            assert not config.evict_first or spared
            seen += 1
    assert seen > 100


def test_what_does_not_need_it() -> None:
    h200 = KNOWN["h200"]
    given = Call((64, 256, 14, 14), True, training=False).problem("forward")
    assert PERSISTENT.supports(given, h200) == "the statistics are given"
    sums = Call((64, 256, 14, 14), True, needs="wb").problem("backward")
    assert "no second pass" in PERSISTENT.supports(sums, h200)
    assert choose(sums, h200).algorithm != "persistent"
