"""Which operations a run measures: a case is a call and a mode, a suite a list of cases."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.call import Call
from bench.layers import NETWORKS, Layer
from bench.norm_call import NormCall, NormTensors
from bench.norm_suite import NORM_MODES, norm_calls
from tritonnorm.activation import ACTIVATIONS
from tritonnorm.plan import fewest_bytes

__all__ = ["DTYPES", "LAYOUTS", "MODES", "OWN", "SUITES", "Case", "cases"]

MODES = ("forward", "backward", "forward+backward", "inference")
LAYOUTS = ("NHWC", "NCHW")
DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
NORMS = "norms"  # the suite of `bench.norm_suite`
OWN = "own"  # in place of an operation: the one that the layer has in its network


@dataclass(frozen=True)
class Case:
    """One thing to measure. ``inference`` takes the running statistics and asks for no gradient."""

    call: Call | NormCall
    mode: str

    def bytes_past(self, cache: int) -> int:
        """The fewest bytes it moves through DRAM (`fewest_bytes`), past a cache of so many.

        What the forward leaves in the cache the backward need not read again.
        """
        forward = fewest_bytes(self.call.problem("forward"))
        if self.mode in ("forward", "inference"):
            return forward
        problem = self.call.problem("backward")
        backward = fewest_bytes(problem)
        if self.mode == "backward":
            return backward
        others = 1 + problem.needs_dx + problem.needs_dresidual  # dy, and what it writes
        return forward + backward - min(backward - others * problem.bytes, cache)

    def tensors(self, device: str | torch.device, generator: torch.Generator) -> Any:
        """Its tensors. A model in 16 bits has the parameters of its other norms in 16 bits."""
        made = self.call.tensors(device, generator)
        return made.in_one_dtype() if isinstance(made, NormTensors) else made

    @property
    def footprint(self) -> int:
        """Bytes of the tensors that a call reads or writes, each once."""
        return self.bytes_past(1 << 60)

    def __str__(self) -> str:
        c = self.call
        return f"{c.op} {self.mode} {c.size} {c.layout} {c.type}"


@dataclass(frozen=True)
class Suite:
    """Layers of networks at a batch size, and the modes that matter there."""

    networks: tuple[str, ...]
    batches: tuple[int, ...]
    modes: tuple[str, ...] = MODES
    layouts: tuple[str, ...] = LAYOUTS
    keep: Callable[[Layer], bool] = lambda layer: True

    def layers(self) -> Iterator[tuple[Layer, int]]:
        """Every layer with every batch size."""
        for network in self.networks:
            for batch in self.batches:
                yield from ((layer, batch) for layer in NETWORKS[network] if self.keep(layer))


# Large, middle and small planes, with and without a residual: one layer for each way a batch norm
# can be computed.
_REPRESENTATIVE = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))

SUITES: dict[str, Suite] = {
    "quick": Suite(
        *(("resnet50",), (64,), ("forward+backward", "inference"), ("NHWC",)),
        keep=lambda layer: (layer.channels, layer.plane[0]) in _REPRESENTATIVE,
    ),
    "resnet50": Suite(("resnet50",), (32, 256)),
    "efficientnet_b0": Suite(("efficientnet_b0",), (128,)),
    "densenet121": Suite(("densenet121",), (64,)),
    "unet3d": Suite(("unet3d",), (2,)),
    "mobilenet_v3": Suite(("mobilenet_v3",), (128,)),
    "sequence": Suite(("sequence",), (32, 256), layouts=("NCHW",)),
    "full": Suite(tuple(NETWORKS), (64,)),
}


def cases(
    suite: str,
    ops: Sequence[str] = (OWN,),
    dtypes: Sequence[str] = ("bf16",),
    layouts: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
) -> list[Case]:
    """The cases of a suite, each once, in the order of its layers.

    Args:
        suite: a key of `SUITES`, or ``norms`` for the other norms with what follows them.
        ops: ``own`` for what follows the layer in its network, or ``BN``, ``BN+relu``,
            ``BN+add+silu``, ... for all of its layers.
        dtypes: keys of `DTYPES`.
        layouts, modes, batches: in place of those of the suite. Inputs of fewer than four
            dimensions have one memory order; they are taken once.

    Raises:
        ValueError: a name is unknown, or a batch is not positive.
    """
    _known("suite", [suite], (*SUITES, NORMS))
    _known("dtype", dtypes, DTYPES)
    if suite == NORMS:
        return _norms(ops, dtypes, layouts, modes, batches)
    chosen = SUITES[suite]
    layouts, modes = layouts or chosen.layouts, modes or chosen.modes
    _known("layout", layouts, LAYOUTS)
    _known("mode", modes, MODES)
    if batches:
        if min(batches) < 1:
            raise ValueError(f"batch: expected positive numbers, got {min(batches)}")
        chosen = replace(chosen, batches=tuple(batches))
    epilogues = [_epilogue(op) for op in ops]
    found: dict[Case, None] = {}
    for layer, batch in chosen.layers():
        shape = layer.shape(batch)
        for activation, residual in (
            epilogue or (layer.activation, layer.residual) for epilogue in epilogues
        ):
            for layout in layouts if len(shape) > 3 else ("NCHW",):
                for dtype in dtypes:
                    call = Call(shape, layout == "NHWC", DTYPES[dtype], activation, residual)
                    for mode in modes:
                        training = mode != "inference"
                        needs = call.needs if training else ""
                        found[Case(replace(call, training=training, needs=needs), mode)] = None
    return list(found)


def _norms(
    ops: Sequence[str],
    dtypes: Sequence[str],
    layouts: Sequence[str] | None,
    modes: Sequence[str] | None,
    batches: Sequence[int] | None,
) -> list[Case]:
    """The cases of the suite ``norms``."""
    if list(ops) != [OWN]:
        raise ValueError(f"ops: expected {OWN} with the suite {NORMS}; got {', '.join(ops)}")
    _known("layout", layouts or (), LAYOUTS)
    _known("mode", modes or (), NORM_MODES)
    calls = norm_calls([DTYPES[name] for name in dtypes], layouts, batches)
    return [Case(call, mode) for call in calls for mode in modes or NORM_MODES]


def _epilogue(op: str) -> tuple[str | None, bool] | None:
    """Activation and residual of ``BN+add+relu``; None for `OWN`."""
    if op.lower() == OWN:
        return None
    first, *rest = op.split("+")
    residual = rest[:1] == ["add"]
    rest = rest[residual:]
    if first.upper() != "BN" or len(rest) > 1 or (rest and rest[0] not in ACTIVATIONS):
        raise ValueError(
            f"ops: expected {OWN}, BN, BN+add, BN+ACTIVATION or BN+add+ACTIVATION with one of "
            f"{', '.join(ACTIVATIONS)}; got {op!r}"
        )
    return (rest[0] if rest else None), residual


def _known(what: str, names: Sequence[str], of: Collection[str]) -> None:
    for name in names:
        if name not in of:
            raise ValueError(f"{what}: expected one of {', '.join(of)}; got {name!r}")
