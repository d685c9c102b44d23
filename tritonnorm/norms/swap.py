"""What `replace` does with group, layer, instance and RMS norms: a change of class, in place.

Only modules of exactly torch's classes are changed; a subclass may compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tritonnorm.report import LEFT, Row

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
_MARK = "_tritonnorm_swapped"  # on modules that were changed; `restore_norms` looks for it
_ADDED = {"activation": None, "activation_args": ()}


def check_norms(norms: Collection[str]) -> None:
    """Refuse a name that is none of `NORMS`."""
    unknown = sorted(set(norms) - set(NORMS))
    if isinstance(norms, str) or unknown:
        raise ValueError(f"norms: expected a tuple of {', '.join(NORMS)}; got {norms!r}")


def swap_norms(
    model: nn.Module,
    norms: Collection[str],
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    dry_run: bool = False,
) -> list[Row]:
    """Make torch's norms of these kinds this library's, in place.

    Args:
        model: the model.
        norms: keys of `SWAPS`; others are ignored.
        filter_fn: called as `filter_fn(norm, name)`; False leaves the module as it is.
        dry_run: only report.

    Returns:
        A row for each norm of these kinds.
    """
    table = {k: v for kind in norms for k, v in SWAPS.get(kind, {}).items()}
    theirs, ours = tuple(table), tuple(table.values())
    rows: list[Row] = []
    chosen: list[nn.Module] = []
    compiled: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if _is_compiled(module):
            compiled = (*compiled, f"{name}." if name else "")
        if not isinstance(module, theirs):
            continue
        reason = _reason(module, table, ours)
        if reason is None and (_is_compiled(module) or name.startswith(compiled or "\0")):
            reason = "it is compiled: call replace before torch.compile"
        if reason is None and filter_fn is not None and not filter_fn(module, name):
            reason = "left out by filter_fn"
        kind, shown = type(module).__name__, name or "(root)"
        if reason is not None:
            rows.append(Row(shown, kind, LEFT, reason))
            continue
        chosen.append(module)
        rows.append(Row(shown, kind, "replaced", f"exactly torch.nn.{kind}", "class swap"))
    for module in () if dry_run else chosen:
        module.__class__ = table[type(module)]
        module.__dict__.update(_ADDED, **{_MARK: True})
    return rows


def restore_norms(model: nn.Module) -> None:
    """Give every module that `swap_norms` changed its torch class back."""
    original = {o: t for table in SWAPS.values() for t, o in table.items()}
    for module in model.modules():
        if type(module) in original and module.__dict__.get(_MARK):
            module.__class__ = original[type(module)]
            for name in (*_ADDED, _MARK):
                module.__dict__.pop(name, None)


def _is_compiled(module: nn.Module) -> bool:
    wrapped = isinstance(module, torch._dynamo.eval_frame.OptimizedModule)
    return wrapped or getattr(module, "_compiled_call_impl", None) is not None


def _reason(
    module: nn.Module,
    table: dict[type[nn.Module], type[nn.Module]],
    ours: tuple[type[nn.Module], ...],
) -> str | None:
    """Why a norm is left, or None when its class can be changed."""
    if isinstance(module, ours):
        return "it is already a norm of this library"
    if parametrize.is_parametrized(module):
        return "it is parametrised, which has changed its class already"
    if type(module) not in table:
        path = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"{path} is not exactly torch's class and may compute something else"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if taken := [name for name in (*_ADDED, _MARK) if hasattr(module, name)]:
        return f"it has an attribute of its own named {taken[0]}"
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            return f"its {name} is a {type(tensor).__name__}, not a plain tensor"
    return None
