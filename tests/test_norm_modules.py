"""The modules and functions of group, layer, instance and RMS norm: they are torch's, and more."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import tritonnorm
from tests import norms
from tests.test_torch_samples import assert_same, outcome
from tritonnorm import functional

NAMES = ("GroupNorm", "LayerNorm", "RMSNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")
FUNCTIONS = ("group_norm", "layer_norm", "rms_norm", "instance_norm")
OPS = [op for op in op_db if op.name.removeprefix("nn.functional.") in FUNCTIONS]
MODULES = [info for info in module_db if info.module_cls.__name__ in NAMES]


def _op_samples() -> Iterator[Any]:
    for op in OPS:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for i, sample in enumerate(op.sample_inputs("cpu", dtype, requires_grad=True)):
                if dtype == torch.float32 and sample.args and sample.args[0] == (1,):
                    continue  # a row of one value: torch's dweight is 4e-5 in place of 0
                yield pytest.param(op, sample, id=f"{op.name}-{dtype}-{i}")


def _module_samples() -> Iterator[Any]:
    for info in MODULES:
        tracks = "Instance" in info.module_cls.__name__  # the others know no training mode
        for dtype in (torch.float64,):
            for training in (True, False) if tracks else (True,):
                for sample in info.module_inputs_func(info, "cpu", dtype, True, training):
                    name = f"{info.module_cls.__name__}-{dtype}-{sample.desc}-{training}"
                    yield pytest.param(info, sample, training, id=name)


def _module_errors() -> Iterator[Any]:
    for info in MODULES:
        if info.module_error_inputs_func is not None:
            samples = info.module_error_inputs_func(info, "cpu", torch.float32, False, True)
            for i, sample in enumerate(samples):
                yield pytest.param(info, sample, id=f"{info.module_cls.__name__}-{i}")


@pytest.mark.parametrize(("op", "sample"), list(_op_samples()))
def test_torchs_samples_of_the_functions(op: Any, sample: Any) -> None:
    ours = getattr(functional, op.name.removeprefix("nn.functional."))
    outcomes = []
    for function in (ours, op.op):
        x, args, kwargs = copy.deepcopy((sample.input, sample.args, sample.kwargs))
        if function is ours:
            kwargs.pop("cudnn_enabled", None)
        tensors = [t for t in (x, *args, *kwargs.values()) if isinstance(t, Tensor)]
        leaves = [t for t in tensors if t.requires_grad and not t.grad_fn]
        result = outcome(functools.partial(function, x, *args, **kwargs), leaves)
        buffers = [t for t in tensors if not t.requires_grad]
        outcomes.append(result if isinstance(result, type) else result + buffers)
    assert_same(*outcomes, sample.input.dtype)


@pytest.mark.parametrize(("info", "sample", "training"), list(_module_samples()))
def test_torchs_samples_of_the_modules(info: Any, sample: Any, training: bool) -> None:
    ours = getattr(tritonnorm, info.module_cls.__name__)
    arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
    x = sample.forward_input.args[0]
    modules = [cls(*arguments, **options) for cls in (ours, info.module_cls)]
    for module in modules:
        module.to(x.dtype).train(training)
    modules[0].load_state_dict(modules[1].state_dict())
    outcomes = []
    for module in modules:
        leaf = x.detach().clone().requires_grad_()
        result = outcome(functools.partial(module, leaf), [leaf, *module.parameters()])
        if not isinstance(result, type):
            result += [b for b in module.buffers() if b.is_floating_point()]
        outcomes.append(result)
    assert_same(*outcomes, x.dtype)


@pytest.mark.parametrize(("info", "sample"), list(_module_errors()))
def test_torchs_errors_of_the_modules(info: Any, sample: Any) -> None:
    inputs = sample.module_error_input
    with pytest.raises(sample.error_type, match=sample.error_regex):
        module = getattr(tritonnorm, info.module_cls.__name__)(
            *inputs.constructor_input.args, **inputs.constructor_input.kwargs
        )
        module(*inputs.forward_input.args, **inputs.forward_input.kwargs)


def test_there_are_samples() -> None:
    assert {op.name.removeprefix("nn.functional.") for op in OPS} == set(FUNCTIONS)
    assert {info.module_cls.__name__ for info in MODULES} == set(NAMES)
    assert len(list(_op_samples())) >= 60
    assert len(list(_module_samples())) >= 20


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_begin_as_torchs(name: str) -> None:
    ours = inspect.signature(getattr(functional, name)).parameters
    torchs = inspect.signature(getattr(F, name)).parameters
    assert list(ours)[: len(torchs)] == list(torchs)
    assert all(ours[n].default == p.default for n, p in torchs.items())
    added = list(ours)[len(torchs) :]
    assert added == ["activation", "activation_args", "residual"]
    assert all(ours[n].kind == inspect.Parameter.KEYWORD_ONLY for n in added)


def made(name: str, **options: Any) -> tuple[Any, Any, Tensor]:
    """A module, its original, and an input for both."""
    arguments: tuple[Any, ...] = {"GroupNorm": (2, 4), "LayerNorm": ((5, 3),), "RMSNorm": (3,)}.get(
        name, (4,)
    )
    shape = (3, 4, 5, 3) if name[-2:] not in ("1d", "3d") else (3, 4, *(5, 3, 2)[: int(name[-2])])
    torch.manual_seed(0)
    return (
        getattr(tritonnorm, name)(*arguments, **options),
        getattr(torch.nn, name)(*arguments),
        torch.randn(shape),
    )


@pytest.mark.parametrize("name", NAMES)
def test_activation_and_residual(name: str) -> None:
    module, original, x = made(name, activation="leaky_relu", activation_args=(0.3,))
    assert isinstance(module, type(original))
    assert "activation=leaky_relu, activation_args=(0.3,)" in repr(module)
    assert list(module.state_dict()) == list(original.state_dict())
    z = torch.randn_like(x)
    with norms.ran() as ran:
        y = module(x, z)
    assert len(ran) == 1
    torch.testing.assert_close(y, F.leaky_relu(original(x) + z, 0.3))
    with pytest.raises(ValueError, match="residual: expected the shape of input"):
        module(x, z[1:])
    with pytest.raises(ValueError, match="activation: expected None or one of"):
        made(name, activation="nonsense")


def test_one_sample_without_a_batch() -> None:
    module, _, x = made("InstanceNorm2d", activation="relu")
    z = torch.randn_like(x)
    torch.testing.assert_close(module(x[0], z[0]), module(x, z)[0])
    torch.testing.assert_close(module(x[0]), module(x)[0])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_of_instance_norm(momentum: float | None) -> None:
    """They move as torch's do, and eval uses them: an affine map."""
    options = {"affine": True, "track_running_stats": True, "momentum": momentum}
    ours = tritonnorm.InstanceNorm2d(3, activation="relu", **options)
    torchs = torch.nn.InstanceNorm2d(3, **options)
    for _ in range(2):
        x = torch.randn(4, 3, 5, 6) * 2 + 1
        torch.testing.assert_close(ours(x), torch.relu(torchs(x)))
    for name, buffer in torchs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)
    torch.testing.assert_close(ours.eval()(x), torch.relu(torchs.eval()(x)))


@pytest.mark.parametrize("name", NAMES)
def test_falls_back_once_with_a_reason(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tritonnorm import conditions

    monkeypatch.setattr(conditions, "_logged", set())
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")
    module, original, x = made(name, activation="silu")
    with caplog.at_level("INFO", logger="tritonnorm"), norms.ran() as ran:
        assert torch.equal(module(x, x), F.silu(original(x) + x))
        module(x)
    assert ran == []
    (message,) = caplog.messages
    assert message.endswith("_norm runs in PyTorch: TRITONNORM_DISABLE is set")


def test_vmap_and_fx_fall_back() -> None:
    x = torch.randn(2, 3, 4, 5)
    with norms.ran() as ran:
        mapped = torch.vmap(lambda t: functional.layer_norm(t, (5,)))(x)
        assert ran == []
    torch.testing.assert_close(mapped, F.layer_norm(x, (5,)))
    for name in NAMES:
        module, original, x = made(name)
        traced = torch.fx.symbolic_trace(torch.nn.Sequential(module))
        torch.testing.assert_close(traced(x), original(x))


def test_autocast_widens_where_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA autocast computes group, layer and RMS norm in float32, by torch's own table."""
    from tritonnorm import conditions

    x = torch.randn(2, 4, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu"):
        assert functional.group_norm(x, 2).dtype == F.group_norm(x, 2).dtype == torch.bfloat16
        monkeypatch.setitem(conditions._WIDENED, ("group_norm", "cpu"), True)
        y = functional.group_norm(x, 2, residual=x, activation="relu")
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, torch.relu(F.group_norm(x.float(), 2) + x))
    assert conditions._WIDENED["layer_norm", "cuda"] and conditions._WIDENED["group_norm", "cuda"]
    assert not conditions._WIDENED["instance_norm", "cuda"]


def test_a_wrong_call_is_torchs_error() -> None:
    calls: tuple[Callable[[Any], Any], ...] = (
        lambda m: m.group_norm(torch.ones(2, 5, 3), 2),
        lambda m: m.group_norm(torch.ones(1, 2), 2),
        lambda m: m.layer_norm(torch.ones(2, 5), (4,)),
        lambda m: m.layer_norm(torch.ones(2, 5), (5,), torch.ones(4)),
        lambda m: m.rms_norm(torch.ones(2, 5), (4,)),
        lambda m: m.instance_norm(torch.ones(2, 5, 1)),
        lambda m: m.group_norm(torch.ones(2, 4, 3), 2, torch.ones(3)),
    )
    for call in calls:
        with pytest.raises(Exception) as theirs:
            call(F)
        with pytest.raises(type(theirs.value)) as ours:
            call(functional)
        assert str(ours.value) == str(theirs.value)
