"""Tables of tuned results, examined without a GPU: does every entry still compile, and well?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tritonnorm.device import Device
from tritonnorm.kernels import algorithms_for
from tritonnorm.kernels.base import Config
from tritonnorm.tune.prune import prune
from tritonnorm.tune.revisions import REVISIONS
from tritonnorm.tune.store import Entry

__all__ = ["device_of", "faults_of"]


def device_of(entry: Entry) -> Device:
    """The GPU of an entry, as far as its identity tells."""
    d = entry.device
    arch = str(d["arch"])
    warp = 64 if arch.startswith("gfx9") else 32
    sizes = (int(d["sms"]), int(d["l2_bytes"]))
    return Device("", arch, *sizes, 0.0, warp, int(d["bus_bits"]), int(d["memory_khz"]))


def faults_of(entries: Iterable[Entry], processes: int = 1) -> Iterator[str]:
    """What is wrong with the entries of tables, in words; nothing if all is well.

    An entry must be of the kernels as they are, name a configuration that its algorithm offers, and
    compile for its architecture without spills and with the vector width that its problem allows.
    """
    for entry in entries:
        device, problem = device_of(entry), entry.key.problem()
        if REVISIONS.get(entry.algorithm) != entry.revision:
            yield f"{entry.key}: of revision {entry.revision} of {entry.algorithm}"
            continue
        try:
            config = Config(**entry.config)
            algorithm = next(a for a in algorithms_for(problem) if a.name == entry.algorithm)
            able = algorithm.supports(problem, device) is None
            offered = able and config in algorithm.configs(problem, device)
        except (TypeError, ValueError, StopIteration):
            offered = False
        if not offered:
            yield f"{entry.key}: {entry.algorithm} does not offer {dict(entry.config)}"
            continue
        todo = {entry.key: (problem, [(entry.algorithm, config)])}
        for key, result in prune(todo, device, processes):
            yield from (f"{key}: {reason}" for reason in result.reasons)
