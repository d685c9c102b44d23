"""The ranks of a job take the same tuned results: those of rank 0.

Two ranks that compute the same layer by different kernels differ in rounding, and replicas drift
apart. Rank 0 puts what it found into the store of the process group, and the others read it there.
Nothing collective happens, so ranks that need no plan cannot block those that do.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from typing import Any, Literal

import torch.distributed as dist

from tritonnorm import settings

__all__ = ["Phase", "agreed", "has_collectives", "phase"]

Phase = Literal["alone", "before", "job"]
PLACE = "tritonnorm/tuned_results"
# Ranks reach their first batch norm together; this only bounds the wait for a rank 0 that has none.
WAIT = datetime.timedelta(seconds=20)


def phase() -> Phase:
    """Whether this process is alone, in a job, or in one whose process group is still to come.

    Launchers such as torchrun say in WORLD_SIZE how many processes there will be.
    """
    if dist.is_available() and dist.is_initialized():
        return "job" if dist.get_world_size() > 1 else "alone"
    size = os.environ.get("WORLD_SIZE", "1")
    return "before" if size.isdecimal() and int(size) > 1 else "alone"


def has_collectives() -> bool:
    """Whether kernels of NCCL (RCCL on AMD) may run beside others, with gradients of a job."""
    now = phase()
    return now == "before" or (now == "job" and "nccl" in str(dist.get_backend_config()))


def agreed(mine: Callable[[], dict[str, Any]], wait: datetime.timedelta = WAIT) -> dict[str, Any]:
    """What rank 0 found; nothing, for all ranks, if rank 0 does not come.

    Args:
        mine: makes what this process found, as JSON; its item "release" must be that of rank 0.
        wait: how long to wait for rank 0.

    Raises:
        RuntimeError: rank 0 runs another release, or its kernels have another revision.
    """
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    own = mine()
    nothing = json.dumps({"release": own["release"]})
    if rank == 0:
        value = store.compare_set(PLACE, "", json.dumps(own))
    else:
        try:
            store.wait([PLACE], wait)
            value = store.get(PLACE)
        except RuntimeError:  # the time is over; whoever says so first says it for all
            value = store.compare_set(PLACE, "", nothing)
    found: dict[str, Any] = json.loads(value)
    if found["release"] != own["release"]:
        raise RuntimeError(
            f"tuned results: rank 0 and rank {rank} run different releases of tritonnorm or have "
            f"different shipped tables ({found['release']} and {own['release']}), so their plans "
            "would differ"
        )
    if set(found) == {"release"}:
        settings.logger.warning(
            "rank 0 needed no norm within %d s: no rank uses its cache of tuned results",
            wait.total_seconds(),
        )
    elif found != own:
        settings.logger.info("rank %d takes the tuned results of rank 0, not its own", rank)
    return found
