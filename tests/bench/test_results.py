"""The results files of the repository: valid, plausible, in the right place, of a known commit."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import bench
from bench.commands.measure import RESULTS, slug
from bench.record.file import Record
from bench.record.rows import TABLES

FILES = sorted(RESULTS.rglob("*"))
TEXTS = {".json", ".md", ".png", ".csv"}


def faults(path: Path, results: Path = RESULTS) -> list[str]:
    """What is wrong with a results file and where it lies."""
    record = Record.read(path)
    e = record.environment
    found = []
    folder = slug(e["gpu"]["name"]) if e["gpu"]["sms"] else "cpu"
    if path.parent != results / folder:
        found.append(f"belongs into {folder}/")
    if not path.stem.startswith(e["date"]):
        found.append(f"is of {e['date']}")
    if e["dirty"] is not False or not e["commit"]:
        found.append("was measured with changes that no commit has")
    if (
        record.frame()
        .duplicated(["op", "mode", "layout", "dtype", "shape", "provider", "cache"])
        .any()
    ):
        found.append("has a row twice")
    return found


def test_only_results_are_there() -> None:
    strange = [path for path in FILES if path.is_file() and path.suffix not in TEXTS]
    assert strange == []


def test_every_file_of_the_repository() -> None:
    found = {str(path): faults(path) for path in FILES if path.suffix == ".json"}
    assert {path: wrong for path, wrong in found.items() if wrong} == {}
    if found:
        assert sum(len(bench.load(RESULTS, table=table)) for table in TABLES) > 0


def test_a_file_in_the_wrong_place_is_found(tmp_path: Path) -> None:
    from tests.bench.samples import sample

    record = sample()
    record.environment |= {"dirty": False, "commit": "0" * 40, "date": "2026-01-02"}
    right = tmp_path / slug(record.environment["gpu"]["name"]) / "2026-01-02.json"
    record.save(right)
    assert faults(right, tmp_path) == []
    wrong = tmp_path / "another_gpu" / "2026-01-03.json"
    wrong.parent.mkdir()
    shutil.copy(right, wrong)
    assert len(faults(wrong, tmp_path)) == 2
    record.environment |= {"dirty": True}
    record.ops.append(record.ops[0])
    record.save(right)
    assert len(faults(right, tmp_path)) == 2


@pytest.mark.parametrize("path", ["bench/results/nvidia_h200/2026-01-01.json"])
def test_git_does_not_ignore_results(path: str) -> None:
    root = RESULTS.parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    done = subprocess.run(["git", "check-ignore", "-q", path], cwd=root)
    assert done.returncode == 1
