"""Group, layer, instance and RMS norm on a GPU: every case in every way, and sizes of networks."""

from __future__ import annotations

import pytest
import torch

from tests import norm_cases, norms
from tests.norms import NormCase

FUSED = {"activation": "silu", "residual": "contiguous"}
LAYERS = [
    NormCase(norm, shape, groups, layout, dtype, torch.float32, **kind)
    for norm, shape, groups, layout in (
        ("group", (4, 320, 64, 64), 32, "contiguous"),
        ("group", (4, 320, 64, 64), 32, "channels_last"),
        ("group", (4, 1280, 16, 16), 32, "channels_last"),
        ("group", (8, 64, 7, 7), 32, "contiguous"),
        ("layer", (4, 197, 768), 1, "contiguous"),
        ("layer", (512, 8192), 1, "contiguous"),
        ("layer", (3, 100_003), 1, "contiguous"),
        ("rms", (2, 2048, 64), 1, "contiguous"),
        ("rms", (1, 1 << 20), 1, "contiguous"),
        ("instance", (2, 64, 128, 128), 1, "contiguous"),
        ("instance", (2, 64, 32, 32), 1, "channels_last"),
    )
    for dtype in (torch.float32, torch.bfloat16)
    for kind in ({}, FUSED)
]


@pytest.mark.parametrize("way", norm_cases.WAYS, ids=str)
@pytest.mark.parametrize("case", norm_cases.CASES, ids=str)
def test_matrix(case: NormCase, way: norm_cases.Way) -> None:
    algorithm, tiles = way
    norms.check(case, "cuda", algorithm, norm_cases.small(case) if tiles else None)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layers(case: NormCase) -> None:
    norms.check(case, "cuda")


@pytest.mark.parametrize("case", LAYERS[::5], ids=str)
def test_same_bits_twice(case: NormCase) -> None:
    data = norms.build(case, "cuda")
    a, b = (norms.results(norms.by_tritonnorm, case, data) for _ in range(2))
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_in_a_cuda_graph() -> None:
    """Captured with its running statistics, and replayed."""
    import tritonnorm

    module = tritonnorm.InstanceNorm2d(8, track_running_stats=True, activation="silu").cuda()
    x = torch.randn(2, 8, 16, 16, device="cuda")
    module(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    before = module.running_mean.clone()
    x.add_(1.0)
    graph.replay()
    torch.testing.assert_close(y, torch.nn.functional.silu(torch.nn.functional.instance_norm(x)))
    assert not torch.equal(module.running_mean, before)
