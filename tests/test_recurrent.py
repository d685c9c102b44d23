"""Batch norm by time step: whose statistics a step uses, and an LSTM against its equations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonnorm
from bench.lab.traffic import trace
from tritonnorm import BatchNormLSTM, BatchNormLSTMCell, RecurrentBatchNorm


def batch(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_step_has_statistics_of_its_own() -> None:
    bn = RecurrentBatchNorm(3, max_length=4)
    assert torch.equal(bn.weight, torch.full((3,), 0.1)) and not bn.bias.any()
    theirs = [nn.BatchNorm1d(3) for _ in range(4)]
    for t in (0, 1, 3, 1):
        x = batch(6, 3, seed=t) * (t + 1) + t
        with trace() as seen:
            y = bn(x, t)
        assert seen.launches
        torch.testing.assert_close(y, 0.1 * theirs[t](x))
    for t in range(4):
        torch.testing.assert_close(bn.running_mean[t], theirs[t].running_mean)
        torch.testing.assert_close(bn.running_var[t], theirs[t].running_var)
    assert bn.num_batches_tracked.tolist() == [1, 2, 0, 1]
    bn.eval()
    for t, norm in enumerate(theirs):
        torch.testing.assert_close(bn(x, t), 0.1 * norm.eval()(x))


def test_later_steps_use_the_last() -> None:
    bn = RecurrentBatchNorm(3, max_length=2, momentum=None)
    for t in range(4):
        bn(batch(5, 3, seed=t) + t, t)
    assert bn.num_batches_tracked.tolist() == [1, 3]  # steps 1, 2 and 3
    expected = torch.stack([batch(5, 3, seed=t).mean(0) + t for t in (1, 2, 3)]).mean(0)
    torch.testing.assert_close(bn.running_mean[1], expected)
    bn.eval()
    x = batch(5, 3)
    assert torch.equal(bn(x, 1), bn(x, 99)) and not torch.equal(bn(x, 0), bn(x, 1))


def test_sequences_that_are_over_do_not_count() -> None:
    bn, alone = (RecurrentBatchNorm(3, 2) for _ in range(2))
    x, mask = batch(6, 3), torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    x[~mask] = float("nan")
    y = bn(x, 0, mask)
    torch.testing.assert_close(y[mask], alone(x[mask], 0))
    assert not y[~mask].any() and torch.equal(bn.running_var, alone.running_var)
    bn(x, 1, torch.arange(6) < 1)  # a single one has no variance
    assert bn.num_batches_tracked.tolist() == [1, 0] and bn.running_mean[1].eq(0).all()


def test_the_state_goes_through_a_dict() -> None:
    bn, other = (RecurrentBatchNorm(3, 4, bias=False) for _ in range(2))
    bn(batch(5, 3), 2)
    state = bn.state_dict()
    assert {n: tuple(t.shape) for n, t in state.items()} == {
        "weight": (3,), "running_mean": (4, 3), "running_var": (4, 3), "num_batches_tracked": (4,),
    }  # fmt: skip
    other.load_state_dict(state)
    assert torch.equal(other.eval()(batch(5, 3), 2), bn.eval()(batch(5, 3), 2))
    bn.reset_parameters()
    assert not bn.num_batches_tracked.any() and bn.running_var.eq(1).all()
    with pytest.raises(RuntimeError, match="size mismatch"):
        RecurrentBatchNorm(3, 5, bias=False).load_state_dict(state)


def by_the_equations(cell: BatchNormLSTMCell, x: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
    """Equations 6 to 8 of the paper, with PyTorch's batch norm of the batch."""

    def norm(v: Tensor, of: RecurrentBatchNorm) -> Tensor:
        return F.batch_norm(v, None, None, of.weight, of.bias, True)

    gates = norm(h @ cell.weight_hh.t(), cell.norm_hh) + norm(x @ cell.weight_ih.t(), cell.norm_ih)
    f, i, o, g = (gates + cell.bias).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return [o.sigmoid() * norm(c, cell.norm_c).tanh(), c]


def test_the_cell_is_that_of_the_paper() -> None:
    cell = BatchNormLSTMCell(4, 3, max_length=5)
    nn.init.normal_(cell.bias)
    x, h, c = batch(6, 4), batch(6, 3, seed=1), batch(6, 3, seed=2)
    found, expected = cell(x, 0, (h, c)), by_the_equations(cell, x, h, c)
    torch.testing.assert_close(list(found), expected)
    ours, theirs = (
        torch.autograd.grad(sum(s.square().sum() for s in states), list(cell.parameters()))
        for states in (found, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_layer_stops_where_a_sequence_ends(batch_first: bool) -> None:
    layer = BatchNormLSTM(4, 3, 5, batch_first=batch_first).eval()
    for norm in (layer.cell.norm_ih, layer.cell.norm_hh, layer.cell.norm_c):
        norm.running_mean.normal_()
    lengths = torch.tensor([7, 3, 0])
    x = batch(7, 3, 4)
    garbage = torch.where((torch.arange(7)[:, None] < lengths)[..., None], x, 1e30)
    y, (h, c) = layer(garbage.transpose(0, 1) if batch_first else garbage, lengths)
    y = y.transpose(0, 1) if batch_first else y
    for n, length in enumerate(lengths.tolist()):
        one = x[:length, n : n + 1]
        alone, (own_h, own_c) = layer(one.transpose(0, 1) if batch_first else one)
        alone = alone.transpose(0, 1) if batch_first else alone
        torch.testing.assert_close(y[:length, n : n + 1], alone)
        torch.testing.assert_close((h[n : n + 1], c[n : n + 1]), (own_h, own_c))
        assert not y[length:, n].any()


def test_the_layer_trains_on_padded_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients ignore padding; statistics of a step are those of the sequences that reach it."""
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")
    torch.manual_seed(0)
    layer, lengths = BatchNormLSTM(4, 3, 6), torch.tensor([6, 2, 4, 6])
    x = batch(6, 4, 4)
    x[2:, 1] = float("nan")
    y, _ = layer(x.requires_grad_(), lengths)
    y.square().sum().backward()
    assert not x.grad[2:, 1].any() and not x.grad[4:, 2].any() and x.grad[5, 0].any()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    projected = x[5, [0, 3]] @ layer.cell.weight_ih.t()
    torch.testing.assert_close(layer.cell.norm_ih.running_mean[5], 0.1 * projected.mean(0))


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_statistics_that_moved_do_not_stop_a_backward(
    disabled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps share their buffers; some have one sequence left, and two share the last row."""
    monkeypatch.setenv("TRITONNORM_DISABLE", disabled)
    layer = BatchNormLSTM(4, 3, 4)
    y, _ = layer(batch(6, 3, 4), torch.tensor([6, 2, 1]))
    y.sum().backward()
    layer(batch(6, 3, 4))[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="max_length: expected at least 1, got 0"):
        RecurrentBatchNorm(3, 0)
    bn = RecurrentBatchNorm(3, 2)
    with pytest.raises(ValueError, match=r"input: expected \[N, 3\], got \(5, 4\)"):
        bn(batch(5, 4), 0)
    with pytest.raises(ValueError, match="step: expected 0 or more, got -1"):
        bn(batch(5, 3), -1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        bn(batch(1, 3), 0)
    with pytest.raises(ValueError, match="input: expected 3 dimensions, got 2D"):
        tritonnorm.BatchNormLSTM(4, 3, 2)(batch(5, 4))
