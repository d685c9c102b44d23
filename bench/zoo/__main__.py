"""``python -m bench.zoo``: fold every model of the families, one at a time, and write the table;
with ``--replace`` the same for `replace`."""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from pathlib import Path

from bench.zoo import replacing, replacing_table
from bench.zoo.families import entries
from bench.zoo.measure import TOOLS, Result, measure
from bench.zoo.replacing import Replaced
from bench.zoo.table import page

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "out" / "zoo"
PAGE = ROOT / "docs" / "coverage.md"


def main() -> int:
    """Measure the models that have no result yet; the exit code is 1 if any result is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", help="only these models; default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--tool", choices=TOOLS, default="tritonnorm", help="what folds")
    parser.add_argument("--again", action="store_true", help="measure what has a result, too")
    parser.add_argument("--page", type=Path, help=f"write the table to this page ({PAGE.name})")
    parser.add_argument("--replace", action="store_true", help="replace instead of fold")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.replace:
        return _replace(options)
    path = options.results / f"{options.tool}.jsonl"
    found = _read(path)
    options.results.mkdir(parents=True, exist_ok=True)
    for entry in entries():
        key = f"{entry.library}/{entry.name}"
        if options.names and entry.name not in options.names:
            continue
        if key in found and not options.again:
            continue
        result = found[key] = measure(entry, options.tool)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result.as_json()) + "\n")
        before, after = result.calls
        what = result.problem or result.raised or f"{before} -> {after}, error {result.error:.1e}"
        print(f"{key}: {what} ({result.seconds:.1f} s)", flush=True)
    if options.page:
        known = {f"{entry.library}/{entry.name}" for entry in entries()}
        tools = {}
        for tool in TOOLS:
            results = _read(options.results / f"{tool}.jsonl")
            tools[tool] = {key: result for key, result in results.items() if key in known}
        options.page.write_text(page(tools), encoding="utf-8")
    return 1 if any(r.wrong or r.raised for r in found.values()) else 0


def _replace(options: argparse.Namespace) -> int:
    """Measure `replace` on the models without a result, in a random order."""
    path = options.results / "replace.jsonl"
    options.results.mkdir(parents=True, exist_ok=True)
    found = replaced(path)
    order = list(entries())
    random.Random(0).shuffle(order)  # so that a part of them says something about all
    for entry in order:
        key = f"{entry.library}/{entry.name}"
        if (options.names and entry.name not in options.names) or (
            key in found and not options.again
        ):
            continue
        if options.page and not options.names:
            continue  # only written
        result = found[key] = replacing.measure(entry)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result.as_json()) + "\n")
        what = result.problem or result.raised or f"{result.fused} of {result.fusable} fused"
        print(f"{key}: {what} ({result.seconds:.1f} s)", flush=True)
    if options.page:
        options.page.write_text(replacing_table.page(found, len(order)), encoding="utf-8")
    return 1 if any(r.wrong or r.raised for r in found.values()) else 0


def replaced(path: Path) -> dict[str, Replaced]:
    """The last row of each model in a file of `replace`, by library and name."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [Replaced(**json.loads(line)) for line in lines]
    return {f"{r.library}/{r.name}": r for r in rows}


def _read(path: Path) -> dict[str, Result]:
    """The last result of each model in a file, by library and name."""
    found = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for read in map(json.loads, lines):
        result = Result(**{**read, "calls": tuple(read["calls"])})
        found[f"{result.library}/{result.name}"] = result
    return found


if __name__ == "__main__":
    sys.exit(main())
