"""Tests that need another kind of process than the interpreter's run in a child pytest from here.

tests/compiled and bench/regression compile kernels (no GPU needed); tests/gpu runs them. All need
Triton's compiler, and a process in which the interpreter was chosen cannot go back to it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
HAS_TRITON = importlib.util.find_spec("triton") is not None


def run_folder(folder: str, report: Path, *options: str) -> tuple[str, int]:
    """Run pytest on a folder without the interpreter; its output, and how many tests ran."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", folder, f"--junitxml={report}", *options],
        cwd=ROOT,
        env={**inherited, "TRITON_INTERPRET": "0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"pytest {folder}: exit status {done.returncode}\n{done.stdout}"
    counts = [suite.attrib for suite in ElementTree.parse(report).iter("testsuite")]
    ran = sum(int(count["tests"]) - int(count["skipped"]) for count in counts)
    return done.stdout, ran


def parallel() -> list[str]:
    return ["-n", "auto"] if importlib.util.find_spec("xdist") else []


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="needs triton, to compile with")
def test_compiled(tmp_path: Path) -> None:
    output, ran = run_folder("tests/compiled", tmp_path / "report.xml", *parallel())
    assert ran > 0, output


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu(tmp_path: Path) -> None:
    output, ran = run_folder(
        "tests/gpu", tmp_path / "report.xml"
    )  # one process: it fills the memory
    assert ran > 0, output


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="needs triton, to compile with")
def test_regression(tmp_path: Path) -> None:
    """The suites of pytest-benchmark run; their times are for who compares them."""
    options = ("-p", "no:xdist", "--benchmark-disable")
    output, ran = run_folder("bench/regression", tmp_path / "report.xml", *options)
    assert ran >= 8, output
