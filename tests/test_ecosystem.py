"""A model with our batch norms in the hands of PyTorch's own tools, next to one with torch's."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import tritonnorm
from tests import matrix

ROOT = Path(__file__).resolve().parent.parent
# dynamo makes an instance of the function itself, and warns about it
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


class Net(nn.Module):
    """A residual block: batch norm with an activation, then with a residual too."""

    def __init__(self, ours: bool = True, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.ours = ours
        norm: Any = tritonnorm.BatchNorm2d if ours else nn.BatchNorm2d
        options = {"activation": "relu"} if ours else {}
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, dtype=dtype), nn.Conv2d(4, 4, 1, dtype=dtype)
        self.bn1, self.bn2 = norm(4, dtype=dtype, **options), norm(4, dtype=dtype, **options)
        self.head = nn.Linear(4, 2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.ours:
            y = self.bn2(self.conv2(self.bn1(x)), x)
        else:
            y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(x)))) + x)
        return self.head(y.mean((2, 3)))


def pair(dtype: torch.dtype | None = None) -> tuple[Net, Net]:
    """A net with our batch norms, and one with torch's and the same state."""
    torch.manual_seed(0)
    ours, theirs = Net(True, dtype), Net(False, dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    for (name, ours), theirs in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("training", [True, False])
def test_compiled_once_for_all_batch_sizes(training: bool) -> None:
    torch._dynamo.reset()
    eager = pair(torch.float64)[0].train(training)
    net = copy.deepcopy(eager)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (5, 2, 3):
        x = torch.randn(n, 3, 9, 8, dtype=torch.float64)
        with torch._dynamo.config.patch(error_on_recompile=True), matrix.ran() as ran:
            compiled(x).sum().backward()
        assert len(ran) == 4  # two batch norms, both ways, by kernels
        eager(x).sum().backward()
    for a, b in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)
    assert_same_state(net, eager)


INDUCTOR = """
import torch, tritonnorm
ours = tritonnorm.BatchNorm2d(4, activation="relu", dtype=torch.float64)
theirs = torch.nn.BatchNorm2d(4, dtype=torch.float64)
compiled = torch.compile(lambda x: ours(x.sin(), x).cos(), fullgraph=True, dynamic=True)
for n in (5, 2):
    x = torch.randn(n, 4, 9, 8, dtype=torch.float64)
    grads = []
    for y, bn in ((compiled(x), ours), (torch.relu(theirs(x.sin()) + x).cos(), theirs)):
        grads.append([y, *torch.autograd.grad(y.square().sum(), tuple(bn.parameters()))])
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() < 1e-11
assert (ours.running_var - theirs.running_var).abs().max() < 1e-13
print("same")
"""


@pytest.mark.slow
def test_inductor_on_the_cpu() -> None:
    """With our operators in the graph: the interpreter runs them. In a process of its own, as
    inductor warns."""
    done = subprocess.run(
        [sys.executable, "-c", INDUCTOR],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["same"], done.stderr


EVAL_NORM = {"aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default"}


@pytest.mark.parametrize("strict", [False, True])
def test_export_gives_torchs_own_nodes(strict: bool) -> None:
    net = pair()[0].eval()
    x = torch.randn(2, 3, 9, 8)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},), strict=strict)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum(target in EVAL_NORM for target in called) == 2
    assert called.count("aten.relu.default") == 2
    assert not any("tritonnorm" in target for target in called)
    again = torch.randn(5, 3, 9, 8)
    torch.testing.assert_close(program.module()(again), net(again))


@pytest.mark.filterwarnings("ignore")  # its own, about torch
def test_onnx_export_gives_its_own_nodes() -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    net = pair()[0].eval()
    program = torch.onnx.export(
        net, (torch.randn(2, 3, 9, 8),), dynamo=True, optimize=False, verbose=False
    )
    kinds = [node.op_type for node in program.model.graph]
    assert kinds.count("BatchNormalization") == 2 and kinds.count("Relu") == 2
    assert {node.domain for node in program.model.graph} == {""}


def test_gradient_of_each_sample() -> None:
    """vmap over grad, with the fallback that transforms need."""
    answers = []
    for net in pair(torch.float64):
        net.eval()
        parameters = {n: p.detach() for n, p in net.named_parameters()}
        buffers = dict(net.named_buffers())

        def loss(p: Any, sample: Tensor, net: Any = net, buffers: Any = buffers) -> Tensor:
            return torch.func.functional_call(net, (p, buffers), (sample[None],)).square().sum()

        x = torch.linspace(-1, 1, 4 * 3 * 25, dtype=torch.float64).reshape(4, 3, 5, 5).sin()
        answers.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x))
    for name in answers[0]:
        torch.testing.assert_close(answers[0][name], answers[1][name])


def test_replace_all_batch_norm_modules() -> None:
    net = torch.func.replace_all_batch_norm_modules_(pair()[0])
    assert net.bn1.running_mean is None and not net.bn1.track_running_stats
    x = torch.randn(2, 3, 3, 6, 6)
    assert torch.func.vmap(net)(x).shape == (2, 3, 2)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast_dtypes_are_torchs(low: torch.dtype, given: torch.dtype) -> None:
    x = torch.randn(4, 3, 5, 5, dtype=given)
    kinds = []
    for module in (tritonnorm.BatchNorm2d(3, activation="relu"), nn.BatchNorm2d(3)):
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", low):
            y = module(own)
        y.sum().backward()
        kinds.append((y.dtype, own.grad.dtype, module.weight.grad.dtype, module.running_var.dtype))
    assert kinds[0] == kinds[1]


def train(net: nn.Module, steps: int, bad: int, use: Callable[[Tensor], Tensor]) -> list[float]:
    """Steps with a GradScaler; the batch number ``bad`` overflows."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    generator, scales = torch.Generator().manual_seed(0), []
    for step in range(steps):
        x = torch.randn(4, 3, 6, 6, generator=generator)
        optimizer.zero_grad()
        loss = use(x) * (float("inf") if step == bad else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def test_grad_scaler() -> None:
    nets = pair()
    scales = [train(n, 4, 1, lambda x, n=n: n(x).square().mean()) for n in nets]
    assert scales[0] == scales[1] == [1024.0, 512.0, 512.0, 512.0]
    assert_same_state(*nets)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_as_torchs(reentrant: bool) -> None:
    """A recomputed forward moves the running statistics again, as it does with torch's."""
    nets = pair(torch.float64)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    for net in nets:
        own = x.clone().requires_grad_()
        checkpoint(net, own, use_reentrant=reentrant).square().sum().backward()
        assert net.bn1.num_batches_tracked.item() == 2
    assert_same_state(*nets)
    for a, b in zip(*(n.parameters() for n in nets), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_in_and_out(rank: int, training: bool) -> None:
    last = torch.channels_last if rank == 2 else torch.channels_last_3d
    kind = tritonnorm.BatchNorm2d if rank == 2 else tritonnorm.BatchNorm3d
    module = kind(4, activation="silu").train(training)
    x = torch.randn(2, 4, *(3,) * rank).to(memory_format=last).requires_grad_()
    z = torch.randn_like(x).requires_grad_()
    y = module(x, z)
    y.square().sum().backward()
    assert all(t.is_contiguous(memory_format=last) for t in (y, x.grad, z.grad))


def test_averaged_models_and_update_bn() -> None:
    nets, averaged = pair(), []
    batches = [torch.randn(4, 3, 6, 6) for _ in range(3)]
    for net in nets:
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for x in batches:
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
            average.update_parameters(net)
        averaged.append(average)
    assert_same_state(*averaged)
    for average in averaged:
        update_bn(batches, average)
        assert average.module.bn1.num_batches_tracked.item() == 3
    assert_same_state(*averaged)
    assert averaged[0].module.bn1.momentum == 0.1


def test_freezing_and_parameter_helpers() -> None:
    """By their classes: what recipes look for. And helpers of torch.nn.utils."""
    for kind, theirs in (
        (tritonnorm.BatchNorm1d, nn.BatchNorm1d),
        (tritonnorm.BatchNorm2d, nn.BatchNorm2d),
        (tritonnorm.BatchNormAct2d, nn.BatchNorm2d),
        (tritonnorm.BatchNorm3d, nn.BatchNorm3d),
        (tritonnorm.SyncBatchNorm, nn.SyncBatchNorm),
    ):
        assert issubclass(kind, theirs) and "BatchNorm" in kind.__name__
    ours, theirs = pair()
    for net in (ours, theirs):
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval().requires_grad_(False)
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
        net(x).square().sum().backward()
        assert net.bn1.weight.grad is None and net.bn1.num_batches_tracked == 0
        nn.utils.clip_grad_norm_([p for p in net.parameters() if p.grad is not None], 0.1)
    torch.testing.assert_close(ours.conv1.weight.grad, theirs.conv1.weight.grad)
    vector = nn.utils.parameters_to_vector(ours.parameters())
    nn.utils.vector_to_parameters(vector * 2, theirs.parameters())
    torch.testing.assert_close(theirs.bn2.weight, 2 * ours.bn2.weight)
    assert nn.utils.skip_init(tritonnorm.BatchNorm2d, 4).weight.shape == (4,)


def test_hugging_face_trainer(tmp_path: Path) -> None:
    """A model with our batch norms, unchanged, in a Trainer."""
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2
    )
    model, report = tritonnorm.replace(ResNetForImageClassification(config))
    assert report.counts["replaced"] > 0
    data = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 2} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    with matrix.ran() as ran:
        Trainer(model=model, args=arguments, train_dataset=data).train()
    norms = [m for m in model.modules() if isinstance(m, tritonnorm.BatchNorm2d)]
    assert ran and all(m.num_batches_tracked.item() == 2 for m in norms)


@pytest.mark.filterwarnings("ignore")  # its own, about torch
def test_lightning(tmp_path: Path) -> None:
    """A LightningModule around the net, unchanged, in a Trainer."""
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Task(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = pair()[0]

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    task = Task()
    loader = torch.utils.data.DataLoader(torch.randn(8, 3, 6, 6), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=str(tmp_path),
    )  # fmt: skip
    trainer.fit(task, loader)
    assert task.net.bn1.num_batches_tracked.item() == 2
