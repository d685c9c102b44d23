"""fold on models from other libraries, held against the originals in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from tests.fold_models import LIMIT, error, positive, rand, trained
from tritonnorm.fold import fold

ZOO = {  # name: module, input size, batch norms, folded, reduced to an addition
    "sharesnet18": ("sharesnet", 64, 20, 20, 0),  # 4 convolutions each called before 2 of them
    "resnet18": ("resnet", 64, 20, 20, 0),
    "preresnet20_cifar10": ("preresnet_cifar", 32, 19, 9, 10),  # conv output also in the skip
    "densenet40_k12_cifar10": ("densenet_cifar", 32, 39, 0, 39),  # concatenations before each
    "wrn20_10_1bit_cifar10": ("wrn1bit_cifar", 32, 20, 0, 0),  # weights computed in forward
    "mobilenetv2_wd4": ("mobilenetv2", 64, 53, 53, 0),
    "mixnet_s": ("mixnet", 64, 49, 49, 0),  # concatenations of depthwise convolutions
    "ibn_resnet50": ("ibnresnet", 64, 53, 53, 0),  # batch norms on half of the channels
    "igcv3_wd4": ("igcv3", 64, 98, 98, 0),  # channel shuffles
    "fishnet99": ("fishnet", 64, 99, 63, 36),  # the output of a convolution used several times
}


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels would take minutes; tests/test_fold_fused.py has them."""
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")


@pytest.mark.zoo
@pytest.mark.parametrize("name", ZOO)
def test_pytorchcv(name: str) -> None:
    module, size, total, folds, reduced = ZOO[name]
    try:
        factory = getattr(importlib.import_module(f"pytorchcv.models.{module}"), name)
    except ImportError as error_:
        pytest.skip(f"pytorchcv.models.{module} cannot be imported: {error_}")
    torch.manual_seed(0)
    options = {} if size == 32 else {"in_size": (size, size)}
    model = factory(**options)
    if hasattr(model.features, "final_pool"):
        model.features.final_pool = nn.AdaptiveAvgPool2d(1)
    positive(trained(model))
    x = rand(1, 3, size, size)
    folded, report = fold(model, x, verify=False)
    got = report.counts
    assert (got.get("folded", 0), got.get("reduced", 0)) == (folds, reduced), str(report)
    assert error(model, folded, x) <= LIMIT
    model.train()
    _, report = fold(model, x.repeat(2, 1, 1, 1))
    assert report.counts == {"left": total}
    assert {row.reason for row in report.rows} == {
        "the batch norm is in training mode: call model.eval() first"
    }


@pytest.mark.zoo
def test_transformers_resnet() -> None:
    try:
        from transformers import ResNetConfig, ResNetForImageClassification
    except ImportError as error_:
        pytest.skip(f"transformers' ResNet cannot be imported: {error_}")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 1, 1])
    model = trained(ResNetForImageClassification(config))
    x = rand(1, 3, 64, 64)
    folded, report = fold(model, x)
    assert report.counts == {"folded": 16}, str(report)
    assert type(folded) is type(model)
    assert error(model, folded, x) <= LIMIT
    assert report.error is not None and report.error <= LIMIT
    _, report = fold(model)
    assert report.counts == {"left": 16} and "give example_inputs" in report.rows[0].reason
