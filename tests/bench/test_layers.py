"""The layer lists are those of the networks: held against models, and against published counts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bench.layers import (
    NETWORKS,
    RESNET50,
    SEQUENCE,
    Layer,
    densenet121,
    distinct,
    efficientnet_b0,
    mobilenet_v3,
    twin,
    unet3d,
)
from bench.models import build

ACTIVATIONS = {"relu": "relu", "relu_": "relu", "silu": "silu"}
SUMS = ("__add__", "__iadd__", "add", "add_")


class Recorder(TorchFunctionMode):
    """The batch norms that run, each with the sum and the activation that its output goes into."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self._found: dict[int, int] = {}  # id of a tensor -> the layer that it came out of last
        self._alive: list[Tensor] = []  # so that no id is given twice

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "batch_norm":
            self.layers.append(Layer(out.shape[1], tuple(out.shape[2:]), None))
            self._keep(out, len(self.layers) - 1)
        elif name in SUMS or name in ACTIVATIONS:
            # The layer whose output ran last: the block's own, not the shortcut's before it.
            from_ = [self._found[id(a)] for a in args if id(a) in self._found]
            if from_:
                self._change(max(from_), name, out)
        return out

    def _change(self, i: int, name: str, out: Tensor) -> None:
        layer = self.layers[i]
        if name in SUMS and layer.activation is None:
            self.layers[i] = Layer(layer.channels, layer.plane, None, residual=True)
            self._keep(out, i)
        elif name in ACTIVATIONS and layer.activation is None:
            kind = ACTIVATIONS[name]
            self.layers[i] = Layer(layer.channels, layer.plane, kind, layer.residual)

    def _keep(self, out: Tensor, i: int) -> None:
        self._found[id(out)] = i
        self._alive.append(out)


def recorded(model: nn.Module, *shape: int) -> list[Layer]:
    """The layers of a model in eval mode, on the meta device: shapes without numbers."""
    model = model.to("meta").eval()
    with torch.no_grad(), Recorder() as found:
        model(torch.empty(shape, device="meta"))
    return found.layers


@pytest.mark.zoo
def test_resnet50_is_that_of_transformers() -> None:
    found = recorded(build("resnet-50"), 1, 3, 224, 224)
    assert len(found) == 53
    shortcuts = [layer for layer in found if layer.activation is None]
    assert Counter(layer.channels for layer in shortcuts) == Counter((256, 512, 1024, 2048))
    shapes = {(layer.channels, layer.plane) for layer in RESNET50}
    assert {(layer.channels, layer.plane) for layer in shortcuts} <= shapes
    assert {layer for layer in found if layer.activation} == set(RESNET50)
    assert len(set(RESNET50)) == len(RESNET50)


@pytest.mark.zoo
def test_efficientnet_b0_is_that_of_transformers() -> None:
    found = recorded(build("efficientnet-b0"), 1, 3, 224, 224)
    assert found == list(efficientnet_b0())
    assert len(found) == 49
    assert Counter(layer.residual for layer in found) == {False: 40, True: 9}


def test_densenet121_has_its_parameters() -> None:
    """7,978,856 with 1000 classes, as torchvision documents it, from the widths alone."""
    layers = iter(densenet121())
    assert next(layers) == Layer(64, (112, 112))
    parameters = 3 * 64 * 7**2 + 2 * 64
    for block, (depth, side) in enumerate(((6, 56), (12, 28), (24, 14), (16, 7))):
        for _ in range(depth):
            first, second = next(layers), next(layers)
            assert first.plane == second.plane == (side, side)
            parameters += first.channels * second.channels + second.channels * 32 * 3**2
            parameters += 2 * (first.channels + second.channels)
        if block < 3:
            transition = next(layers)
            assert transition.plane == (side, side)
            parameters += transition.channels * (transition.channels // 2) + 2 * transition.channels
    (last,) = layers
    assert last.plane == (7, 7)
    assert parameters + 2 * last.channels + last.channels * 1000 + 1000 == 7_978_856
    # One with each of the 120 convolutions, and one before the classes.
    assert len(list(densenet121())) == 121


def test_unet3d_has_its_parameters() -> None:
    """19,069,955, as the paper says: convolutions and their biases, up-convolutions without."""
    layers = list(unet3d())
    assert len(layers) == 14
    parameters, inputs = 0, 3
    for i, layer in enumerate(layers):
        before = layers[i - 1] if i else None
        if before is not None and before.plane < layer.plane:  # up-convolution, concatenation
            parameters += before.channels**2 * 2**3
            skip = next(s for s in reversed(layers[:i]) if s.plane == layer.plane)
            inputs = before.channels + skip.channels
        parameters += inputs * layer.channels * 3**3 + layer.channels
        inputs = layer.channels
    assert parameters + inputs * 3 + 3 == 19_069_955
    assert [layer.plane[0] for layer in layers] == [
        *(128, 128, 64, 64, 32, 32, 16, 16, 32, 32, 64, 64, 128, 128)
    ]


def test_sequences_are_of_every_kind() -> None:
    shapes = [layer.shape(20) for layer in SEQUENCE]
    assert (20, 6, 65536) in shapes and (20, 8192) in shapes
    assert {len(shape) for shape in shapes} == {2, 3}
    assert any(layer.residual for layer in SEQUENCE)


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_are_distinct_and_have_twins(name: str) -> None:
    layers = NETWORKS[name]
    assert layers == distinct(layers) and all(layer.channels > 0 for layer in layers)
    for layer in layers:
        shape = layer.shape(64)
        small = twin(shape)
        assert len(small) == len(shape) and small[1] % 16 == layer.channels % 16
        assert torch.Size(small).numel() <= 3 * 31 * 28**3


def test_the_densenet_that_is_folded_is_densenet121() -> None:
    """7,978,856 parameters with 1000 labels (Huang et al. 2017; torchvision's figure)."""
    from bench.densenet import DenseNet

    net = DenseNet(labels=1000)
    assert sum(p.numel() for p in net.parameters()) == 7_978_856
    seen: list[tuple[int, tuple[int, ...]]] = []
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(
                lambda m, given, out: seen.append((out.shape[1], tuple(out.shape[2:])))
            )
    with torch.device("meta"):
        net.to("meta").eval()(torch.empty(1, 3, 224, 224))
    assert seen == [(layer.channels, layer.plane) for layer in densenet121()]


def test_mobilenet_v3_by_its_table() -> None:
    """Howard et al. 2019, table 1: 15 blocks, of which the first does not expand."""
    layers = list(mobilenet_v3())
    assert len(layers) == 1 + 2 + 14 * 3 + 1
    assert layers[-1] == Layer(960, (7, 7), "hardswish")
    assert [sum(layer.plane == (s, s) for layer in layers) for s in (112, 56, 28, 14, 7)] == [
        *(4, 6, 9, 18, 9),
    ]
    assert sum(layer.residual for layer in layers) == 10
