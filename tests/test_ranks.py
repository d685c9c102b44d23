"""All ranks of a job take the same plan, whatever their caches hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests import tuned
from tritonnorm.kernels import BY_NAME
from tritonnorm.tune.store import UserCache

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
ROOT = Path(__file__).resolve().parent.parent

# Every scenario is a job of its own: another process group, and tables that are read anew.
SCENARIOS: dict[str, dict[str, Any]] = {
    "caches differ": {},
    "a plan before the group exists": {"WORLD_SIZE": ["2", "2"]},
    "rank 0 has no batch norm": {"absent": 3.0, "wait": 1.0},
    "modes differ": {"TRITONNORM_TUNE": ["heuristic", "off"]},
    "releases differ": {"revision": 7},
}
RANK = """
import datetime, json, os, sys, time
import torch.distributed as dist
from tests import tuned
from tritonnorm.plan import plan
from tritonnorm.tune import agree, standing
rank, folder, said = int(sys.argv[1]), sys.argv[2], {}
for i, (name, options) in enumerate(json.loads(sys.argv[3]).items()):
    os.environ.update({"TRITONNORM_TUNE": "off", "WORLD_SIZE": "1"})
    os.environ.update({n: v[rank] for n, v in options.items() if n.isupper()})
    agree.agreed.__defaults__ = (datetime.timedelta(seconds=options.get("wait", 60)),)
    if rank and "revision" in options:
        standing.REVISIONS["split"] = options["revision"]
    standing.reload()
    plans = said[name] = []
    def ask():
        found = plan(tuned.problem(), tuned.H200)
        plans.append([found.algorithm, str(found.config), found.source])
    if "WORLD_SIZE" in options:
        ask()
    place = f"file://{folder}/rendezvous{i}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    if rank == 0:
        time.sleep(options.get("absent", 0))
    try:
        ask()
        dist.barrier()
        ask()
    except RuntimeError as error:
        said[name] = str(error)
    if "revision" in options:
        break  # the other rank is gone: the end
    dist.barrier()
    dist.destroy_process_group()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two caches with different choices of one problem."""
    found = tmp_path_factory.mktemp("ranks")
    for rank, config in enumerate(choices()):
        UserCache(found / str(rank)).put(tuned.entry(config=config))
    return found


def choices() -> list[Any]:
    configs = BY_NAME["split"].configs(tuned.problem(), tuned.H200)
    assert configs[-1] != configs[-2]
    return [configs[-1], configs[-2]]


@pytest.fixture(scope="module")
def job(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What two gloo ranks say of their plans, and what they log."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), folder, json.dumps(SCENARIOS)],
            cwd=ROOT,
            env={**os.environ, "TRITONNORM_CACHE_DIR": str(folder / str(rank))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    done = [child.communicate(timeout=240) for child in children]
    assert all(out for out, _ in done), done
    return [json.loads(out) for out, _ in done], [err for _, err in done]


def test_rank_0_decides(job: Any) -> None:
    zero, one = (said["caches differ"] for said in job[0])
    assert zero == one == [["split", str(choices()[0]), "user cache"]] * 2


def test_plans_made_before_the_group_exists(job: Any) -> None:
    """A launcher's WORLD_SIZE says that there will be others: no cache counts until they meet."""
    zero, one = (said["a plan before the group exists"] for said in job[0])
    assert zero == one and zero[0][2] == "formula"
    assert zero[1:] == [["split", str(choices()[0]), "user cache"]] * 2


def test_rank_0_has_no_batch_norm(job: Any) -> None:
    """The others stop waiting, and then nobody's cache counts, rank 0's own neither."""
    zero, one = (said["rank 0 has no batch norm"] for said in job[0])
    assert zero == one and zero[0][2] == "formula"
    assert "no rank uses its cache" in job[1][1]


def test_modes_that_differ(job: Any) -> None:
    zero, one = (said["modes differ"] for said in job[0])
    assert zero == one and zero[0][2] == "formula"


def test_releases_that_differ(job: Any) -> None:
    assert "different releases of tritonnorm" in job[0][1]["releases differ"]
