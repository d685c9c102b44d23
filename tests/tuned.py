"""Tuned results that are made up, for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tritonnorm.device import KNOWN, Device
from tritonnorm.kernels import algorithms_for
from tritonnorm.kernels.base import Config
from tritonnorm.norms.problem import GroupProblem
from tritonnorm.norms.problem import described as group_described
from tritonnorm.problem import FoldProblem, Problem, View
from tritonnorm.tune.key import Key, Shape
from tritonnorm.tune.revisions import REVISIONS
from tritonnorm.tune.store import Entry

H200 = KNOWN["h200"]
FOLD = FoldProblem(torch.bfloat16, torch.float32, torch.float32, 53, 26560, 23_454_912, False)


def problem(n: int = 32, c: int = 256, p: int = 196, **options: Any) -> Problem:
    settings = {"direction": "forward", "batch_statistics": True, "dtype": torch.bfloat16}
    view = View(1, c, n * p, True) if options.pop("channels_last", False) else View(n, c, p, False)
    return Problem(view=view, **{**settings, **options})


def group(*sizes: int, groups: int = 32, channels_last: bool = False, **options: Any) -> Any:
    """The problem of a group norm of ``[N, C, ...]``, or of rows ``[rows, C]`` of a layer norm."""
    x = torch.empty(sizes, device="meta")
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    found: GroupProblem = group_described(
        *("forward", sizes, x.stride(), torch.bfloat16, groups if len(sizes) > 2 else 1),
        *(True, "none", False),
    )[0]
    return replace(found, **options)


def entry(
    of: Shape | None = None,
    algorithm: str = "split",
    config: Config | None = None,
    device: Device = H200,
    **options: Any,
) -> Entry:
    """An entry; by default the last candidate of the algorithm, which no formula takes."""
    of = of or problem()
    config = config or last(of, algorithm, device)
    settings = {"revision": REVISIONS[algorithm], "us": 10.0, "formula_us": 12.0, **options}
    return Entry(device.identity, Key.of(of), algorithm, vars(config), **settings)


def last(of: Shape, algorithm: str, device: Device = H200) -> Config:
    """The last candidate of an algorithm."""
    chosen = next(a for a in algorithms_for(of) if a.name == algorithm)
    found: Config = chosen.configs(of, device)[-1]
    return found
