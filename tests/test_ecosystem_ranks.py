"""Data parallel wrappers on two gloo processes, with our batch norms and with torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import Ranks
from tests.test_ecosystem import Net, pair

STEPS = 3


def batches(rank: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(4, 3, 6, 6, generator=generator, dtype=dtype) for _ in range(STEPS)]


def trained(net: nn.Module, module: nn.Module, rank: int) -> dict[str, Tensor]:
    """State after a few steps; ``net`` is called, ``module`` is what it wraps."""
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for x in batches(rank):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    found = {}
    for name, value in module.state_dict().items():
        full = getattr(value, "full_tensor", None)
        found[name] = (full() if full else value).detach().clone()
    return found


def ddp_of_rank(rank: int, group: Any, compiled: bool) -> list[dict[str, Tensor]]:
    answers = []
    for net in pair(torch.float64):
        with torch.no_grad():
            net.bn1.running_mean.fill_(rank)  # rank 0's is broadcast at the first forward
        wrapped: Any = nn.parallel.DistributedDataParallel(net, process_group=group)
        if compiled:
            torch._dynamo.reset()
            wrapped = torch.compile(wrapped, backend="aot_eager")
        answers.append(trained(wrapped, net, rank))
    return answers


@pytest.mark.parametrize("compiled", [False, True])
def test_ddp_broadcasts_buffers(pool: Ranks, compiled: bool) -> None:
    """Parameters end equal on all ranks, and all is as with torch's batch norms."""
    first, second = pool.run(ddp_of_rank, compiled, world=2)
    for ours, theirs in (first, second):
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-12)
    for name, value in first[0].items():
        if "running" not in name:  # those of each rank's last batch
            assert torch.equal(value, second[0][name]), name


def fsdp_of_rank(rank: int, group: Any, each: bool) -> list[dict[str, Tensor]]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, "cpu")
    answers = []
    for net in pair(torch.float64):
        if each:
            for module in (net.bn1, net.bn2):
                fully_shard(module, mesh=mesh)
        fully_shard(net, mesh=mesh)
        answers.append(trained(net, net, rank))
    return answers


@pytest.mark.parametrize("each", [False, True])
def test_fully_shard(pool: Ranks, each: bool) -> None:
    """FSDP2 around the whole net, and around each batch norm too: weights are DTensors between."""
    for ours, theirs in pool.run(fsdp_of_rank, each, world=2):
        assert ours["bn1.num_batches_tracked"] == STEPS
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-12)


def synchronized_of_rank(rank: int, group: Any) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    from tritonnorm import convert_sync_batchnorm

    net = convert_sync_batchnorm(pair(torch.float64)[0], group)
    fully_shard(net, mesh=DeviceMesh.from_group(group, "cpu"))
    return trained(net, net, rank)


def test_sharded_and_synchronized_is_one_process(pool: Ranks) -> None:
    """FSDP2 averages gradients: with synchronised statistics, equal parts train as the whole."""
    net: Net = pair(torch.float64)[1]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x in (torch.cat(both) for both in zip(batches(0), batches(1), strict=True)):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    for found in pool.run(synchronized_of_rank, world=2):
        for name, value in net.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-11)
