"""Which kernels a model calls, without running it: it is run with tensors that have no values.

The model is copied without its weights, and the copy runs on fake tensors, which know shape,
strides, dtype and device and nothing else. No memory is needed, and no state of the model changes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .device import Device
from .problem import FoldProblem, Problem
from .recipe import described

__all__ = ["Mode", "OperatorCall", "observe"]

Mode = Literal["present", "train", "eval"]
_OPERATORS = ("batch_norm_training", "batch_norm_inference", "batch_norm_backward")


@dataclass(frozen=True)
class OperatorCall:
    """One kind of call of an operator: what its compiled kernels depend on.

    Attributes:
        direction: "forward" or "backward".
        sizes, strides, dtype: of the input.
        where: the device of the input.
        device: what a plan knows of it.
        batch_statistics, activation, activation_args, residual, mask, needs: as for `recipe`.
        keeps_residual: backward: whether the residual itself was saved.
        saves: forward: whether the statistics are saved for a backward.
        cumulative: forward: whether the running statistics are plain averages (momentum None).
        vectors: dtypes, or None, of weight, bias, running mean, running variance and counter.
    """

    direction: Literal["forward", "backward"]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    where: torch.device
    device: Device
    batch_statistics: bool
    activation: str
    activation_args: tuple[float, ...]
    residual: bool
    mask: bool
    needs: tuple[bool, ...] = ()
    keeps_residual: bool = False
    saves: bool = True
    cumulative: bool = False
    vectors: tuple[torch.dtype | None, ...] = (None,) * 5
    slope: torch.dtype | None = None

    @property
    def problem(self) -> Problem | FoldProblem:
        """What the planner is asked."""
        return described(
            *(self.direction, self.sizes, self.strides, self.dtype, self.batch_statistics),
            *(self.activation, self.residual, self.mask, self.needs),
        )[0]


def observe(
    model: nn.Module, *inputs: Any, modes: Sequence[Mode] = ("present", "train", "eval")
) -> list[OperatorCall]:
    """The distinct calls that a model makes, forward and backward, in the order of appearance.

    Args:
        model: with batch norms of this library; it is not changed.
        inputs: its arguments; tensors count by shape, strides, dtype and device only.
        modes: "present" for the modules' own modes; "train" and "eval" for all of them. A backward
            follows where a gradient can be asked for; there is none in "eval".

    Raises:
        RuntimeError: the model cannot run on tensors without values.
    """
    watch = _Watch()
    for mode in modes:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        twin = _without_values(model, fake)
        given = pytree.tree_map_only(Tensor, fake.from_tensor, inputs)
        if mode != "present":
            twin.train(mode == "train")
        grad = torch.is_grad_enabled() and mode != "eval"
        try:
            with fake, watch, torch.set_grad_enabled(grad):
                _run(twin, given)
        except Exception as error:
            raise RuntimeError(
                "model: expected one that runs on tensors without values, got "
                f"{type(error).__name__}: {error}"
            ) from error
    return list(watch.calls)


def _run(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    found = [t for t in pytree.tree_leaves(model(*inputs)) if isinstance(t, Tensor)]
    ends = [t for t in found if t.requires_grad]
    if ends:
        torch.autograd.backward(ends, [torch.empty_like(t) for t in ends])


def _without_values(model: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """A copy whose parameters and buffers are fake."""
    memo: dict[int, Any] = {}
    for t in _tensors(model):
        twin: Tensor = fake.from_tensor(t.detach())
        if isinstance(t, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=t.requires_grad)
        memo[id(t)] = twin
    return copy.deepcopy(model, memo)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


class _Watch(TorchDispatchMode):
    """Takes down the calls of this library's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[OperatorCall, None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "tritonnorm":
            name = func._schema.name.partition("::")[2]
            if name in _OPERATORS:
                self.calls[_call(name, args)] = None
        return func(*args, **(kwargs or {}))


def _call(name: str, args: Sequence[Any]) -> OperatorCall:
    """A call from the operator's arguments; `ops` has the schemas."""
    if name == "batch_norm_backward":
        _, x, residual, mask, weight, bias, mean, _, batch = args[:9]
        activation, parameters, needs, *slope = args[9:]
        return OperatorCall(
            direction="backward",
            **_of(x, residual is not None or mask is not None, activation, parameters),
            batch_statistics=batch,
            mask=mask is not None,
            needs=tuple(needs),
            keeps_residual=residual is not None,
            vectors=_dtypes(weight, bias, mean, mean, None),
            slope=_dtypes(*slope, None)[0],
        )
    x, residual, weight, bias, mean, var = args[:6]
    counter = momentum = None
    saves = True
    training = name == "batch_norm_training"
    if training:
        counter, momentum, _, activation, parameters, save_mask, *slope = args[6:]
    else:
        _, activation, parameters, saves, save_mask, *slope = args[6:]
    return OperatorCall(
        direction="forward",
        **_of(x, residual is not None, activation, parameters),
        batch_statistics=training,
        mask=save_mask,
        saves=training or saves,
        cumulative=training and momentum is None and counter is not None,
        vectors=_dtypes(weight, bias, mean, var, counter),
        slope=_dtypes(*slope, None)[0],
    )


def _of(x: Tensor, residual: bool, activation: str, parameters: Sequence[float]) -> dict[str, Any]:
    return {
        "sizes": tuple(x.shape),
        "strides": x.stride(),
        "dtype": x.dtype,
        "where": x.device,
        "device": Device.of(x.device),
        "activation": activation,
        "activation_args": tuple(parameters),
        "residual": residual,
    }


def _dtypes(*vectors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple(None if t is None else t.dtype for t in vectors)
