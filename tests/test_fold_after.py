"""Odd operations and layers, and what a fold leaves: modules, parameters, checkpoints, rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.fold_models import SHAPE, bn, conv, folded, left, net, positive, rand, same, trained
from tritonnorm.fold import fold, fold_state_dict

# operations


def test_an_empty_list_is_concatenated() -> None:
    model = net(lambda m, x: m.bn(torch.cat([torch.tensor([]), m.conv(x)], 1)))
    x = rand(SHAPE)
    other, _ = folded(model, x)
    same(model, other, (x,))


def test_complex_numbers() -> None:
    model = net(lambda m, x: torch.exp(m.bn(m.conv(x).relu()) * 1j).real)
    x = rand(SHAPE)
    other, _ = folded(model, x)
    same(model, other, (x,))


# what is left in the model


@pytest.mark.parametrize("activation", [F.relu, torch.tanh])
def test_a_batch_norm_called_by_keyword(activation: Any) -> None:
    model = positive(net(lambda m, x: m.conv(activation(m.bn(input=x)))))
    x = rand(SHAPE)
    other, report = folded(model, x)
    assert activation is not F.relu or report.counts == {"reduced": 1}
    same(model, other, (x,))


def test_what_was_fused_takes_hooks_and_a_second_fold() -> None:
    model = trained(nn.Sequential(bn(4), nn.Tanh()))
    x = rand(SHAPE)
    other, report = fold(model, x)
    assert report.counts == {"fused": 1}
    again, _ = fold(other, x)
    same(model, again, (x,))
    seen = []
    other[0].register_forward_hook(lambda *a: seen.append(a))  # type: ignore[index]
    same(model, other, (x,))
    assert len(seen) == 1 and not model[0]._forward_hooks
    with pytest.raises(ValueError, match="strict"):
        fold(model, x, strict=True)


@pytest.mark.parametrize("learned", [True, False])
def test_a_parametrised_layer_learns_as_before(learned: bool) -> None:
    layer = nn.utils.parametrizations.weight_norm(conv(4, 4))
    model = trained(nn.Sequential(layer, bn(4))).requires_grad_(learned)
    other, report = fold(model, rand(SHAPE), rules="all")
    assert report.counts == {"folded": 1}
    assert {p.requires_grad for p in other.parameters()} == {learned}


def test_a_fold_under_inference_mode_can_be_trained() -> None:
    model = trained(nn.Sequential(bn(4), nn.ReLU(), conv(4, 4), bn(4)))
    x = rand(SHAPE)
    with torch.inference_mode():
        other, _ = fold(model, x.clone())
    assert not any(t.is_inference() for t in (*other.parameters(), *other.buffers()))
    other(x).sum().backward()


@pytest.mark.parametrize("inputs", [True, False])
def test_a_patched_convolution(inputs: bool) -> None:
    model = net(lambda m, x: m.bn(m.conv(x)))
    layer: Any = model.conv
    layer._conv_forward = lambda x, w, b: F.conv2d(x, w.abs(), b, padding=1)
    x = rand(SHAPE)
    other, report = folded(model, x if inputs else None)
    assert "patched" in left(report)
    same(model, other, (x,))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2)])
@pytest.mark.parametrize("way", [torch.jit.script, torch.fx.symbolic_trace])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_what_was_reduced_is_scripted_and_traced(way: Any, activation: nn.Module) -> None:
    model = positive(trained(nn.Sequential(bn(4), activation, conv(4, 4), nn.Flatten())))
    x = rand(SHAPE).contiguous(memory_format=torch.channels_last)
    other, report = fold(model, x)
    assert report.counts == {"reduced": 1}
    same(model, other, (x,))
    assert other[0](x).is_contiguous(memory_format=torch.channels_last)  # type: ignore[index]
    same(model, way(other), (x,))


# checkpoints, and dtypes


def test_a_report_knows_the_eps_of_its_batch_norms() -> None:
    model = trained(nn.Sequential(conv(4, 4), nn.BatchNorm2d(4, eps=0.1)))
    other, report = fold(model, rand(SHAPE))
    state, _ = fold_state_dict(model.state_dict(), report)
    torch.testing.assert_close(state, other.state_dict())


@pytest.mark.parametrize("copied", [True, False])
def test_a_layer_with_two_names_in_a_checkpoint(copied: bool) -> None:
    model = net(lambda m, x: m.bn(m.body(x)))
    model.body = nn.Sequential(model.conv)
    _, report = fold(model, rand(SHAPE))
    assert report.counts == {"folded": 1}
    state = {k: v.clone() if copied else v for k, v in model.state_dict().items()}
    kept, rows = fold_state_dict(state, report)
    assert "body.0.weight" in left(rows) and kept.keys() == state.keys()


def test_what_rounding_to_16_bits_costs_is_said() -> None:
    """A mean of 300 deviations becomes a bias that hardly fits bfloat16."""
    model = trained(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4)))
    with torch.no_grad():
        model[0].running_mean.fill_(300.0)  # type: ignore[union-attr, operator]
        model[0].running_var.fill_(1.0)  # type: ignore[union-attr, operator]
    x = rand((64, 8)) + 300
    errors = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        cast = copy.deepcopy(model).to(dtype)
        other, report = fold(cast, x.to(dtype))
        note = report.notes[-1]
        assert ("rounded to" in note) == (dtype != torch.float32)
        expected = cast.double()(x.to(dtype).double()).detach()
        found = other.double()(x.to(dtype).double()).detach()
        errors[dtype] = float((found - expected).abs().max() / expected.abs().max())
        if dtype != torch.float32:
            said = float(note.rpartition(" ")[2])
            assert said == pytest.approx(errors[dtype], rel=0.02)
    assert errors[torch.bfloat16] > 4 * errors[torch.float16] > 1e-2 > errors[torch.float32]


def test_a_layer_without_elements() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        model = trained(nn.Sequential(nn.Linear(0, 3), nn.BatchNorm1d(3)))
    x = rand((2, 0))
    other, report = folded(model, x)
    assert "no elements" in left(report)
    same(model, other, (x,))
