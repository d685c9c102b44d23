"""A model with fused blocks under PyTorch's other tools, which must not notice."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tritonnorm
from tests.fold_models import bn, conv
from tritonnorm.fusing.forward import holds
from tritonnorm.replace import replace, restore


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = conv(4, 4), bn(4)
        self.c2, self.b2 = conv(4, 4), bn(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.b1(self.c1(x)))
        out = self.b2(self.c2(out))
        out += x
        return self.relu(out)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(conv(3, 4), bn(4), nn.SiLU()), Block(), Block())


def pair() -> tuple[nn.Module, nn.Module, Tensor]:
    """A replaced model with five sites, its original, and an input."""
    theirs = model()
    ours, report = replace(copy.deepcopy(theirs))
    assert report.counts == {"fused": 5}
    return ours, theirs, torch.randn(2, 3, 6, 6)


@pytest.fixture(autouse=True)
def without_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "kernels" not in request.node.name:
        monkeypatch.setenv("TRITONNORM_DISABLE", "1")


def step(net: Any, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    y = net(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in net.parameters())]


def alike(ours: Any, theirs: Any, x: Tensor) -> None:
    for a, b in zip(step(ours, x), step(theirs, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_with_the_kernels() -> None:
    ours, theirs, x = pair()
    alike(ours, theirs, x)
    alike(ours.eval(), theirs.eval(), x)


def test_compile_traces_the_fused_code_with_the_kernels() -> None:
    ours, theirs, x = pair()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    ours.eval(), theirs.eval()
    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(ours, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(y, theirs(x), rtol=1e-4, atol=1e-5)
    called = [str(n.target) for n in graphs[0].graph.nodes if n.op == "call_function"]
    assert sum("inference" in name for name in called) == 5, called
    assert not any(name in text for text in called for name in ("relu", "silu", "iadd"))


@pytest.mark.slow
def test_compile_trains_the_whole_graph() -> None:
    ours, theirs, x = pair()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (x, x.repeat(2, 1, 1, 1)):
        for a, b in zip(step(compiled, batch), step(theirs, batch), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compile_after_a_hook() -> None:
    ours, theirs, x = pair()
    for net in (ours.eval(), theirs.eval()):
        net[1].relu.register_forward_hook(lambda *args: args[2] * 2)
    torch._dynamo.reset()
    y = torch.compile(ours, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, theirs(x), rtol=1e-4, atol=1e-5)


def test_export_and_fx_see_plain_operations() -> None:
    ours, theirs, x = pair()
    ours.eval(), theirs.eval()
    for strict in (True, False):
        program = torch.export.export(ours, (x,), strict=strict)
        names = [str(n.target) for n in program.graph.nodes]
        assert sum("batch_norm" in name for name in names) == 5
        assert sum("relu" in name or "silu" in name for name in names) == 5
    graph = torch.fx.symbolic_trace(ours)
    assert sum(n.op == "call_module" and "relu" in str(n.target) for n in graph.graph.nodes) == 4
    torch.testing.assert_close(graph(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_copies_and_files() -> None:
    ours, theirs, x = pair()
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    others = (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    )
    for other in others:
        for place in (0, 1, 2):
            forward = other[place].forward
            assert forward.module is other[place] and forward.module is not ours[place]
            assert holds(forward)
        alike(copy.deepcopy(other), copy.deepcopy(theirs), x)
        restore(other)
        assert [type(m) for m in other.modules()] == [type(m) for m in theirs.modules()]
        assert all("forward" not in m.__dict__ for m in other.modules())


def test_checkpoints_go_both_ways() -> None:
    ours, theirs, x = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    step(theirs, x)
    ours.load_state_dict(theirs.state_dict())
    alike(ours, theirs, x)
    fresh = model()
    fresh.load_state_dict(ours.state_dict())
    alike(fresh, ours, x)


def test_classes_and_restore() -> None:
    theirs = model()
    kinds = [type(m) for m in theirs.modules()]
    before = [dict(m.__dict__) for m in theirs.modules()]
    parameters = list(map(id, theirs.parameters()))
    replace(theirs)
    now = [type(m) for m in theirs.modules()]
    assert [k for k in now if "BatchNorm" not in k.__name__] == [
        k for k in kinds if k is not nn.BatchNorm2d
    ]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in theirs.modules()) == 5
    assert list(map(id, theirs.parameters())) == parameters
    restore(theirs)
    assert [type(m) for m in theirs.modules()] == kinds
    assert [dict(m.__dict__) for m in theirs.modules()] == before


def test_autocast_and_checkpointing() -> None:
    ours, theirs, x = pair()
    with torch.autocast("cpu", torch.bfloat16):
        y, z = ours(x), theirs(x)
    assert y.dtype == z.dtype
    torch.testing.assert_close(y, z, rtol=0.05, atol=0.05)
    ours, theirs, x = pair()
    results = []
    for net in (ours, theirs):
        y = checkpoint(net, x.clone().requires_grad_(), use_reentrant=False)
        y.square().mean().backward()
        results.append([*(p.grad for p in net.parameters()), *net.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert ours[1].b1.num_batches_tracked == 2  # the forward ran twice, as torch's does


def test_torch_func() -> None:
    ours, theirs, x = pair()
    ours.eval(), theirs.eval()
    parameters, buffers = dict(theirs.named_parameters()), dict(theirs.named_buffers())

    def loss(net: nn.Module, given: Any, sample: Tensor) -> Tensor:
        return torch.func.functional_call(net, (given, buffers), (sample[None],)).sum()

    for transform in (lambda f: torch.vmap(torch.func.grad(f), (None, 0)),):
        got = transform(lambda p, s: loss(ours, p, s))(parameters, x)
        expected = transform(lambda p, s: loss(theirs, p, s))(parameters, x)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_distributed_data_parallel(tmp_path: Path) -> None:
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("PyTorch was built without gloo")
    ours, theirs, x = pair()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        alike(nn.parallel.DistributedDataParallel(ours), theirs, x)
    finally:
        dist.destroy_process_group()


def test_data_parallel_replicas_run_their_own_code() -> None:
    ours, _, _ = pair()
    replica = ours[1]._replicate_for_data_parallel()
    assert "forward" not in replica.__dict__ and "forward" in ours[1].__dict__


def test_fold_after_replace() -> None:
    ours, theirs, x = pair()
    step(ours, x)
    theirs.load_state_dict(ours.state_dict())
    folded, report = tritonnorm.fold(ours.eval(), x)
    assert report.counts == {"folded": 5}, str(report)
    torch.testing.assert_close(folded(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)
    assert all("forward" in m.__dict__ for m in (ours[0], ours[1]))
    assert not any("forward" in m.__dict__ for m in folded.modules())


def test_hooks_of_a_block_and_of_all_modules() -> None:
    ours, _, x = pair()
    seen: list[str] = []
    ours[1].register_forward_hook(lambda *_: seen.append("block"))
    ours(x)
    assert seen == ["block"] and holds(ours[1].forward)
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda m, *_: seen.append(type(m).__name__)
    )
    try:
        ours(x)
    finally:
        everywhere.remove()
    assert seen.count("ReLU") == 4 and seen.count("SiLU") == 1


def test_the_fused_code_can_be_read() -> None:
    ours, _, _ = pair()
    source = ours[1].forward.sources[True]
    assert source.startswith("def forward(self, x):") and source.count("fused") >= 2
    assert F.relu.__name__ not in source.replace("'relu'", "")


def test_the_check_of_blocks_with_the_kernels() -> None:
    net = nn.Sequential(conv(3, 4), bn(4), nn.SiLU())
    _, report = replace(net, example_inputs=torch.randn(2, 3, 5, 5))
    assert report.counts == {"fused": 1}, str(report)  # the bias has a gradient of rounding errors
