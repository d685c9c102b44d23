"""Every entry of every shipped table compiles for its architecture; what is wrong is noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests import tuned
from tritonnorm.cli.main import main
from tritonnorm.device import KNOWN
from tritonnorm.kernels.base import Config
from tritonnorm.tune.revisions import REVISIONS
from tritonnorm.tune.store import SHIPPED, read_table, write_table
from tritonnorm.tune.validate import device_of, faults_of

GOOD = tuned.entry(tuned.problem(8, 64, 784), config=None)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_table(path: Path) -> None:
    assert list(faults_of(read_table(path))) == []


def test_a_made_up_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = KNOWN["h200"]
    path = tmp_path / "h200.json"
    write_table(
        path,
        device,
        [GOOD, tuned.entry(tuned.problem(8, 64, 784, batch_statistics=False), "affine")],
    )
    assert list(faults_of(read_table(path))) == []
    old = replace(GOOD, revision=GOOD.revision + 1)
    other = replace(GOOD, config={**GOOD.config, "block_p": 8192})
    none = replace(GOOD, algorithm="affine", revision=REVISIONS["affine"])
    assert [fault.partition(": ")[2] for fault in faults_of([old, other, none])] == [
        f"of revision {old.revision} of split",
        f"split does not offer {dict(other.config)}",
        f"affine does not offer {dict(none.config)}",
    ]
    assert main(["tune", "--dry-run", "--merge", str(path), "--processes", "1"]) == 0
    assert "2 results, 0 at fault" in capsys.readouterr().out
    write_table(path, device, [GOOD, other])
    assert main(["tune", "--dry-run", "--merge", str(path), "--processes", "1"]) == 1


def test_an_entry_that_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    from tritonnorm.kernels.split import Split

    spilling = Config(1, 32, 2048, 1, 4)
    monkeypatch.setattr(Split, "configs", lambda *args: [spilling])
    entry = replace(GOOD, config=vars(spilling))
    (fault,) = faults_of([entry])
    assert fault.endswith("spills registers")


def test_the_device_of_an_entry() -> None:
    for known in KNOWN.values():
        found = device_of(tuned.entry(device=known))
        assert found.identity == known.identity and found.warp == known.warp
