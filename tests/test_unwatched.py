"""Operators are called directly only where nobody could tell; checks are remembered only where
nothing that they look at has changed."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import tritonnorm
from tritonnorm import functional, ops
from tritonnorm.conditions import Kind
from tritonnorm.device import INTERPRETER, KNOWN, simulated


class Operators(TorchDispatchMode):
    """Records the names of this library's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tritonnorm":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def step(bn: tritonnorm.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    y = bn(x)
    y.sum().backward()
    return y.detach()


def test_a_mode_sees_the_operators() -> None:
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    with Operators() as mode:
        step(tritonnorm.BatchNorm2d(4), x)
        tritonnorm.BatchNorm2d(4).eval()(x.detach())
    assert mode.seen == ["batch_norm_training", "batch_norm_backward", "batch_norm_inference"]


def test_a_profiler_sees_the_operators() -> None:
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step(tritonnorm.BatchNorm2d(4), x)
    names = {event.key for event in profile.key_averages()}
    assert {"tritonnorm::batch_norm_training", "tritonnorm::batch_norm_backward"} <= names


def test_otherwise_the_dispatcher_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def __getattr__(self, name: str) -> object:
            raise AssertionError("the dispatcher was asked")

    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    expected = step(tritonnorm.BatchNorm2d(4), x)
    monkeypatch.setattr(torch.ops, "tritonnorm", Gone())
    assert torch.equal(step(tritonnorm.BatchNorm2d(4), x), expected)


def test_unwatched() -> None:
    class Own(torch.Tensor):
        pass

    x, weight = torch.randn(2), torch.nn.Parameter(torch.randn(2))
    assert ops.unwatched(x, None, weight)
    assert not ops.unwatched(x, x.as_subclass(Own))
    with Operators():
        assert not ops.unwatched(x)


def test_both_ways_give_the_same() -> None:
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    plain = tritonnorm.BatchNorm2d(4, activation="relu")
    watched = tritonnorm.BatchNorm2d(4, activation="relu")
    first = step(plain, x)
    grad, x.grad = x.grad, None
    with Operators():
        second = step(watched, x)
    assert torch.equal(first, second) and torch.equal(grad, x.grad)
    assert torch.equal(plain.running_var, watched.running_var)
    assert plain.num_batches_tracked == watched.num_batches_tracked == 1


def test_running_statistics_changed_behind_autograd_are_noticed() -> None:
    """Their version moves, so that a graph that saved them refuses to walk back."""
    bn = tritonnorm.BatchNorm2d(4)
    before = bn.running_mean._version
    bn(torch.randn(3, 4, 5, 5))
    assert bn.running_mean._version > before


def accepted(**changed: object) -> dict[str, object]:
    given = {
        "input": torch.randn(3, 4, 5, 5),
        "running_mean": torch.zeros(4),
        "running_var": torch.ones(4),
        "weight": torch.ones(4),
        "bias": torch.zeros(4),
        "training": True,
        "residual": torch.randn(3, 4, 5, 5),
        "num_batches_tracked": torch.tensor(0),
    }
    return given | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.ones(5)}, "weight should contain 4 elements not 5"),
        ({"input": torch.randn(1, 4, 1, 1), "residual": None}, "more than 1 value per channel"),
        ({"residual": torch.randn(3, 4, 5, 4)}, "residual: expected the shape"),
        (
            {"residual": torch.randn(3, 4, 5, 5, dtype=torch.float64)},
            "residual: expected the dtype",
        ),
        ({"eps": 0.0}, "eps must be positive"),
        ({"activation": "gleu"}, "activation: expected None or one of"),
        ({"running_mean": None}, "running_mean, running_var: expected both or neither"),
        ({"num_batches_tracked": torch.tensor(0.0)}, "num_batches_tracked: expected an int64"),
        ({"num_batches_tracked": None, "momentum": None}, "momentum: None"),
        ({"training": False, "running_var": None}, "running_var must be defined"),
    ],
)
def test_a_call_like_a_good_one_is_still_refused(changed, message: str) -> None:
    functional.batch_norm(**accepted())
    with pytest.raises((ValueError, RuntimeError), match=message):
        functional.batch_norm(**accepted(**changed))
    functional.batch_norm(**accepted())


def test_what_is_around_a_call_is_asked_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 4, 5, 5)
    weight = torch.rand(4) + 0.5
    functional.batch_norm(x, None, None, weight, training=True)
    calls: list[None] = []
    right = F.batch_norm
    monkeypatch.setattr(F, "batch_norm", lambda *a, **k: calls.append(None) or right(*a, **k))
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")
    functional.batch_norm(x, None, None, weight, training=True)
    assert len(calls) == 1
    monkeypatch.delenv("TRITONNORM_DISABLE")
    torch.func.vmap(lambda x: functional.batch_norm(x, None, None, weight, training=True))(x[None])
    assert len(calls) == 2
    functional.batch_norm(x, None, None, weight, training=True)
    assert len(calls) == 2


def test_the_memory_of_checks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional.Accepted, "MOST", 3)
    functional._accepted.clear()
    for n in range(2, 12):
        functional.batch_norm(torch.randn(n, 2), None, None, training=True)
        assert 1 <= len(functional._accepted) <= 3


def test_a_warm_call_is_found_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is described anew for it, forward and backward; strides and a forced plan count."""
    asked: list[str] = []
    right = ops.recipe
    monkeypatch.setattr(ops, "recipe", lambda *a, **k: asked.append(a[0]) or right(*a, **k))
    bn, x = tritonnorm.BatchNorm2d(4, activation="relu"), torch.randn(3, 4, 5, 5)
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    x.requires_grad_()
    expected = {True: step(bn, x), False: step(bn, last)}
    assert asked == ["forward", "backward"] * 2
    for first, t in ((True, x), (False, last)):
        assert torch.equal(step(bn, t), expected[first])
    assert len(asked) == 4
    with tritonnorm.force_plan("split"):
        step(bn, x)
    assert len(asked) == 6
    with simulated(KNOWN["h200"]), simulated(INTERPRETER):
        pass
    step(bn, x)
    assert len(asked) == 8


def test_a_launch_of_one_kind_refuses_another() -> None:
    """The interpreter checks what compiled launches rely on."""
    x, weight = torch.randn(3, 4, 5, 5), torch.ones(4)
    kind = Kind("", ())
    given = (x, None, weight, None, None, None, None, 0.1, 1e-5, "", (), False, None, kind)
    ops.training(True)(*given)
    ops.training(True)(*given)
    for other in (None, weight.double()):
        with pytest.raises(RuntimeError, match="launch: made for"):
            ops.training(True)(*given[:2], other, *given[3:])


@pytest.mark.parametrize("number", [1, True, np.float32(0.25), np.float64(0.25)], ids=repr)
def test_numbers_of_all_kinds(number) -> None:
    """For every kind of number the same launch, which got a float before."""
    x = torch.randn(3, 4, 5, 5)
    for given in (float(number), number):
        ours = tritonnorm.BatchNorm2d(4, momentum=given, eps=given)
        theirs = torch.nn.BatchNorm2d(4, momentum=float(number), eps=float(number))
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_parameters_that_are_cast_before_the_backward() -> None:
    x, dy = (torch.randn(3, 4, 5, 5, dtype=torch.bfloat16) for _ in range(2))
    grads = []
    for cast in (False, True):
        bn, own = tritonnorm.BatchNorm2d(4, activation="relu"), x.clone().requires_grad_()
        bn(own.detach()).sum().backward()  # a kind whose parameters stay
        bn.zero_grad()
        y = bn(own)
        if cast:
            bn.bfloat16()
        y.backward(dy)
        grads.append((own.grad, bn.weight.grad.float(), bn.bias.grad.float()))
    for plain, after in zip(*grads, strict=True):
        torch.testing.assert_close(plain, after, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", None])
@pytest.mark.parametrize("layout", ["last", "first", "expanded", "crop"])
def test_hooks_that_give_back_other_tensors(narrow: bool, activation, layout: str) -> None:
    """In another memory order, as `save_on_cpu(pin_memory=True)` does, or in fewer bits."""
    x = torch.randn(3, 4, 6, 6)
    if layout == "last":
        x = x.to(memory_format=torch.channels_last)
    x = x[:1].expand(3, 4, 6, 6) if layout == "expanded" else x
    x = x[:, :, 1:, :5] if layout == "crop" else x
    residual, dy = torch.randn_like(x), torch.randn_like(x)

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept = torch.empty(t.size(), dtype=torch.bfloat16 if narrow and t.dim() == 4 else t.dtype)
        return kept.copy_(t)

    grads = []
    for hooks in (contextlib.nullcontext(), saved_tensors_hooks(pack, lambda t: t)):
        bn = tritonnorm.BatchNorm2d(4, activation=activation)
        bn(x.detach().clone())
        leaves = (x.detach().requires_grad_(), residual.clone().requires_grad_())
        with hooks:
            y = bn(*leaves)
        y.backward(dy)
        grads.append((*(t.grad for t in leaves), bn.weight.grad, bn.bias.grad))
    error = 0.05 if narrow else 1e-5
    for plain, hooked in zip(*grads, strict=True):
        torch.testing.assert_close(plain, hooked.to(plain.dtype), rtol=error, atol=error)
