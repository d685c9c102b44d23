"""A results file is read as it was written, or refused with one line that says why."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.record import file as record_file
from bench.record.file import Record, load
from tests.bench.samples import sample, without_gpu

Content = dict[str, Any]


def small() -> Record:
    return sample(layers=2, providers=("tritonnorm", "eager"), modes=("forward",), models=1)


@pytest.mark.parametrize(
    "record",
    [sample(layers=5, caches=("cold", "warm")), sample(layers=2, peak=False), without_gpu()],
    ids=["gpu", "no peak", "no gpu"],
)
def test_round_trip(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "results.json"
    record.save(path)
    assert Record.read(path) == record
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_one_row_a_line(tmp_path: Path) -> None:
    record = small()
    lines = record.to_json().splitlines()
    for row in record.ops:
        (line,) = (text for text in lines if f'"p50_us": {row.p50_us}' in text)
        assert json.loads(line.strip().rstrip(",]"))["shape"] == row.shape


def write(tmp_path: Path, change: Callable[[Content], object]) -> Path:
    """The file of `small`, with a change that its own `save` would not let through."""
    content = json.loads(small().to_json())
    change(content)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(content), encoding="utf-8")  # writes NaN as NaN
    return path


def first(table: str, **values: object) -> Callable[[Content], object]:
    return lambda content: content[table][0].update(values)


def at(percent: float) -> dict[str, float]:
    """The fields of the first operation if it reached so much of the theoretical bandwidth."""
    record = small()
    rate = record.roof("theoretical") * percent / 100
    p50 = record.ops[0].bytes / rate * 1e-3
    times = {"p20_us": p50, "p50_us": p50, "p80_us": p50}
    return {**times, "gb_s": rate, "peak_percent": percent}


BROKEN: dict[str, tuple[Callable[[Content], object], str]] = {
    "another schema": (lambda c: c.update(schema="other/1"), "tritonnorm.bench/1"),
    "no schema": (lambda c: c.pop("schema"), "schema"),
    "no table": (lambda c: c.pop("models"), "models"),
    "another table": (lambda c: c.update(more=[]), "more"),
    "no column": (lambda c: c["ops"][0].pop("noise"), "noise"),
    "another column": (first("ops", speed=1), "speed"),
    "text for a number": (first("ops", p50_us="fast"), "fast"),
    "true for a number": (first("ops", samples=True), "True"),
    "a time of nothing": (first("models", p20_ms=0), "0"),
    "negative": (first("ops", host_us=-1.0), "-1.0"),
    "half a byte": (first("ops", bytes=0.5), "0.5"),
    "no such flag": (first("ops", flags="Z"), "Z"),
    "no such layout": (first("ops", layout="CHWN"), "CHWN"),
    "no such cache": (first("ops", cache="tepid"), "tepid"),
    "not a shape": (first("ops", shape="32,64"), "32,64"),
    "no GPU": (lambda c: c["environment"].pop("gpu"), "gpu"),
    "not a date": (lambda c: c["environment"].update(date="today"), "today"),
    "a NaN time": (first("ops", p50_us=float("nan")), "NaN"),
    "a NaN speed-up": (first("ops", x_eager=float("nan")), "NaN"),
    "a NaN model": (first("models", p50_ms=float("nan")), "NaN"),
    "an infinite roof": (first("roofs", gb_s=float("inf")), "Infinity"),
    "another bandwidth": (first("ops", gb_s=1.0), "gb_s is 1.0"),
    "quantiles out of order": (first("ops", p20_us=1e9), "not in order"),
    "a model's quantiles out of order": (first("models", p80_ms=1e-3), "not in order"),
    "a host time's quantiles out of order": (first("host", p80_us=1e-3), "not in order"),
    "over the peak": (first("ops", **at(120.0), flags=""), "120.0 % of the peak"),
    "a share of another peak": (
        first("ops", **{**at(120.0), "peak_percent": 80.0}),
        "peak_percent is 80.0, but of the roof it is 120.0",
    ),
    "no share of a known peak": (first("ops", peak_percent=None), "peak_percent is None"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused(name: str, tmp_path: Path) -> None:
    change, named = BROKEN[name]
    path = write(tmp_path, change)
    with pytest.raises(ValueError) as refusal:
        Record.read(path)
    text = str(refusal.value)
    assert text.startswith(f"{path}: ") and named in text
    assert len(text.splitlines()) == 1 and len(text) < len(str(path)) + 300


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\x01"])
def test_not_a_results_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as refusal:
        Record.read(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    text = small().to_json()
    path.write_text(text[: int(len(text) * share)], encoding="utf-8")
    with pytest.raises(ValueError, match="not a results file"):
        Record.read(path)


def test_over_the_peak_is_believed_of_the_cache(tmp_path: Path) -> None:
    for values in ({"flags": "C"}, {"cache": "warm"}):
        Record.read(write(tmp_path, first("ops", **at(120.0), **values)))


def broken() -> Record:
    good = small()
    return replace(good, ops=[replace(good.ops[0], gb_s=1.0), *good.ops[1:]])


def test_save_refuses_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gb_s is 1\.0"):
        broken().save(tmp_path / "folder" / "results.json")
    assert list(tmp_path.iterdir()) == []


def test_save_keeps_what_was_there_when_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    small().save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"gb_s is 1\.0"):
        broken().save(path)
    assert path.read_bytes() == before


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    small().save(path)
    before = path.read_bytes()

    def half(self: Path, text: str, encoding: str) -> int:
        with self.open("w", encoding=encoding) as file:
            file.write(text[: len(text) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(record_file.Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        sample(layers=3).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_load_gathers_files(tmp_path: Path) -> None:
    small().save(tmp_path / "a" / "one.json")
    sample(layers=3, models=0).save(tmp_path / "b" / "two.json")
    (empty := tmp_path / "empty").mkdir()
    frame = load(tmp_path)
    assert len(frame) == len(small().ops) + len(sample(layers=3).ops)
    assert list(frame.columns[:4]) == ["gpu", "date", "file", "op"]
    assert set(frame["gpu"]) == {"Simulated GPU"}
    assert len(load(tmp_path / "a" / "one.json", table="models")) == len(small().models)
    with pytest.raises(FileNotFoundError, match="no results files"):
        load(empty)
    with pytest.raises(ValueError, match="expected one of ops, folds, counters, roofs"):
        small().frame("rows")


def test_a_machine_without_jsonschema_can_measure_but_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    path = tmp_path / "results.json"
    small().save(path)
    with pytest.raises(ValueError, match=r"gb_s is 1\.0"):
        broken().save(path)
    with pytest.raises(ImportError, match="jsonschema"):
        Record.read(path)
    monkeypatch.undo()
    assert Record.read(path) == small()
