"""Which kernels a model calls, without running it: it is run with tensors that have no values.

The model is copied without its weights, and the copy runs on fake tensors, which know shape,
strides, dtype and device and nothing else. No memory is needed, and no state of the model changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .device import Device
from .kernels.base import Launch, launches_to
from .operators import IMPLEMENTATIONS
from .plan import force_plan
from .tune.key import Shape

__all__ = ["Mode", "OperatorCall", "Rehearsed", "observe"]

Mode = Literal["present", "train", "eval"]
#: A launch, and of its tensors the dtypes; None for what is no tensor.
Rehearsed = tuple[Launch, tuple["torch.dtype | None", ...]]


@dataclass(frozen=True)
class OperatorCall:
    """One kind of call of an operator.

    Attributes:
        name: of the operator.
        where: the device of its tensors.
        problems: what the planner is asked, and for which device.
        run: the operator's implementation.
        args: its arguments; the tensors are fake.
        fake: their mode.
    """

    name: str
    where: torch.device
    problems: tuple[tuple[Shape, Device], ...]
    run: Callable[..., Any]
    args: tuple[Any, ...]
    fake: FakeTensorMode

    def rehearse(self) -> list[Rehearsed]:
        """The launches of such a call, by the plans as they are now. None of them is made."""
        return _rehearsed(self.run, self.args, self.fake)


def _rehearsed(
    run: Callable[..., Any], args: Sequence[Any], fake: FakeTensorMode
) -> list[Rehearsed]:
    found: list[Rehearsed] = []

    def sink(launch: Launch, tensors: tuple[Any, ...]) -> None:
        kinds = (t.dtype if isinstance(t, Tensor) else None for t in tensors)
        found.append((launch, tuple(kinds)))

    with fake, torch.no_grad(), launches_to(sink):
        run(*args)
    return found


def observe(
    model: nn.Module, *inputs: Any, modes: Sequence[Mode] = ("present", "train", "eval")
) -> list[OperatorCall]:
    """The distinct calls that a model makes, forward and backward, in the order of appearance.

    Args:
        model: with norms of this library; it is not changed.
        inputs: its arguments; tensors count by shape, strides, dtype and device only.
        modes: "present" for the modules' own modes; "train" and "eval" for all of them. A backward
            follows where a gradient can be asked for; there is none in "eval".

    Raises:
        RuntimeError: the model cannot run on tensors without values.
    """
    watch = _Watch()
    for mode in modes:
        fake = watch.fake = FakeTensorMode(allow_non_fake_inputs=True)
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
    return list(watch.calls.values())


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
    if torch.distributed.is_available():  # a process group cannot be copied
        values = (value for m in model.modules() for value in vars(m).values())
        groups = (v for v in values if isinstance(v, torch.distributed.ProcessGroup))
        memo.update({id(group): group for group in groups})
    return copy.deepcopy(model, memo)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


class _Watch(TorchDispatchMode):
    """Rehearses the calls of this library's operators that pass by, each kind once."""

    fake: FakeTensorMode

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[Rehearsed, ...], OperatorCall] = {}
        self._seen: set[Any] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "tritonnorm":
            name = func._schema.name.partition("::")[2]
            kind = (name, _described(args))
            if name in IMPLEMENTATIONS and kind not in self._seen:
                self._seen.add(kind)
                self._note(name, args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: Sequence[Any]) -> None:
        run = IMPLEMENTATIONS[name]
        given: tuple[Any, ...] = pytree.tree_map_only(Tensor, Tensor.detach, tuple(args))
        with force_plan("formula"):  # nothing is looked up, recorded or tuned by observing
            launches = tuple(_rehearsed(run, given, self.fake))
        problems = dict.fromkeys(launch.origin for launch, _ in launches)
        if problems:
            where = next(t for t in given if isinstance(t, Tensor)).device
            call = OperatorCall(name, where, tuple(problems), run, given, self.fake)
            self.calls.setdefault(launches, call)


def _described(value: Any) -> Any:
    """What tells calls apart; strings and numbers as they are."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    return tuple(map(_described, value)) if isinstance(value, list | tuple) else value
