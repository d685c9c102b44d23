"""Which norms besides batch norm `replace` takes, and what they become."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from . import nn as ours

#: Names of norms that `replace` takes besides "batch" -> torch's class -> ours.
SWAPS: dict[str, dict[type[nn.Module], type[nn.Module]]] = {
    "group": {nn.GroupNorm: ours.GroupNorm},
    "layer": {nn.LayerNorm: ours.LayerNorm},
    "instance": {
        nn.InstanceNorm1d: ours.InstanceNorm1d,
        nn.InstanceNorm2d: ours.InstanceNorm2d,
        nn.InstanceNorm3d: ours.InstanceNorm3d,
    },
    "rms": {nn.RMSNorm: ours.RMSNorm},
}
NORMS = ("batch", *SWAPS)
#: The same names -> how the rules of a report call them.
SHORT = {"batch": "bn", "group": "gn", "layer": "ln", "instance": "in", "rms": "rms"}


def check_norms(norms: Collection[str]) -> None:
    """Refuse a name that is none of `NORMS`."""
    unknown = sorted(set(norms) - set(NORMS))
    if isinstance(norms, str) or unknown:
        raise ValueError(f"norms: expected a tuple of {', '.join(NORMS)}; got {norms!r}")
