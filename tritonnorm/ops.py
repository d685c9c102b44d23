"""The operators: schema, fake, and the execution of a plan.

Three operators carry everything: `batch_norm_training`, `batch_norm_inference` and
`batch_norm_backward` in the namespace ``tritonnorm``. They are defined with
`torch.library.Library.define`, the form that costs least per call, and pass through torch.compile
as they are. Their implementations allocate the outputs, describe the problem, ask for a plan and
run it. Arguments are
checked above, in `functional`; gradients are attached there too, by `autograd`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .conditions import Kind
from .device import Device
from .kernels.base import BackwardArguments, ForwardArguments
from .operators import implement
from .plan import forced
from .problem import Form, Problem
from .recipe import of_kinds, recipe, view_of

Maybe = Tensor | None  # None is not asked for
Outputs = tuple[Tensor, Maybe, Maybe, Maybe]  # y, mean, rstd, mask
# dinput, dresidual, dweight, dbias, dslope
Gradients = tuple[Maybe, Maybe, Maybe, Maybe, Maybe]

_library = torch.library.Library("tritonnorm", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "batch_norm_training(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "float? momentum, float eps, str activation, float[] activation_args, bool save_mask, "
    "Tensor? slope=None) "
    "-> (Tensor output, Tensor mean, Tensor rstd, Tensor mask)",
    tags=_tags,
)
_library.define(
    "batch_norm_inference(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor running_mean, Tensor running_var, "
    "float eps, str activation, float[] activation_args, bool save_statistics, bool save_mask, "
    "Tensor? slope=None) "
    "-> (Tensor output, Tensor mean, Tensor rstd, Tensor mask)",
    tags=_tags,
)
_library.define(
    "batch_norm_backward(Tensor grad, Tensor input, Tensor? residual, Tensor? mask, "
    "Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool batch_statistics, "
    "str activation, float[] activation_args, bool[] needs, Tensor? slope=None) "
    "-> (Tensor dinput, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dslope)",
    tags=_tags,
)


def dense_like(t: Tensor, dense: tuple[int, ...]) -> Tensor:
    """``t`` in the given dense strides; those of dimensions of size 1 do not matter."""
    if t.stride() == dense:
        return t
    for size, own, wanted in zip(t.shape, t.stride(), dense, strict=True):
        if size > 1 and own != wanted:
            return torch.empty_strided(t.shape, dense, dtype=t.dtype, device=t.device).copy_(t)
    return t


def vector_of(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str,
    activation_args: Sequence[float],
    batch_statistics: bool,
    save_statistics: bool,
    save_mask: bool,
    slope: Tensor | None,
    kind: Kind | None,
) -> Outputs:
    y = torch.empty_like(x)
    known = (kind, x.stride(), forced(), save_statistics, save_mask)
    found = of_kinds.get(known) or recipe(
        "forward", x.shape, x.stride(), x.dtype, Device.of(x.device), forced(),
        batch_statistics, activation, tuple(activation_args), residual is not None, save_mask,
        known=kind and known,
    )  # fmt: skip
    mean, rstd, mask = _saved(x, running_mean, found.problem, save_statistics)
    found.run(
        ForwardArguments(  # by name they cost the host a microsecond more
            torch.empty_like(x).copy_(x) if found.copies else x,
            y,
            mean,
            rstd,
            None if residual is None else dense_like(residual, found.dense),
            mask,
            vector_of(weight),
            vector_of(bias),
            running_mean,
            running_var,
            counter,
            momentum,
            eps,
            vector_of(slope),
        )
    )
    return y, mean, rstd, mask


def _saved(
    x: Tensor, running_mean: Tensor | None, problem: Problem, statistics: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Unwritten mean, rstd and mask; None where they are not asked for."""
    mean = rstd = mask = None
    if statistics:
        # `empty_like` costs the host 2 microseconds less.
        if running_mean is not None and running_mean.dtype == problem.accumulator:
            mean = torch.empty_like(running_mean)
        else:
            mean = x.new_empty(problem.view.c, dtype=problem.accumulator)
        rstd = torch.empty_like(mean)
    if problem.mask:
        mask = x.new_empty(problem.mask_room, dtype=torch.uint8)
    return mean, rstd, mask


def _training(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str,
    activation_args: Sequence[float],
    save_mask: bool,
    slope: Tensor | None = None,
    kind: Kind | None = None,
) -> Outputs:
    changed = [t for t in (running_mean, running_var, num_batches_tracked) if t is not None]
    torch.autograd.graph.increment_version(changed)
    return _forward(
        input, residual, weight, bias, running_mean, running_var, num_batches_tracked,
        momentum, eps, activation, activation_args, True, True, save_mask, slope, kind,
    )  # fmt: skip


def _inference(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: str,
    activation_args: Sequence[float],
    save_statistics: bool,
    save_mask: bool,
    slope: Tensor | None = None,
    kind: Kind | None = None,
) -> Outputs:
    return _forward(
        input, residual, weight, bias, vector_of(running_mean), vector_of(running_var), None,
        0.0, eps, activation, activation_args, False, save_statistics, save_mask, slope, kind,
    )  # fmt: skip


def _backward(
    grad: Tensor,
    input: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    batch_statistics: bool,
    activation: str,
    activation_args: Sequence[float],
    needs: Sequence[bool],
    slope: Tensor | None = None,
    kind: Kind | None = None,
) -> Gradients:
    """``needs``: which of dinput, dresidual, dweight, dbias (and, with a slope, dslope) to compute;
    the others are None."""
    # What was saved may have another dtype by now: a parameter that was cast, a hook that packs.
    saved = (input, residual, weight, bias, mean, rstd, slope)
    dtypes = tuple([t is None or t.dtype for t in saved])
    known = (kind, input.stride(), forced(), tuple(needs), dtypes)
    found = of_kinds.get(known) or recipe(
        "backward", input.shape, input.stride(), input.dtype, Device.of(input.device), forced(),
        batch_statistics, activation, tuple(activation_args),
        residual is not None or mask is not None, mask is not None, tuple(needs),
        known=kind and known,
    )  # fmt: skip
    outputs = _gradients(input, weight, bias, needs)
    dslope = None
    if slope is not None and needs[4]:
        dslope = torch.empty_like(mean)
    found.run(
        BackwardArguments(
            dense_like(grad, found.dense),
            torch.empty_like(input).copy_(input) if found.copies else input,
            mean,
            rstd,
            None if residual is None else dense_like(residual, found.dense),
            mask,
            vector_of(weight),
            vector_of(bias),
            *outputs,
            vector_of(slope),
            dslope,
        )
    )
    if slope is not None and dslope is not None:
        dslope = dslope if slope.numel() == dslope.numel() else dslope.sum()
        dslope = dslope.to(slope.dtype).reshape(slope.shape)
    return *outputs, dslope


def _gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Maybe, Maybe, Maybe, Maybe]:
    return (
        torch.empty_like(x) if needs[0] else None,
        torch.empty_like(x) if needs[1] else None,
        torch.empty_like(weight) if needs[2] and weight is not None else None,
        torch.empty_like(bias) if needs[3] and bias is not None else None,
    )


def _fake_forward(x: Tensor, statistics: bool, save_mask: bool) -> Outputs:
    y = torch.empty_like(x)
    view, _, _ = view_of(x.shape, x.stride())
    problem = Problem("forward", True, view, x.dtype, mask=save_mask)
    return y, *_saved(x, None, problem, statistics)


def promised(found: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """What a schema promises: an empty tensor for each result that was not asked for."""
    return tuple(like.new_empty(0) if t is None else t for t in found)


def operator(implementation: Callable[..., Sequence[Maybe]], input: int) -> Callable[..., Any]:
    """The implementation as the dispatcher calls it; ``input`` is the place of the input."""

    def run(*args: Any) -> tuple[Tensor, ...]:
        return promised(implementation(*args), args[input])

    return run


for _name, _implementation in (
    ("batch_norm_training", operator(_training, 0)),
    ("batch_norm_inference", operator(_inference, 0)),
    ("batch_norm_backward", operator(_backward, 1)),
):
    implement(_library, _name, _implementation)


@torch.library.register_fake("tritonnorm::batch_norm_training", lib=_library)
def _(input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return promised(_fake_forward(input, True, args[10]), input)


@torch.library.register_fake("tritonnorm::batch_norm_inference", lib=_library)
def _(input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return promised(_fake_forward(input, args[8], args[9]), input)


@torch.library.register_fake("tritonnorm::batch_norm_backward", lib=_library)
def _(grad: Tensor, input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weight, bias, needs, slope = args[2], args[3], args[9], (*args[10:], None)[0]
    dslope = torch.empty_like(slope) if slope is not None and needs[4] else None
    return promised((*_gradients(input, weight, bias, needs), dslope), input)


def unwatched(*tensors: Tensor | None, before: Sequence[Tensor | None] = ()) -> bool:
    """Whether nothing looks at operators now, so that calling their code directly is the same.

    The dispatcher's way to an operator in Python costs some 15 microseconds. A compiler, a mode, a
    profiler or a subclass of Tensor sees operators only there; and there a tensor with the negative
    bit, as the imaginary part of a conjugate, gets its values.

    Args:
        tensors: arguments of the operator; None is not given.
        before: more of them, which were looked at by the forward of this backward. A hook for saved
            tensors can have made another class of them since, but no negative bit.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._autograd._profiler_enabled():
        return False
    if not _PLAIN.issuperset(map(type, (*tensors, *before))):
        return False
    for t in tensors:  # noqa: SIM110 - a generator takes twice as long
        if t is not None and t.is_neg():
            return False
    return True


_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})


def training(direct: bool) -> Callable[..., Outputs]:
    """`batch_norm_training`, or directly its code, where a mask not asked for may be None."""
    return _training if direct else torch.ops.tritonnorm.batch_norm_training.default


def inference(direct: bool) -> Callable[..., Outputs]:
    """`batch_norm_inference`, or directly its code, where what is not asked for may be None."""
    return _inference if direct else torch.ops.tritonnorm.batch_norm_inference.default


def backward(direct: bool) -> Callable[..., Gradients]:
    """`batch_norm_backward`, or directly its code, where what is not asked for may be None."""
    return _backward if direct else torch.ops.tritonnorm.batch_norm_backward.default


def in_order(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A saved input as the forward had it: bits of a mask lie in the order of its elements, and a
    hook for saved tensors may give them back in another, as `save_on_cpu(pin_memory=True)` does."""
    _, dense, copies = view_of(x.shape, strides)
    order = dense if copies else strides
    once = x[tuple(slice(0, 1) if s == 0 else slice(None) for s in order)]  # not expanded
    made = torch.empty_strided(once.shape, order, dtype=x.dtype, device=x.device)
    return made.copy_(once).expand(x.shape)


def unpack_mask(mask: Tensor, x: Tensor, form: Form = "plain") -> Tensor:
    """The bits of the mask of a batch norm of some form as a boolean tensor of the shape of
    ``x``."""
    view, dense, _ = view_of(x.shape, x.stride())
    bits = Problem("forward", True, view, x.dtype, mask=True, form=form).mask_bits(mask)
    in_memory_order = bits.transpose(1, 2) if view.channels_last else bits
    return in_memory_order.reshape(-1).as_strided(x.shape, dense)
