"""The rows of a results file. Every field is a plain value; None is what could not be known."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "FLAGS",
    "NOISY",
    "TABLES",
    "CounterRow",
    "FoldRow",
    "HostRow",
    "ModelRow",
    "OpRow",
    "RoofRow",
    "Row",
    "SkippedRow",
]

NOISY = 0.02  # standard deviation over mean, from which a row is flagged

#: Letter -> what it says of a row.
FLAGS: dict[str, str] = {
    "T": "throttled: the driver lowered the clocks while it ran",
    "N": f"noisy: the samples' standard deviation is over {NOISY:.0%} of their mean",
    "C": "fits in cache: the tensors of all runs together are under 4x the last-level cache",
    "H": "host-bound: an eager call keeps the host longer than the GPU",
    "?": "peak unknown: the driver does not tell memory clock and bus width",
}


@dataclass(frozen=True)
class OpRow:
    """One operation by one provider.

    Attributes:
        op: ``BN``, ``BN+relu``, ``BN+add+relu``, ...
        mode: one of `bench.suites.MODES`: forward, backward, forward+backward, inference.
        layout: NHWC (channels last) or NCHW, whatever the rank.
        dtype: of the activations, as ``bfloat16``.
        shape: of the input, as ``32x64x56x56``.
        provider: who computed it.
        cache: "cold" (buffers rotate, in sum 4x the last-level cache or more) or "warm" (one set).
        p50_us, p20_us, p80_us: median and quantiles of the samples, microseconds a call.
        noise: standard deviation of the samples over their mean.
        samples: how many.
        bytes: the fewest bytes of the operation, `Case.bytes_past` the cache, whoever runs it.
        gb_s: bytes over p50, in 1e9 bytes a second.
        peak_percent: of the theoretical bandwidth.
        copy_percent: of the bandwidth of a plain copy in the same run.
        host_us: host time of one eager call.
        peak_mb: device memory a call adds at its highest, in 1e6 bytes.
        x_eager, x_compile: how many times faster than these providers.
        flags: letters of `FLAGS`.
        plan: what the provider chose, and who decided: ``resident 64x64 4w (formula)``.
        error: against float64, checked before timing; see `bench.check`.
        sm_mhz: clock of the multiprocessors while it ran.
    """

    op: str
    mode: str
    layout: str
    dtype: str
    shape: str
    provider: str
    cache: str
    p50_us: float
    p20_us: float
    p80_us: float
    noise: float
    samples: int
    bytes: int
    gb_s: float
    peak_percent: float | None
    copy_percent: float | None
    host_us: float | None
    peak_mb: float | None
    x_eager: float | None
    x_compile: float | None
    flags: str
    plan: str
    error: float
    sm_mhz: float | None = None


@dataclass(frozen=True)
class FoldRow:
    """The weights of a whole model folded by one provider, as `tritonnorm.freeze` does every step.

    Attributes:
        model: whose pairs of a layer and a batch norm.
        mode: forward, backward or forward+backward.
        layout: memory order of the weights, NHWC (channels last) or NCHW.
        dtype: of the weights.
        pairs: how many.
        provider: who folds.
        bytes: the fewest bytes of the operation, `tritonnorm.folding.minimum_bytes`.
        p50_us, p20_us, p80_us, noise, samples, gb_s, peak_percent, copy_percent, host_us, x_eager,
            x_compile, flags, error: as in `OpRow`.
    """

    model: str
    mode: str
    layout: str
    dtype: str
    pairs: int
    provider: str
    p50_us: float
    p20_us: float
    p80_us: float
    noise: float
    samples: int
    bytes: int
    gb_s: float
    peak_percent: float | None
    copy_percent: float | None
    host_us: float | None
    x_eager: float | None
    x_compile: float | None
    flags: str
    error: float


@dataclass(frozen=True)
class CounterRow:
    """DRAM traffic of one call by the GPU's own counters; see `bench.counters`.

    Attributes:
        regime: which way of computing it stands for.
        op, layout, dtype, shape: as in `OpRow`; mode: forward or backward.
        plan: the algorithm, and who decided.
        launches: kernels of the call.
        read_bytes, written_bytes: through DRAM, by ncu.
        fewest_read, fewest: bytes that must be read, and read or written; see `minimum_bytes`.
    """

    regime: str
    op: str
    mode: str
    layout: str
    dtype: str
    shape: str
    plan: str
    launches: int
    read_bytes: int
    written_bytes: int
    fewest_read: int
    fewest: int


@dataclass(frozen=True)
class RoofRow:
    """A bandwidth to compare with.

    Attributes:
        kind: "theoretical" (memory clock and bus width, or the data sheet), or what was measured:
            "copy" (reads and writes) or "read" (a sum).
        bytes: moved by one run; 0 for the theoretical one.
        gb_s: 1e9 bytes a second; p20 and p80 are quantiles of it over the samples.
    """

    kind: str
    bytes: int
    gb_s: float
    p20_gb_s: float
    p80_gb_s: float


@dataclass(frozen=True)
class ModelRow:
    """A whole model, one variant of it.

    Attributes:
        model: its name.
        mode: "training step" or "inference".
        variant: "eager", "replace", "compile", "compile+replace", "replace+graph", "folded", ...
        device: "cpu" or "cuda".
        dtype, layout, shape: of the input.
        p50_ms, p20_ms, p80_ms: milliseconds a step (a call).
        noise, samples: as in `OpRow`.
        forward_ms, backward_ms, optimizer_ms: medians of the parts of a training step.
        batch_norms: how many run in the variant: ours, or PyTorch's.
        error: against the variant "eager" in float64, checked before timing.
        flags: letters of `FLAGS`.
    """

    model: str
    mode: str
    variant: str
    device: str
    dtype: str
    layout: str
    shape: str
    p50_ms: float
    p20_ms: float
    p80_ms: float
    noise: float
    samples: int
    forward_ms: float | None
    backward_ms: float | None
    optimizer_ms: float | None
    batch_norms: int
    error: float
    flags: str = ""


@dataclass(frozen=True)
class HostRow:
    """A cost of the host: import time of the package, host time of a call.

    Attributes:
        what: "import tritonnorm", "BN+relu forward", ...
        variant: "tritonnorm", "torch", ...
        p50_us, p20_us, p80_us: microseconds.
        samples: how many.
    """

    what: str
    variant: str
    p50_us: float
    p20_us: float
    p80_us: float
    samples: int


@dataclass(frozen=True)
class SkippedRow:
    """What was asked for and not measured: a provider altogether (``case`` empty), or one case."""

    provider: str
    case: str
    reason: str


Row = OpRow | FoldRow | CounterRow | RoofRow | ModelRow | HostRow | SkippedRow

#: Table of a results file -> the class of its rows.
TABLES: dict[str, type[Row]] = {
    "ops": OpRow,
    "folds": FoldRow,
    "counters": CounterRow,
    "roofs": RoofRow,
    "models": ModelRow,
    "host": HostRow,
    "skipped": SkippedRow,
}
