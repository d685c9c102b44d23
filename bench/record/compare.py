"""Two results files, row by row: what became slower, what faster."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from bench.record.file import Record

__all__ = ["THRESHOLD", "VERDICTS", "Comparison", "Difference", "compare"]

THRESHOLD = 0.03  # of the smaller time; less is not worth a verdict, however clear
VERDICTS = ("SLOW", "AMBIGUOUS", "FAST", "SAME")  # in the order in which a reader wants them
IDENTITY = ("name", "arch", "sms", "l2_bytes")  # what makes a GPU another one
MOMENTARY = ("sm_mhz", "memory_mhz", "temperature_c")  # what a GPU has another of every time

# Table -> the fields that say which row it is, and the unit of its times.
_KEYS = {
    "ops": (("op", "mode", "layout", "dtype", "shape", "provider", "cache"), "us"),
    "folds": (("model", "mode", "layout", "dtype", "provider"), "us"),
    "models": (("model", "mode", "variant", "device", "dtype", "layout", "shape"), "ms"),
    "host": (("what", "variant"), "us"),
}
_COLUMNS = (
    *("table", "row", "unit", "base_p50", "base_p20", "base_p80", "new_p50", "new_p20", "new_p80"),
    *("change_percent", "verdict", "why"),
)


@dataclass(frozen=True)
class Difference:
    """Something of the environment that is not the same; None where it is not recorded."""

    name: str
    base: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name}: {_said(self.base)} -> {_said(self.new)}"


@dataclass(frozen=True)
class Comparison:
    """What two records have in common, and what not.

    Attributes:
        rows: a row per pair, those that changed most first: ``table``, ``row`` (its name),
            ``unit``, ``base_p50``, ``base_p20``, ``base_p80``, the same for ``new``,
            ``change_percent`` (of the base; above 0 is slower), ``verdict`` (one of `VERDICTS`)
            and ``why`` it is AMBIGUOUS.
        only_base, only_new: names of the rows that the other record lacks.
        differences: of the environments.
    """

    rows: pd.DataFrame
    only_base: tuple[str, ...]
    only_new: tuple[str, ...]
    differences: tuple[Difference, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Verdict -> how many rows have it."""
        found = Counter(self.rows["verdict"])
        return {verdict: found[verdict] for verdict in VERDICTS}

    @property
    def regressed(self) -> bool:
        """Whether any row is SLOW."""
        return self.counts["SLOW"] > 0


def compare(base: Record, new: Record, force: bool = False) -> Comparison:
    """Compare the times of all rows that both records have: operations, models, host.

    A row is SLOW or FAST if the ranges from p20 to p80 are apart, the medians differ by more than
    `THRESHOLD`, and, where the clock is known in both, the cycles differ in the same direction. It
    is AMBIGUOUS if only the medians differ, else SAME.

    Args:
        base, new: what it was, and what it is.
        force: compare different GPUs too; they are among the differences then.

    Raises:
        ValueError: different GPUs; no row that both have; or a record that has a row twice.
    """
    gpus = _gpu_differences(base, new)
    if gpus and not force:
        raise ValueError(
            f"base, new: expected results of the same GPU; {'; '.join(map(str, gpus))}"
        )
    pairs: list[dict[str, Any]] = []
    only_base: list[str] = []
    only_new: list[str] = []
    for table in _KEYS:
        old, now = _by_key(base, table, "base"), _by_key(new, table, "new")
        pairs += [_pair(table, key, old[key], now[key]) for key in old if key in now]
        only_base += [_name(key) for key in old if key not in now]
        only_new += [_name(key) for key in now if key not in old]
    if not pairs:
        raise ValueError(
            f"base, new: expected rows that both have; base has {len(only_base)} others, "
            f"new has {len(only_new)}"
        )
    rank = {verdict: i for i, verdict in enumerate(VERDICTS)}
    pairs.sort(key=lambda pair: (rank[pair["verdict"]], -abs(pair["change_percent"])))
    return Comparison(
        pd.DataFrame(pairs, columns=_COLUMNS),
        tuple(only_base),
        tuple(only_new),
        (*gpus, *_differences(base, new)),
    )


def _by_key(record: Record, table: str, which: str) -> dict[tuple[str, ...], dict[str, Any]]:
    """The rows of a table by what they measure."""
    names, _ = _KEYS[table]
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in getattr(record, table):
        key = tuple(getattr(row, name) for name in names)
        if key in found:
            raise ValueError(f"{which}: {table}: two rows are {_name(key)!r}")
        found[key] = asdict(row)
    return found


def _name(key: tuple[str, ...]) -> str:
    return " ".join(part for part in key if part != "cold")  # what rows are unless they say so


def _pair(
    table: str, key: tuple[str, ...], base: dict[str, Any], new: dict[str, Any]
) -> dict[str, Any]:
    _, unit = _KEYS[table]
    times = {
        f"{side}_{quantile}": row[f"{quantile}_{unit}"]
        for side, row in (("base", base), ("new", new))
        for quantile in ("p50", "p20", "p80")
    }
    verdict, why = _verdict(times, base.get("sm_mhz"), new.get("sm_mhz"))
    change = 100 * (times["new_p50"] / times["base_p50"] - 1)
    return {
        "table": table,
        "row": _name(key),
        "unit": unit,
        **times,
        "change_percent": change,
        "verdict": verdict,
        "why": why,
    }


def _verdict(t: dict[str, float], base_mhz: float | None, new_mhz: float | None) -> tuple[str, str]:
    """The verdict, and why it is AMBIGUOUS."""
    slower = t["new_p50"] > t["base_p50"]
    low, high = sorted((t["base_p50"], t["new_p50"]))
    if high <= low * (1 + THRESHOLD):
        return "SAME", ""
    apart = t["new_p20"] > t["base_p80"] if slower else t["new_p80"] < t["base_p20"]
    if not apart:
        return "AMBIGUOUS", "p20..p80 overlap"
    if base_mhz and new_mhz:
        base_cycles, new_cycles = t["base_p50"] * base_mhz, t["new_p50"] * new_mhz
        if base_cycles == new_cycles or (new_cycles > base_cycles) != slower:
            return "AMBIGUOUS", f"not so in cycles: {base_mhz:.0f} -> {new_mhz:.0f} MHz"
    return ("SLOW" if slower else "FAST"), ""


def _gpu_differences(base: Record, new: Record) -> list[Difference]:
    old, now = base.environment["gpu"], new.environment["gpu"]
    return [Difference(f"GPU {k}", old[k], now[k]) for k in IDENTITY if old[k] != now[k]]


def _differences(base: Record, new: Record) -> list[Difference]:
    """Commit, settings of the GPU, versions, host and variables."""

    def flat(record: Record) -> dict[str, Any]:
        e = record.environment
        found = {"commit": e["commit"], "uncommitted changes": e["dirty"]}
        settings = set(e["gpu"]) - {*IDENTITY, *MOMENTARY}
        found |= {f"GPU {name}": e["gpu"][name] for name in sorted(settings)}
        for part in ("versions", "host", "variables"):
            found |= e.get(part, {})
        return found

    old, now = flat(base), flat(new)
    names = {**old, **now}
    return [Difference(k, old.get(k), now.get(k)) for k in names if old.get(k) != now.get(k)]


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else str(value)
