"""Regression of single operations with pytest-benchmark: compare, autosave and all it knows.

    python -m pytest bench/regression --benchmark-autosave
    python -m pytest bench/regression --benchmark-compare --benchmark-compare-fail=median:5%

On a GPU a sample is a call and the wait for its end. Without one the kernels are compiled and not
run, and a sample is what a call costs the host. For bandwidth and peers: ``python -m bench run``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from bench.call import Call, Tensors
from bench.lab.fake_driver import fake_driver
from tritonnorm.device import KNOWN, simulated

ON_GPU = torch.cuda.is_available()
SHAPES = ((64, 256, 56, 56), (64, 2048, 7, 7)) if ON_GPU else ((2, 256, 7, 7),)
CALLS = [
    Call(shape, channels_last, torch.bfloat16, "relu", residual)
    for shape in SHAPES
    for channels_last in (True, False)
    for residual in (False, True)
]


@pytest.fixture(params=CALLS, ids=lambda c: f"{c.op} {c.size} {c.layout}")
def tensors(request: pytest.FixtureRequest) -> Iterator[Tensors]:
    """The tensors of a call on the GPU, or on the CPU under a driver that records launches."""
    with ExitStack() as stack:
        if ON_GPU:
            generator = torch.Generator("cuda").manual_seed(0)
            yield request.param.tensors("cuda", generator)
            return
        stack.enter_context(simulated(KNOWN["h200"]))
        stack.enter_context(fake_driver(multiprocessors=KNOWN["h200"].sms)).recording = False
        yield request.param.tensors("cpu", torch.Generator().manual_seed(0))


def finished(call: Callable[[], object]) -> Callable[[], None]:
    """The call and, on a GPU, the wait for its end; called once before it is measured."""

    def whole() -> None:
        call()
        if ON_GPU:
            torch.cuda.synchronize()

    whole()
    return whole


def test_forward(benchmark: Callable[..., None], tensors: Tensors) -> None:
    before = int(tensors.counter)
    benchmark(finished(tensors.forward))
    if ON_GPU:
        assert int(tensors.counter) > before  # it ran


def test_backward(benchmark: Callable[..., None], tensors: Tensors) -> None:
    y = tensors.forward()
    assert type(y.grad_fn).__name__ == "BatchNormFunctionBackward"  # the kernels, no fallback
    benchmark(finished(lambda: tensors.backward(y)))
