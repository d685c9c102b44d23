"""The suite under other versions of Triton and torch, by hand: `nox -f .ci/noxfile.py`."""

from __future__ import annotations

from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent.parent

# Triton -> (torch, numpy), as pip writes requirements. Triton 3.6 is what torch 2.11 brings. Triton
# 3.4's interpreter does not run with numpy 2.4.
VERSIONS = {
    "3.4.0": ("torch==2.13.0", "numpy<2.4"),
    "3.6.0": ("torch==2.11.0", "numpy"),
    "3.7.1": ("torch==2.13.0", "numpy"),
    "3.9.0": ("torch==2.13.0", "numpy"),
}
CHOSEN = ("triton==", "torch==", "numpy==")


def constraints(triton: str, folder: Path) -> Path:
    """The CI constraints less their lines for what the session chooses."""
    lines = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(CHOSEN)]
    path = folder / "constraints.txt"
    lines = [*kept, f"triton=={triton}", *VERSIONS[triton], ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@nox.session
@nox.parametrize("triton", list(VERSIONS))
def suite(session: nox.Session, triton: str) -> None:
    """The whole suite with one version of Triton. Arguments after -- go to pytest."""
    session.chdir(ROOT)
    pins = constraints(triton, Path(session.create_tmp()))
    session.install("-c", str(pins), "-e", ".[test]")
    session.run("python", "-m", "pytest", "-n", "auto", *session.posargs)
