"""Folding the weights of a whole model, forward and backward: three ways, right first, then timed.

It is what `tritonnorm.freeze` does in every step. The operation is w' = s*w and
b' = s*(b - mean) + beta for all pairs of a layer and a batch norm that the model has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import tritonnorm
from bench.check import WrongResult, tolerance
from bench.machine import Machine
from bench.models import build
from bench.processes import one_line
from bench.record.rows import NOISY, FoldRow, SkippedRow
from bench.runner import DEFAULTS, MOST_SETS, ROTATION, Options
from tritonnorm import fold_ops, folding
from tritonnorm.folding import Folded, Source
from tritonnorm.timing import Quiet, Timing, in_turn

__all__ = ["MODELS", "MODES", "PROVIDERS", "FoldCase", "FoldRun", "measure"]

MODELS = ("resnet-50", "mobilenet-v2", "densenet-121")
MODES = ("forward", "backward", "forward+backward")
Fold = Callable[[Sequence[Source]], Sequence[Folded]]


@dataclass(frozen=True)
class FoldCase:
    """What is folded.

    Attributes:
        model: a name of `bench.models.build`.
        mode: one of `MODES`.
        dtype: of weights and biases of the layers; all else is float32 (float64 for float64).
        channels_last: memory order of the weights.
        pairs: shape of the weight, groups (see `Source`), and whether the layer has a bias.
    """

    model: str
    mode: str
    dtype: torch.dtype
    channels_last: bool
    pairs: tuple[tuple[tuple[int, ...], int, bool], ...] = field(repr=False)

    @classmethod
    def of(cls, model: str, mode: str, dtype: torch.dtype, channels_last: bool) -> FoldCase:
        """The pairs that `tritonnorm.freeze` finds in a model."""
        net = build(model)
        _, report = tritonnorm.freeze(net, torch.zeros(2, 3, 64, 64), dry_run=True)
        modules = dict(net.named_modules())
        pairs = []
        for row in report.rows:
            if row.partner:
                layer: nn.Module = modules[row.partner]
                source = Source.of(layer, modules[row.name])
                pairs.append((tuple(source.weight.shape), source.groups, source.bias is not None))
        if not pairs:
            raise ValueError(f"model: expected one with a layer before a batch norm, got {model}")
        return cls(model, mode, dtype, channels_last, tuple(pairs))

    @property
    def layout(self) -> str:
        return "NHWC" if self.channels_last else "NCHW"

    @property
    def bytes(self) -> int:
        """The fewest bytes that it moves (`tritonnorm.folding.minimum_bytes`)."""
        sources = self.sources("meta", None)
        forward = folding.minimum_bytes(sources)
        backward = folding.minimum_bytes(sources, backward=True)
        return {"forward": forward, "backward": backward}.get(self.mode, forward + backward)

    @property
    def footprint(self) -> int:
        """Bytes of the weights, the folded ones and their gradients."""
        return 4 * sum(math.prod(shape) for shape, _, _ in self.pairs) * self.dtype.itemsize

    def sources(
        self, device: str | torch.device, generator: torch.Generator | None
    ) -> list[Source]:
        """Its tensors: random, or without a generator whatever the memory holds."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32

        def vector(c: int, low: float, high: float, dtype: torch.dtype = wide) -> Tensor:
            t = torch.empty(c, dtype=dtype, device=device)
            return t if generator is None else t.uniform_(low, high, generator=generator)

        found = []
        for shape, groups, bias in self.pairs:
            c = shape[1] * groups if groups else shape[0]
            last = self.channels_last and len(shape) == 4
            order = torch.channels_last if last else torch.contiguous_format
            w = torch.empty(shape, dtype=self.dtype, device=device, memory_format=order)
            if generator is not None:
                w.normal_(generator=generator)
            trained = (
                w,
                vector(c, -1.0, 1.0, self.dtype) if bias else None,
                vector(c, 0.5, 1.5),
                vector(c, -1.0, 1.0),
            )
            for t in trained:
                if t is not None:
                    t.requires_grad_()
            _, b, gamma, beta = trained
            mean, var = vector(c, -1.0, 1.0), vector(c, 0.5, 1.5)
            found.append(Source(w, b, mean, var, gamma, beta, 1e-5, groups))
        return found

    def __str__(self) -> str:
        return f"fold {self.mode} {self.model} {self.layout} {_name(self.dtype)}"


class _Ours:
    name = "tritonnorm"

    def setup(self, case: FoldCase) -> Fold:
        return fold_ops.fold


class _Eager:
    name = "eager"

    def setup(self, case: FoldCase) -> Fold:
        return folding.differentiable


class _Compile:
    name = "compile"

    def setup(self, case: FoldCase) -> Fold:
        from torch._functorch import config

        # A backward that is called again and again may give none of its saved tensors away.
        config.donated_buffer = case.mode != "backward"
        torch._dynamo.reset()  # or the eighth case would silently run eagerly
        compiled = torch.compile(_folded, fullgraph=True, dynamic=False)

        def fold(sources: Sequence[Source]) -> Sequence[Folded]:
            columns = list(zip(*sources, strict=True))
            flat = compiled([list(c) for c in columns[:6]], *columns[6:])
            return [Folded(*pair) for pair in flat]

        return fold


#: Who folds: this library in one launch, the plain expression of PyTorch, and that compiled.
PROVIDERS = {provider.name: provider for provider in (_Ours(), _Eager(), _Compile())}


def _folded(
    tensors: list[list[Tensor | None]], eps: Sequence[float], groups: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    rows = zip(*tensors, eps, groups, strict=True)
    return [tuple(f) for f in folding.differentiable([Source(*row) for row in rows])]  # type: ignore[misc]


@dataclass(frozen=True)
class FoldRun:
    """One call of one provider on one set of tensors: what a clock measures."""

    name: str
    case: FoldCase
    fold: Fold
    sources: list[Source]
    grads: list[Tensor]
    kept: list[Tensor] = field(default_factory=list)  # the results that a backward starts at

    @property
    def inputs(self) -> list[Tensor]:
        """What a gradient is asked for."""
        return [t for s in self.sources for t in s.tensors if t is not None and t.requires_grad]

    def forward(self) -> list[Tensor]:
        """All w' and b', pair after pair."""
        return [t for folded in self.fold(self.sources) for t in folded]

    def __call__(self) -> object:
        if self.case.mode == "forward":
            return self.forward()
        if self.case.mode == "forward+backward":
            results = self.forward()  # kept with the gradients: all outputs take turns in memory
            return results, torch.autograd.grad(results, self.inputs, self.grads)
        if not self.kept:  # on the stream of whoever calls first: the one that is captured
            self.kept.extend(self.forward())
        return torch.autograd.grad(self.kept, self.inputs, self.grads, retain_graph=True)


def check(run: FoldRun) -> float:
    """The largest relative error of results and gradients, tensor by tensor, against float64.

    Raises:
        WrongResult: one of them is beyond `bench.check.tolerance`, or of another shape or dtype.
    """
    exact = [_double(s) for s in run.sources]
    right = FoldRun("exact", run.case, lambda s: [folding.fold(x) for x in s], exact, [])
    mine, theirs = run.forward(), right.forward()
    if "backward" in run.case.mode:
        gradients = torch.autograd.grad(mine, run.inputs, run.grads)
        grads = [g.double() for g in run.grads]
        mine, theirs = (
            [*mine, *gradients],
            [*theirs, *torch.autograd.grad(theirs, right.inputs, grads)],
        )
    worst = 0.0
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if a.shape != b.shape or (i < len(run.grads) and a.dtype != run.case.dtype):
            raise WrongResult(f"result {i} is {a.dtype} of shape {tuple(a.shape)}")
        error = ((a.double() - b).abs().max() / b.abs().max()).item()
        limit = tolerance(run.case.dtype)
        if not error <= limit:
            raise WrongResult(f"wrong result {i}: error {error:.1e}, more than {limit:.1e}")
        worst = max(worst, error)
    return worst


def _double(source: Source) -> Source:
    """The same values in float64, as leaves of their own."""

    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

    values: list[Any] = [*map(wide, source.tensors), source.eps, source.groups]
    return Source(*values)


def measure(
    case: FoldCase,
    machine: Machine,
    roofs: tuple[float | None, float | None] = (None, None),
    options: Options = DEFAULTS,
    providers: Sequence[str] = tuple(PROVIDERS),
) -> tuple[list[FoldRow], list[SkippedRow]]:
    """Check and time a case; arguments as `bench.runner.measure` takes them.

    Returns:
        A row per provider that was right, and for the others why they are not there.
    """
    sets = list(_sets(case, machine, options))
    skipped: list[SkippedRow] = []
    errors: dict[str, float] = {}
    runs: dict[str, FoldRun] = {}
    measures: dict[str, Callable[[], float]] = {}
    for name in providers:
        try:
            fold = PROVIDERS[name].setup(case)
            turns = [FoldRun(name, case, fold, sources, grads) for sources, grads in sets]
            errors[name] = check(turns[0])
            measures[name] = machine.clock.prepare(turns)
            runs[name] = turns[0]
        except Exception as error:  # the others are measured
            skipped.append(SkippedRow(name, str(case), one_line(error, most=200)))
    if not runs:
        return [], skipped
    machine.throttled()  # what happened before does not count
    timings = in_turn(
        measures,
        options.rounds,
        options.seed,
        budget=options.seconds * len(runs),
        quiet=Quiet(),
        accept=machine.accept,
    )
    throttled = machine.throttled()
    fits = len(sets) * case.footprint < ROTATION * machine.facts.l2_bytes
    rows = []
    for name, timing in timings.items():
        host = machine.host_seconds(runs[name]) if options.host else None
        row = _row(case, name, timing, timings, roofs, errors[name], host)
        earned = {
            "T": throttled,
            "N": timing.noise > NOISY,
            "C": fits,
            "H": host is not None and host > timing.median,
            "?": roofs[0] is None,
        }
        flags = "".join(letter for letter, is_so in earned.items() if is_so)
        rows.append(replace(row, flags=flags))
    return rows, skipped


def _sets(
    case: FoldCase, machine: Machine, options: Options
) -> Iterator[tuple[list[Source], list[Tensor]]]:
    """Tensors that take turns, and the gradients of the results."""
    wanted = math.ceil(ROTATION * machine.facts.l2_bytes / case.footprint)
    generator = torch.Generator(machine.device).manual_seed(options.seed)
    for _ in range(1 if options.warm else max(1, min(wanted, MOST_SETS))):
        sources = case.sources(machine.device, generator)
        grads = []
        for s in sources:
            grads.append(torch.empty_like(s.weight).normal_(generator=generator).detach())
            like = s.mean.to(case.dtype)
            grads.append(torch.empty_like(like).normal_(generator=generator))
        yield sources, grads


def _row(
    case: FoldCase,
    name: str,
    timing: Timing,
    timings: dict[str, Timing],
    roofs: tuple[float | None, float | None],
    error: float,
    host: float | None,
) -> FoldRow:
    gb_s = case.bytes / timing.median * 1e-9
    of_peak, of_copy = (None if roof is None else 100.0 * gb_s / roof for roof in roofs)
    times = {
        of: timings[of].median / timing.median if of in timings else None
        for of in ("eager", "compile")
    }
    return FoldRow(
        *(case.model, case.mode, case.layout, _name(case.dtype), len(case.pairs), name),
        p50_us=timing.median * 1e6,
        p20_us=timing.p20 * 1e6,
        p80_us=timing.p80 * 1e6,
        noise=timing.noise,
        samples=timing.rounds,
        bytes=case.bytes,
        gb_s=gb_s,
        peak_percent=of_peak,
        copy_percent=of_copy,
        host_us=None if host is None else host * 1e6,
        x_eager=times["eager"],
        x_compile=times["compile"],
        flags="",
        error=error,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
