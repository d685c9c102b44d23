"""Tuning at the first call of a kind, where TRITONNORM_TUNE asks for it."""

from __future__ import annotations

import threading

import torch
import torch.distributed as dist

from tritonnorm import settings
from tritonnorm.device import Device
from tritonnorm.plan import Plan
from tritonnorm.tune import agree
from tritonnorm.tune.key import Key, Shape
from tritonnorm.tune.session import Session
from tritonnorm.tune.standing import OWN

__all__ = ["refusal", "tuned"]

_lock = threading.Lock()
_done: dict[tuple[Key, Device], Plan] = {}  # of this process, by kind of GPU
_said: set[str] = set()


def refusal() -> str | None:
    """Why nothing may be timed now, or None."""
    if agree.phase() != "alone" or (dist.is_available() and dist.is_initialized()):
        return "this is a job of several processes, whose plans must be the same"
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    if not torch.cuda.is_available():
        return "there is no GPU"
    return None


def _index(device: Device) -> int:
    """The number of a GPU of this kind, the current one if it is."""
    current = torch.cuda.current_device()
    for i in (current, *range(torch.cuda.device_count())):
        if Device.of(torch.device("cuda", i)).identity == device.identity:
            return i
    return current


def tuned(problem: Shape, device: Device, chosen: Plan) -> Plan:
    """The plan that tuning finds, once per process and kind; ``chosen`` where it may not happen."""
    key = Key.of(problem)
    reason = refusal()
    if reason is not None:
        if reason not in _said:
            _said.add(reason)
            settings.logger.warning("TRITONNORM_TUNE: nothing is tuned: %s", reason)
        return chosen
    with _lock:
        known = (key, device)
        if known not in _done:
            settings.logger.info("tuning %s", key)
            session = Session(device, index=_index(device))
            done = session.tune([problem]).done
            best = done[0].result.best if done else None
            _done[known] = Plan(*best, OWN) if best else chosen
        return _done[known]
