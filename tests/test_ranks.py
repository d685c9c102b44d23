"""All ranks of a job take the same plan, whatever their caches hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests import tuned
from tritonnorm.kernels import BY_NAME
from tritonnorm.tune.store import UserCache

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
ROOT = Path(__file__).resolve().parent.parent
RANK = """
import datetime, json, sys, time
import torch.distributed as dist
from tests import tuned
from tritonnorm.plan import plan
from tritonnorm.tune import agree, standing
rank, place, early, absent, wait = int(sys.argv[1]), sys.argv[2], *map(float, sys.argv[3:])
agree.agreed.__defaults__ = (datetime.timedelta(seconds=wait),)
p, said = tuned.problem(), []
def ask():
    found = plan(p, tuned.H200)
    said.append([found.algorithm, str(found.config), found.source])
if early:
    ask()
dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
if rank == 0 and absent:
    time.sleep(absent)
ask()
dist.barrier()
ask()
print(json.dumps(said))
"""


def ranks(tmp_path: Path, early: int = 0, absent: float = 0, wait: float = 20, **each: list[str]):
    """What both ranks say of their plans, or their errors. Rank i has the cache ``tmp_path/i``."""
    place = tmp_path / "rendezvous"
    children = []
    for rank in range(2):
        own = {"TRITONNORM_TUNE": "off", "TRITONNORM_CACHE_DIR": str(tmp_path / str(rank))}
        own |= {name: values[rank] for name, values in each.items()}
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK, *map(str, (rank, place, early, absent, wait))],
                cwd=ROOT,
                env={**os.environ, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    done = [child.communicate(timeout=120) for child in children]
    return [json.loads(out) if out else err for out, err in done], [err for _, err in done]


def different_caches(tmp_path: Path) -> list[str]:
    """Fill both caches, with different choices of one problem; the two configurations."""
    configs = BY_NAME["split"].configs(tuned.problem(), tuned.H200)
    for rank, config in enumerate((configs[-1], configs[-2])):
        UserCache(tmp_path / str(rank)).put(tuned.entry(config=config))
    return [str(configs[-1]), str(configs[-2])]


def test_rank_0_decides(tmp_path: Path) -> None:
    of_rank_0, of_rank_1 = different_caches(tmp_path)
    assert of_rank_0 != of_rank_1
    said, _ = ranks(tmp_path)
    assert said == [[["split", of_rank_0, "user cache"]] * 2] * 2


def test_plans_made_before_the_group_exists(tmp_path: Path) -> None:
    """A launcher's WORLD_SIZE says that there will be others: no cache counts until they meet."""
    of_rank_0, _ = different_caches(tmp_path)
    (zero, one), _ = ranks(tmp_path, early=1, WORLD_SIZE=["2", "2"])
    assert zero == one
    assert zero[0][2] == "formula" and zero[1:] == [["split", of_rank_0, "user cache"]] * 2


def test_rank_0_has_no_batch_norm(tmp_path: Path) -> None:
    """The others stop waiting, and then nobody's cache counts, rank 0's own neither."""
    different_caches(tmp_path)
    (zero, one), errors = ranks(tmp_path, absent=4, wait=1)
    assert zero == one and zero[0][2] == "formula"
    assert "no rank uses its cache" in errors[1]


def test_modes_that_differ(tmp_path: Path) -> None:
    different_caches(tmp_path)
    (zero, one), _ = ranks(tmp_path, TRITONNORM_TUNE=["heuristic", "off"])
    assert zero == one and zero[0][2] == "formula"


def test_releases_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = 'if rank: standing.REVISIONS = {"split": 7}\nif early:'
    monkeypatch.setitem(globals(), "RANK", RANK.replace("if early:", other))
    said, _ = ranks(tmp_path)
    assert "different releases of tritonnorm" in said[1]
