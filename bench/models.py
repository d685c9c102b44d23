"""Real models for the demo and the benchmarks, with random weights; most are of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.densenet import DenseNet

__all__ = ["DENSENET", "MODELS", "Classifier", "batch_norms", "build", "reorder", "settle"]

#: Name -> the family in transformers, and what its configuration is made of. "tiny" is for tests.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet-18": (
        "ResNet",
        {
            "layer_type": "basic",
            "depths": [2, 2, 2, 2],
            "hidden_sizes": [64, 128, 256, 512],
        },
    ),
    "resnet-50": (
        "ResNet",
        {
            "layer_type": "bottleneck",
            "depths": [3, 4, 6, 3],
            "hidden_sizes": [256, 512, 1024, 2048],
        },
    ),
    "mobilenet-v2": ("MobileNetV2", {}),
    "efficientnet-b0": (  # the configuration's own defaults are those of B7
        "EfficientNet",
        {
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "image_size": 224,
            "hidden_dim": 1280,
            "dropout_rate": 0.2,
        },
    ),
    "tiny": (
        "ResNet",
        {
            "layer_type": "basic",
            "depths": [1, 1],
            "hidden_sizes": [16, 32],
            "embedding_size": 16,
        },
    ),
}


DENSENET = "densenet-121"  # of `bench.densenet`


class Classifier(nn.Module):
    """An image classifier of transformers as it is, from plain tensors to plain tensors."""

    def __init__(self, name: str, labels: int = 10) -> None:
        super().__init__()
        import transformers

        family, settings = MODELS[name]
        config = getattr(transformers, f"{family}Config")(num_labels=labels, **settings)
        self.net = getattr(transformers, f"{family}ForImageClassification")(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits ``[N, labels]`` of images ``[N, 3, H, W]``."""
        logits: Tensor = self.net(pixel_values=pixels).logits
        return logits


def build(name: str, seed: int = 0) -> nn.Module:
    """A new model with random weights that depend on the seed alone.

    Raises:
        ValueError: no such model.
        RuntimeError: transformers is missing or does not import; the message says what to install.
    """
    known = [*MODELS, DENSENET]
    if name not in known:
        raise ValueError(f"model: expected one of {', '.join(known)}; got {name!r}")
    torch.manual_seed(seed)
    if name == DENSENET:
        return DenseNet()
    try:
        return Classifier(name)
    except ImportError as error:
        raise RuntimeError(
            "the models come from transformers, which does not import here "
            f"({error.__cause__ or error}); `pip install -e '.[bench]'` installs it, and a "
            "torchvision whose build does not match that of torch breaks it"
        ) from error


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms of a model, this library's among them."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def settle(model: nn.Module, pixels: Tensor, batch: int = 8) -> None:
    """Give the batch norms parameters unlike a new module's and the statistics of ``pixels``.

    The model is in eval mode afterwards.
    """
    generator = torch.Generator().manual_seed(3)
    for bn in batch_norms(model):
        with torch.no_grad():
            for parameter, low, high in ((bn.weight, 0.5, 1.5), (bn.bias, -0.5, 0.5)):
                values = torch.empty(parameter.shape).uniform_(low, high, generator=generator)
                parameter.copy_(values)
        bn.momentum = None  # the plain average of what comes
    model.train()
    with torch.no_grad():
        for part in pixels.split(batch):
            model(part)
    model.eval()


def reorder(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Bring the weights of 2-d convolutions into a memory format, in place."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
