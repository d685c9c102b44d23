"""What `import tritonnorm` costs where torch is imported already, and torch's own import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.processes import Progress, silent
from bench.record.rows import HostRow
from tritonnorm.timing import Timing

__all__ = ["run"]

ROOT = Path(__file__).resolve().parents[2]

# Each line is timed in a new process, after those above it. The last is what the first call on a
# GPU imports: triton and the kernels.
IMPORTS = {
    "torch": "import torch",
    "tritonnorm": "import tritonnorm",
    "tritonnorm, first call": "from tritonnorm import explain",
}
CHILD = """
import json, sys, time
seconds = []
for line in json.loads(sys.argv[1]):
    start = time.perf_counter()
    exec(line)
    seconds.append(time.perf_counter() - start)
print(json.dumps(seconds))
"""


def run(progress: Progress = silent, repeats: int = 7) -> list[HostRow]:
    """Time the imports in so many new processes, one after another.

    Before them one process runs unmeasured: it writes the compiled files and warms the file cache.

    Raises:
        ValueError: no repeats.
        RuntimeError: an import failed; the message is the child's last line.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    _child()
    samples = []
    for i in range(repeats):
        progress(i, repeats, "importing in a new process")
        samples.append(_child())
    progress(repeats, repeats)
    return [
        _row(name, Timing.of(list(seconds)))
        for name, seconds in zip(IMPORTS, zip(*samples, strict=True), strict=True)
    ]


def _row(variant: str, timing: Timing) -> HostRow:
    p50, p20, p80 = (1e6 * seconds for seconds in (timing.median, timing.p20, timing.p80))
    return HostRow("import", variant, p50, p20, p80, timing.rounds)


def _child() -> list[float]:
    """Seconds of each import, in order."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(list(IMPORTS.values()))],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("TRITON")},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"imports: {(done.stderr.splitlines() or ['no words'])[-1][:300]}")
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds
