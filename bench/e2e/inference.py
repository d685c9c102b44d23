"""Inference of a real model as it is and folded: equal first, then latency, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.e2e.check import EXACT, ROUNDING
from bench.e2e.clocks import EventClock
from bench.e2e.forms import Form, Subject, parts_of
from bench.e2e.rows import in_words, measured, skipped
from bench.launches import Launches
from bench.processes import Progress, silent
from bench.record.rows import ModelRow, SkippedRow
from tritonnorm.timing import Clock, HostClock, Timing, interleaved

__all__ = ["CPU_VARIANTS", "GPU_VARIANTS", "FoldResult", "Variant", "compare", "run"]

MODE = "inference"
DTYPES = ("float32", "bfloat16", "float16")
CPU_VARIANTS = ("eager", "folded", "compile", "compile+folded")
GPU_VARIANTS = (*CPU_VARIANTS, "eager+graph", "folded+graph")


@dataclass(frozen=True)
class Variant:
    """One form of the model.

    Attributes:
        batch_norms: how many are left in it.
        error: of its logits in float64, relative to the original's largest; None for a form that
            exists only in the dtype that is timed (compiled, or in a CUDA graph).
        rounding: the same of the form that is timed, in its dtype, against the original in float64.
        timing: seconds of a forward.
    """

    batch_norms: int
    error: float | None
    rounding: float
    timing: Timing


@dataclass(frozen=True)
class FoldResult:
    """A model before and after `fold`, and what else it was compared with.

    Attributes:
        model, pixels: name of the model, and the shape of the input that was timed.
        device, dtype, layout: where and in what it was timed.
        report: the report of `fold` as text.
        variants: name -> what was found; "eager", the original, and "folded" are always there.
        skipped: name -> why it was not measured.
        threads: threads of PyTorch on a CPU, 0 on a GPU.
        launches: what computed the batch norms while the original was checked.
    """

    model: str
    pixels: tuple[int, ...]
    device: str
    dtype: str
    layout: str
    report: str
    variants: dict[str, Variant]
    skipped: dict[str, str]
    threads: int
    launches: Launches

    @property
    def before(self) -> int:
        """Batch norms of the original."""
        return self.variants["eager"].batch_norms

    @property
    def after(self) -> int:
        """Batch norms of the folded model."""
        return self.variants["folded"].batch_norms

    @property
    def error(self) -> float:
        """Largest difference of the folded model's logits in float64, relative to the largest."""
        return self.variants["folded"].error or 0.0

    @property
    def error32(self) -> float:
        """The same of the folded model in the dtype that was timed."""
        return self.variants["folded"].rounding

    @property
    def original(self) -> Timing:
        """Seconds of a forward of the original."""
        return self.variants["eager"].timing

    @property
    def folded(self) -> Timing:
        """Seconds of a forward of the folded model."""
        return self.variants["folded"].timing

    @property
    def speedup(self) -> float:
        """Latency before over latency after."""
        return self.original.median / self.folded.median

    @property
    def apart(self) -> bool:
        """Whether the spans from the 20th to the 80th percentile do not overlap."""
        return self.original.p20 > self.folded.p80 or self.folded.p20 > self.original.p80

    def rows(self) -> list[ModelRow | SkippedRow]:
        """The rows for a results file."""
        form = (self.device, self.dtype, self.layout, self.pixels)
        rows: list[ModelRow | SkippedRow] = []
        for name, v in self.variants.items():
            error = v.rounding if v.error is None else v.error
            rows.append(measured(self.model, MODE, name, *form, v.timing, v.batch_norms, error))
        return rows + [skipped(self.model, MODE, *each) for each in self.skipped.items()]


def run(
    progress: Progress = silent,
    model: str = "resnet-50",
    device: str = "cuda",
    batch: int = 32,
    size: int = 224,
    dtype: str = "bfloat16",
    variants: Sequence[str] | None = None,
    budget: float = 30.0,
    clock: Clock | None = None,
    backend: str = "inductor",
) -> list[ModelRow | SkippedRow]:
    """The rows of `compare`, channels last on a GPU.

    Args:
        variants: by default `GPU_VARIANTS` or `CPU_VARIANTS`.
        progress, model, device, batch, size, dtype, budget, clock, backend: as in `compare`.
    """
    on_cpu = device == "cpu"
    variants = variants or (CPU_VARIANTS if on_cpu else GPU_VARIANTS)
    found = compare(
        *(progress, model, variants, device, batch, size, dtype),
        channels_last=not on_cpu,
        rounds=51,
        budget=budget,
        clock=clock,
        backend=backend,
    )
    return found.rows()


def compare(
    progress: Progress = silent,
    model: str = "resnet-50",
    variants: Sequence[str] = ("eager", "folded"),
    device: str = "cpu",
    batch: int = 1,
    size: int = 224,
    dtype: str = "float32",
    channels_last: bool = False,
    rounds: int = 21,
    budget: float = 15.0,
    clock: Clock | None = None,
    backend: str = "inductor",
) -> FoldResult:
    """Check every variant against the original in float64, then time those that run.

    Args:
        progress: told after each step.
        model: a name of `bench.models.MODELS`.
        variants: names made of `bench.e2e.forms.EDITS` and ``RUNNERS``; "eager" first, and
            "folded" among them.
        device: "cpu" or "cuda".
        batch, size: of the input ``[batch, 3, size, size]``, which is random.
        dtype, channels_last: of the model and the input that are timed; the dtype is one of
            `DTYPES`. The model is folded in float32 and cast afterwards.
        rounds: how often each variant runs, in turn and in random order; fewer if that takes
            longer than ``budget`` seconds.
        clock: by default the host's on a CPU and `EventClock` on a GPU.
        backend: of `torch.compile`.

    Raises:
        ValueError: a name or the dtype is unknown, or "eager" or "folded" is not where it must be.
        RuntimeError: the folded model computes something else than the original; nothing is timed
            then. A compiler's failure, or a wrong result of its own, only skips its variant.
    """
    if variants[0] != "eager" or "folded" not in variants:
        raise ValueError(f"variants: expected eager first and folded among them, got {variants}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}; got {dtype!r}")
    for name in variants:
        parts_of(name)
    torch.compiler.reset()  # beyond a number of compiled forms, more would silently run eagerly
    total = len(variants) + rounds + 1
    progress(0, total, f"building {model}")
    subject = Subject.of(model, device, (batch, 3, size, size), dtype, channels_last)
    forms: dict[str, Form] = {}
    left_out: dict[str, str] = {}
    for i, name in enumerate(variants):
        progress(i + 1, total, f"checking {name}")
        try:
            form = Form.of(name, subject, backend)
            _check(name, form, forms.get("eager", form).rounding)
        except Exception as error:
            if name in ("eager", "folded"):
                raise
            left_out[name] = in_words(error)
        else:
            forms[name] = form
    timings = interleaved(
        {name: [form.forward] for name, form in forms.items()},
        clock or (HostClock() if device == "cpu" else EventClock()),
        rounds,
        progress=lambda done, of: progress(len(variants) + 1 + done, total, "timing in turn"),
        budget=budget,
    )
    progress(total, total)
    return FoldResult(
        *(model, tuple(subject.pixels.shape), device, dtype, "NHWC" if channels_last else "NCHW"),
        report=forms["folded"].report,
        variants={
            name: Variant(form.batch_norms, form.error, form.rounding, timings[name])
            for name, form in forms.items()
        },
        skipped=left_out,
        threads=torch.get_num_threads() if device == "cpu" else 0,
        launches=subject.launches,
    )


def _check(name: str, form: Form, original: float) -> None:
    """Refuse a form that is wrong; ``original`` is the original's rounding in the same dtype."""
    for error, limit, kind in (
        (form.error or 0.0, EXACT, "in float64"),
        (form.rounding, ROUNDING * original, "in the dtype that is timed"),
    ):
        if not error <= limit:
            raise RuntimeError(f"{name}: error {error:.1e} {kind}, expected at most {limit:.1e}")
