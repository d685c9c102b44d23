"""Gradients taken with create_graph are the ones taken without it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tritonnorm
from bench.launches import observe
from tritonnorm.sequences.masked import masked_batch_norm


@pytest.mark.parametrize(
    ("ours", "plain", "shape"),
    [
        (lambda: tritonnorm.BatchNorm2d(3), lambda: torch.nn.BatchNorm2d(3), (4, 3, 2, 2)),
        (lambda: tritonnorm.GroupNorm(3, 6), lambda: torch.nn.GroupNorm(3, 6), (2, 6, 2, 2)),
        (lambda: tritonnorm.LayerNorm(5), lambda: torch.nn.LayerNorm(5), (4, 5)),
    ],
)
@pytest.mark.parametrize("create", [False, True])
def test_gradients_of_a_norm_used_twice(ours: Any, plain: Any, shape: Any, create: bool) -> None:
    """The second call's input depends on the weight; with create_graph no way counts twice."""
    found = []
    for made in (ours().double(), plain().double()):
        torch.manual_seed(0)
        with torch.no_grad():
            made.weight.uniform_(0.5, 1.5)
            made.bias.uniform_(-1.0, 1.0)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y = made(made(x)).pow(3).sum()
        found.append(torch.autograd.grad(y, [x, made.weight, made.bias], create_graph=create))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "make", [tritonnorm.BatchNorm2d, lambda c, **o: tritonnorm.GroupNorm(c, c, **o)]
)
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_gradients_of_a_residual_that_is_the_input(make: Any, activation: str) -> None:
    """The same first derivative with create_graph as without."""
    module = make(3, activation=activation).double()
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def of(x: Tensor) -> Tensor:
        return module(x, 2 * x)

    first, again = (
        torch.autograd.grad(of(x).square().sum(), x, create_graph=create)[0]
        for create in (False, True)
    )
    torch.testing.assert_close(again, first)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tritonnorm.BatchNorm2d(4, activation="relu"),
        lambda: tritonnorm.GroupNorm(2, 4, activation="silu"),
        lambda: tritonnorm.LayerNorm(3),
        lambda: (
            lambda x: masked_batch_norm(
                x.flatten(2), None, None, training=True, lengths=torch.tensor([9, 4])
            )
        ),
    ],
    ids=["batch", "group", "layer", "masked"],
)
def test_gradients_through_a_checkpoint(make: Any) -> None:
    """What it saved can be unpacked once."""
    module = make()
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    found = []
    for inside in (False, True):
        y = checkpoint(module, x, use_reentrant=False) if inside else module(x)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), x)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("make", [tritonnorm.BatchNorm2d, partial(tritonnorm.GroupNorm, 2)])
@pytest.mark.parametrize("create", [False, True])
def test_the_gradient_of_a_residual_that_is_only_added(make: Any, create: bool) -> None:
    """It is that of the output, and no kernel writes it."""
    module = make(4).requires_grad_(False)
    residual = torch.randn(2, 4, 3, 3, requires_grad=True)
    y = module(torch.randn(2, 4, 3, 3), residual)
    grad = torch.randn_like(y)
    with observe() as seen:
        (found,) = torch.autograd.grad(y, residual, grad, create_graph=create)
    assert torch.equal(found, grad) and not seen.interpreted
