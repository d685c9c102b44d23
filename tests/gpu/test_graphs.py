"""CUDA graphs: a captured step replays with new data; statistics and counter move each time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import matrix
from tritonnorm import nn
from tritonnorm.plan import force_plan

SHAPE = (8, 12, 28, 28)


def module(momentum: float | None, **options: Any) -> nn.BatchNorm2d:
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(SHAPE[1], momentum=momentum, device="cuda", **options)
    torch.nn.init.normal_(bn.weight)
    return bn


def batch(seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(SHAPE, device="cuda", generator=generator) * (seed + 1) + seed


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("algorithm", ["split", "resident", "persistent"])
def test_replay_of_a_training_step(momentum: float | None, algorithm: str) -> None:
    bn, eager = (module(momentum, activation="relu") for _ in range(2))
    x, residual = batch(0).requires_grad_(), torch.randn(SHAPE, device="cuda").requires_grad_()
    dy = torch.randn(SHAPE, device="cuda")
    leaves = (x, residual, bn.weight, bn.bias)

    with force_plan(algorithm), matrix.ran() as ran:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles what the capture needs
            for _ in range(3):
                torch.autograd.grad(bn(x, residual), leaves, dy)
        assert set(ran) == {algorithm}
        torch.cuda.current_stream().wait_stream(stream)
        bn.reset_running_stats()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = bn(x, residual)
            gradients = torch.autograd.grad(y, leaves, dy)
        assert bn.num_batches_tracked.item() == 0  # a capture runs nothing

        for step in range(1, 4):
            with torch.no_grad():
                x.copy_(batch(step))
            graph.replay()
            own = x.detach().clone().requires_grad_()
            expected = eager(own, residual)
            theirs = torch.autograd.grad(expected, (own, residual, eager.weight, eager.bias), dy)
            assert torch.equal(y, expected)
            for a, b in zip(gradients, theirs, strict=True):
                assert torch.equal(a, b)
            assert bn.num_batches_tracked.item() == step
            for name, buffer in eager.named_buffers():
                assert torch.equal(bn.get_buffer(name), buffer), (name, step)


def test_replay_of_inference() -> None:
    bn = module(0.1, activation="silu").eval()
    x = batch(0)
    with torch.no_grad():
        bn(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = bn(x)
        bn.running_mean.normal_()  # the graph reads the statistics of the moment
        x.copy_(batch(5))
        graph.replay()
        assert torch.equal(y, bn(x))
    assert bn.num_batches_tracked.item() == 0


def test_no_host_synchronization(no_waiting) -> None:
    """Neither forward nor backward waits for the GPU, with momentum None either."""
    bn = module(None, activation="gelu")
    x = batch(0).requires_grad_()
    bn(x).sum().backward()
    torch.cuda.synchronize()
    with no_waiting():
        bn(x).sum().backward()
    assert bn.num_batches_tracked.item() == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("algorithm", ["split", "resident", "persistent"])
def test_graphs_of_the_compiler(algorithm: str) -> None:
    """It first runs a step in the memory of a graph to come, and nothing of that may stay there."""
    torch._dynamo.reset()
    bn, eager = (module(0.1, activation="relu") for _ in range(2))
    compiled = torch.compile(bn, mode="reduce-overhead")
    with force_plan(algorithm):
        for seed in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            x, own = batch(seed).requires_grad_(), batch(seed).requires_grad_()
            y, expected = compiled(x), eager(own)
            y.square().sum().backward()
            expected.square().sum().backward()
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(x.grad, own.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bn.running_var, eager.running_var)


def test_a_captured_launch_is_all_there_is() -> None:
    """Forward and backward are one node each: programs that meet need nothing set to zero."""
    bn, x = module(0.1, activation="relu"), batch(0)
    with force_plan("persistent"), torch.no_grad():
        bn(x)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            bn(x)
        cudart = pytest.importorskip("cuda.bindings.runtime")
        error, nodes, count = cudart.cudaGraphGetNodes(graph.raw_cuda_graph(), 16)
    assert int(error) == 0 and count == 1, nodes
