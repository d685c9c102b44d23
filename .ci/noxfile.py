"""The suite under other versions of Triton, by hand: `nox -f .ci/noxfile.py`."""

from __future__ import annotations

from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent.parent

# Triton 3.4's interpreter does not run with numpy 2.4. The second column is for those.
VERSIONS = {
    "3.4.0": "numpy<2.4",
    "3.6.0": "numpy",
    "3.7.1": "numpy",
    "3.9.0": "numpy",
}


def constraints(triton: str, folder: Path) -> Path:
    """The CI constraints less their lines for triton and numpy, which the session chooses."""
    lines = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(("triton==", "numpy=="))]
    path = folder / "constraints.txt"
    path.write_text("\n".join([*kept, f"triton=={triton}", VERSIONS[triton], ""]), encoding="utf-8")
    return path


@nox.session
@nox.parametrize("triton", list(VERSIONS))
def suite(session: nox.Session, triton: str) -> None:
    """The whole suite with one version of Triton. Arguments after -- go to pytest."""
    session.chdir(ROOT)
    pins = constraints(triton, Path(session.create_tmp()))
    session.install("-c", str(pins), "-e", ".[test]")
    session.run("python", "-m", "pytest", "-n", "auto", *session.posargs)
