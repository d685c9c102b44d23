"""A comparison calls slower what is slower beyond doubt, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.record.compare import THRESHOLD, VERDICTS, Comparison, compare
from bench.record.file import Record
from bench.record.rows import OpRow
from bench.report.table import comparison_table, comparison_text
from tests.bench.samples import ENVIRONMENT, GPU, sample, without_gpu

ROW = sample(layers=1, providers=("tritonnorm",), modes=("forward",), models=0).ops[0]
SWAPPED = {"SLOW": "FAST", "FAST": "SLOW", "SAME": "SAME", "AMBIGUOUS": "AMBIGUOUS"}


def row(p20: float, p50: float, p80: float, sm_mhz: float | None = None, **others: Any) -> OpRow:
    gb_s = ROW.bytes / p50 * 1e-3
    return replace(ROW, p20_us=p20, p50_us=p50, p80_us=p80, gb_s=gb_s, sm_mhz=sm_mhz, **others)


def record(*rows: OpRow, **environment: Any) -> Record:
    return Record({**ENVIRONMENT, **environment}, ops=list(rows))


def verdict(base: OpRow, new: OpRow) -> str:
    (found,) = compare(record(base), record(new)).rows["verdict"]
    return str(found)


@pytest.mark.parametrize(
    ("base", "new", "expected"),
    [
        ((99, 100, 101), (104, 105, 106), "SLOW"),
        ((104, 105, 106), (99, 100, 101), "FAST"),
        ((99, 100, 101), (101.5, 102, 103), "SAME"),  # apart, but only by 2 %
        ((95, 100, 106), (104, 110, 115), "AMBIGUOUS"),  # 10 %, but the ranges overlap
        ((99, 100, 105), (105, 106, 107), "AMBIGUOUS"),  # they touch
        ((104, 110, 115), (95, 100, 106), "AMBIGUOUS"),
        # The clock was lower by more than the time is longer: fewer cycles.
        ((99, 100, 101, 1500), (104, 105, 106, 1400), "AMBIGUOUS"),
        ((99, 100, 101, 1500), (104, 105, 106, 1480), "SLOW"),
        ((99, 100, 101, 1500), (104, 105, 106, None), "SLOW"),
        ((99, 100, 101, 1400), (94, 95, 96, 1500), "AMBIGUOUS"),
    ],
)
def test_verdicts(base: tuple[float, ...], new: tuple[float, ...], expected: str) -> None:
    assert verdict(row(*base), row(*new)) == expected


def test_only_a_slow_row_is_a_regression() -> None:
    base = record(row(99, 100, 101), row(99, 100, 101, shape="1x1x1x1"))
    for others, expected in (
        ((80, 81, 82), False),
        ((95, 110, 120), False),
        ((104, 105, 106), True),
    ):
        new = record(row(99, 100, 101), row(*others, shape="1x1x1x1"))
        assert compare(base, new).regressed is expected


@st.composite
def timings(draw: st.DrawFn) -> OpRow:
    p50 = draw(st.floats(80, 120))
    below, above = draw(st.tuples(st.floats(0, 0.06), st.floats(0, 0.06)))
    clock = draw(st.none() | st.floats(1300, 1700))
    return row(p50 * (1 - below), p50, p50 * (1 + above), clock)


@given(timings(), timings())
def test_swapping_the_records_swaps_slow_and_fast(base: OpRow, new: OpRow) -> None:
    assert verdict(new, base) == SWAPPED[verdict(base, new)]


@given(timings())
def test_a_record_is_the_same_as_itself(base: OpRow) -> None:
    assert verdict(base, base) == "SAME"


@given(timings(), timings())
def test_slow_means_slow_in_every_respect(base: OpRow, new: OpRow) -> None:
    slow = new.p50_us > base.p50_us * (1 + THRESHOLD) and new.p20_us > base.p80_us
    if base.sm_mhz and new.sm_mhz:
        slow &= new.p50_us * new.sm_mhz > base.p50_us * base.sm_mhz
    assert (verdict(base, new) == "SLOW") is slow


def test_models_and_host_are_compared_too() -> None:
    base = sample(layers=0, models=1)
    slower = {"p50_ms": 200.0, "p20_ms": 199.0, "p80_ms": 201.0}
    new = replace(
        base,
        models=[replace(base.models[0], **slower), *base.models[1:]],
        host=[replace(base.host[0], p50_us=10.0, p20_us=9.0, p80_us=11.0), *base.host[1:]],
    )
    rows = compare(base, new).rows
    assert len(rows) == len(base.models) + len(base.host)
    slow, fast = rows.iloc[0], rows[rows["verdict"] == "FAST"].iloc[0]
    assert (slow["table"], slow["unit"], slow["new_p50"]) == ("models", "ms", 200.0)
    assert (fast["row"], fast["unit"]) == ("import tritonnorm tritonnorm", "us")
    assert list(rows["verdict"][1:]).count("SAME") == len(rows) - 2


def test_rows_without_a_partner() -> None:
    both, old, added = (row(1, 1, 1, shape=f"{n}x1x1x1") for n in (1, 2, 3))
    warm = replace(both, cache="warm")
    found = compare(record(both, old), record(both, added, warm))
    assert len(found.rows) == 1
    assert [name.split()[4] for name in found.only_base] == ["2x1x1x1"]
    assert [name.split()[-1] for name in found.only_new] == ["tritonnorm", "warm"]
    assert "Only in base (1):" in comparison_text(found)
    assert "Only in new (2):" in comparison_text(found)


def test_nothing_in_common() -> None:
    with pytest.raises(
        ValueError, match=r"expected rows that both have; base has 1 others, new .* 1"
    ):
        compare(record(row(1, 1, 1)), record(row(1, 1, 1, provider="eager")))
    with pytest.raises(ValueError, match="rows that both have"):
        compare(Record(ENVIRONMENT), Record(ENVIRONMENT))


def test_a_row_that_is_there_twice() -> None:
    once, twice = record(ROW), record(ROW, ROW)
    with pytest.raises(ValueError, match=r"^new: ops: two rows are 'BN\+relu forward NHWC"):
        compare(once, twice)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("name", "Another", "GPU name: Simulated GPU -> Another"),
        ("arch", "sm_01", "GPU arch: sm_00 -> sm_01"),
        ("sms", 50, "GPU sms: 100 -> 50"),
        ("l2_bytes", None, "GPU l2_bytes: 41943040 -> unknown"),
    ],
)
def test_another_gpu_is_refused_unless_forced(field: str, value: object, said: str) -> None:
    base, new = record(ROW), record(ROW, gpu={**GPU, field: value})
    with pytest.raises(ValueError, match="expected results of the same GPU") as refusal:
        compare(base, new)
    assert said in str(refusal.value)
    found = compare(base, new, force=True)
    assert [str(difference) for difference in found.differences] == [said]


def test_differences_stand_above_the_table() -> None:
    base = record(ROW, gpu={**GPU, "power_limit_w": 300, "temperature_c": 30})
    new = record(
        ROW,
        commit="fedcba",
        dirty=True,
        gpu={**GPU, "power_limit_w": 250, "temperature_c": 60},
        versions={**ENVIRONMENT["versions"], "torch": "2.1.0", "driver": None, "cuda": "12.4"},
        variables={"TRITON_X": "1"},
    )
    found = compare(base, new)
    assert {str(difference) for difference in found.differences} == {
        f"commit: {ENVIRONMENT['commit']} -> fedcba",
        "uncommitted changes: no -> yes",
        "GPU power_limit_w: 300 -> 250",
        "torch: 2.0.0 -> 2.1.0",
        "driver: 1.0 -> unknown",
        "cuda: unknown -> 12.4",
        "TRITON_X: unknown -> 1",
    }
    text = comparison_text(found)
    assert text.index("torch: 2.0.0 -> 2.1.0") < text.index("verdict")


def test_the_same_record() -> None:
    for same in (sample(layers=4), without_gpu()):
        found = compare(same, same)
        assert found.counts["SAME"] == len(found.rows) == len(same.ops + same.models + same.host)
        assert not (found.regressed or found.differences or found.only_base or found.only_new)
        assert "Not the same in both" not in comparison_text(found)


def slower_and_faster() -> Comparison:
    times = {"1x1x1x1": (1, 1, 1), "2x1x1x1": (8, 9, 10), "3x1x1x1": (99, 100, 101)}
    new = {"1x1x1x1": (2, 2, 2), "2x1x1x1": (4, 4.5, 5), "3x1x1x1": (95, 105, 115)}
    base_rows = [row(*t, shape=shape) for shape, t in times.items()]
    return compare(record(*base_rows), record(*(row(*t, shape=s) for s, t in new.items())))


def test_the_table_says_what_changed() -> None:
    found = slower_and_faster()
    assert list(found.rows["verdict"]) == ["SLOW", "AMBIGUOUS", "FAST"]
    assert list(found.rows["verdict"].map(VERDICTS.index)) == [0, 1, 2]
    lines = comparison_text(found).splitlines()
    (slow,) = (line for line in lines if "SLOW " in line and "1x1x1x1 tritonnorm" in line)
    assert slow.split()[-6:] == ["1.00", "1.00/1.00", "2.00", "2.00/2.00", "us", "+100.0%"]
    (ambiguous,) = (line for line in lines if line.startswith("AMBIGUOUS"))
    assert ambiguous.endswith("+5.0%  p20..p80 overlap")
    # (2 * 0.5 * 1.05) ** (1/3) = 1.0164
    assert lines[-1] == (
        "3 rows in both: 1 SLOW, 1 AMBIGUOUS, 1 FAST; times x 1.016 (geometric mean)"
    )
    assert len(comparison_table(found).renderables) == 3
