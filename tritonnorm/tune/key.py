"""The key of a tuned result: what a problem is, in words and numbers that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from tritonnorm.norms.problem import GroupProblem
from tritonnorm.problem import Activity, FoldProblem, Problem, View

__all__ = ["Key", "Shape"]

Shape = Problem | GroupProblem | FoldProblem  # what is planned and tuned

_DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FLAGS = ("residual", "mask")
_NEEDS = ("dx", "dresidual", "dparams")
GROUP = "group "  # before the direction of a group norm
LARGEST = 1 << 48  # an extent beyond it is no extent of a tensor


@dataclass(frozen=True)
class Key:
    """A problem as tables know it.

    Problems of one `group` run the same code. Those of one `bucket` are also of about the same
    size, and `shape` tells them apart.

    Attributes:
        op: "forward", "backward" or "fold"; "group forward" or "group backward" of the other norms.
        dtype: of the activations, or of the weights that are folded.
        layout: "NCP" or "PC", the memory order (`View`), with "strided" where the input has its own
            strides; of a fold, and of a norm over rows, "rows", and else of a fold "mixed".
        flags: what else the compiled code depends on, joined by "+".
        v: the power of two, up to 16, that divides the contiguous extent: how wide accesses may be.
        log2_m: of the values per channel, rounded; of a group norm of the groups of all samples.
        log2_c: of the channels, rounded; of a group norm of the values of a group.
        shape: exact: ``(n, c, p)`` and strides if any, after ``(n, c, p, groups)`` of a group norm;
            of a fold ``(pairs, channels, elements)``.
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
    def of(cls, problem: Shape) -> Key:
        """The key of a problem."""
        if isinstance(problem, FoldProblem):
            return cls._of_fold(problem)
        view = problem.view
        layout = "PC" if view.channels_last else "NCP"
        groups: tuple[int, ...] = ()
        if isinstance(problem, GroupProblem):
            op, groups = f"{GROUP}{problem.direction}", (problem.groups,)
            layout = "rows" if problem.rows else layout
            flags = [problem.per, *(["centred"] if problem.centred else [])]
            if problem.strip != problem.vector:  # of the channels of a group
                flags.append(f"strip{problem.strip}")
            sizes = problem.statistics, view.numel // problem.statistics
        else:
            op, sizes = problem.direction, (view.count, view.c)
            flags = ["batch" if problem.batch_statistics else "given"]
            if problem.form != "plain":
                flags.append(problem.form)
        if problem.activity != "none":
            flags.append(problem.activity)
        flags += [name for name in _FLAGS if getattr(problem, name, False)]
        if problem.direction == "backward":
            flags += [name for name in _NEEDS if getattr(problem, f"needs_{name}")]
        return cls(
            op,
            _NAMES[problem.dtype],
            layout if view.strides is None else f"{layout} strided",
            "+".join(flags),
            problem.vector,
            _log2(sizes[0]),
            _log2(sizes[1]),
            (view.n, view.c, view.p, *groups, *(view.strides or ())),
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

    @property
    def kind(self) -> str:
        """The kind of problem: sizes of two kinds cannot be compared."""
        return GROUP if self.op.startswith(GROUP) else "fold" if self.op == "fold" else "batch"

    def distance(self, other: Key) -> float:
        """How far apart two sizes are: powers of two, where one of channels counts twice.

        Channels decide how many programs there are, values per channel only how long they run. Of a
        group norm the values of a group count twice: they decide the tile.
        """
        pairs = zip(self._logs, other._logs, (1, 2), strict=True)
        return sum(times * abs(a - b) for a, b, times in pairs)

    @property
    def _logs(self) -> tuple[float, float]:
        one, c, other = self.shape[:3]
        if self.kind == "fold":
            return math.log2(max(1.0, other / c)), math.log2(c)
        if self.kind == "batch":
            return math.log2(one * other), math.log2(c)
        statistics = other if self.layout.startswith("rows") else one * self.shape[3]
        return math.log2(statistics), math.log2(one * c * other / statistics)

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
        if not isinstance(shape, list) or not 3 <= len(shape) <= 7:
            raise ValueError(f"key: expected a shape of 3 to 7 integers, got {_short(shape)}")
        key = cls(**{**found, "shape": tuple(shape)})
        if key != cls.of(key.problem()):
            raise ValueError(f"key: expected one that agrees with its shape, got {_short(found)}")
        return key

    def problem(self) -> Shape:
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

    def _norm(self) -> Problem | GroupProblem:
        flags = set(self.flags.split("+"))
        direction = self.op.removeprefix(GROUP)
        if direction not in ("forward", "backward"):
            raise ValueError(f"op: expected one of a norm or fold, got {_short(self.op)}")
        grouped = self.kind == GROUP
        n, c, p, *rest = self.shape
        groups = [rest.pop(0)] if grouped and rest else []
        if len(groups) != grouped or len(rest) not in (0, 3):
            raise ValueError(f"shape: expected sizes and three strides, got {_short(self.shape)}")
        own = (rest[0], rest[1], rest[2]) if rest else None
        rows = self.layout.startswith("rows")
        common: dict[str, Any] = {
            "direction": direction,
            "view": View(n, c, p, rows or self.layout.startswith("PC"), own),
            "dtype": _DTYPES[self.dtype],
            "activity": cast(Activity, next(iter(flags & {"two_valued", "smooth"}), "none")),
            "residual": "residual" in flags,
        }
        if direction == "backward":
            common |= {f"needs_{name}": name in flags for name in _NEEDS}
        if not grouped:
            common["form"] = next(iter(flags & {"synced", "masked"}), "plain")
            return Problem(batch_statistics="batch" in flags, mask="mask" in flags, **common)
        if not groups[0] or c % groups[0] or (rows and (n, groups[0]) != (1, 1)):
            raise ValueError(f"shape: expected groups of channels, got {_short(self.shape)}")
        return GroupProblem(groups=groups[0], rows=rows, centred="centred" in flags, **common)

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        return f"{self.op} {sizes} {self.layout} {self.dtype} {self.flags}"


def _log2(extent: int) -> int:
    return round(math.log2(extent))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
