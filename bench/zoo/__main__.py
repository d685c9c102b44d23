"""``python -m bench.zoo``: fold every model of the families, one at a time, and write the table."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

from bench.zoo.families import entries
from bench.zoo.measure import Result, measure
from bench.zoo.table import page

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "out" / "zoo.jsonl"
PAGE = ROOT / "docs" / "coverage.md"


def main() -> int:
    """Measure the models that have no result yet; the exit code is 1 if any result is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", help="only these models; default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="one line of JSON per model")
    parser.add_argument("--again", action="store_true", help="measure what has a result, too")
    parser.add_argument("--page", type=Path, help=f"write the table to this page ({PAGE.name})")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    found: dict[str, Result] = {}
    if options.results.exists():
        lines = options.results.read_text(encoding="utf-8").splitlines()
        for line in lines:
            read = json.loads(line)
            result = Result(**{**read, "calls": tuple(read["calls"])})
            found[f"{result.library}/{result.name}"] = result
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for entry in entries():
        key = f"{entry.library}/{entry.name}"
        if options.names and entry.name not in options.names:
            continue
        if key in found and not options.again:
            continue
        result = found[key] = measure(entry)
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result.as_json()) + "\n")
        before, after = result.calls
        what = result.problem or result.raised or f"{before} -> {after}, error {result.error:.1e}"
        print(f"{key}: {what} ({result.seconds:.1f} s)", flush=True)
    results = list(found.values())
    if options.page:
        options.page.write_text(page(results), encoding="utf-8")
    return 1 if any(r.wrong or r.raised for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
