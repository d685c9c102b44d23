"""SyncBatchNorm on 2 and 3 gloo processes, next to batch norm of the whole batch in this one."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tritonnorm
from bench.lab.traffic import trace
from tests import matrix
from tests.cases import LAYOUTS
from tests.ranks import Ranks, parts
from tests.test_observe import rehearsed
from tritonnorm import SyncBatchNorm, force_plan
from tritonnorm.activation import apply, resolve
from tritonnorm.device import KNOWN, simulated
from tritonnorm.observe import observe
from tritonnorm.tune.key import Key


@dataclass(frozen=True)
class Case:
    """Everything about a call but the sizes of the batches."""

    activation: str | None = None
    args: tuple[float, ...] = ()
    residual: bool = False
    shape: tuple[int, ...] = (5, 3, 4)  # C and positions
    layout: str = "contiguous"
    momentum: float | None = 0.1
    affine: bool = True
    track: bool = True
    dtype: torch.dtype = torch.float64
    needs: str = "xrwb"


CASES = (
    Case(),
    Case("relu", residual=True),  # a mask is kept
    Case("silu", residual=True, layout="channels_last"),  # the residual is kept
    Case("leaky_relu", (0.2,), layout="crop", momentum=None),
    Case("gelu", shape=(3,), affine=False),
    Case("elu", (0.5,), shape=(2, 2, 3, 2), track=False),
    Case("relu", residual=True, needs="r"),
    Case(residual=True, needs="wb"),
    Case(residual=True, needs="x", shape=(9, 2, 2), layout="channels_last"),
)


def batch(sizes: tuple[int, ...], case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Input, residual and upstream gradient of all ranks together."""
    generator = torch.Generator().manual_seed(sum(sizes))
    shape = (sum(sizes), *case.shape)
    x, z, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return tuple(t.to(case.dtype) for t in (2 * x + 3, z, dy))  # type: ignore[return-value]


def step(module: Any, x: Tensor, z: Tensor, dy: Tensor, case: Case) -> dict[str, Tensor]:
    """Output, gradients and buffers of one training step of a module of ours or torch's."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.arange(p.numel()) - 1.5)
    leaves = {"x": x, "r": z, "w": module.weight, "b": module.bias}
    asked = {n: t for n, t in leaves.items() if n in case.needs and t is not None}
    for name, leaf in leaves.items():
        if leaf is not None:
            leaf.requires_grad_(name in asked)
    if not case.residual:
        asked.pop("r", None)
    if isinstance(module, SyncBatchNorm):
        y = module(x, z if case.residual else None)
    else:
        v = module(x)
        y = apply(*resolve(case.activation, case.args), v + z if case.residual else v)
    gradients = torch.autograd.grad(y, list(asked.values()), dy)
    found = dict(zip([f"d{n}" for n in asked], gradients, strict=True))
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    return {n: t.detach() for n, t in {"y": y, **found, **buffers}.items()}


def of_rank(
    rank: int, group: Any, sizes: tuple[int, ...], cases: tuple[Case, ...], way: str
) -> list[dict[str, Tensor]]:
    with pytest.MonkeyPatch.context() as patch, force_plan("split"):
        fallback = way == "fallback" or (way == "mixed" and rank == 1)
        patch.setenv("TRITONNORM_DISABLE", str(int(fallback)))
        answers = []
        for case in cases:
            own = [t[parts(sizes)[rank]].clone() for t in batch(sizes, case)]
            x = LAYOUTS[case.layout](own[0]).detach()
            bn = SyncBatchNorm(
                case.shape[0], 1e-5, case.momentum, case.affine, case.track, group,
                dtype=case.dtype, activation=case.activation, activation_args=case.args,
            )  # fmt: skip
            with matrix.poisoned():
                answers.append(step(bn, x, *own[1:], case))
    return answers


@pytest.mark.parametrize(
    ("sizes", "way"),
    [
        ((2, 3), "kernels"),
        ((4, 0, 3), "kernels"),
        ((2, 3), "fallback"),
        ((4, 0, 3), "fallback"),
        ((1, 2, 3), "mixed"),  # one rank in PyTorch, two by kernels
    ],
    ids=str,
)
def test_one_batch_on_several_ranks(pool: Ranks, sizes: tuple[int, ...], way: str) -> None:
    answers = pool.run(of_rank, sizes, CASES, way, world=len(sizes))
    for i, case in enumerate(CASES):
        whole = torch.nn.SyncBatchNorm(
            case.shape[0], 1e-5, case.momentum, case.affine, case.track, dtype=case.dtype
        )
        expected = step(whole, *batch(sizes, case), case)
        ranks = [answer[i] for answer in answers]
        for name, value in expected.items():
            found = [rank[name] for rank in ranks]
            if name in ("y", "dx", "dr"):
                found = [torch.cat(found)]
            elif name in ("dw", "db"):
                found = [torch.stack(found).sum(0)]
            for each in found:
                torch.testing.assert_close(
                    each, value, rtol=0, atol=1e-12, msg=lambda m, c=case, n=name: f"{c} {n}: {m}"
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes(pool: Ranks, dtype: torch.dtype) -> None:
    """Statistics are float32: the result is the rounded one of the whole batch by our kernels."""
    case, sizes = Case("silu", residual=True, dtype=dtype), (2, 3)
    (first,), (second,) = pool.run(of_rank, sizes, (case,), "kernels", world=2)
    whole = tritonnorm.BatchNorm2d(case.shape[0], dtype=dtype)
    expected = step(whole, *batch(sizes, case), case)
    for name in ("y", "dx", "dr"):
        found = torch.cat([first[name], second[name]])
        assert found.dtype == dtype
        # the sum may round another way: a few ulp of the dtype
        torch.testing.assert_close(
            found, expected[name], rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
        )
    torch.testing.assert_close(first["running_var"], second["running_var"], rtol=0, atol=0)


class Operators(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        return sum(part in name for name in self.seen)


def collectives_of_rank(rank: int, group: Any, way: str) -> dict[str, list[int]]:
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITONNORM_DISABLE", str(int(way == "fallback")))
        for name, momentum, training, needs in (
            ("training", None, True, "xw"),
            ("no dx", 0.1, True, "w"),
            ("eval", 0.1, False, "xw"),
        ):
            bn = SyncBatchNorm(4, momentum=momentum, process_group=group, activation="relu")
            bn.train(training).weight.requires_grad_("w" in needs)
            x = torch.randn(rank, 4, 3).requires_grad_("x" in needs)  # rank 0 has nothing
            with Operators() as forward:
                y = bn(x)
            dy = torch.ones_like(y)
            with Operators() as backward:
                y.backward(dy)
            counts = []
            for operators in (forward, backward):
                every = operators.count("c10d") - operators.count("wait_tensor")
                named = operators.count("all_gather") + operators.count("all_reduce")
                assert every == named, operators.seen
                assert not operators.count("local_scalar") and not operators.count("nonzero")
                counts.append(every)
            found[name] = counts
    return found


@pytest.mark.parametrize("way", ["kernels", "fallback"])
def test_one_collective_in_each_direction_and_no_host_sync(pool: Ranks, way: str) -> None:
    expected = {"training": [1, 1], "no dx": [1, 0], "eval": [0, 0]}
    assert pool.run(collectives_of_rank, way) == [expected] * 3


def nothing_of_rank(rank: int, group: Any) -> list[Tensor]:
    bn = SyncBatchNorm(4, process_group=group)
    x = torch.randn(0, 4, 3, requires_grad=True)
    bn(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    return [bn.running_mean, bn.running_var, bn.num_batches_tracked, bn.weight.grad]


def test_nothing_on_any_rank_moves_no_statistics(pool: Ranks) -> None:
    for mean, var, counter, dweight in pool.run(nothing_of_rank):
        assert mean.eq(0).all() and var.eq(1).all() and counter == 1 and dweight.eq(0).all()


SECOND = (Case("silu", residual=True), Case("leaky_relu", (0.2,), residual=True), Case())


def twice(module: Any, x: Tensor, z: Tensor, dy: Tensor, case: Case) -> list[Tensor]:
    """Gradients of a function of the gradients."""
    leaves = [t.requires_grad_() for t in (x, z, dy)] + [module.weight, module.bias]
    if isinstance(module, SyncBatchNorm):
        y = module(x, z)
    else:
        y = apply(*resolve(case.activation, case.args), module(x) + z)
    first = torch.autograd.grad(y, [leaves[0], leaves[1], *leaves[3:]], dy, create_graph=True)
    local = first[0].pow(3).sum() + first[1].pow(2).sum()
    return [t.detach() for t in torch.autograd.grad(local, [leaves[0], leaves[2], leaves[3]])]


def twice_of_rank(rank: int, group: Any, sizes: tuple[int, ...], way: str) -> list[list[Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITONNORM_DISABLE", str(int(way == "fallback")))
        answers = []
        for case in SECOND:
            own = [t[parts(sizes)[rank]].clone() for t in batch(sizes, case)]
            bn = SyncBatchNorm(
                5, process_group=group, dtype=torch.float64, activation=case.activation,
                activation_args=case.args,
            )  # fmt: skip
            answers.append(twice(bn, *own, case))
    return answers


@pytest.mark.parametrize("way", ["kernels", "fallback"])
def test_second_derivatives(pool: Ranks, way: str) -> None:
    sizes = (2, 3)
    first, second = pool.run(twice_of_rank, sizes, way, world=2)
    for i, case in enumerate(SECOND):
        whole = torch.nn.SyncBatchNorm(5, dtype=torch.float64)
        dx, ddy, dweight = twice(whole, *batch(sizes, case), case)
        close = {"rtol": 0, "atol": 1e-11}
        torch.testing.assert_close(torch.cat([first[i][0], second[i][0]]), dx, **close)
        torch.testing.assert_close(torch.cat([first[i][1], second[i][1]]), ddy, **close)
        torch.testing.assert_close(first[i][2] + second[i][2], dweight, **close)


def compiled_of_rank(rank: int, group: Any, way: str) -> list[bool]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own
        patch.setenv("TRITONNORM_DISABLE", str(int(way == "fallback")))
        torch._dynamo.reset()
        eager = SyncBatchNorm(4, process_group=group, activation="relu", dtype=torch.float64)
        module = copy.copy(eager)
        module.__dict__["_buffers"] = {n: b.clone() for n, b in eager.named_buffers()}
        whole = way == "kernels" or torch.__version__ >= "2.13"
        compiled = torch.compile(module, backend="aot_eager", fullgraph=whole, dynamic=True)
        same = []
        for n in (2, 3):
            x = torch.randn(n + rank, 4, 7, dtype=torch.float64)
            z, outcomes = torch.randn_like(x), []
            for f, of in ((eager, eager), (compiled, module)):
                own = x.clone().requires_grad_()
                with torch._dynamo.config.patch(error_on_recompile=whole):  # one graph for all
                    y = f(own, z)
                grads = torch.autograd.grad(y.sin().sum(), (own, eager.weight))
                outcomes.append((y, *grads, *of.buffers()))
            for a, b in zip(*outcomes, strict=True):
                same.append(bool(torch.allclose(a, b, rtol=0, atol=1e-13)))
    return same


@pytest.mark.parametrize("way", ["kernels", "fallback"])
def test_compiled_with_its_collectives(pool: Ranks, way: str) -> None:
    assert all(all(same) for same in pool.run(compiled_of_rank, way, world=2))


def traced_of_rank(rank: int, group: Any) -> list[Tensor]:
    net = torch.nn.Sequential(SyncBatchNorm(4, process_group=group), torch.nn.ReLU())
    traced = torch.fx.symbolic_trace(net)
    torch.manual_seed(rank)
    x = torch.randn(3, 4, 2)
    return [traced(x).detach(), net(x).detach()]


def test_a_traced_model_still_synchronises(pool: Ranks) -> None:
    for traced, eager in pool.run(traced_of_rank, world=2):
        torch.testing.assert_close(traced, eager)


def outside_of_rank(rank: int, group: Any) -> list[Tensor]:
    two = torch.distributed.new_group([0, 1])
    x = torch.randn(2, 4, 3)
    bn = SyncBatchNorm(4, process_group=two)
    return [bn(x).detach(), torch.nn.BatchNorm1d(4)(x).detach()]


def test_a_rank_outside_the_group_is_alone(pool: Ranks) -> None:
    *inside, outside = pool.run(outside_of_rank)
    torch.testing.assert_close(*outside)
    assert not any(torch.allclose(*rank) for rank in inside)


def errors_of_rank(rank: int, group: Any) -> list[str]:
    bn = SyncBatchNorm(4, process_group=group)
    x, messages = torch.randn(2, 4, 3), []
    for bad in ((torch.randn(4),), (torch.randn(2, 0, 3),), (torch.randn(2, 5, 3),),
                (x, torch.randn(2, 4, 1)), (x.int(),)):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError)) as caught:
            bn(*bad)
        messages.append(str(caught.value))
    assert bn.num_batches_tracked.item() == 0
    return messages


def test_bad_input_is_refused_before_any_collective(pool: Ranks) -> None:
    for messages in pool.run(errors_of_rank, world=2):
        for message, text in zip(
            messages, ("at least 2D", "channel", "running_mean", "residual", "input"), strict=True
        ):
            assert text in message


def observed_of_rank(rank: int, group: Any) -> tuple[list[str], list[str], list[Key], str]:
    bn = SyncBatchNorm(8, process_group=group, activation="relu")
    x = torch.randn(2 + rank, 8, 5, 5, requires_grad=True)
    with simulated(KNOWN["h200"]):
        calls, said = observe(bn, x, modes=("train",)), str(tritonnorm.explain(bn, x))
        with trace() as seen:
            bn(x).sum().backward()
        keys = [Key.of(p) for call in calls for p, _ in call.problems]
        return rehearsed(calls), [launch.kernel for launch in seen.launches], keys, said


def test_a_rank_is_observed(pool: Ranks) -> None:
    for planned, ran, keys, said in pool.run(observed_of_rank, world=2):
        assert planned == ran and len(ran) == 7 and all("synced" in k.flags for k in keys)
        assert len(set(keys)) == 3 and keys[2] == keys[3]  # both stages of a backward ask alike
        assert said.count("-> split (formula)") == 3 and "resident" not in said
