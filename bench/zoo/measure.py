"""What fold does to one model: batch norm calls before and after, the error, the time."""

from __future__ import annotations

import gc
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tritonnorm
from bench.zoo.families import Entry

__all__ = ["TOOLS", "Result", "measure"]


def _fx(model: nn.Module, inputs: Any) -> tuple[nn.Module, None]:
    """PyTorch's own folding, which needs no inputs and gives no report."""
    from torch.fx.experimental.optimization import fuse

    return fuse(model), None


def _torchao(model: nn.Module, inputs: Any) -> tuple[nn.Module, None]:
    """What torchao does to an exported program before it quantises it."""
    from torchao.quantization.pt2e.utils import _fuse_conv_bn_, _fuse_linear_bn_

    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), None)
    exported: Any = torch.export.export(model, args, kwargs).module()
    _fuse_conv_bn_(exported)
    _fuse_linear_bn_(exported)
    return exported, None


def _mmcv(model: nn.Module, inputs: Any) -> tuple[nn.Module, None]:
    """MMCV's folding in place, which pairs modules in the order of their definition."""
    from mmcv.cnn import fuse_conv_bn

    return fuse_conv_bn(model), None


TOOLS: dict[str, Callable[..., tuple[nn.Module, Any]]] = {
    "tritonnorm": tritonnorm.fold,
    "torch.fx": _fx,
    "torchao": _torchao,
    "mmcv": _mmcv,
}
MAX_PARAMETERS = 100e6
LIMIT = 1e-9  # relative, float64


@dataclass
class Result:
    """What fold did to one model.

    Attributes:
        library, name: of the model.
        problem: why there are no figures: not built, not run, too large; empty otherwise.
        raised: what fold raised; empty when it did not.
        parameters: of the model, in millions.
        calls: batch norm calls in eval mode of one run, before and after.
        shifts: additions per channel that took their place, in one run.
        decisions: batch norms (modules) by decision and rule.
        reasons: batch norms that stayed, by reason.
        error: largest difference of an output in float64, relative to the largest value.
        seconds: of fold.
    """

    library: str
    name: str
    problem: str = ""
    raised: str = ""
    parameters: float = 0.0
    calls: tuple[int, int] = (0, 0)
    shifts: int = 0
    decisions: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    error: float = 0.0
    seconds: float = 0.0

    @property
    def wrong(self) -> bool:
        """Whether the folded model computes something else."""
        return not self.problem and not self.raised and not self.error <= LIMIT

    def as_json(self) -> dict[str, Any]:
        """All attributes, for a file."""
        return asdict(self)


def measure(entry: Entry, tool: str = "tritonnorm") -> Result:
    """Build one model, fold it in float64 with one of `TOOLS`, and compare."""
    before = torch.get_default_dtype()
    try:
        return _measure(entry, TOOLS[tool])
    finally:
        torch.set_default_dtype(before)


def _measure(entry: Entry, fold: Callable[..., tuple[nn.Module, Any]]) -> Result:
    result = Result(entry.library, entry.name)
    torch.manual_seed(0)
    try:
        model, inputs = entry.build()
        result.parameters = sum(p.numel() for p in model.parameters()) / 1e6
        if result.parameters > MAX_PARAMETERS / 1e6:
            result.problem = f"{result.parameters:.0f} M parameters"
            return result
        model = model.double().eval()
        torch.set_default_dtype(torch.float64)  # of the constants that a forward makes
        inputs = _doubled(inputs)
        settle(model, inputs)
        before, _, expected = _run(model, inputs)
        if not any(t.is_floating_point() and bool(t.abs().max() > 0) for t in expected):
            raise ValueError("its outputs are all zero, which proves nothing")
    except Exception as error:
        result.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        return result
    start = time.perf_counter()
    try:
        folded, report = fold(model, inputs)
        result.seconds = time.perf_counter() - start
        after, result.shifts, got = _run(folded, inputs)
    except Exception as error:
        result.raised = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        result.raised += traceback.format_exc()[-600:]
        return result
    result.calls = (before, after)
    result.error = difference(expected, got)
    if report is not None:
        result.decisions = dict(Counter(f"{r.decision}: {r.rule}" for r in report.rows))
        stays = [row.reason for row in report.rows if row.decision in ("left", "fused")]
        result.reasons = dict(Counter(stays))
    del model, folded, expected, got
    gc.collect()
    return result


def settle(model: nn.Module, inputs: Any) -> None:
    """Scales and shifts unlike a new module's, and the statistics that they lead to.

    The scales are positive, as nearly all scales of trained models are.
    """
    generator = torch.Generator().manual_seed(1)
    norms = [m for m in model.modules() if hasattr(m, "running_var")]

    def fill(tensor: Any, low: float, high: float) -> None:
        if isinstance(tensor, Tensor):
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data.copy_(values * (high - low) + low)

    for m in norms:
        fill(getattr(m, "weight", None), 0.5, 1.5)
        fill(getattr(m, "bias", None), -0.5, 0.5)
        fill(m.running_mean, -0.3, 0.3)
        fill(m.running_var, 0.5, 1.5)
    plain = [m for m in norms if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in plain]
    saved = [(b, b.clone()) for m in plain for b in m.buffers()]
    for m in plain:
        m.momentum = 0.9
        m.train()
    try:
        with torch.no_grad():
            _call(model, inputs)
    except Exception:  # one value per channel, say: the random statistics stay
        for buffer, value in saved:
            buffer.copy_(value)
    for m, momentum in zip(plain, momenta, strict=True):
        m.momentum = momentum
        m.eval()


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _doubled(item) for key, item in value.items()}
    return tuple(_doubled(item) for item in value)


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


class _Counter(TorchDispatchMode):
    """Counts the batch norm operations in eval mode."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "batch_norm" in func.__name__:
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.calls += not given.get("training", False)
        return func(*args, **(kwargs or {}))


def _run(model: nn.Module, inputs: Any) -> tuple[int, int, list[Tensor]]:
    """Batch norm calls in eval mode, frozen batch norms too; what is left of some; the outputs."""
    watched = ("FrozenBatchNorm", "ChannelShift")
    calls: Counter[str] = Counter()
    handles = [
        m.register_forward_hook(lambda *_, kind=kind: calls.update([kind]))
        for m in model.modules()
        for kind in watched
        if kind in type(m).__name__
    ]
    counter = _Counter()
    torch.manual_seed(0)
    with torch.no_grad(), counter:
        outputs = list(tensors_in(_call(model, inputs)))
    for handle in handles:
        handle.remove()
    kept = [t.clone() for t in outputs]
    return counter.calls + calls["FrozenBatchNorm"], calls["ChannelShift"], kept


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for item in vars(value).values():
            yield from tensors_in(item)


def difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """Largest error of any output, relative to its largest value."""
    worst = 0.0
    if len(expected) != len(got):
        return float("inf")
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if not a.is_floating_point() or not a.numel():
            worst = worst if torch.equal(a, b) else float("inf")
            continue
        finite = torch.isfinite(a)
        if not torch.equal(a.nan_to_num()[~finite], b.nan_to_num()[~finite]):
            return float("inf")
        error = (a - b)[finite].abs().max().item() if finite.any() else 0.0
        size = a[finite].abs().max().item() if finite.any() else 1.0
        worst = max(worst, error / size if size else (float("inf") if error else 0.0))
    return worst
