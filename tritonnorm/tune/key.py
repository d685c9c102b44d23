"""The key of a tuned result: what a problem is, in words and numbers that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from tritonnorm.problem import Activity, FoldProblem, Problem, View

__all__ = ["Key"]

_DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FLAGS = ("residual", "mask")
_NEEDS = ("dx", "dresidual", "dparams")
LARGEST = 1 << 48  # an extent beyond it is no extent of a tensor


@dataclass(frozen=True)
class Key:
    """A problem as tables know it.

    Problems of one `group` run the same code. Those of one `bucket` are also of about the same
    size, and `shape` tells them apart.

    Attributes:
        op: "forward", "backward" or "fold".
        dtype: of the activations, or of the weights that are folded.
        layout: "NCP" or "PC", the memory order (`View`), with "strided" where the input has its own
            strides; of a fold "rows" or "mixed".
        flags: what else the compiled code depends on, joined by "+".
        v: the power of two, up to 16, that divides the contiguous extent: how wide accesses may be.
        log2_m: of the values per channel, rounded.
        log2_c: of the channels, rounded.
        shape: exact: ``(n, c, p)`` and strides if any; of a fold ``(pairs, channels, elements)``.
    """

    op: str
    dtype: str
    layout: str
    flags: str
    v: int
    log2_m: int
    log2_c: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, problem: Problem | FoldProblem) -> Key:
        """The key of a problem."""
        if isinstance(problem, FoldProblem):
            return cls._of_fold(problem)
        view = problem.view
        flags = ["batch" if problem.batch_statistics else "given"]
        if problem.activity != "none":
            flags.append(problem.activity)
        flags += [name for name in _FLAGS if getattr(problem, name)]
        if problem.direction == "backward":
            flags += [name for name in _NEEDS if getattr(problem, f"needs_{name}")]
        layout = "PC" if view.channels_last else "NCP"
        return cls(
            problem.direction,
            _NAMES[problem.dtype],
            layout if view.strides is None else f"{layout} strided",
            "+".join(flags),
            problem.vector,
            _log2(view.count),
            _log2(view.c),
            (view.n, view.c, view.p, *(view.strides or ())),
        )

    @classmethod
    def _of_fold(cls, problem: FoldProblem) -> Key:
        return cls(
            "fold",
            _NAMES[problem.dtype],
            "rows" if problem.rows else "mixed",
            f"{_NAMES[problem.affine]}+{_NAMES[problem.statistics]}",
            16 // problem.dtype.itemsize if problem.rows else 1,
            _log2(max(1, problem.elements // max(1, problem.channels))),
            _log2(problem.channels),
            (problem.pairs, problem.channels, problem.elements),
        )

    @property
    def group(self) -> tuple[str | int, ...]:
        """Problems of one group can be compared by their sizes."""
        return self.op, self.dtype, self.layout, self.flags, self.v

    @property
    def bucket(self) -> tuple[str | int, ...]:
        """The group and the rounded sizes."""
        return *self.group, self.log2_m, self.log2_c

    def distance(self, other: Key) -> float:
        """How far apart two sizes are: powers of two, where one of channels counts twice.

        Channels decide how many programs there are, values per channel only how long they run.
        """
        return abs(self._log_m - other._log_m) + 2 * abs(self._log_c - other._log_c)

    @property
    def _log_m(self) -> float:
        one, c, other = self.shape[:3]
        return math.log2(max(1.0, other / c)) if self.op == "fold" else math.log2(one * other)

    @property
    def _log_c(self) -> float:
        return math.log2(self.shape[1])

    def to_json(self) -> dict[str, Any]:
        """The fields, for `from_json`."""
        return asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_json(cls, found: Any) -> Key:
        """The key that `to_json` wrote; nothing in ``found`` is trusted.

        Raises:
            ValueError: it is not the key of any problem.
        """
        if not isinstance(found, Mapping) or set(found) != set(cls.__dataclass_fields__):
            raise ValueError(f"key: expected the fields of a key, got {_short(found)}")
        shape = found["shape"]
        if not isinstance(shape, list) or not 3 <= len(shape) <= 6:
            raise ValueError(f"key: expected a shape of 3 or 6 integers, got {_short(shape)}")
        key = cls(**{**found, "shape": tuple(shape)})
        if key != cls.of(key.problem()):
            raise ValueError(f"key: expected one that agrees with its shape, got {_short(found)}")
        return key

    def problem(self) -> Problem | FoldProblem:
        """The problem that it is the key of.

        Raises:
            ValueError: there is none.
        """
        for name in ("op", "dtype", "layout", "flags"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}: expected a string, got {_short(getattr(self, name))}")
        for value in self.shape:
            if type(value) is not int or not 0 <= value <= LARGEST:
                raise ValueError(f"shape: expected extents, got {_short(self.shape)}")
        if min(self.shape[:3]) < 1 or self.dtype not in _DTYPES:
            raise ValueError(f"key: expected a shape and a dtype, got {_short(self)}")
        return self._fold() if self.op == "fold" else self._norm()

    def _fold(self) -> FoldProblem:
        affine, _, statistics = self.flags.partition("+")
        if not {affine, statistics} <= set(_DTYPES):
            raise ValueError(f"flags: expected two dtypes, got {_short(self.flags)}")
        pairs, channels, elements = self.shape[:3]
        dtypes = (_DTYPES[self.dtype], _DTYPES[affine], _DTYPES[statistics])
        return FoldProblem(*dtypes, pairs, channels, elements, self.layout == "rows")

    def _norm(self) -> Problem:
        flags = set(self.flags.split("+"))
        activity = next(iter(flags & {"two_valued", "smooth"}), "none")
        n, c, p, *strides = self.shape
        if strides and len(strides) != 3:
            raise ValueError(f"shape: expected three strides, got {_short(self.shape)}")
        own = (strides[0], strides[1], strides[2]) if strides else None
        if self.op not in ("forward", "backward"):
            raise ValueError(f"op: expected forward, backward or fold, got {_short(self.op)}")
        needs = {f"needs_{name}": name in flags for name in _NEEDS}
        return Problem(
            "forward" if self.op == "forward" else "backward",
            "batch" in flags,
            View(n, c, p, self.layout.startswith("PC"), own),
            _DTYPES[self.dtype],
            cast(Activity, activity),
            "residual" in flags,
            "mask" in flags,
            **(needs if self.op == "backward" else {}),
        )

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        return f"{self.op} {sizes} {self.layout} {self.dtype} {self.flags}"


def _log2(extent: int) -> int:
    return round(math.log2(extent))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
