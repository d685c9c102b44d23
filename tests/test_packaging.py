"""The wheel builds, holds its data and licence, and imports with what it declares alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "TRITON"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    run(*build, cwd=folder)
    (path,) = folder.glob("tritonnorm-*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = (ROOT / "tritonnorm").rglob("*")
    kept = [path for path in package if path.suffix in (".py", ".json") or path.name == "py.typed"]
    assert "tritonnorm/py.typed" in held
    assert held == {str(path.relative_to(ROOT)) for path in kept}


def about(wheel: Path) -> Message:
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    return message_from_bytes(archive.read(name))


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert about(wheel)["License-Expression"] == "Apache-2.0"
    assert about(wheel)["Requires-Python"] == ">=3.10"
    always = [r for r in about(wheel).get_all("Requires-Dist", []) if "extra ==" not in r]
    assert sorted(always) == [
        "platformdirs>=4",
        "torch>=2.8",
        "triton>=3.4; sys_platform == 'linux'",
    ]


def closure(name: str) -> set[str]:
    """A distribution and all that it requires here, leaving extras out, by canonical name."""
    found, todo = set(), [name]
    while todo:
        current = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        try:
            requires = metadata.requires(current) or []
        except metadata.PackageNotFoundError:  # asked for on other platforms only
            continue
        if current not in found:
            found.add(current)
            todo += [re.match(r"[\w.-]+", r)[0] for r in requires if "extra ==" not in r]
    return found


def top_levels(name: str) -> set[str]:
    """What a distribution put directly into site-packages."""
    files = metadata.files(name) or []
    return {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}


def test_imports_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """A new environment with the wheel, and with what torch and triton require linked into it."""
    venv.create(tmp_path / "empty", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "empty").glob("lib/python*/site-packages")
    here = Path(sysconfig.get_path("purelib"))
    for name in closure("torch") | closure("triton") | closure("platformdirs"):
        for entry in top_levels(name):
            if (here / entry).exists() and not (site / entry).exists():
                (site / entry).symlink_to(here / entry)
    assert not (site / "numpy").exists()
    zipfile.ZipFile(wheel).extractall(site)
    python = tmp_path / "empty" / "bin" / "python"
    out = run(
        *(python, "-c"),
        "import torch, tritonnorm\n"
        "y = tritonnorm.BatchNorm2d(3, activation='relu')(torch.ones(2, 3, 4, 4))\n"
        "print(tritonnorm.__file__, tritonnorm.__version__, y.abs().max().item())",
        cwd=tmp_path,
    )
    file, version, largest = out.split()
    assert Path(file).parent == site / "tritonnorm"
    assert wheel.name.startswith(f"tritonnorm-{version}-")
    assert float(largest) == 0.0  # a constant channel


def test_the_extras_pull_no_torchvision(wheel: Path) -> None:
    """Its build must match that of torch; one that does not breaks other imports."""
    extras = [r for r in about(wheel).get_all("Requires-Dist", []) if "extra ==" in r]
    names = {re.match(r"[\w.-]+", r)[0] for r in extras} - {"tritonnorm"}
    assert names, "the wheel declares no extras"
    assert not {"torchvision", "torchaudio"} & set().union(*map(closure, names))
