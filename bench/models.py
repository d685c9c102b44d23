"""The real model of the demo: a ResNet from transformers, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RESNETS", "ResNet", "batch_norms", "build"]

#: Name -> what its ResNetConfig is made of. "tiny" is for tests.
RESNETS: dict[str, dict[str, Any]] = {
    "resnet-18": {
        "layer_type": "basic",
        "depths": [2, 2, 2, 2],
        "hidden_sizes": [64, 128, 256, 512],
    },
    "resnet-50": {
        "layer_type": "bottleneck",
        "depths": [3, 4, 6, 3],
        "hidden_sizes": [256, 512, 1024, 2048],
    },
    "tiny": {
        "layer_type": "basic",
        "depths": [1, 1],
        "hidden_sizes": [16, 32],
        "embedding_size": 16,
    },
}


class ResNet(nn.Module):
    """`transformers.ResNetForImageClassification` as it is, from plain tensors to plain tensors."""

    def __init__(self, name: str, labels: int = 10) -> None:
        super().__init__()
        from transformers import ResNetConfig, ResNetForImageClassification

        self.net = ResNetForImageClassification(ResNetConfig(num_labels=labels, **RESNETS[name]))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits ``[N, labels]`` of images ``[N, 3, H, W]``."""
        logits: Tensor = self.net(pixel_values=pixels).logits
        return logits


def build(name: str, seed: int = 0) -> ResNet:
    """A new model with random weights that depend on the seed alone.

    Raises:
        ValueError: no such model.
        RuntimeError: transformers is missing or does not import; the message says what to install.
    """
    if name not in RESNETS:
        raise ValueError(f"model: expected one of {', '.join(RESNETS)}; got {name!r}")
    torch.manual_seed(seed)
    try:
        return ResNet(name)
    except ImportError as error:
        raise RuntimeError(
            "the demo's model comes from transformers, which does not import here "
            f"({error.__cause__ or error}); `pip install -e '.[bench]'` installs it, and a "
            "torchvision whose build does not match that of torch breaks it"
        ) from error


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms of a model, this library's among them."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
