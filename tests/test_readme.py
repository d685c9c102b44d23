"""Every Python block of the README and of docs/ runs, as a reader with a CPU would run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path) -> list[str]:
    return BLOCK.findall(path.read_text(encoding="utf-8"))


README = blocks(ROOT / "README.md")
PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if blocks(path)]


def run(code: str, folder: Path) -> None:
    """Run code in a fresh interpreter: no Triton interpreter, warnings are errors."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PYTEST"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def test_the_readme_has_blocks() -> None:
    assert len(README) >= 2


@pytest.mark.parametrize("index", range(len(README)))
def test_readme_block(index: int, tmp_path: Path) -> None:
    run(README[index], tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page(page: Path, tmp_path: Path) -> None:
    """The blocks of one page belong together: they run one after another in one process."""
    run("\n".join(blocks(page)), tmp_path)


def test_the_readme_gives_the_two_commands() -> None:
    """.ci/run takes the test command from here; both do all their set-up in one line."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines[:40] if line.startswith("python3 -m venv ")]
    assert [line.rpartition(" && ")[2] for line in commands] == [
        ".venv/bin/python -m bench demo",
        ".venv/bin/python -m pytest -n auto",
    ]
    assert all(" -c .ci/constraints.txt -e " in line for line in commands)
