"""The providers: torch's own run; modules of the same interface stand for other libraries."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.call import Call
from bench.check import WrongResult, check
from bench.providers import DEFAULT, PROVIDERS, select
from bench.providers.compiled import Compiled
from bench.runner import Run
from bench.session import present
from bench.suites import MODES, Case


def case(mode: str = "forward+backward", **options: object) -> Case:
    given = {"shape": (4, 8, 3, 3), "channels_last": True, "dtype": torch.float16} | options
    return Case(Call(**given, training=mode != "inference"), mode)


def tensors(one: Case):
    return one.call.tensors(generator=torch.Generator().manual_seed(0))


def passes(name: str, one: Case) -> float:
    """Its error, after the checks that the runner makes."""
    provider = PROVIDERS[name]
    assert provider.absent() is None and provider.declines(one) is None
    return check(one, provider, provider.setup(one), tensors(one))


def test_names() -> None:
    assert [provider.name for provider in select(DEFAULT)] == list(DEFAULT)
    assert select(["eager", "all"])[0].name == "eager" and len(select(["all"])) == len(PROVIDERS)
    with pytest.raises(ValueError, match=r"providers: expected all or of tritonnorm, .* 'egaer'"):
        select(["egaer"])


def test_the_absent_say_why() -> None:
    here, away = present(select(["tritonnorm", "eager", "cudnn", "apex", "flag_gems"]))
    assert [provider.name for provider in here] == ["tritonnorm", "eager"]
    reasons = {row.provider: row.reason for row in away}
    assert reasons["cudnn"] == "cuDNN is not available"
    assert reasons["apex"] == "apex.contrib.groupbn does not import: No module named 'apex'"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["tritonnorm", "eager"])
def test_ours_and_eager(name: str, mode: str) -> None:
    assert passes(name, case(mode, activation="silu", residual=True)) > 0


def test_eager_names_the_backend() -> None:
    one = case()
    assert PROVIDERS["eager"].plan(one, tensors(one)) == "native"


@pytest.mark.parametrize("mode", ["backward", "inference"])
def test_the_compiled_can_be_called_again(mode: str) -> None:
    provider = Compiled("compile", "without Inductor", backend="aot_eager")
    one = case(mode, activation="relu", residual=True)
    forward = provider.setup(one)
    assert check(one, provider, forward, tensors(one)) > 0
    run = Run(provider, one, forward, tensors(one))
    first, second = run(), run()  # a backward keeps its graph
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch._dynamo.reset()


def test_compile_options_reach_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr(torch, "compile", lambda f, **options: seen.update(options) or f)
    for name in ("compile", "compile-max", "compile-coop"):
        PROVIDERS[name].setup(case())
        assert seen.pop("fullgraph") is True and seen.pop("dynamic") is False
    assert seen == {
        "mode": "max-autotune-no-cudagraphs",
        "options": {"triton.cooperative_reductions": True},
    }


def put(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """Make modules importable, parents included, with these members in the last."""
    parts = name.split(".")
    for i in range(len(parts)):
        module = types.ModuleType(".".join(parts[: i + 1]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for key, value in members.items():
        setattr(module, key, value)


class NHWC(nn.modules.batchnorm._BatchNorm):
    """What apex.contrib.groupbn.BatchNorm2d_NHWC is: physically NHWC in and out, fp16."""

    def __init__(self, num_features: int, fuse_relu: bool = False) -> None:
        super().__init__(num_features)
        self.fuse_relu = fuse_relu

    def cuda(self, device: object = None) -> NHWC:
        return self

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        assert x.is_contiguous() and x.dtype == torch.float16
        y = F.batch_norm(
            x.permute(0, 3, 1, 2),
            *(self.running_mean, self.running_var, self.weight, self.bias, self.training),
        ).permute(0, 2, 3, 1)
        y = y if z is None else y + z
        return y.relu() if self.fuse_relu else y


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("activation", "residual"), [(None, False), ("relu", False), ("relu", True)]
)
def test_apex(monkeypatch: pytest.MonkeyPatch, mode: str, activation, residual) -> None:
    put(monkeypatch, "apex.contrib.groupbn", BatchNorm2d_NHWC=NHWC)
    assert passes("apex", case(mode, activation=activation, residual=residual)) > 0
    declined = [
        case(dtype=torch.bfloat16),
        case(channels_last=False),
        case(shape=(4, 6, 3, 3)),
        case(activation="silu"),
        case(residual=True),
    ]
    assert all(PROVIDERS["apex"].declines(one) for one in declined)


class Attorch:
    """The interface of attorch's BatchNormAutoGrad."""

    @staticmethod
    def apply(
        input: Tensor,
        training: bool,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        track_running_stats: bool,
        pre_act_add: Tensor | None,
        act_func: str | None,
    ) -> Tensor:
        assert track_running_stats
        y = F.batch_norm(*(input, running_mean, running_var, weight, bias, training, momentum, eps))
        y = y if pre_act_add is None else y + pre_act_add
        return y if act_func is None else getattr(F, act_func)(y)


def test_attorch(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "attorch.batch_norm_layer", BatchNormAutoGrad=Attorch)
    for mode in MODES:
        assert passes("attorch", case(mode, activation="gelu", residual=True)) > 0
    assert PROVIDERS["attorch"].declines(case(activation="hardswish")) == "has no hardswish"
    assert PROVIDERS["attorch"].declines(case(shape=(1, 2, 3, 4, 5), channels_last=False))


def test_flag_gems_is_on_for_its_own_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    on: list[bool] = [False]

    @contextlib.contextmanager
    def use_gems() -> Iterator[None]:
        on[0] = True
        yield
        on[0] = False

    put(monkeypatch, "flag_gems", use_gems=use_gems)
    seen: list[bool] = []
    right = F.batch_norm
    monkeypatch.setattr(F, "batch_norm", lambda *a, **k: seen.append(on[0]) or right(*a, **k))
    assert passes("flag_gems", case()) > 0
    assert seen == [True] and on == [False]


def inplace_abn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    activation_param: float,
) -> Tensor:
    """The interface of inplace_abn.inplace_abn: works in x, with |weight| + eps."""
    with torch.no_grad():
        y = F.batch_norm(
            *(x, running_mean, running_var, weight.abs() + eps, bias, training, momentum, eps)
        )
        if activation == "leaky_relu":
            y = F.leaky_relu(y, activation_param)
        return x.copy_(y)


def test_inplace_abn_overwrites_and_is_measured_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "inplace_abn", inplace_abn=inplace_abn)
    one = case("forward", activation="leaky_relu")
    t = tensors(one)
    before = t.x.detach().clone()
    provider = PROVIDERS["inplace_abn"]
    assert check(one, provider, provider.setup(one), t) > 0
    assert torch.equal(t.x, before)  # the check puts it back, for the next provider
    assert passes("inplace_abn", case("inference")) > 0
    for declined in (
        case("backward", activation="leaky_relu"),
        case("forward", activation="relu"),
        case("forward", residual=True),
        case("forward", dtype=torch.bfloat16),
    ):
        assert provider.declines(declined)


def test_a_peer_of_another_interface_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @staticmethod
        def apply(*arguments: object) -> Tensor:
            return arguments[0] * 2

    put(monkeypatch, "attorch.batch_norm_layer", BatchNormAutoGrad=Broken)
    with pytest.raises(WrongResult, match="wrong y"):
        passes("attorch", case("inference"))
