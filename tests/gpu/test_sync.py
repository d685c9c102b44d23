"""The four operators and NCCL's collectives on one GPU: a group of one rank, taken as any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tritonnorm import nn
from tritonnorm.sync.functional import sync_batch_norm

SHAPE = (8, 12, 14, 14)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    store: Path = tmp_path_factory.mktemp("nccl") / "store"
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def call(bn: Any, group: str) -> Callable[[Tensor, Tensor], Tensor]:
    def synchronized(x: Tensor, residual: Tensor) -> Tensor:
        return sync_batch_norm(
            x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.momentum, bn.eps, 1, group,
            bn.activation, bn.activation_args, residual, bn.num_batches_tracked,
        )  # fmt: skip

    return synchronized


def modules(momentum: float | None) -> list[nn.BatchNorm2d]:
    return [nn.BatchNorm2d(12, momentum=momentum, activation="relu", device="cuda") for _ in "ab"]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_eager_and_captured_steps(group: str, momentum: float | None) -> None:
    ours, plain = modules(momentum)
    x, residual = (torch.randn(SHAPE, device="cuda", requires_grad=True) for _ in range(2))
    dy = torch.randn(SHAPE, device="cuda")
    step = call(ours, group)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and makes NCCL's communicator
        for _ in range(2):
            torch.autograd.grad(step(x, residual), (x, residual, ours.weight), dy)
    torch.cuda.current_stream().wait_stream(stream)
    ours.reset_running_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(x, residual)
        found = torch.autograd.grad(y, (x, residual, ours.weight), dy)
    for count in (1, 2):
        with torch.no_grad():
            x.copy_(torch.randn(SHAPE, device="cuda") * 3 + count)
        graph.replay()
        expected = plain(x, residual)
        theirs = torch.autograd.grad(expected, (x, residual, plain.weight), dy)
        torch.testing.assert_close(y, expected)
        for a, b in zip(found, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert ours.num_batches_tracked.item() == count
        torch.testing.assert_close(ours.running_var, plain.running_var)


def test_no_host_synchronization(group: str, no_waiting) -> None:
    bn, _ = modules(None)
    x, residual = (torch.randn(SHAPE, device="cuda", requires_grad=True) for _ in range(2))
    step = call(bn, group)
    step(x, residual).sum().backward()
    torch.cuda.synchronize()
    with no_waiting():
        step(x, residual).sum().backward()


@pytest.mark.filterwarnings("ignore")
def test_compiled_by_inductor(group: str) -> None:
    torch._dynamo.reset()
    ours, plain = modules(0.1)
    x, residual = (torch.randn(SHAPE, device="cuda", requires_grad=True) for _ in range(2))
    y = torch.compile(call(ours, group), fullgraph=True)(x, residual)
    expected = plain(x, residual)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(expected.square().sum(), x)
    )
