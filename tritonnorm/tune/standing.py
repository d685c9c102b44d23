"""The tuned results that count in this process: read once, and the same on every rank of a job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from tritonnorm import settings
from tritonnorm.device import INTERPRETER, Device
from tritonnorm.tune import agree
from tritonnorm.tune.lookup import FARTHEST, Entries
from tritonnorm.tune.revisions import REVISIONS
from tritonnorm.tune.store import SHIPPED, Entry, UserCache, shipped

__all__ = ["NEAREST", "OWN", "SEEN", "TABLE", "on_change", "put", "reload", "standing"]

OWN, TABLE, NEAREST = "user cache", "shipped table", "nearest entry"
SEEN = (OWN, TABLE)  # sources that were measured on this GPU, for this size

_standing: dict[Device, tuple[Entries, ...]] = {}
_phase: agree.Phase = "alone"
_cache: UserCache | None = None
_agreed: dict[str, Any] | None = None
_listeners: list[Callable[[], None]] = []


def standing(device: Device) -> tuple[Entries, ...]:
    """The look-ups for a GPU, the most trusted first: cache, shipped table, nearest entry.

    Files are read when they are first needed. In a job of several processes they are those of rank
    0; while its process group is still to come, the cache is left out.
    """
    global _phase
    now = agree.phase()
    if now != _phase:
        _phase = now
        reload()
    found = _standing.get(device)
    if found is None:
        found = _standing[device] = _read(device)
    return found


def _read(device: Device) -> tuple[Entries, ...]:
    global _agreed
    if device.arch == INTERPRETER.arch:
        return ()
    if _phase == "job":
        if _agreed is None:
            _agreed = agree.agreed(_bundle)
        heuristic = _agreed.get("heuristic", False)
        own = [Entry.from_json(e) for e in _agreed.get("cache", ())]
        extra = [Entry.from_json(e) for e in _agreed.get("tables", ())]
    else:
        heuristic = settings.tune_mode() == "heuristic"
        own = [] if _phase == "before" or heuristic else cache().entries()
        extra = [] if heuristic else shipped(settings.table_files())
    if heuristic:
        return ()
    tables = [*extra, *shipped(sorted(SHIPPED.glob("*.json")))]
    here, arch = device.identity, device.arch
    own = [e for e in own if e.device["arch"] == arch]
    tables = [e for e in tables if e.device["arch"] == arch]
    return (
        Entries(OWN, [e for e in own if e.device == here]),
        Entries(TABLE, [e for e in tables if e.device == here]),
        Entries(NEAREST, [*own, *tables], FARTHEST),
    )


def _bundle() -> dict[str, Any]:
    """What rank 0 gives to the others."""
    heuristic = settings.tune_mode() == "heuristic"
    content = [path.read_bytes() for path in sorted(SHIPPED.glob("*.json"))]
    release = hashlib.sha256(b"\0".join([json.dumps(REVISIONS).encode(), *content])).hexdigest()
    if heuristic:
        return {"release": release[:12], "heuristic": True}
    return {
        "release": release[:12],
        "heuristic": False,
        "cache": [e.to_json() for e in cache().entries()],
        "tables": [e.to_json() for e in shipped(settings.table_files())],
    }


def cache() -> UserCache:
    """The user's cache of this process."""
    global _cache
    if _cache is None:
        _cache = UserCache()
    return _cache


def put(entry: Entry) -> bool:
    """Keep a tuned result, and use it from now on; whether it is on disk."""
    kept = cache().put(entry)
    _changed()
    return kept


def on_change(call: Callable[[], None]) -> None:
    """Have ``call`` called whenever look-ups may answer differently from before."""
    _listeners.append(call)


def reload() -> None:
    """Read the cache, the tables and the environment anew when they are next needed."""
    global _cache, _agreed
    _cache = _agreed = None
    _changed()


def _changed() -> None:
    _standing.clear()
    for call in _listeners:
        call()
