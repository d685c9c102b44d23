"""PyTorch's own samples of batch norm, run against our functional and modules."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from tests import matrix
from tritonnorm import functional, nn

OPS = [op for op in op_db if op.name == "nn.functional.batch_norm"]
CLASSES = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
MODULES = [info for info in module_db if info.module_cls in CLASSES]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _op_samples() -> Iterator[Any]:
    for op in OPS:
        for dtype in DTYPES:
            name = f"{op.variant_test_name or 'default'}-{dtype}"
            for i, sample in enumerate(op.sample_inputs("cpu", dtype, requires_grad=True)):
                yield pytest.param(op, sample, id=f"{name}-{i}")


def _module_samples() -> Iterator[Any]:
    for info in MODULES:
        for dtype in DTYPES[:2]:
            for training in (True, False):
                for sample in info.module_inputs_func(info, "cpu", dtype, True, training):
                    name = f"{info.module_cls.__name__}-{dtype}-{sample.desc}-{training}"
                    yield pytest.param(info, sample, training, id=name)


def _module_errors() -> Iterator[Any]:
    for info in MODULES:
        samples = info.module_error_inputs_func(info, "cpu", torch.float32, False, True)
        for i, sample in enumerate(samples):
            yield pytest.param(info, sample, id=f"{info.module_cls.__name__}-{i}")


def outcome(call: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor] | type:
    """Output and gradients of the inputs that want one, or the type of the error."""
    try:
        y = call()
    except Exception as error:
        return type(error)
    wanted = [t for t in inputs if t.requires_grad]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def assert_same(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    if isinstance(theirs, type) or isinstance(ours, type):
        assert ours is theirs
        return
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-9}[dtype]
    for a, b in zip(ours, theirs, strict=True):
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(("op", "sample"), list(_op_samples()))
def test_functional(op: Any, sample: Any) -> None:
    outcomes = []
    for function in (functional.batch_norm, op.op):
        x, *vectors = (copy.deepcopy(t) for t in (sample.input, *sample.args))
        leaves = [t for t in (x, *vectors[2:]) if t is not None]
        call = functools.partial(function, x, *vectors, **_kept(function, sample.kwargs))
        result = outcome(call, leaves)
        buffers = [b for b in vectors[:2] if b is not None]
        outcomes.append(result if isinstance(result, type) else result + buffers)
    assert_same(*outcomes, sample.input.dtype)


def _kept(function: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    ours = function is functional.batch_norm
    return {k: v for k, v in kwargs.items() if not (ours and k == "cudnn_enabled")}


@pytest.mark.parametrize(("info", "sample", "training"), list(_module_samples()))
def test_modules(info: Any, sample: Any, training: bool) -> None:
    ours = getattr(nn, info.module_cls.__name__)
    arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
    x = sample.forward_input.args[0]
    modules = [cls(*arguments, **options) for cls in (ours, info.module_cls)]
    for module in modules:
        module.to(x.dtype).train(training)
    modules[0].load_state_dict(modules[1].state_dict())
    outcomes = []
    with matrix.ran() as ran:
        for module in modules:
            leaf = x.detach().clone().requires_grad_()
            result = outcome(functools.partial(module, leaf), [leaf, *module.parameters()])
            assert not isinstance(result, type)
            outcomes.append(result + list(module.buffers()))
    assert bool(ran) == (x.numel() > 0)
    floats = [[t for t in o if t.is_floating_point()] for o in outcomes]
    assert_same(*floats, x.dtype)
    counters = [[t for t in o if not t.is_floating_point()] for o in outcomes]
    assert all(map(torch.equal, *counters))


@pytest.mark.parametrize(("info", "sample"), list(_module_errors()))
def test_module_errors(info: Any, sample: Any) -> None:
    ours = getattr(nn, info.module_cls.__name__)
    inputs = sample.module_error_input
    module = ours(*inputs.constructor_input.args, **inputs.constructor_input.kwargs)
    with pytest.raises(sample.error_type, match=sample.error_regex):
        module(*inputs.forward_input.args, **inputs.forward_input.kwargs)


def test_there_are_samples() -> None:
    assert len(list(_op_samples())) >= 30
    assert len(list(_module_samples())) >= 70
    assert len(list(_module_errors())) >= 6
