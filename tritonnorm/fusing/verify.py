"""Runs on example inputs: what each module is called with, and whether fused blocks compute the
same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tritonnorm.flow.guard import StateGuard, quiet_run
from tritonnorm.flow.inputs import Call, tensors_in
from tritonnorm.fusing.forward import FusedForward
from tritonnorm.fusing.search import Given

Named = tuple[str, Tensor | None]
Before = Callable[[nn.Module, Any, Any], None]
LIMIT = 1e-9  # of the largest value, in float64: rounding is 1e-13, a wrong graph is 1e-2


def recorded(model: nn.Module, calls: list[Call]) -> Given:
    """The arguments of the first call of each module; tensors stand for their kind only.

    Raises:
        ValueError: the model raised on the inputs.
    """
    found: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        kinds = Call(args, kwargs).map(lambda t: t.new_empty(0))
        found.setdefault(module, (kinds.args, kinds.kwargs))

    observed(model, calls, before)
    return found


def differing(
    model: nn.Module, forwards: dict[nn.Module, FusedForward], swaps: Any, calls: list[Call]
) -> dict[nn.Module, str]:
    """The blocks whose fused code does not compute what their own does, and how it differs.

    Each is run by itself in float64 on what it gets in a run of the model, in training and in eval
    mode. Outputs, gradients and buffers are compared.
    """
    given: dict[nn.Module, Call] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module in forwards and module not in given:
            given[module] = Call(args, kwargs).map(lambda t: t.detach().clone())

    observed(model, calls, before)
    found: dict[nn.Module, str] = {}
    for module in list(given):
        if difference := _compare(forwards[module], swaps, given.pop(module).double()):
            found[module] = difference
    return found


def _compare(forward: FusedForward, swaps: Any, call: Call) -> str:
    """How the fused code differs from the block's own; empty if it does not."""
    try:
        plain = copy.deepcopy(forward.module).double()
        ours = copy.deepcopy(forward)
    except Exception as error:
        return f"it cannot be copied to be checked ({type(error).__name__}: {error})"
    ours.module.double()
    for bn in ours.norms:
        bn.__class__ = swaps.get(type(bn), type(bn))
    if ours.tensors(call.args, call.kwargs) is None:
        return ""  # called in another way than the one it was made for: its own code runs
    for training in (True, False):
        for module in (plain, ours.module):
            module.train(training)
        state = copy.deepcopy(plain.state_dict())
        with torch.random.fork_rng(devices=[]):
            try:
                expected = _results(plain, type(plain).forward, call)
            except Exception:
                continue  # one value per channel, say, which cannot be trained on
            try:
                got = _results(ours.module, lambda _, *a, **k: ours.run(*ours.tensors(a, k)), call)
            except Exception as error:
                return f"it raises {type(error).__name__}: {' '.join(str(error).split())[:100]}"
        if difference := _difference(expected, got):
            return difference
        plain.load_state_dict(state)
        ours.module.load_state_dict(state)
    return ""


def _difference(expected: list[Named], got: list[Named]) -> str:
    """The first tensor that differs, and by how much; empty if none does."""
    largest: dict[str, float] = {}
    for what, a in expected:
        if a is not None:
            largest[what] = max(largest.get(what, 0.0), _size(a))
    for (what, a), (_, b) in zip(expected, got, strict=True):
        if a is None or b is None:
            if a is not b:
                return f"{what} is missing"
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{what} has another shape or dtype"
        if not torch.equal(a.isnan(), b.isnan()):
            return f"{what} is not a number in other places"
        error = _size(a.double() - b.double())
        # Some gradients are zero but for rounding: that of a bias before a batch norm, say.
        if error > LIMIT * max(_size(a), 0.1 * largest[what]):
            return f"{what} differs by {error:.1e}"
    return ""


def _size(tensor: Tensor) -> float:
    return float(tensor.nan_to_num().abs().max()) if tensor.numel() else 0.0


def _results(module: nn.Module, forward: Any, call: Call) -> list[Named]:
    """Outputs, gradients and buffers of one step."""
    torch.manual_seed(0)
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        leaves.append(tensor.clone().requires_grad_())
        return leaves[-1] * 1  # blocks may write to what they are given

    with torch.enable_grad():
        given = call.map(leaf)
        outputs = list(tensors_in(forward(module, *given.args, **given.kwargs)))
        wanted = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
        scored = [y for y in outputs if y.requires_grad]
        grads: list[Any] = [None] * len(wanted)
        if scored:
            weights = [torch.rand_like(y) for y in scored]
            grads = list(torch.autograd.grad(scored, wanted, weights, allow_unused=True))
    return [
        *(("an output", y.detach()) for y in outputs),
        *(("a gradient", g) for g in grads),
        *(("a buffer", b.clone()) for b in module.buffers()),
    ]


def _run(model: nn.Module, call: Call, place: int) -> None:
    guard = StateGuard(model)
    try:
        with quiet_run(), guard:
            call.run(model)
    except Exception as error:
        raise ValueError(
            f"example_inputs: expected inputs the model can run on, but input {place} raised "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        guard.restore()


def observed(model: nn.Module, calls: list[Call], before: Before) -> None:
    """Run a model with a hook before every call of a module. The model is as it was afterwards.

    Raises:
        ValueError: the model raised on the inputs.
    """
    plain = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in plain]
    try:
        for place, call in enumerate(calls):
            _run(model, call, place)
    finally:
        for handle in handles:
            handle.remove()
