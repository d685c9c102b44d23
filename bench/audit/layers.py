"""The layers of networks through the planner of every known GPU, and proof of what it says.

For every distinct batch norm: the algorithm of each GPU, the bytes by its model and through DRAM
over the fewest, and its launches. What the models say is counted in the interpreter on a small twin
of the layer; the kernels are compiled for each GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Group

from bench.audit.compile import GPUS, CompileCase, same_code
from bench.audit.traffic import TrafficRow, count
from bench.call import DIRECTIONS, Call, Direction
from bench.layers import NETWORKS, RESNET50, Layer, distinct, twin
from bench.processes import Progress
from bench.report.terminal import new_table, titled
from tritonnorm.device import KNOWN, Device
from tritonnorm.kernels import BY_NAME
from tritonnorm.plan import Plan, choose
from tritonnorm.problem import minimum_bytes

__all__ = ["LAUNCHES", "LayerRow", "count_twins", "layer_cases", "layer_rows", "layer_table"]

#: Network -> the batch it is planned for: one GPU's share of a usual training run.
BATCHES = {"resnet50": 64, "efficientnet_b0": 64, "densenet121": 64, "unet3d": 2}


@dataclass(frozen=True)
class LayerRow:
    """One direction of one layer in one layout.

    Attributes:
        call, direction: what is planned; bf16.
        plans: GPU -> what the formula picks.
    """

    call: Call
    direction: Direction
    plans: dict[str, Plan]

    def over_floor(self, gpu: str) -> tuple[float, float]:
        """Bytes by the model and bytes through DRAM, each over the fewest."""
        problem, plan = self.call.problem(self.direction), self.plans[gpu]
        least = minimum_bytes(problem)
        moved = plan.runs.dram_bytes(problem, plan.config, KNOWN[gpu])
        return plan.runs.model_bytes(problem, plan.config) / least, moved / least


def layer_rows(quick: bool = False) -> list[LayerRow]:
    """Every distinct layer of the networks in both layouts; ``quick``: two of ResNet-50."""
    layers = {name: NETWORKS[name] for name in BATCHES}
    if quick:
        layers = {"resnet50": (RESNET50[0], RESNET50[-1])}
    calls = dict.fromkeys(
        _call(layer, BATCHES[name], channels_last)
        for name, found in layers.items()
        for layer in distinct(found)
        for channels_last in (False, True)
    )
    return [
        LayerRow(
            *(call, direction),
            {gpu: choose(call.problem(direction), device) for gpu, device in KNOWN.items()},
        )
        for call in calls
        for direction in DIRECTIONS
    ]


def _call(layer: Layer, batch: int, channels_last: bool) -> Call:
    return Call(
        *(layer.shape(batch), channels_last),
        activation=layer.activation,
        residual=layer.residual,
    )


def _twin(call: Call, algorithm: str, direction: Direction, device: Device) -> Call | None:
    """The smallest twin that the algorithm supports; None if a small one will not do."""
    for batch in (3, 9, 27):
        small = replace(call, shape=twin(call.shape, batch))
        if all(BY_NAME[algorithm].supports(small.problem(d), device) is None for d in DIRECTIONS):
            return small
    return None


def count_twins(progress: Progress, rows: Sequence[LayerRow]) -> list[TrafficRow]:
    """Run a twin of every layer by every algorithm that some GPU picks for it, and count.

    A twin is tiled as the H200 tiles it. Layers with the same twin are counted once.
    """
    h200 = KNOWN["h200"]
    todo: dict[tuple[Call, str], None] = {}
    for row in rows:
        for algorithm in dict.fromkeys(plan.algorithm for plan in row.plans.values()):
            small = _twin(row.call, algorithm, row.direction, h200)
            if small is not None:
                todo[small, algorithm] = None
    found = []
    for i, (call, algorithm) in enumerate(todo):
        progress(i, len(todo), f"{algorithm} {call.op} {call.size} {call.layout}")
        found += count(call, algorithm, h200)
    progress(len(todo), len(todo))
    return found


def layer_cases(
    rows: Sequence[LayerRow], targets: Sequence[str] = tuple(GPUS)
) -> list[CompileCase]:
    """One case for each piece of code that some layer needs on the GPU of a target."""
    seen, found = set(), []
    for row in rows:
        problem = row.call.problem(row.direction)
        for target in targets:
            plan = row.plans[GPUS[target]]
            chunks = plan.config.chunks(problem) if plan.algorithm == "resident" else 0
            key = (
                *(plan.algorithm, same_code(plan.config), chunks, target, row.direction),
                *(row.call.op, row.call.layout, problem.vector),
            )
            if key not in seen:
                seen.add(key)
                case = CompileCase(row.call, plan.algorithm, target, every_config=False)
                found.append(replace(case, directions=(row.direction,)))
    return found


LAUNCHES = {"resident": 1, "persistent": 1, "split": 3}  # of a training step, each way


def layer_table(rows: Sequence[LayerRow]) -> Group:
    """A row per layer, layout and direction; a cell per GPU: algorithm, DRAM over the fewest."""
    table = new_table(("operation", "input", "direction"), ("fewest MB", "launches", *KNOWN))
    for row in rows:
        launches = {LAUNCHES[plan.algorithm] for plan in row.plans.values()}
        least = minimum_bytes(row.call.problem(row.direction))
        cells = []
        for gpu, plan in row.plans.items():
            model, dram = row.over_floor(gpu)
            cells.append(f"{plan.algorithm} {model:.2f} {dram:.2f}")
        table.add_row(
            *(row.call.op, f"{row.call.size} {row.call.layout}", row.direction),
            *(f"{least / 1e6:,.1f}", "/".join(map(str, sorted(launches))), *cells),
        )
    title = "Layers, bf16: algorithm, bytes by its model and through DRAM over the fewest, per GPU"
    return titled(title, table)
