"""replace(model): torch's norms become this library's, in place, by a change of class.

The module objects stay, and with them parameters, buffers, hooks, flags and state_dict keys. Blocks
in which a norm runs together with what follows it get a forward of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.utils import parametrize

from tritonnorm import nn as ours
from tritonnorm.flow.inputs import Call, calls_from
from tritonnorm.fusing.forward import FusedForward
from tritonnorm.norms import swap
from tritonnorm.report import LEFT, Report, Row
from tritonnorm.settings import logger
from tritonnorm.sync.nn import SyncBatchNorm

if TYPE_CHECKING:
    from tritonnorm.fusing.search import Found

__all__ = ["replace", "restore"]

SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: ours.BatchNorm1d,
    nn.BatchNorm2d: ours.BatchNorm2d,
    nn.BatchNorm3d: ours.BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    **{plain: own for table in swap.SWAPS.values() for plain, own in table.items()},
}
_OURS = tuple(SWAPS.values())
# On modules that `replace` changed: their class before. `restore` looks for it.
_MARK = "_tritonnorm_replaced"
_ADDED = {"activation": None, "activation_args": ()}


def replace(
    model: nn.Module,
    *,
    norms: Collection[str] = ("batch",),
    example_inputs: Any = None,
    fuse: bool = True,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    dry_run: bool = False,
) -> tuple[nn.Module, Report]:
    """Make every `torch.nn.BatchNorm1d/2d/3d` and `SyncBatchNorm` of a model a batch norm of this
    library, in place, and run it together with the addition and the activation that follow it. The
    same for the other norms that are named.

    Only modules of exactly these classes are changed; subclasses may compute something else. Each
    module stays the same object with the same parameters, buffers, hooks and settings. A block, the
    smallest module whose code shows a norm and what follows it, gets a `forward` on the
    object; its class stays. The block's own code runs whenever something is not as it was: a hook
    on a module that would not be called, another child, other arguments, a tracer.

    Args:
        model: the model; it is edited, and it may itself be a batch norm.
        norms: which kinds: "batch", "group", "layer", "instance", "rms".
        example_inputs: a tensor, a tuple of arguments, a mapping of keyword arguments, or a list of
            these. The model is run on them, and every fused block is checked in float64 against
            its own code: outputs, gradients and statistics, in training and in eval mode. Without
            them only what the code shows is fused, and arguments with a default have that value.
        fuse: False changes the norms only.
        filter_fn: called as `filter_fn(norm, name)`; False leaves the module as it is.
        dry_run: only report.

    Returns:
        The same model and the report, one row per norm of these kinds.

    Raises:
        ValueError: the model is not a module, or raised on the example inputs, or a name in `norms`
            is unknown. The model is as before then, as it is when `filter_fn` or anything else
            raises part-way.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    swap.check_norms(norms)
    calls = None if example_inputs is None else calls_from(example_inputs)
    report = Report("replace", dry_run=dry_run)
    whole = _model_reason(model)
    chosen: dict[nn.Module, int] = {}  # with the place of the row
    for name, module in model.named_modules():
        if _family(module) not in norms:
            continue
        shown, kind = name or "(root)", _kind(module)
        reason = whole or _inside_reason(model, name) or _reason(module)
        if reason is None and filter_fn is not None and not filter_fn(module, name):
            reason = "left out by filter_fn"
        if reason is not None:
            report.rows.append(Row(shown, kind, LEFT, reason))
            continue
        chosen[module] = len(report.rows)
        report.rows.append(Row(shown, kind, "replaced", _what(module), "class swap"))
    if whole:
        report.notes.append(whole)
    found = _fusable(model, chosen, calls, report) if fuse and chosen else None
    if not dry_run:
        _edit(list(chosen), found.forwards if found else {})
    return model, report


def _fusable(
    model: nn.Module, chosen: dict[nn.Module, int], calls: list[Call] | None, report: Report
) -> Found:
    """What can be fused; the rows of the report are written anew."""
    # Here, as they are a fifth of `import tritonnorm`, which most programs want for its modules.
    from tritonnorm.fusing.search import search
    from tritonnorm.fusing.verify import differing, recorded

    names = {module: name for name, module in model.named_modules()}
    if calls is not None and (reason := _cannot_run(model)):
        report.notes.append(reason)
        calls = None
    given = None if calls is None else recorded(model, calls)
    short = {module: swap.SHORT[_family(module)] for module in chosen}
    found = search(model, short, given)
    if calls is not None:
        for block, difference in differing(model, found.forwards, SWAPS, calls).items():
            found.drop(
                block, f"the fused code of {names[block] or 'the model'} was dropped: {difference}"
            )
    for module, place in chosen.items():
        row = report.rows[place]
        if fused := found.fused.get(module):
            where = f"in the forward of {names[fused.block] or 'the model'}"
            partner = names[fused.partner] if fused.partner is not None else ""
            row = dataclasses.replace(
                row, decision="fused", rule=fused.rule, partner=partner, reason=where
            )
        else:
            row = dataclasses.replace(
                row, reason=f"{row.reason}; not fused: {found.reasons[module]}"
            )
        report.rows[place] = row
    return found


def restore(model: nn.Module) -> nn.Module:
    """Undo `replace`: every module it changed gets its torch class or its own forward back.

    Modules that were built as norms of this library stay what they are.

    Args:
        model: the model; it is edited in place.

    Returns:
        The same model.
    """
    for name, module in model.named_modules():
        if isinstance(module.__dict__.get("forward"), FusedForward):
            FusedForward.remove(module)
        plain = module.__dict__.get(_MARK)
        if plain is not None and type(module) is SWAPS[plain]:
            _to_plain(module, plain)
        elif plain is not None and isinstance(module, SWAPS[plain]):
            why = f"its class was changed to {type(module).__name__} after replace"
            logger.warning("restore: %s stays a norm of this library: %s", name, why)
    return model


def _edit(modules: list[nn.Module], forwards: Mapping[nn.Module, FusedForward]) -> None:
    """Change the norms and the blocks, or nothing when anything raises."""
    done: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for module in modules:
            plain = type(module)
            done.append((module, plain))
            module.__class__ = SWAPS[plain]
            module.__dict__.update(_ADDED)
            module.__dict__[_MARK] = plain
        for forward in forwards.values():
            forward.install()
    except BaseException:
        for block in forwards:
            FusedForward.remove(block)
        for module, plain in done:
            _to_plain(module, plain)
        raise


def _cannot_run(model: nn.Module) -> str | None:
    """Why the model cannot be run on the example inputs, or None."""
    tensors = (*model.parameters(), *model.buffers())
    if any(nn.parameter.is_lazy(tensor) for tensor in tensors):
        return "example_inputs were not used: the model has lazy parameters; run it once first"
    if any(tensor.is_meta for tensor in tensors):
        return "example_inputs were not used: the model is on the meta device"
    return None


def _to_plain(module: nn.Module, plain: type[nn.Module]) -> None:
    module.__class__ = plain
    for name in (*_ADDED, _MARK):
        module.__dict__.pop(name, None)


def _family(module: nn.Module) -> str:
    """The kind of norm, of those that `norms` names; empty for other modules."""
    for name, table in swap.SWAPS.items():
        if isinstance(module, tuple(table)):
            return name
    return "batch" if _is_batch_norm(module) else ""


def _is_batch_norm(module: nn.Module) -> bool:
    """Whether the report has a row for this module."""
    scripted = isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in _kind(module)
    frozen = "BatchNorm" in type(module).__name__ and hasattr(module, "running_mean")
    return isinstance(module, _BatchNorm) or scripted or frozen


def _kind(module: nn.Module) -> str:
    return str(getattr(module, "original_name", "") or type(module).__name__)


def _model_reason(model: nn.Module) -> str | None:
    """Why no module of the model may be changed, or None."""
    if isinstance(model, torch.jit.ScriptModule):
        return "the model is a TorchScript module: call replace before scripting"
    return None


def _inside_reason(model: nn.Module, name: str) -> str | None:
    """Why the place of a module in the model forbids the change, or None."""
    parts = name.split(".") if name else []
    for depth in range(len(parts) + 1):
        parent = model.get_submodule(".".join(parts[:depth]))
        wrapped = isinstance(parent, torch._dynamo.eval_frame.OptimizedModule)
        if wrapped or getattr(parent, "_compiled_call_impl", None) is not None:
            return "it is compiled: call replace before torch.compile"
    return None


def _reason(module: nn.Module) -> str | None:
    """Why a norm is left, or None when its class can be changed."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module, whose code is fixed"
    if isinstance(module, _OURS):
        return "it is already a norm of this library"
    if isinstance(module, _LazyNormBase):
        return "it is lazy: run the model once, then call replace"
    if parametrize.is_parametrized(module):
        return "it is parametrised, which has changed its class already"
    if type(module) not in SWAPS:
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


def _what(module: nn.Module) -> str:
    """The reason of a replaced row."""
    tensors = (*module.parameters(), *module.buffers())
    where = "; its tensors are on the meta device" if any(t.is_meta for t in tensors) else ""
    return f"exactly torch.nn.{type(module).__name__}{where}"
