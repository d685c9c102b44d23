"""The kernels that fold all pairs in one launch, against the float64 expression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.lab.traffic import trace
from tests.matrix import poisoned
from tritonnorm import fold_ops, folding, frozen
from tritonnorm.folding import Source
from tritonnorm.kernels import folding as kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def source(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    groups: int = 0,
    *,
    last: bool = False,
    bias: bool = True,
    gamma: bool = True,
    beta: bool = True,
    wide: torch.dtype | None = None,
    seed: int = 0,
) -> Source:
    """A pair; ``wide`` is the dtype of the batch norm's tensors, by default that of the layer."""
    g = torch.Generator().manual_seed(seed + sum(shape))
    c = shape[1] * groups if groups else shape[0]

    def normal(size: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64).to(kind)

    w, norm = normal(shape, dtype), wide or dtype
    if last:
        order = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        w = w.contiguous(memory_format=order)
    return Source(
        w,
        normal((c,), dtype) if bias else None,
        normal((c,), norm) * 3,
        normal((c,), norm).abs() + 0.3,
        normal((c,), norm) if gamma else None,
        normal((c,), norm) if beta else None,
        0.01,
        groups,
    )


def model(dtype: torch.dtype = torch.float32, wide: torch.dtype | None = None) -> list[Source]:
    """Every kind of tile, and tails of channels and of rows."""
    make: Callable[..., Source] = lambda *a, **k: source(*a, dtype, wide=wide, **k)  # noqa: E731
    return [
        make((20, 3, 3, 3)),  # rows of 27
        make((8, 16, 1, 1), bias=False),  # short rows
        make((5, 64, 3, 3), last=True),  # long rows
        make((17, 40), gamma=False),  # a linear layer
        make((9, 1, 5), beta=False),  # depthwise, 1d
        make((12, 4, 3, 3), groups=2, bias=False, gamma=False, beta=False),
        make((12, 4, 3, 3), groups=3, last=True),
        make((6, 8, 2, 3, 2)),
        make((8, 5, 4), groups=1),
    ]


def grads_of(sources: list[Source], seed: int = 5) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(seed)

    def like(t: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty_like(t, dtype=dtype).copy_(
            torch.randn(t.shape, generator=g, dtype=torch.float64)
        )

    kinds = [(s.weight, s.mean) for s in sources]
    return [like(w, w.dtype) for w, _ in kinds], [like(m, w.dtype) for w, m in kinds]


def columns(sources: list[Source]) -> list[list[Any]]:
    return [list(column) for column in zip(*sources, strict=True)]


def check(name: str, ours: Tensor, exact: Tensor, scale: Tensor | float, acc: torch.dtype) -> None:
    """Rounded once, after arithmetic whose error is a few units of what was added up."""
    slack = 8 * torch.finfo(acc).eps * scale + torch.finfo(ours.dtype).eps / 2 * exact.abs()
    tiny = torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
    assert ours.shape == exact.shape, name
    assert ((ours.double() - exact).abs() <= slack * 1.01 + tiny).all(), name


def check_all(sources: list[Source], acc: torch.dtype = torch.float32) -> None:
    """Forward and backward of one launch each, against float64."""
    n = len(sources)
    with poisoned():
        found = fold_ops.forward(*columns(sources))
    for i, s in enumerate(sources):
        exact = folding.fold(s)
        w, b = found[i], found[n + i]
        assert w.dtype == b.dtype == s.weight.dtype and w.stride() == s.weight.stride()
        check(f"w' {i}", w, exact.weight, exact.weight.abs(), acc)
        check(f"b' {i}", b, exact.bias, _terms(s), acc)
    check_gradients(sources, acc)


def check_gradients(sources: list[Source], acc: torch.dtype) -> None:
    n = len(sources)
    dw, db = grads_of(sources)
    with poisoned():
        found = fold_ops.backward(dw, db, *columns(sources))
    for i, s in enumerate(sources):
        leaves = [None if t is None else t.double().requires_grad_() for t in s.tensors]
        wide = Source(*leaves, *s[6:])
        exact = folding.fold(wide)
        wanted = {k: leaves[k] for k in (0, 1, 4, 5) if leaves[k] is not None}
        gradients = dict(
            zip(
                wanted,
                torch.autograd.grad([*exact], [*wanted.values()], [dw[i].double(), db[i].double()]),
                strict=True,
            )
        )
        size = (s.weight.double() * dw[i].double()).abs()
        if s.groups:
            size = size.unflatten(0, (s.groups, -1)).transpose(1, 2).flatten(0, 1)
        rstd = torch.rsqrt(s.var.double() + s.eps)
        shift = s.mean.double().abs() + (0 if s.bias is None else s.bias.double().abs())
        sums = rstd * (size.flatten(1).sum(1) + shift * db[i].double().abs())
        for k, row, scale in ((0, 0, None), (1, 1, None), (4, 2, sums), (5, 3, None)):
            if k in gradients:
                g = gradients[k]
                check(
                    f"{k} of {i}", found[row * n + i], g, g.abs() if scale is None else scale, acc
                )
        assert found[i].stride() == s.weight.stride()


def _terms(s: Source) -> Tensor:
    size = s.mean.double().abs() + (0 if s.bias is None else s.bias.double().abs())
    scale = torch.rsqrt(s.var.double() + s.eps)
    scale = scale if s.gamma is None else scale * s.gamma.double().abs()
    return size * scale + (0 if s.beta is None else s.beta.double().abs())


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype: torch.dtype) -> None:
    check_all(model(dtype), torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_batch_norm_in_float32_after_a_layer_in_half(dtype: torch.dtype) -> None:
    check_all(model(dtype, torch.float32))
    assert (
        fold_ops.backward(
            *grads_of(model(dtype, torch.float32)), *columns(model(dtype, torch.float32))
        )[-1].dtype
        == torch.float32
    )


shapes = st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=25, deadline=None)
@given(st.lists(shapes, min_size=1, max_size=4), st.sampled_from(DTYPES), st.booleans(), st.data())
def test_random_models(sizes: Any, dtype: torch.dtype, last: bool, data: Any) -> None:
    sources = []
    for shape in sizes:
        groups = data.draw(st.sampled_from([0, *(g for g in (1, 2, 5) if shape[0] % g == 0)]))
        bias = data.draw(st.booleans())
        sources.append(source(shape, dtype, groups, last=last, bias=bias))
    check_all(sources, torch.float64 if dtype == torch.float64 else torch.float32)


def test_weights_that_do_not_begin_at_16_bytes() -> None:
    s = source((8, 16, 1, 1))
    assert kernels.tile_kind(s.weight, (1, 8, 16)) == 1
    memory = torch.zeros(s.weight.numel() + 1)
    moved = memory[1:].view(s.weight.shape).copy_(s.weight)
    s = s._replace(weight=moved)
    assert kernels.tile_kind(moved, (1, 8, 16)) == 0
    check_all([s])


def test_gradients_that_lie_otherwise() -> None:
    """Another memory format, an odd address, none at all."""
    sources = [source((8, 16, 3, 3)), source((8, 16, 1, 1), seed=1), source((7, 12))]
    dw, db = grads_of(sources)
    expected = fold_ops.backward(dw, db, *columns(sources))
    odd = torch.zeros(dw[1].numel() + 1)[1:].view(dw[1].shape).copy_(dw[1])
    other = [dw[0].contiguous(memory_format=torch.channels_last), odd, dw[2].t().contiguous().t()]
    found = fold_ops.backward(other, db, *columns(sources))
    assert all(map(torch.equal, found, expected))
    none = fold_ops.backward([None, dw[1], None], [db[0], None, None], *columns(sources))
    zeros = [torch.zeros_like(t) for t in dw], [torch.zeros_like(t) for t in db]
    zeros[0][1], zeros[1][0] = dw[1], db[0]
    for a, b in zip(none, fold_ops.backward(*zeros, *columns(sources)), strict=True):
        assert torch.equal(a, b)


def test_the_same_bits_twice() -> None:
    sources = model()
    dw, db = grads_of(sources)
    first = fold_ops.backward(dw, db, *columns(sources))
    again = fold_ops.backward([g.clone() for g in dw], [g.clone() for g in db], *columns(sources))
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_those_of_the_model(dtype: torch.dtype) -> None:
    """Every element once, in one launch, and no two programs write the same."""
    sources = model(dtype)
    dw, db = grads_of(sources)
    tensors = {
        f"{i}.{k}": t
        for i, s in enumerate(sources)
        for k, t in enumerate(s.tensors)
        if t is not None
    }
    tensors |= {f"grad {i}": t for i, t in enumerate((*dw, *db))}
    for backward in (False, True):
        with trace(tensors) as seen:
            if backward:
                fold_ops.backward(dw, db, *columns(sources))
            else:
                fold_ops.forward(*columns(sources))
        seen.raise_on_race()
        assert [x.kernel for x in seen.launches] == [
            "fold_gradient_kernel" if backward else "fold_kernel"
        ]
        moved = {k: v for k, v in seen.launches[0].arguments.items() if k not in TABLES}
        assert sum(a + b for a, b, _ in moved.values()) == folding.minimum_bytes(sources, backward)
        assert seen.atomic == 0


TABLES = ("table_ptr", "work_ptr", "grads_ptr")


def leaves(dtype: torch.dtype = torch.float64) -> list[Source]:
    made = [
        source((5, 3, 2, 2), dtype),
        source((4, 3, 2), dtype, 2, bias=False),
        source((3, 7), dtype, gamma=False),
    ]
    for s in made:
        for t in (s.weight, s.bias, s.gamma, s.beta):
            if t is not None:
                t.requires_grad_()
    return made


def test_gradcheck_of_first_and_second_order() -> None:
    made = leaves()
    tensors = [t for s in made for t in s.tensors if t is not None and t.requires_grad]

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        found = iter(given)
        sources = [
            Source(
                *(next(found) if t is not None and t.requires_grad else t for t in s.tensors),
                *s[6:],
            )
            for s in made
        ]
        return tuple(t for f in fold_ops.fold(sources) for t in f)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_an_output_that_nothing_uses() -> None:
    made = leaves()
    found = fold_ops.fold(made)
    found[0].weight.sum().backward()
    assert made[0].weight.grad is not None and made[0].weight.grad.abs().min() > 0
    assert made[1].weight.grad is None or not made[1].weight.grad.any()


@pytest.mark.parametrize("name", ["fold", "fold_backward"])
def test_opcheck(name: str) -> None:
    """With sizes that leave no gaps in the results' buffers: what lies in a gap is undefined."""
    sources = [
        source((16, 4, 2, 2)),
        source((32, 5), bias=False),
        source((4, 8, 4), groups=2, gamma=False, beta=False),
    ]
    sample = tuple(columns(sources))
    if name == "fold_backward":
        dw, db = grads_of(sources)
        sample = ([None, *dw[1:]], [*db[:-1], None], *sample)
    results = torch.library.opcheck(getattr(torch.ops.tritonnorm, name).default, sample)
    assert set(results.values()) == {"SUCCESS"}, results


def test_tables_are_made_once_for_the_same_tensors() -> None:
    sources = model()
    with mock.patch.object(kernels.Batch, "of", side_effect=kernels.Batch.of) as made:
        fold_ops.forward(*columns(sources))
        sources[0].weight.mul_(2)
        found = fold_ops.forward(*columns(sources))
        assert made.call_count == 1
        moved = [sources[0]._replace(weight=sources[0].weight * 3), *sources[1:]]
        other = fold_ops.forward(*columns(moved))
        assert made.call_count == 2
        torch.testing.assert_close(other[0], found[0] * 3)
        fold_ops.forward(*columns([s._replace(eps=0.5) for s in sources]))
        assert made.call_count == 3


def test_gradients_gathered_for_a_graph() -> None:
    """What a captured CUDA graph does, which may not send a table from the host."""
    sources = model()
    dw, db = grads_of(sources)
    dw[1] = None  # type: ignore[call-overload]
    expected = fold_ops.backward(dw, db, *columns(sources))
    batch = fold_ops._batch(sources)
    like = torch.empty(batch.weights)
    table, _kept = fold_ops._gathered([*dw, *db], batch, like)
    assert table.is_contiguous() and table.data_ptr() % 16 == 0
    flat, affine = torch.empty_like(like), torch.empty(2 * batch.channels)
    batch.launch(True)(batch.table, batch.work, table, flat, affine)
    for mine, theirs in zip(fold_ops._views(flat, sources), expected, strict=False):
        assert torch.equal(mine, theirs)


def test_one_launch_for_each_set_of_dtypes() -> None:
    sources = [*model(), *model(torch.float64)]
    sources.insert(3, source((6, 8))._replace(weight=torch.randn(8, 6).t()))  # not dense by rows
    with mock.patch.object(fold_ops, "fold", side_effect=fold_ops.fold) as launches:
        found = frozen.fold_all(sources)
    assert [len(call.args[0]) for call in launches.call_args_list] == [9, 9]
    for s, f in zip(sources, found, strict=True):
        exact = folding.fold(s)
        torch.testing.assert_close(f.weight.double(), exact.weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(f.bias.double(), exact.bias, rtol=1e-5, atol=1e-5)


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")
    with mock.patch.object(fold_ops, "fold", side_effect=AssertionError):
        found = frozen.fold_all(model())
    torch.testing.assert_close(found[0].weight.double(), folding.fold(model()[0]).weight)
