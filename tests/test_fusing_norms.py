"""replace fuses group, layer, instance and RMS norms with what follows them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonnorm
from tests.fold_models import Net, bn, conv
from tests.test_fusing import image, steps_alike
from tritonnorm.norms.swap import NORMS
from tritonnorm.replace import replace, restore

KINDS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "gn": ("group", lambda: nn.GroupNorm(2, 4)),
    "ln": ("layer", lambda: nn.LayerNorm((4, 5, 5))),
    "in": ("instance", lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
    "rms": ("rms", lambda: nn.RMSNorm((5, 5))),
}
every = pytest.mark.parametrize("short", KINDS)


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")


def rules(model: nn.Module, **options: Any) -> dict[str, str]:
    """The rule of each fused norm; the model must compute what it did."""
    theirs = copy.deepcopy(model.double())
    _, report = replace(model, **{"norms": NORMS, **options})
    steps_alike(model, theirs, image())
    return {row.name: row.rule for row in report.rows if row.decision == "fused"}


def why(model: nn.Module, **options: Any) -> str:
    """Why the only norm is not fused."""
    theirs = copy.deepcopy(model.double())
    _, report = replace(model, **{"norms": NORMS, **options})
    (row,) = report.rows
    assert row.decision == "replaced", str(report)
    steps_alike(model, theirs, image())
    return row.reason


FOLLOWING: list[tuple[str, Callable[[Any, Tensor], Tensor]]] = [
    ("silu", lambda m, x: m.a(m.n(m.c(x)))),
    ("add -> silu", lambda m, x: m.a(m.n(m.c(x)) + x)),
    ("add -> relu", lambda m, x: F.relu(x + m.n(m.c(x)), inplace=True)),
    ("add", lambda m, x: torch.softmax(m.n(m.c(x)) + x, 1)),
]


@every
@pytest.mark.parametrize(("rule", "run"), FOLLOWING)
def test_patterns(short: str, rule: str, run: Callable[..., Tensor]) -> None:
    model = Net(run, n=KINDS[short][1](), c=conv(4, 4), a=nn.SiLU())
    assert rules(model, example_inputs=image()) == {"n": f"{short} -> {rule}"}


@every
def test_only_the_kinds_that_are_named(short: str) -> None:
    kind, make = KINDS[short]
    for other in ({"batch"}, set(NORMS) - {kind}):
        model = nn.Sequential(conv(4, 4), make(), nn.SiLU(), bn(4), nn.ReLU())
        fused = rules(model, norms=tuple(other))
        assert fused == {"3": "bn -> relu"}
        assert type(model[1]).__module__.startswith("torch.")
    model = nn.Sequential(conv(4, 4), make(), nn.SiLU(), bn(4), nn.ReLU())
    assert rules(model, norms=(kind,)) == {"1": f"{short} -> silu"}
    assert type(model[3]) is nn.BatchNorm2d


@every
def test_one_call_computes_it(short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(lambda m, x: m.a(m.n(m.c(x)) + x), n=KINDS[short][1](), c=conv(4, 4), a=nn.SiLU())
    replace(model.double(), norms=NORMS)
    calls: list[tuple[Any, ...]] = []
    real = type(model.n).run

    def seen(self: Any, x: Tensor, *rest: Any) -> Tensor:
        calls.append((rest[0] is not None, *rest[1:]))
        return real(self, x, *rest)

    monkeypatch.setattr(type(model.n), "run", seen)
    called: list[object] = []
    monkeypatch.setattr(nn.SiLU, "__call__", lambda *args: called.append(args))
    model(image())
    assert called == []
    assert calls == [(True, "silu", ())]


class Unit(nn.Module):
    """A residual block of a diffusion UNet: norm, swish, convolution, twice; time in between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, channels), nn.GroupNorm(2, channels)
        self.conv1, self.conv2 = conv(channels, channels), conv(channels, channels)
        self.time = nn.Linear(3, channels)
        self.act, self.drop = nn.SiLU(), nn.Dropout(0.0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        h = h + self.time(self.act(t))[:, :, None, None]
        h = self.norm2(h)
        h = self.conv2(self.drop(self.act(h)))
        return x + h


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = Unit(4), Unit(8)
        self.last = nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), conv(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        t = x.mean((1, 2))[:, :3]
        h = self.down(x, t)
        return self.last(self.up(torch.cat((h, x), 1), t))


def test_a_diffusion_network() -> None:
    found = rules(UNet(), example_inputs=image())
    assert found == dict.fromkeys(
        ("down.norm1", "down.norm2", "up.norm1", "up.norm2", "last.0"), "gn -> silu"
    )


class After(nn.Module):
    """Norm after the sublayer, as in Swin v2: ``x + norm(sublayer(x))``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp, self.path = norm, nn.Linear(5, 5), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(self.norm(self.mlp(x)))


def test_additions_after_rows_and_with_batch_norms() -> None:
    assert rules(After(nn.LayerNorm(5))) == {"norm": "ln -> add"}
    assert rules(After(nn.RMSNorm(5))) == {"norm": "rms -> add"}
    both = Net(
        lambda m, x: F.relu(m.n(m.c(x)) + m.b(x)), n=nn.GroupNorm(2, 4), c=conv(4, 4), b=bn(4)
    )
    assert list(rules(both).values()) == ["bn -> add -> relu"]
    inner = nn.Sequential(conv(4, 4), nn.GroupNorm(2, 4))
    assert rules(Net(lambda m, x: F.relu(m.i(x) + x), i=inner)) == {"i.1": "gn -> add -> relu"}


def test_what_is_not_fused() -> None:
    def net(run: Callable[..., Any]) -> nn.Module:
        return Net(run, n=nn.GroupNorm(2, 4), c=conv(4, 4), a=nn.SiLU())

    def twice(m: Any, x: Tensor) -> Tensor:
        y = m.n(x)
        return y + F.silu(y)

    assert "goes to" in why(net(twice))
    assert "goes to the result" in why(net(lambda m, x: m.n(x)))
    assert "more than once" in why(net(lambda m, x: m.a(m.n(m.a(m.n(x))))))
    hooked = net(lambda m, x: m.a(m.n(x)))
    hooked.a.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    assert "hook" in why(hooked)

    class Own(nn.GroupNorm):
        """A subclass, as BiT's and guided diffusion's."""

    model = nn.Sequential(conv(4, 4), Own(2, 4), nn.SiLU())
    _, report = replace(model, norms=NORMS)
    assert report.counts == {"left": 1} and "not exactly torch's" in report.rows[0].reason


@every
def test_hooks_and_other_settings_later_count(short: str) -> None:
    model = Net(lambda m, x: m.a(m.n(m.c(x)) + x), n=KINDS[short][1](), c=conv(4, 4), a=nn.SiLU())
    assert rules(model)
    theirs = restore(copy.deepcopy(model))
    seen: list[Tensor] = []
    handle = model.n.register_forward_hook(lambda m, x, y: seen.append(y))
    steps_alike(model, theirs, image())
    assert len(seen) == 2
    handle.remove()
    for m in (model, theirs):
        m.n.eps = 0.5
        m.a = nn.ReLU()
    steps_alike(model, theirs, image())


def test_broadcast_additions_run_as_they_are_written() -> None:
    model = Net(lambda m, x: F.relu(m.n(m.c(x)) + x[:, :1]), n=nn.GroupNorm(2, 4), c=conv(4, 4))
    assert rules(model) == {"n": "gn -> add -> relu"}


def test_under_autocast_a_residual_that_is_written_to_stays_narrow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tritonnorm.fusing.forward import fused_add

    def run(self: Any, x: Tensor, residual: Tensor | None, *rest: Any) -> Tensor:
        y = self(x).float()  # as on CUDA, where autocast widens layer norms
        return y if residual is None else y + residual.float()

    norm = tritonnorm.LayerNorm(5)
    monkeypatch.setattr(tritonnorm.LayerNorm, "run", run)
    monkeypatch.setattr(tritonnorm.LayerNorm, "forward", nn.LayerNorm.forward)
    x = image().float()
    with torch.autocast("cpu", torch.bfloat16):
        half = x.bfloat16()
        assert fused_add(norm, half, half.clone(), None, (), "+=", False).dtype == torch.bfloat16
        assert fused_add(norm, half, half.clone(), None, (), "+", False).dtype == torch.float32


@every
def test_copies_files_and_back(short: str) -> None:
    model = nn.Sequential(conv(4, 4), KINDS[short][1](), nn.SiLU())
    theirs, keys = copy.deepcopy(model.double()), list(model.state_dict())
    replace(model, norms=NORMS)
    assert list(model.state_dict()) == keys
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.forward.norms == (again[1],)
        steps_alike(again, copy.deepcopy(theirs), image())
    restore(model)
    assert "forward" not in model.__dict__ and vars(model[1]).keys() == vars(theirs[1]).keys()
    assert [type(m) for m in model] == [type(m) for m in theirs]
    _, report = replace(model, norms=NORMS, dry_run=True)
    assert report.rows[0].decision == "fused" and type(model[1]) is type(theirs[1])


def test_instance_norms_of_one_sample_and_of_another_width() -> None:
    x, y = image(), torch.randn(3, 5, 5, dtype=torch.float64)
    for width in (4, 3):
        theirs = nn.InstanceNorm2d(width).double()
        ours = tritonnorm.InstanceNorm2d(width).double()
        for given in (x[0], x) if width == 4 else (y, y[None]):
            expected = F.silu(theirs(given) + given)
            torch.testing.assert_close(ours.run(given, given, "silu", ()), expected)
    with pytest.warns(UserWarning, match="num_features"):
        assert ours.run(x, None, "relu", ()).min() == 0


def test_the_check_in_float64_sees_other_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tritonnorm.GroupNorm.run

    def off(self: Any, x: Tensor, residual: Any, activation: Any, args: Any) -> Tensor:
        return real(self, x, residual, activation, args) + 1e-6

    monkeypatch.setattr(tritonnorm.GroupNorm, "run", off)
    model = nn.Sequential(conv(4, 4), nn.GroupNorm(2, 4), nn.SiLU())
    _, report = replace(model, norms=NORMS, example_inputs=image().float())
    assert "was dropped: an output differs" in report.rows[0].reason


@every
def test_a_learned_slope_runs_with_batch_norms_only(short: str) -> None:
    behind = Net(lambda m, x: m.a(m.n(m.c(x))), n=KINDS[short][1](), c=conv(4, 4), a=nn.PReLU(4))
    assert why(behind).endswith("a is a PReLU, which runs with batch norms only")
    added = Net(lambda m, x: m.a(m.n(m.c(x)) + x), n=KINDS[short][1](), c=conv(4, 4), a=nn.PReLU(4))
    assert rules(added) == {"n": f"{short} -> add"}
