"""The models: one of each family of pytorchcv, and those of transformers that have batch norms."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

from bench.zoo.configs import IMAGE, MODELS, build, image

__all__ = ["Entry", "entries"]


@dataclass(frozen=True)
class Entry:
    """One model that can be built.

    Attributes:
        library: "pytorchcv" or "transformers".
        name: of the model.
        build: makes the model with random weights, and inputs for it: a tuple or a dict.
    """

    library: str
    name: str
    build: Callable[[], tuple[nn.Module, Any]]


def entries() -> Iterator[Entry]:
    """All models, in a fixed order; nothing is built yet."""
    yield from _pytorchcv()
    for name, (model, config, options, inputs) in MODELS.items():
        yield Entry("transformers", name, partial(build, model, config, options, inputs))


# pytorchcv: modules that are no models, or that need packages of their own
SKIPPED = {
    "common": "no model",
    "propainter": "needs torchvision",
    "propainter_ip": "needs torchvision",
    "propainter_ip_stream": "no model",
    "propainter_rfc": "needs torchvision",
    "propainter_rfc_stream": "no model",
    "propainter_stream": "no model",
    "raft_stream": "no model",
    "jasper": "needs librosa",
    "jasperdr": "needs librosa",
    "quartznet": "needs librosa",
    "pfpcnet": "inputs of its own kind",
    "visemenet": "inputs of its own kind",
    "irevnet": "301 layers of its own autograd functions: minutes per run",
}
PREFERRED = {  # where the first model of a file has no batch norm
    "vgg": "bn_vgg11",
    "alexnet": "alexnet",
    "zfnet": "zfnet",
}
ONE_CHANNEL = ("superpointnet",)
SPECIAL_INPUTS: dict[str, Callable[[], Any]] = {
    "lffd": lambda: (image(128),),
    "nvpattexp": lambda: (torch.randn(2, 8, 16, 29), torch.tensor([3, 3])),
    "voca": lambda: (torch.randn(2, 1, 16, 29), torch.tensor([1, 2])),
    "raft": lambda: (image(128), image(128)),
}


def _pytorchcv() -> Iterator[Entry]:
    try:
        package = importlib.import_module("pytorchcv.models")
    except ImportError:
        return
    for info in pkgutil.iter_modules(package.__path__):
        if info.name not in SKIPPED:
            yield Entry("pytorchcv", info.name, partial(_build_pytorchcv, info.name))


def _build_pytorchcv(family: str) -> tuple[nn.Module, Any]:
    module = importlib.import_module(f"pytorchcv.models.{family}")
    factory = getattr(module, PREFERRED.get(family, ""), None) or _first(module)
    size = IMAGE
    try:
        model = factory(in_size=(size, size))
    except Exception:
        model = factory()
        size = getattr(model, "in_size", (size, size))[0]
    if size == IMAGE:
        _any_size(model)
    channels = 1 if family in ONE_CHANNEL else 3
    inputs = SPECIAL_INPUTS.get(family, lambda: (image(size, channels),))()
    try:
        with torch.no_grad():
            model.eval()(*inputs)
    except Exception:
        model = factory()
        size = getattr(model, "in_size", (224, 224))[0]
        inputs = (image(size, channels),)
    return model, inputs


def _any_size(model: nn.Module) -> None:
    """The last pooling has the window of 224 pixels."""
    features = getattr(model, "features", None)
    pool = getattr(features, "final_pool", None)
    if isinstance(pool, nn.AvgPool2d) and isinstance(features, nn.Module):
        features.final_pool = nn.AdaptiveAvgPool2d(1)


def _first(module: Any) -> Callable[..., nn.Module]:
    """The first model of a file: models can be had with trained weights, their parts cannot."""
    for name in module.__all__:
        factory = getattr(module, name)
        if name.startswith("get_"):
            continue
        if callable(factory) and "pretrained" in signature(factory).parameters:
            return factory
        if callable(factory) and name.islower() and "kwargs" in signature(factory).parameters:
            return factory
    raise LookupError(f"{module.__name__}: no model")
