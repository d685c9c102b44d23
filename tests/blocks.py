"""Modules of `conv_nn` with random contents, and what PyTorch computes in their place."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import tritonnorm
from tritonnorm.activation import apply, resolve

CLASSES: list[tuple[Any, Any]] = [
    *((getattr(tritonnorm, f"ConvBatchNorm{d}d"), d) for d in (1, 2, 3)),
    *((getattr(tritonnorm, f"ConvTransposeBatchNorm{d}d"), d) for d in (1, 2, 3)),
    (tritonnorm.LinearBatchNorm1d, 0),
]
every = pytest.mark.parametrize(("kind", "rank"), CLASSES)
Block = Any


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in module.state_dict().items():
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape, generator=g, dtype=torch.float64))
                if name.endswith("running_var"):
                    t.abs_().add_(0.3)


def make(kind: Any, rank: int, dtype: torch.dtype = torch.float64, **options: Any) -> Block:
    sizes = (8, 12, 3) if rank else (8, 12)
    module = kind(*sizes, **options)
    randomize(module)
    return module.to(dtype).eval()


def sample(rank: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn((3, 8, *(6, 5, 4)[:rank]), generator=g, dtype=torch.float64).to(dtype)


def layer_of(m: Block) -> Any:
    return m.linear if hasattr(m, "linear") else m.conv


def apart(m: Block, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """What PyTorch computes with the two modules, one after the other."""
    y = normalized(m, x)
    return activated(m.bn, y if residual is None else y + residual)


def normalized(m: Block, x: Tensor) -> Tensor:
    bn = m.bn
    return torch.nn.functional.batch_norm(
        layer_of(m)(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps
    )


def activated(bn: Any, y: Tensor) -> Tensor:
    return apply(*resolve(bn.activation, bn.activation_args), y)


def folded(m: Block, x: Tensor, *args: Any) -> Tensor:
    """The output in eval mode, which has to come from one layer: the batch norm must not run."""
    with torch.no_grad(), mock.patch.object(type(m.bn), "forward", side_effect=AssertionError):
        return m(x, *args)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-13) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max()
