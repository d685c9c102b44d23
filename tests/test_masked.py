"""The masked batch norm against the valid positions picked by index, in float64."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import tritonnorm
from bench.lab.traffic import trace
from bench.launches import observe
from tests.matrix import poisoned
from tritonnorm import reference
from tritonnorm.device import Device
from tritonnorm.kernels.base import Config
from tritonnorm.kernels.masked_launches import Masked
from tritonnorm.plan import force_plan
from tritonnorm.problem import Problem, View
from tritonnorm.sequences import masked as sequences
from tritonnorm.sequences.masked import masked_batch_norm, valid_positions

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAN = float("nan")
EPS = 1e-5
FEW = 2  # ulp of the accumulator, as in tests/matrix.py


def padded(
    n: int = 4, c: int = 6, length: int = 21, *, kind: str = "lengths", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Values ``[N, C, L]`` in float64 and the mask of their valid positions."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, length, generator=g, dtype=torch.float64) * 2 + 1
    if kind == "lengths":
        keep = torch.arange(length) < torch.randint(0, length + 1, (n, 1), generator=g)
    else:
        keep = torch.rand(n, length, generator=g) < 0.5
    keep[0] = True  # whole, and none at all
    keep[-1] = False
    return x, keep


def filled(x: Tensor, keep: Tensor, value: float = NAN) -> Tensor:
    return torch.where(keep[:, None, :], x, value)


def call(
    x: Tensor,
    keep: Tensor,
    dy: Tensor,
    layout: str,
    training: bool,
    v: dict[str, Any],
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Output, gradients, running statistics and counter of one call, all as [N, C, L]."""
    last = layout == "NLC"
    x, keep, dy = (t.to(device) for t in (x, keep, dy))
    running = {n: v[n].clone().to(device) for n in ("running_mean", "running_var", "counter")}
    leaves = [(x.mT.contiguous() if last else x).detach().requires_grad_()]
    leaves += [v[n].to(device).detach().requires_grad_() for n in ("weight", "bias")]
    y = masked_batch_norm(
        leaves[0], running["running_mean"], running["running_var"], *leaves[1:], training,
        v["momentum"], EPS, mask=keep, layout=layout, activation=v["activation"],
        num_batches_tracked=running["counter"],
    )  # fmt: skip
    dx, dw, db = torch.autograd.grad(y, leaves, dy.mT if last else dy)
    y, dx = (t.mT if last else t for t in (y.detach(), dx))
    found = {"y": y, "dx": dx, "dweight": dw, "dbias": db, **running}
    return {name: t.cpu() for name, t in found.items()}


def vectors(c: int, kind: torch.dtype, **options: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(9)

    def normal() -> Tensor:
        return torch.randn(c, generator=g, dtype=torch.float64)

    made = {"weight": normal(), "bias": normal(), "running_mean": normal()}
    made["running_var"] = normal().abs() + 0.5
    made = {n: t.to(kind) for n, t in made.items()}
    return {**made, "counter": torch.tensor(3), "momentum": 0.1, "activation": None, **options}


def check(
    x: Tensor,
    keep: Tensor,
    layout: str,
    dtype: torch.dtype,
    training: bool,
    device: str = "cpu",
    **options: Any,
) -> None:
    """Every result within twice the error of the same in PyTorch operations, and a few ulp."""
    c = x.shape[1]
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    v = vectors(c, kind, **options)
    x = x.to(dtype)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    dy = dy.to(dtype)
    garbage, dy_garbage = filled(x, keep), filled(dy, keep)
    arguments = (garbage, keep, dy_garbage, layout, training, v, device)
    with poisoned(), observe() as ran, trace() if device == "cpu" else nullcontext() as seen:
        ours = call(*arguments)
    assert {*ran.interpreted, *ran.compiled} >= {"masked_apply_kernel", "masked_gradient_kernel"}
    if seen is not None:
        seen.raise_on_race()
        assert seen.atomic == 0
    with mock.patch.dict("os.environ", {"TRITONNORM_DISABLE": "1"}), observe() as none:
        torchs = call(*arguments)
        with mock.patch.object(sequences, "_host_knows", return_value=False):
            traced = call(*arguments)
    assert not none.interpreted and not none.compiled
    x, dy = x.double(), dy.double()
    w, b, mean, var = (v[n].double() for n in ("weight", "bias", "running_mean", "running_var"))
    f = reference.masked_forward(
        x, keep, mean, var, w, b, training, EPS, activation=v["activation"]
    )
    back = reference.masked_backward(
        dy, x, keep, f.mean, f.var, w, b, training, EPS, activation=v["activation"]
    )
    exact = {"y": f.y, "dx": back.dx, "dweight": back.dweight, "dbias": back.dbias}
    if training:
        mean, var = reference.updated_running(
            (mean, var), f.mean, f.var, int(keep.sum()), v["momentum"], 4
        )
    exact |= {"running_mean": mean, "running_var": var}
    terms = (x.abs() + f.mean.abs()[:, None]).max() * torch.rsqrt(f.var + EPS).max()
    g = dy.abs() * (1 + float(terms * w.abs().max()) if v["activation"] == "silu" else 1)
    scale = {
        "y": terms * w.abs().max() + b.abs().max(),
        "dx": g.max() * (2 + terms) * (w.abs() * torch.rsqrt(f.var + EPS)).max(),
        "dweight": (g.sum((0, 2)) * terms).max(),
        "dbias": g.sum((0, 2)).max(),
        "running_mean": x.abs().max(),
        "running_var": x.square().max(),
    }
    for name, value in exact.items():
        mine, theirs = ((t[name].double() - value).abs().max() for t in (ours, torchs))
        stored = torch.finfo(ours[name].dtype).eps * float(value.abs().max())
        slack = FEW * torch.finfo(kind).eps * float(scale[name]) + stored
        assert mine <= 2 * theirs + slack, f"{name}: {mine:.3g}, {theirs:.3g}, {slack:.3g}"
        for other in (theirs, (traced[name].double() - value).abs().max()):
            assert other <= 4 * slack, f"{name} in PyTorch: {other:.3g}, {slack:.3g}"
    assert ours["counter"] == torchs["counter"] == traced["counter"] == 3 + training
    for t in (*(found[n] for found in (ours, torchs, traced) for n in ("y", "dx")),):
        padding = t.movedim(1, 2)[~keep]
        assert not padding.any() and not padding.isnan().any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["NCL", "NLC"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(dtype: torch.dtype, layout: str, training: bool) -> None:
    activation = {"NCL": "relu", "NLC": None}[layout]
    check(*padded(kind="lengths"), layout, dtype, training, activation=activation)


@pytest.mark.parametrize("layout", ["NCL", "NLC"])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((3, 70, 5), {"activation": "silu"}),  # more channels than a tile
        ((2, 3, 700), {"activation": "relu"}),  # more positions
        ((40, 2, 3), {"momentum": None}),
        ((5, 1, 9), {"momentum": 0.0}),
        ((6, 8, 1), {}),  # a step of a recurrent network
    ],
)
def test_sizes(size: tuple[int, int, int], layout: str, options: dict[str, Any]) -> None:
    check(*padded(*size, kind="mask"), layout, torch.float32, True, **options)


@pytest.mark.parametrize("layout", ["NCL", "NLC"])
def test_many_tiles_in_uneven_splits(layout: str) -> None:
    """Tiles so small that some are all padding, in three splits of two channel blocks."""
    tiles = (8, 1, 4) if layout == "NLC" else (4, 2, 8)
    for kind, training in (("lengths", True), ("mask", False)):
        x, keep = padded(5, 11, 18, kind=kind)
        with force_plan("masked", Config(*tiles, splits=3)):
            check(x, keep, layout, torch.float32, training, activation="silu")


@pytest.mark.parametrize("layout", ["NCL", "NLC"])
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_bytes(layout: str, mode: str) -> None:
    """Padding is not read: of single positions in NLC, of whole tiles in NCL."""
    n, c, length = 4, 4, 1024
    x, _ = padded(n, c, length)
    keep = torch.arange(length) < torch.tensor([[1024], [1], [0], [512]])
    v = vectors(c, torch.float32)
    item, valid = 4, int(keep.sum())
    view = "NLC" if layout == "NLC" else "NCL"
    if view == "NCL":  # one sample by 512 positions
        p = Problem("forward", True, View(n, c, length, False), torch.float32, form="masked")
        config = Masked().heuristic(p, Device.of(torch.device("cpu")))
        assert (config.block_n, config.block_p) == (1, 512)
        valid = 512 * int(keep.reshape(n, -1, 512).any(2).sum())
    live, whole = valid * c * item, x.numel() * item
    with trace() as seen:
        call(x.float(), keep, torch.ones_like(x).float(), layout, mode == "training", v)
    found = [
        {a: moved[0] + moved[1] for a, moved in launch.arguments.items()}
        for launch in seen.launches
    ]
    if mode == "training":
        moments, _, apply, sums, _, gradient = found
        assert moments["x_ptr"] == sums["x_ptr"] == sums["dy_ptr"] == live
    else:
        apply, gradient, _ = found
    assert apply["x_ptr"] == gradient["x_ptr"] == gradient["dy_ptr"] == live
    assert apply["y_ptr"] == gradient["dx_ptr"] == whole
    blocks = -(-c // (64 if layout == "NLC" else 4))
    assert apply["keep_ptr"] == gradient["keep_ptr"] == n * length * blocks


@pytest.mark.parametrize("disabled", ["0", "1"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("valid", [0, 1, 2])
def test_few_valid_positions(
    valid: int, momentum: float | None, disabled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None and one leave the statistics alone; one comes out as the bias, with a zero gradient."""
    monkeypatch.setenv("TRITONNORM_DISABLE", disabled)
    bn = tritonnorm.MaskedBatchNorm1d(3, momentum=momentum)
    nn.init.constant_(bn.bias, 0.5)
    x = torch.randn(2, 3, 4, requires_grad=True)
    lengths = torch.tensor([0, valid])
    y = bn(x, lengths=lengths)
    y.square().sum().backward()
    if valid < 2:
        assert torch.equal(bn.running_mean, torch.zeros(3))
        assert torch.equal(bn.running_var, torch.ones(3))
        assert not x.grad.any()
        torch.testing.assert_close(y[1, :, :valid], torch.full((3, valid), 0.5))
    else:
        share = 0.1 if momentum else 1.0
        expected = 1 - share + share * x[1, :, :2].detach().var(1, unbiased=True)
        torch.testing.assert_close(bn.running_var, expected)
        assert x.grad[1, :, :2].any()
    assert bn.num_batches_tracked == (valid > 1)
    assert not y[:, :, valid:].any() and not y[0].any() and y.isfinite().all()
    assert bn.bias.grad.isfinite().all()


def test_nothing_masked_is_the_batch_norm() -> None:
    x = torch.randn(4, 5, 7)
    ours, theirs = tritonnorm.MaskedBatchNorm1d(5, layout="NLC"), nn.BatchNorm1d(5)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x.mT), theirs(x).mT)
    torch.testing.assert_close(ours(x.mT, lengths=torch.full((4,), 7)), theirs(x).mT)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x.mT, torch.ones(4, 7, dtype=torch.bool)), theirs(x).mT)
    ours.load_state_dict(theirs.state_dict())
    assert "layout=NLC" in repr(ours)


def test_lengths_and_masks_are_the_same() -> None:
    lengths = torch.tensor([3, 0, 9], dtype=torch.int32)
    keep = valid_positions(3, 5, None, lengths, torch.device("cpu"))
    assert keep.sum(1).tolist() == [3, 0, 5]
    bn = tritonnorm.MaskedBatchNorm1d(2, track_running_stats=False, activation="elu")
    x = torch.randn(3, 2, 5)
    assert torch.equal(bn(x, keep), bn(x, lengths=lengths))
    bn.eval()
    assert torch.equal(bn(x, keep.mT.contiguous().mT), bn(x, lengths=lengths))  # of any strides


BAD = [
    ({"mask": torch.ones(3, 5)}, "mask: expected torch.bool"),
    ({"mask": torch.ones(3, 4, dtype=torch.bool)}, r"mask: expected shape \(3, 5\)"),
    ({"lengths": torch.ones(5, dtype=torch.int64)}, r"lengths: expected shape \(3,\)"),
    ({"lengths": torch.ones(3)}, "lengths: expected an integer dtype"),
    ({"lengths": torch.ones(3, dtype=torch.int64, device="meta")}, "lengths: expected on cpu"),
    (
        {"lengths": torch.ones(3).long(), "mask": torch.ones(3, 5, dtype=torch.bool)},
        "mask, lengths: expected one of them, got both",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_masks(options: dict[str, Any], message: str) -> None:
    bn = tritonnorm.MaskedBatchNorm1d(2)
    before = {n: t.clone() for n, t in bn.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        bn(torch.randn(3, 2, 5), **options)
    assert all(torch.equal(t, before[n]) for n, t in bn.state_dict().items())


def test_other_bad_arguments() -> None:
    with pytest.raises(ValueError, match="layout: expected 'NCL' or 'NLC'"):
        tritonnorm.MaskedBatchNorm1d(2, layout="LNC")
    with pytest.raises(ValueError, match="activation"):
        tritonnorm.MaskedBatchNorm1d(2, activation="relux")
    bn, one = tritonnorm.MaskedBatchNorm1d(2), torch.ones(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected 3 dimensions NCL, got 2D"):
        bn(torch.randn(3, 2))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        bn(torch.randn(1, 2, 1), lengths=one)
    with pytest.raises(RuntimeError, match="should contain 3 elements"):
        bn(torch.randn(1, 3, 5), lengths=one)


@pytest.mark.parametrize("size", [(0, 2, 5), (3, 2, 0)])
def test_empty(size: tuple[int, int, int]) -> None:
    bn = tritonnorm.MaskedBatchNorm1d(2)
    y = bn(torch.randn(size), lengths=torch.zeros(size[0], dtype=torch.int64))
    assert y.shape == size and bn.num_batches_tracked == 0


class _Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(3, 4, 1), tritonnorm.MaskedBatchNorm1d(4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.bn(self.conv(x), lengths=lengths)


def test_replace_and_fold_leave_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is more than a scale and shift for each channel: the padding is zero."""
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")
    net = _Padded().eval()
    nn.init.normal_(net.bn.running_mean)
    arguments = (torch.randn(2, 3, 5), torch.tensor([5, 2]))
    expected = net(*arguments)
    for change in (tritonnorm.replace, lambda m: tritonnorm.fold(m, arguments)):
        found, report = change(net)
        assert report.counts == {"left": 1}
        assert torch.equal(found(*arguments), expected)
