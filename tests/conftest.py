"""Test set-up: the main process interprets kernels on the CPU; compiled and gpu tests run apart."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.lab.kept import kept_kernels

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker: they share the cores
ROOT = Path(__file__).resolve().parent.parent
if "TRITON_CACHE_DIR" not in os.environ:
    os.environ["TRITON_CACHE_DIR"] = kept_kernels(ROOT / ".pytest_cache" / "triton")
# Plans are the formula's, whatever ships or was tuned on this machine; tests of tables set it anew.
os.environ["TRITONNORM_TUNE"] = "heuristic"
os.environ["TRITONNORM_CACHE_DIR"] = os.devnull  # nothing can be kept there

collect_ignore: list[str] = []

if os.environ["TRITON_INTERPRET"] == "1":
    from bench.lab import interpreter

    collect_ignore += ["compiled", "gpu"]
    interpreter.install()


@pytest.fixture(scope="session")
def pool() -> Iterator[Any]:
    """Three processes in place of ranks, started when a test first asks for them."""
    from tests.ranks import ranks

    with ranks() as started:
        yield started


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty cache of tuned results for this process; tables count, none are shipped."""
    from tritonnorm.tune import standing
    from tritonnorm.tune.store import UserCache

    monkeypatch.setenv("TRITONNORM_TUNE", "off")
    monkeypatch.setenv("TRITONNORM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(standing, "SHIPPED", tmp_path / "shipped")
    standing.reload()
    yield UserCache(tmp_path / "cache")
    monkeypatch.undo()
    standing.reload()
