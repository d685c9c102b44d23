"""The activation that a norm carries, and the class of torch that a norm is derived from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tritonnorm
from tritonnorm import frozen
from tritonnorm.activated import Activated, torch_class
from tritonnorm.fold.edit import _with_activation
from tritonnorm.sync.nn import SyncBatchNormAct2d

SIZES: dict[str, tuple[Any, ...]] = {"GroupNorm": (2, 4)}
DROP_INS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "GroupNorm", "LayerNorm")
DROP_INS += ("RMSNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")


@pytest.mark.parametrize("name", DROP_INS)
def test_a_drop_in_is_found_by_the_name_of_torchs_class(name: str) -> None:
    plain = getattr(torch.nn, name)
    assert torch_class(getattr(tritonnorm, name)) is plain
    assert torch_class(plain) is plain


def test_mixins_and_private_bases_are_passed_over() -> None:
    class Mixin(torch.nn.Module):
        pass

    class BatchNorm3d(Mixin, tritonnorm.BatchNorm2d):  # named like another class of torch
        pass

    assert torch_class(BatchNorm3d) is torch.nn.BatchNorm2d
    assert torch_class(tritonnorm.BatchNormAct2d) is torch.nn.BatchNorm2d
    assert torch_class(SyncBatchNormAct2d) is torch.nn.BatchNorm2d
    assert torch_class(tritonnorm.MaskedBatchNorm1d) is torch.nn.BatchNorm1d
    assert torch_class(torch.nn.modules.batchnorm._BatchNorm) is torch.nn.Module
    assert torch_class(Mixin) is torch.nn.Module


@pytest.mark.parametrize("name", [n for n in DROP_INS if "BatchNorm" in n])
def test_a_fold_gives_an_activation_to_the_drop_in_of_the_class(name: str) -> None:
    plain = getattr(torch.nn, name)(4)
    put = _with_activation(plain, "elu", (0.5,))
    assert type(put) is getattr(tritonnorm, name) and put.weight is plain.weight
    assert (put.activation, put.activation_args) == ("elu", (0.5,))
    assert "activation" not in plain.__dict__ and put._parameters is not plain._parameters


@pytest.mark.parametrize("name", [*DROP_INS, "MaskedBatchNorm1d"])
def test_name_and_parameters_are_kept_as_given(name: str) -> None:
    kind, sizes = getattr(tritonnorm, name), SIZES.get(name, (4,))
    assert issubclass(kind, Activated)
    plain = kind(*sizes)
    assert (plain.activation, plain.activation_args) == (None, ())
    assert "activation" not in repr(plain)
    identity = kind(*sizes, activation="identity")
    assert identity.activation is None and repr(identity) == repr(plain)
    module = kind(*sizes, activation="softplus", activation_args=[2])
    assert (module.activation, module.activation_args) == ("softplus", (2.0,))
    assert repr(module) == f"{repr(plain)[:-1]}, activation=softplus, activation_args=(2.0,))"
    with pytest.raises(ValueError, match="activation: expected None or one of"):
        kind(*sizes, activation="no such")
    with pytest.raises(ValueError, match="activation_args: softplus takes 2"):
        kind(*sizes, activation="softplus", activation_args=(1, 2, 3))


def test_a_frozen_norm_has_no_activation_of_its_own() -> None:
    for kind in frozen.NORMS.values():
        assert issubclass(kind, Activated)
        assert (kind.activation, kind.activation_args) == (None, ())
