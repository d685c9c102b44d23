"""The operators: schema, fakes, autograd, torch.compile, and derivatives of derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import cases, matrix
from tritonnorm import functional
from tritonnorm import ops as _ops  # noqa: F401  registers torch.ops.tritonnorm

OPS = torch.ops.tritonnorm
LAYOUTS = ["contiguous", "channels_last", "channel_slice", "crop", "transposed", "expanded"]


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def training_sample(shape: tuple[int, ...], layout: str, **options: Any) -> tuple[Any, ...]:
    """Arguments of batch_norm_training."""
    c = shape[1]
    with_parts = options.get("full", True)
    return (
        cases.LAYOUTS[layout](tensor(*shape)),
        tensor(*shape, seed=1) if options.get("residual") else None,
        tensor(c, seed=2) if with_parts else None,
        tensor(c, seed=3) if with_parts else None,
        tensor(c, seed=4) if with_parts else None,
        tensor(c, seed=5).abs() if with_parts else None,
        torch.tensor(2) if with_parts else None,
        options.get("momentum", 0.1),
        1e-5,
        options.get("activation", ""),
        options.get("args", []),
        options.get("save_mask", False),
    )


TRAINING = [
    training_sample((3, 5, 2, 4), "contiguous"),
    training_sample(
        (3, 5, 2, 4), "channels_last", residual=True, activation="relu", save_mask=True
    ),
    training_sample((3, 5, 2, 4), "crop", activation="leaky_relu", args=[0.2], momentum=None),
    training_sample((6, 5), "contiguous", full=False, residual=True, activation="gelu"),
]


def inference_sample(statistics: bool, *sample: Any) -> tuple[Any, ...]:
    x, residual, weight, bias, *_ = sample
    c = x.shape[1]
    return (
        x, residual, weight, bias, tensor(c, seed=6), tensor(c, seed=7).abs() + 0.5,
        1e-5, sample[9], sample[10], statistics, sample[11] and statistics,
    )  # fmt: skip


def backward_sample(needs: list[bool], batch: bool, *sample: Any) -> tuple[Any, ...]:
    """Arguments of batch_norm_backward after the forward of a training sample."""
    x, residual, weight, bias, *_, activation, args, save_mask = sample
    _, mean, rstd, mask = OPS.batch_norm_training(
        *[t.clone() if isinstance(t, Tensor) else t for t in sample]
    )
    kept = residual if residual is not None and activation and not save_mask else None
    return (
        tensor(*x.shape, seed=8), x, kept, mask if save_mask else None, weight, bias, mean, rstd,
        batch, activation, args, needs,
    )  # fmt: skip


def opcheck(op: Any, sample: tuple[Any, ...]) -> None:
    results = torch.library.opcheck(op.default, sample)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("sample", TRAINING, ids=range(len(TRAINING)))
def test_opcheck_training(sample: tuple[Any, ...]) -> None:
    opcheck(OPS.batch_norm_training, sample)


@pytest.mark.parametrize("sample", TRAINING, ids=range(len(TRAINING)))
@pytest.mark.parametrize("statistics", [True, False])
def test_opcheck_inference(sample: tuple[Any, ...], statistics: bool) -> None:
    opcheck(OPS.batch_norm_inference, inference_sample(statistics, *sample))


@pytest.mark.parametrize("sample", TRAINING, ids=range(len(TRAINING)))
@pytest.mark.parametrize(
    ("needs", "batch"),
    [([True] * 4, True), ([True, False, False, False], False), ([False, True, True, False], True)],
)
def test_opcheck_backward(sample: tuple[Any, ...], needs: list[bool], batch: bool) -> None:
    needs = [n and (i < 2 or sample[i] is not None) for i, n in enumerate(needs)]
    opcheck(OPS.batch_norm_backward, backward_sample(needs, batch, *sample))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(3, 5, 4, 6), (2, 3, 2, 3, 4), (1, 4, 5, 1), (32, 8, 3, 3)], ids=str
)
def test_fake_strides_are_the_real_ones(shape: tuple[int, ...], layout: str) -> None:
    sample = training_sample(shape, layout, residual=True, activation="relu", save_mask=True)
    back = backward_sample([True] * 4, True, *sample)
    for op, arguments in (
        (OPS.batch_norm_training, sample),
        (OPS.batch_norm_inference, inference_sample(True, *sample)),
        (OPS.batch_norm_inference, inference_sample(False, *sample)),
        (OPS.batch_norm_backward, back),
    ):
        real = op(*[t.clone() if isinstance(t, Tensor) and t.dim() == 0 else t for t in arguments])
        with FakeTensorMode() as mode:
            fake = op(*[mode.from_tensor(t) if isinstance(t, Tensor) else t for t in arguments])
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.dtype) == (f.shape, f.dtype)
            # torch.empty_like itself gives dimensions of size 1 other strides for fake tensors
            assert all(
                n == 1 or s == t for n, s, t in zip(r.shape, r.stride(), f.stride(), strict=True)
            )


def test_version_counters() -> None:
    """Autograd knows that the running statistics and the counter moved, and nothing else."""
    sample = training_sample((3, 5, 2, 4), "contiguous", residual=True)
    before = [t._version if isinstance(t, Tensor) else None for t in sample]
    OPS.batch_norm_training(*sample)
    for i, (t, version) in enumerate(zip(sample, before, strict=True)):
        if isinstance(t, Tensor):
            assert (t._version > version) == (4 <= i <= 6), i
    sample = inference_sample(True, *sample)
    before = [t._version for t in sample[:6]]
    OPS.batch_norm_inference(*sample)
    assert [t._version for t in sample[:6]] == before


SMOOTH = {"activation": "silu"}
MASKED = {"activation": "leaky_relu", "activation_args": (0.3,)}


def differentiable(
    training: bool, residual: bool, options: dict[str, Any], layout: str
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A call as a function of input, weight, bias (and residual) in float64, away from kinks."""
    shape = (3, 2, 2, 2)
    x = cases.LAYOUTS[layout](tensor(*shape, dtype=torch.float64))
    leaves = [
        x,
        tensor(2, seed=2, dtype=torch.float64).abs() + 0.5,
        tensor(2, seed=3, dtype=torch.float64),
    ]
    if residual:
        leaves.append(3.0 * tensor(*shape, seed=1, dtype=torch.float64))
    mean, var = (
        tensor(2, seed=4, dtype=torch.float64),
        tensor(2, seed=5, dtype=torch.float64).abs() + 0.5,
    )

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        buffers = (None, None) if training else (mean, var)
        return functional.batch_norm(
            x, *buffers, weight, bias, training, residual=residual, **options
        )

    return call, tuple(t.detach().requires_grad_() for t in leaves)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("options", [{}, SMOOTH, MASKED], ids=["none", "smooth", "masked"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training: bool, residual: bool, options: dict[str, Any], layout: str) -> None:
    call, leaves = differentiable(training, residual, options, layout)
    with matrix.ran() as ran:
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert ran


@pytest.mark.parametrize("options", [{}, SMOOTH, MASKED], ids=["none", "smooth", "masked"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_gradgradcheck(training: bool, residual: bool, options: dict[str, Any]) -> None:
    layout = "channels_last" if residual else "contiguous"
    call, leaves = differentiable(training, residual, options, layout)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("training", [True, False])
def test_create_graph_gives_the_kernels_gradients(training: bool) -> None:
    """The differentiable formula and the kernels are the same function."""
    for residual, options in ((True, MASKED), (True, SMOOTH), (False, SMOOTH)):
        call, leaves = differentiable(training, residual, options, "channels_last")
        dy = tensor(3, 2, 2, 2, seed=9, dtype=torch.float64)
        kernels = torch.autograd.grad(call(*leaves), leaves, dy)
        formula = torch.autograd.grad(call(*leaves), leaves, dy, create_graph=True)
        for k, f in zip(kernels, formula, strict=True):
            torch.testing.assert_close(k, f.detach(), rtol=1e-10, atol=1e-10)


# dynamo makes an instance of the function itself, and warns about it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    """One graph; forward, backward, running statistics and counter equal eager's."""
    torch._dynamo.reset()

    def step(
        x: Tensor, residual: Tensor, weight: Tensor, mean: Tensor, var: Tensor, counter: Tensor
    ) -> Tensor:
        return functional.batch_norm(
            x,
            mean,
            var,
            weight,
            None,
            True,
            activation="relu",
            residual=residual,
            num_batches_tracked=counter,
        ).sin()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (3, 2):
        outcomes = []
        for f in (step, compiled):
            x = tensor(n, 5, 2, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
            residual, weight = (
                tensor(n, 5, 2, 4, seed=1).requires_grad_(),
                tensor(5, seed=2).requires_grad_(),
            )
            mean, var, counter = torch.zeros(5), torch.ones(5), torch.tensor(4)
            with matrix.ran() as ran:
                y = f(x, residual, weight, mean, var, counter)
                grads = torch.autograd.grad(y.sum(), (x, residual, weight))
            assert len(ran) == 2
            outcomes.append((y.detach(), mean, var, counter, *grads))
        for eager, graph in zip(*outcomes, strict=True):
            assert torch.equal(eager, graph)
            assert eager.stride() == graph.stride()


def test_compile_inference() -> None:
    torch._dynamo.reset()

    def call(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return functional.batch_norm(x, mean, var, activation="hardswish")

    arguments = (tensor(3, 5, 4), tensor(5, seed=1), tensor(5, seed=2).abs())
    with torch.no_grad(), matrix.ran() as ran:
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(*arguments)
        assert ran == ["affine"]
        assert torch.equal(compiled, call(*arguments))
