"""The operators that fold all pairs of a model: schema, fake, gradient, and their tables."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import folding
from .device import Device
from .folding import Folded, Source
from .kernels.fold_configs import problem_of
from .kernels.folding import Batch, affine_dtype, arrange
from .kernels.lasting import lasting
from .plan import forced, on_change
from .recipe import decided

_library = torch.library.Library("tritonnorm", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_SOURCES = (
    "Tensor[] weights, Tensor?[] biases, Tensor[] means, Tensor[] variances, "
    "Tensor?[] gammas, Tensor?[] betas, float[] eps, int[] groups"
)
_library.define(f"fold({_SOURCES}) -> Tensor", tags=_tags)
_library.define(
    f"fold_backward(Tensor?[] grad_weights, Tensor?[] grad_biases, {_SOURCES}) "
    "-> (Tensor weights_and_biases, Tensor affine)",
    tags=_tags,
)

_MOST = 64  # tables remembered: one for each set of tensors that is folded together
_batches: OrderedDict[Any, Batch] = OrderedDict()
_addresses: OrderedDict[Any, Tensor] = OrderedDict()
on_change(_batches.clear)


def _remembered(known: OrderedDict[Any, Any], key: Any, make: Any) -> Any:
    found = known.get(key)
    if found is None:
        found = known[key] = make()
        if len(known) > _MOST:
            known.popitem(last=False)
    return found


def _batch(sources: Sequence[Source]) -> Batch:
    """The table of these tensors. Its key is all that it holds, so it can never be out of date."""
    tensors = tuple(
        None if t is None else (t.data_ptr(), t.dtype, t.shape, t.stride())
        for s in sources
        for t in s.tensors
    )
    constants = tuple((s.eps, s.groups) for s in sources)
    device = sources[0].weight.device
    return _remembered(_batches, (device, tensors, constants), lambda: _planned(sources))


def _planned(sources: Sequence[Source]) -> Batch:
    where = Device.of(sources[0].weight.device)
    return Batch.of(sources, decided(problem_of(sources), where, forced()).config)


def _grad_table(grads: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Addresses ``[pairs, 2]`` on the device. An allocator gives the same ones step after step."""
    found = tuple(0 if g is None else g.data_ptr() for g in grads)
    return _remembered(
        _addresses,
        (device, found),
        lambda: lasting(device, lambda: _pairs(found).to(device)),
    )


def _pairs(addresses: tuple[int, ...]) -> Tensor:
    """``[pairs, 2]`` of those of all weights, then of all biases."""
    return torch.tensor(addresses, dtype=torch.int64).reshape(2, -1).t().contiguous()


def _gathered(grads: Sequence[Tensor | None], batch: Batch, like: Tensor) -> tuple[Tensor, Tensor]:
    """The same for copies in one buffer, without a transfer from the host; and that buffer.

    A CUDA graph that is being captured cannot have one. The table says where the copies lie.
    """
    flat = torch.zeros_like(like)
    starts = [place[0] for place in batch.places] + [place[1] for place in batch.places]
    for grad, start in zip(grads, starts, strict=True):
        if grad is not None:
            flat.as_strided(grad.shape, grad.stride(), start).copy_(grad)
    return batch.table[:, 6:8] * flat.element_size() + flat.data_ptr(), flat


def _sources(*columns: Sequence[Any]) -> list[Source]:
    return [Source(*row) for row in zip(*columns, strict=True)]


def _fold(*columns: Sequence[Any]) -> Tensor:
    """All w' and b' in one buffer; `_views` takes it apart."""
    sources = _sources(*columns)
    batch = _batch(sources)
    flat = sources[0].weight.new_empty(batch.weights)
    batch.launch(False)(batch.table, batch.work, flat)
    return flat


def _fold_backward(
    grad_weights: Sequence[Tensor | None],
    grad_biases: Sequence[Tensor | None],
    *columns: Sequence[Any],
) -> tuple[Tensor, Tensor]:
    """dw and dbias where `_fold` has w' and b'; all dgamma, and then all dbeta."""
    sources = _sources(*columns)
    batch = _batch(sources)
    device = sources[0].weight.device
    grads = [_laid_out(g, s) for g, s in zip(grad_weights, sources, strict=True)]
    grads += [None if g is None else g.contiguous() for g in grad_biases]
    flat = sources[0].weight.new_empty(batch.weights)
    affine = torch.empty(2 * batch.channels, dtype=batch.dtypes[1], device=device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        table, kept = _gathered(grads, batch, flat)
    else:
        table, kept = _grad_table(grads, device), None
    batch.launch(True)(batch.table, batch.work, table, flat, affine)
    del kept  # until here
    return flat, affine


def rehearse(sources: Sequence[Source]) -> None:
    """Everything that `fold` and its backward do, but with results that have no memory; for
    launches that go to a sink."""
    batch = _batch(sources)
    flat, affine = (torch.empty(0, dtype=t, device="meta") for t in batch.dtypes[:2])
    table = torch.empty(0, dtype=torch.int64, device="meta")
    batch.launch(False)(batch.table, batch.work, flat)
    batch.launch(True)(batch.table, batch.work, table, flat, affine)


def _views(flat: Tensor, sources: Sequence[Source]) -> list[Tensor]:
    """w' of each pair, and then b' of each, in the one buffer that holds them all."""
    places = list(zip(sources, arrange(sources)[0], strict=True))
    weights = [flat.as_strided(s.weight.shape, s.weight.stride(), at[0]) for s, at in places]
    return weights + [flat.as_strided((s.mean.numel(),), (1,), at[1]) for s, at in places]


def forward(*columns: Sequence[Any]) -> list[Tensor]:
    """w' of each pair, and then b' of each."""
    return _views(torch.ops.tritonnorm.fold(*columns), _sources(*columns))


def backward(
    grad_weights: Sequence[Tensor | None],
    grad_biases: Sequence[Tensor | None],
    *columns: Sequence[Any],
) -> list[Tensor]:
    """Gradients of the weights, the biases, the gammas and the betas, one after the other."""
    found = torch.ops.tritonnorm.fold_backward(list(grad_weights), list(grad_biases), *columns)
    sources = _sources(*columns)
    places, _, channels = arrange(sources)
    spans = [(at[2], at[2] + s.mean.numel()) for s, at in zip(sources, places, strict=True)]
    vectors = [found[1][a:b] for a, b in spans]
    return _views(found[0], sources) + vectors + [found[1][channels:][a:b] for a, b in spans]


def _laid_out(grad: Tensor | None, source: Source) -> Tensor | None:
    """A gradient in the memory order of its weight, at a multiple of 16 bytes."""
    w = source.weight
    if grad is None or (grad.stride() == w.stride() and grad.data_ptr() % 16 == 0):
        return grad
    return torch.empty_like(w).copy_(grad)


for _key in ("CUDA", "CPU"):
    _library.impl("fold", _fold, _key)
    _library.impl("fold_backward", _fold_backward, _key)


@torch.library.register_fake("tritonnorm::fold", lib=_library)
def _(*columns: Sequence[Any]) -> Tensor:
    sources = _sources(*columns)
    return sources[0].weight.new_empty(arrange(sources)[1])


@torch.library.register_fake("tritonnorm::fold_backward", lib=_library)
def _(*columns: Sequence[Any]) -> tuple[Tensor, Tensor]:
    sources = _sources(*columns[2:])
    _, weights, channels = arrange(sources)
    w = sources[0].weight
    return w.new_empty(weights), w.new_empty(2 * channels, dtype=affine_dtype(sources))


class FoldFunction(torch.autograd.Function):
    """Folds of pairs; the tensors come as six columns one after the other."""

    @staticmethod
    def forward(
        ctx: Any, eps: list[float], groups: list[int], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.constants = (eps, groups)
        return tuple(forward(*_columns(tensors), eps, groups))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, constants = ctx.saved_tensors, ctx.constants
        n = len(grads) // 2
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return (None, None, *_differentiable_backward(tensors, constants, grads, needs))
        found = backward(grads[:n], grads[n:], *_columns(tensors), *constants)
        dw, dbias, dgamma, dbeta = (found[i * n : (i + 1) * n] for i in range(4))
        none = [None] * n
        columns = (*dw, *dbias, *none, *none, *dgamma, *dbeta)
        return (None, None, *(g if need else None for g, need in zip(columns, needs, strict=True)))


def _columns(tensors: Sequence[Tensor | None]) -> list[list[Any]]:
    n = len(tensors) // 6
    return [list(tensors[i * n : (i + 1) * n]) for i in range(6)]


def _differentiable_backward(
    tensors: Sequence[Tensor | None],
    constants: tuple[list[float], list[int]],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The backward as PyTorch operations, so that it has derivatives itself."""
    folded = folding.differentiable(_sources(*_columns(tensors), *constants))
    outputs = [f.weight for f in folded] + [f.bias for f in folded]
    given = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need and t is not None]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in given], wanted, [g for _, g in given], create_graph=True,
            allow_unused=True,
        )
    )  # fmt: skip
    return [next(found) if need else None for need in needs]


def fold(sources: Sequence[Source]) -> list[Folded]:
    """Fold pairs of the same dtypes on one device, in one launch, with gradients if needed."""
    columns = [list(column) for column in zip(*sources, strict=True)]
    tensors = [t for column in columns[:6] for t in column]
    if any(s.needs_grad for s in sources):
        found = FoldFunction.apply(*columns[6:], *tensors)
    else:
        found = forward(*columns)
    n = len(sources)
    return [Folded(w, b) for w, b in zip(found[:n], found[n:], strict=True)]
