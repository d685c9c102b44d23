"""Records of a GPU that does not exist, for tests of everything that reads records."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from bench.record.file import Record
from bench.record.rows import HostRow, ModelRow, OpRow, RoofRow, SkippedRow

PROVIDERS = {  # share of the theoretical bandwidth reached by large tensors, and microseconds extra
    "tritonnorm": (0.88, 2.0),
    "eager": (0.42, 6.0),
    "compile": (0.71, 4.0),
    "compile-max": (0.74, 4.0),
    "cudnn": (0.63, 5.0),
    "apex": (0.58, 5.0),
    "attorch": (0.47, 9.0),
    "FlagGems": (0.44, 9.0),
    "inplace_abn": (0.39, 7.0),
}
TENSORS = {"forward": 3, "backward": 5, "forward+backward": 8, "inference": 2}
PEAK, COPY, READ, L2 = 2000.0, 1780.0, 1850.0, 40 * 2**20
HOST_US = 11.0
PLANES, CHANNELS = (112, 56, 28, 14, 7), (16, 32, 64, 96, 128, 256, 384, 512, 1024, 1536)

GPU = {"name": "Simulated GPU", "arch": "sm_00", "sms": 100, "l2_bytes": L2}
NO_GPU = {"name": "none", "arch": "none", "sms": 0, "l2_bytes": 0}
ENVIRONMENT = {
    "date": "2001-02-03",
    "command": "python -m bench run --suite synthetic",
    "seed": 0,
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "gpu": GPU,
    "versions": {"driver": "1.0", "torch": "2.0.0", "triton": "3.0.0", "python": "3.10.0"},
    "host": {"cpu": "Simulated CPU"},
    "variables": {},
}


def sample(
    layers: int = 12,
    providers: Sequence[str] = ("tritonnorm", "eager", "compile", "compile-max"),
    modes: Sequence[str] = ("forward", "backward", "inference"),
    dtypes: Sequence[str] = ("bfloat16",),
    layouts: Sequence[str] = ("NHWC",),
    caches: Sequence[str] = ("cold",),
    models: int = 2,
    peak: bool = True,
    seed: int = 0,
) -> Record:
    """A plausible record: times follow bytes over bandwidth, plus noise from the seed.

    Args:
        layers: how many different shapes.
        models: how many whole models, each in five variants.
        peak: whether the theoretical bandwidth is known.
    """
    rng = random.Random(seed)
    ops = [
        row
        for cache in caches
        for dtype in dtypes
        for layout in layouts
        for mode in modes
        for channels, plane, residual in shapes(layers)
        for row in case(rng, providers, mode, dtype, layout, cache, channels, plane, residual, peak)
    ]
    return Record(
        {**ENVIRONMENT, "seed": seed},
        ops=ops,
        roofs=roofs(peak),
        models=[row for i in range(models) for row in model(rng, f"network{18 * (i + 1)}")],
        host=[
            HostRow("import tritonnorm", "tritonnorm", 61_000.0, 60_200.0, 63_000.0, 9),
            HostRow("BN+relu forward", "tritonnorm", 18.2, 17.9, 19.0, 500),
            HostRow("BN+relu forward", "torch", 14.1, 13.8, 14.6, 500),
        ],
        skipped=[
            SkippedRow("apex", "", "not installed"),
            SkippedRow("attorch", "BN+silu forward 32x16x7x7", "no kernel for | <this> & more"),
        ],
    )


def without_gpu(models: int = 2, seed: int = 0) -> Record:
    """What a machine without a GPU leaves: models and host times on the CPU, nothing else."""
    full = sample(layers=0, models=models, seed=seed)
    return Record(
        {**ENVIRONMENT, "gpu": NO_GPU},
        models=[replace(row, device="cpu", dtype="float32", flags="") for row in full.models],
        host=full.host,
        skipped=[SkippedRow("eager", "", "needs a GPU")],
    )


def shapes(layers: int) -> Iterator[tuple[int, int, bool]]:
    """Channels, height of a square plane, whether a residual is added: all different."""
    found = 0
    for i, plane in enumerate(PLANES):
        share = layers // len(PLANES) + (i < layers % len(PLANES))
        for j in range(share):
            channels = CHANNELS[(i + j) % len(CHANNELS)] + j // len(CHANNELS) * 8
            yield channels, plane, found % 3 == 2
            found += 1


def case(
    rng: random.Random,
    providers: Sequence[str],
    mode: str,
    dtype: str,
    layout: str,
    cache: str,
    channels: int,
    plane: int,
    residual: bool,
    peak: bool,
) -> list[OpRow]:
    """The rows of one case, a row per provider."""
    elements = 32 * channels * plane * plane
    size = elements * (4 if dtype == "float32" else 2)
    moved = (TENSORS[mode] + residual) * size
    fits = cache == "warm" and 4 * size < L2
    times = {}
    for provider in providers:
        reached, extra = PROVIDERS[provider]
        rate = PEAK * reached * (2.2 if fits else 1.0)
        times[provider] = (extra + moved / rate * 1e-3) * rng.uniform(0.97, 1.03)
    rows = []
    for provider, p50 in times.items():
        noise = rng.choice((0.003, 0.004, 0.006, 0.03))
        gb_s = moved / p50 * 1e-3
        flags = "".join(
            letter
            for letter, holds in {
                "N": noise > 0.02,
                "C": fits,
                "H": p50 < HOST_US,
                "?": not peak,
            }.items()
            if holds
        )
        rows.append(
            OpRow(
                op="BN+add+relu" if residual else "BN+relu",
                mode=mode,
                layout=layout,
                dtype=dtype,
                shape=f"32x{channels}x{plane}x{plane}",
                provider=provider,
                cache=cache,
                p50_us=p50,
                p20_us=p50 * (1 - noise),
                p80_us=p50 * (1 + noise),
                noise=noise,
                samples=200,
                bytes=moved,
                gb_s=gb_s,
                peak_percent=100 * gb_s / PEAK if peak else None,
                copy_percent=100 * gb_s / COPY,
                host_us=HOST_US,
                peak_mb=size * 1e-6,
                x_eager=times["eager"] / p50 if "eager" in times else None,
                x_compile=times["compile"] / p50 if "compile" in times else None,
                flags=flags,
                plan="resident 64x64 4w (formula)" if provider == "tritonnorm" else "",
                error=1e-3,
                sm_mhz=1500.0,
            )
        )
    return rows


def roofs(peak: bool) -> list[RoofRow]:
    """The theoretical roof if it is known, and the measured ones at two sizes each."""
    measured = [
        RoofRow(kind, size, rate * share, rate * share * 0.995, rate * share * 1.004)
        for kind, rate in (("copy", COPY), ("read", READ))
        for size, share in ((8 * L2, 0.96), (32 * L2, 1.0))
    ]
    return [RoofRow("theoretical", 0, PEAK, PEAK, PEAK)] * peak + measured


def model(rng: random.Random, name: str) -> list[ModelRow]:
    """A training step in five variants, and two of inference; a CUDA graph has no parts."""
    step = rng.uniform(40, 90)
    rows = []
    for variant, share in {
        "eager": 1.0,
        "replace": 0.82,
        "compile": 0.8,
        "compile+replace": 0.71,
        "replace+graph": 0.76,
    }.items():
        whole = step * share
        parts = (whole * 0.31, whole * 0.62, step * 0.07)
        rows.append(
            _model_row(
                name, "training step", variant, whole, parts if "graph" not in variant else None
            )
        )
    rows.append(_model_row(name, "inference", "eager", step * 0.2, None))
    rows.append(_model_row(name, "inference", "folded", step * 0.13, None))
    return rows


def _model_row(
    name: str, mode: str, variant: str, whole: float, parts: tuple[float, float, float] | None
) -> ModelRow:
    return ModelRow(
        *(name, mode, variant, "cuda", "bfloat16", "NHWC", "32x3x224x224"),
        *(whole, whole * 0.99, whole * 1.01, 0.008, 40),
        *(parts or (None, None, None)),
        batch_norms=0 if variant == "folded" else 20,
        error=2e-3,
    )
