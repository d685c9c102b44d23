"""Views of every layout, found again in memory; the fewest bytes, against the design's table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import cases
from tritonnorm.problem import Problem, View, minimum_bytes

SHAPES = [
    (6, 5),
    (3, 5, 7),
    (3, 5, 4, 6),
    (2, 3, 2, 3, 4),
    (1, 4, 5),
    (3, 1, 4),
    (1, 1, 2, 3),
    (5, 4, 1, 1),
]


def view_of(t: Tensor) -> View | None:
    return View.of(t.shape, t.stride(), torch.empty_like(t).stride())


def gathered(t: Tensor, view: View) -> Tensor:
    """The values that a kernel meets at ``[n, c, p]``, by the strides of the view."""
    n, c, p = (torch.arange(e) for e in (view.n, view.c, view.p))
    s_n, s_c, s_p = view.strides or dense_strides(view)
    at = n[:, None, None] * s_n + c[:, None] * s_c + p * s_p + t.storage_offset()
    storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return storage[at]


def dense_strides(view: View) -> tuple[int, int, int]:
    return (0, 1, view.c) if view.channels_last else (view.c * view.p, view.p, 1)


def check_view(t: Tensor) -> View | None:
    """Gathered through the view and written in its dense order, a tensor is itself again."""
    view = view_of(t)
    if view is None:
        return None
    assert view.numel == t.numel() and view.c == t.shape[1] and view.count * view.c == t.numel()
    twin = torch.empty_like(t)
    in_order = gathered(t, view)
    flat = in_order.movedim(1, -1) if view.channels_last else in_order
    written = torch.empty(0, dtype=t.dtype).set_(twin.untyped_storage())
    written.copy_(flat.reshape(-1))
    assert torch.equal(twin, t)
    assert (view.strides is None) == (t.numel() == 1 or same_strides(t, twin))
    return view


def same_strides(a: Tensor, b: Tensor) -> bool:
    return all(s == u for n, s, u in zip(a.shape, a.stride(), b.stride(), strict=True) if n > 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_round_trip(shape: tuple[int, ...], layout: str) -> None:
    if layout.endswith("crop") and len(shape) < 4:
        pytest.skip("a crop needs a plane")
    values = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    t = cases.LAYOUTS[layout](values)
    view = check_view(t)
    if layout in ("contiguous", "channels_last", "transposed", "batch_inner", "misaligned"):
        assert view is not None and view.strides is None
    elif layout.endswith("slice") and shape[1] > 1:
        assert view is not None
    elif view is None:
        assert check_view(torch.empty_like(t).copy_(t)) is not None


@st.composite
def strided(draw: st.DrawFn) -> Tensor:
    """A tensor of 2 to 5 dimensions with its memory order permuted, sliced, stepped or expanded."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    order = draw(st.permutations(range(len(sizes))))
    extra = [draw(st.integers(0, 2)) for _ in sizes]
    step = [draw(st.sampled_from([1, 1, 1, 2])) for _ in sizes]
    base = torch.arange(
        float(torch.Size([s * k + e for s, k, e in zip(sizes, step, extra, strict=True)]).numel())
    )
    whole = base.reshape([sizes[d] * step[d] + extra[d] for d in order])
    t = whole.permute([order.index(d) for d in range(len(sizes))])
    t = t[tuple(slice(0, s * k, k) for s, k in zip(sizes, step, strict=True))]
    if draw(st.booleans()):
        d = draw(st.integers(0, len(sizes) - 1))
        t = t.narrow(d, 0, 1).expand(sizes)
    return t


@settings(max_examples=150, deadline=None, derandomize=True)
@given(strided())
def test_any_strides(t: Tensor) -> None:
    """Whatever the strides: a right view, or none and then a dense copy has one."""
    if check_view(t) is None:
        assert check_view(torch.empty_like(t).copy_(t)) is not None


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((8, 6, 4, 5), "contiguous", View(8, 6, 20, False)),
        ((8, 6, 4, 5), "channels_last", View(1, 6, 160, True)),
        ((8, 6), "contiguous", View(1, 6, 8, True)),
        ((8, 6, 5), "contiguous", View(8, 6, 5, False)),
        ((8, 6, 2, 4, 5), "channels_last", View(1, 6, 320, True)),
        ((8, 6, 4, 5), "channel_slice", View(8, 6, 20, False, (160, 20, 1))),
        ((8, 6), "channel_slice", View(1, 6, 8, True, (0, 1, 8))),
        ((8, 6, 4, 5), "crop", None),
    ],
)
def test_views(shape: tuple[int, ...], layout: str, expected: View | None) -> None:
    assert view_of(cases.LAYOUTS[layout](torch.zeros(shape))) == expected


S = 2 * 8 * 16 * 64 * 2  # bytes of the bf16 tensor below
MASK = S // 16


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        # section 2 of the design, "data kept on chip"
        (2 * S, {"direction": "forward"}),
        (2 * S, {"direction": "forward", "activity": "two_valued"}),
        (2 * S, {"direction": "forward", "activity": "smooth"}),
        (3 * S, {"direction": "forward", "activity": "smooth", "residual": True}),
        (
            3 * S + MASK,
            {"direction": "forward", "activity": "two_valued", "residual": True, "mask": True},
        ),
        (3 * S, {"direction": "backward"}),
        (3 * S, {"direction": "backward", "activity": "two_valued"}),
        (3 * S, {"direction": "backward", "activity": "smooth"}),
        (
            4 * S + MASK,
            {
                "direction": "backward", "activity": "two_valued", "residual": True, "mask": True,
                "needs_dresidual": True,
            },
        ),
        # a smooth activation recomputes from the residual, which is read for it
        (
            5 * S,
            {
                "direction": "backward", "activity": "smooth", "residual": True,
                "needs_dresidual": True,
            },
        ),
        # inference, forward and backward
        (2 * S, {"direction": "forward", "batch_statistics": False, "activity": "two_valued"}),
        (3 * S, {"direction": "forward", "batch_statistics": False, "residual": True}),
        (2 * S, {"direction": "backward", "batch_statistics": False, "needs_dparams": False}),
        (3 * S, {"direction": "backward", "batch_statistics": False}),
        # only the parameters' gradients: dy and x
        (2 * S, {"direction": "backward", "needs_dx": False}),
    ],
)  # fmt: skip
def test_minimum_bytes(expected: int, options: dict[str, object]) -> None:
    problem = Problem(
        **{
            "batch_statistics": True,
            "view": View(16, 16, 64, False),
            "dtype": torch.bfloat16,
            **options,
        }
    )
    assert problem.bytes == S
    assert minimum_bytes(problem) == expected


@pytest.mark.parametrize(
    ("fast", "vector"), [(1, 1), (49, 1), (196, 4), (56, 8), (64, 16), (3136, 16)]
)
def test_vector(fast: int, vector: int) -> None:
    for view in (View(2, 3, fast, False), View(1, fast, 5, True)):
        assert Problem("forward", True, view, torch.float32).vector == vector


@pytest.mark.parametrize(("p", "rows"), [(8, 1), (9, 2), (49, 7), (1, 1)])
def test_mask_bytes(p: int, rows: int) -> None:
    assert View(3, 5, p, False).mask_bytes == 15 * rows
    assert View(1, p, 4, True).mask_bytes == 4 * rows


def test_accumulator() -> None:
    view = View(2, 3, 4, False)
    for dtype in cases.FLOATS:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert Problem("forward", True, view, dtype).accumulator == wide
