"""`functional.batch_norm`: torch's signature, what runs in PyTorch, what bad input gets."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import matrix
from tritonnorm import conditions, functional, settings


def arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of a good call on (4, 3, 5), with changes."""
    generator = torch.Generator().manual_seed(0)
    good = {
        "input": torch.randn(4, 3, 5, generator=generator),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "weight": torch.randn(3, generator=generator),
        "bias": torch.randn(3, generator=generator),
        "training": True,
        "num_batches_tracked": torch.tensor(2),
    }
    return good | changes


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The library's log; nothing has been said before."""
    monkeypatch.setattr(conditions, "_logged", set())
    with caplog.at_level(logging.INFO, logger="tritonnorm"):
        yield caplog


def runs_no_kernel(call: Callable[[], Tensor]) -> Tensor:
    with matrix.ran() as ran:
        result = call()
    assert ran == []
    return result


def test_signature_begins_as_torchs() -> None:
    ours = inspect.signature(functional.batch_norm).parameters
    torchs = inspect.signature(F.batch_norm).parameters
    assert list(ours)[: len(torchs)] == list(torchs)
    for name, parameter in torchs.items():
        assert ours[name].default == parameter.default
        assert ours[name].kind == parameter.kind
    added = list(ours)[len(torchs) :]
    assert added == [
        *("activation", "activation_args", "residual", "num_batches_tracked", "slope"),
    ]
    assert all(ours[name].kind == inspect.Parameter.KEYWORD_ONLY for name in added)


@pytest.mark.parametrize("training", [True, False])
def test_positional_parity(training: bool) -> None:
    """All eight arguments by position, buffers included."""
    a = arguments()
    vectors = [a[n] for n in ("running_mean", "running_var", "weight", "bias")]
    mine, theirs = [v.clone() for v in vectors], [v.clone() for v in vectors]
    with matrix.ran() as ran:
        y = functional.batch_norm(a["input"], *mine, training, 0.3, 1e-3)
    assert ran
    torch.testing.assert_close(y, F.batch_norm(a["input"], *theirs, training, 0.3, 1e-3))
    for ours, torchs in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, torchs)


def test_defaults_are_torchs() -> None:
    x, mean, var = torch.randn(4, 3), torch.randn(3), torch.rand(3)
    torch.testing.assert_close(functional.batch_norm(x, mean, var), F.batch_norm(x, mean, var))


def _fallback(reason: str, **changes: Any) -> Any:
    return pytest.param(reason, changes, id=reason)


VECTORS = ("running_mean", "running_var", "weight", "bias", "num_batches_tracked")
FALLBACKS = [
    _fallback("input is empty", input=torch.randn(0, 3, 5)),
    _fallback("input is empty", input=torch.randn(4, 3, 0)),
    _fallback("input is on meta", input=torch.randn(4, 3, 5, device="meta"),
              **dict.fromkeys(VECTORS)),
    _fallback("weight is torch.float64", weight=torch.randn(3, dtype=torch.float64)),
    _fallback("running_mean is not contiguous", running_mean=torch.zeros(6)[::2]),
]  # fmt: skip


def torchs_answer(call: Callable[[], Tensor]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize(("reason", "changes"), FALLBACKS)
def test_fallback(reason: str, changes: dict[str, Any], log: Any) -> None:
    """What has no kernel gets PyTorch's answer, and says so once."""
    a = arguments(**changes)
    plain = {n: v for n, v in copy.deepcopy(a).items() if n != "num_batches_tracked"}
    expected = torchs_answer(lambda: F.relu(F.batch_norm(**plain)))
    for _ in range(2):
        call = copy.deepcopy(a)
        with matrix.ran() as ran:
            ours = torchs_answer(lambda: functional.batch_norm(**call, activation="relu"))  # noqa: B023
        assert ran == []
        if isinstance(expected, type):
            assert ours is expected
        elif expected.is_meta:
            assert (
                ours.is_meta and ours.shape == expected.shape and ours.stride() == expected.stride()
            )
        else:
            assert torch.equal(ours, expected)
    assert len(log.messages) == 1 and reason in log.messages[0]


def test_fallback_without_the_interpreter(monkeypatch: pytest.MonkeyPatch, log: Any) -> None:
    """A CPU tensor in an ordinary process: PyTorch, with all that a call can have."""
    monkeypatch.setattr(settings, "interpreting", lambda: False)
    a = arguments(residual=torch.randn(4, 3, 5), activation="gelu", momentum=None)
    a["input"].requires_grad_()
    y = runs_no_kernel(lambda: functional.batch_norm(**a))
    mean, var = torch.zeros(3), torch.ones(3)
    z = F.batch_norm(a["input"], mean, var, a["weight"], a["bias"], True, 1.0 / 3.0)
    expected = F.gelu(z + a["residual"])
    assert torch.equal(y, expected) and torch.equal(a["running_mean"], mean)
    assert torch.equal(a["running_var"], var) and a["num_batches_tracked"].item() == 3
    dy = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(t, a["input"], dy) for t in (y, expected))
    assert torch.equal(*ours, *theirs)
    assert log.messages == [
        "batch_norm runs in PyTorch: input is on cpu, and Triton's interpreter is off"
    ]


def test_disabled(monkeypatch: pytest.MonkeyPatch, log: Any) -> None:
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")
    runs_no_kernel(lambda: functional.batch_norm(**arguments()))
    assert log.messages == ["batch_norm runs in PyTorch: TRITONNORM_DISABLE is set"]


def test_without_triton(monkeypatch: pytest.MonkeyPatch, log: Any) -> None:
    monkeypatch.setattr(conditions, "_triton", False)
    runs_no_kernel(lambda: functional.batch_norm(**arguments()))
    assert log.messages == ["batch_norm runs in PyTorch: triton is not installed"]


def test_complex_is_torchs_business() -> None:
    """The same answer or the same type of error as torch."""
    x = torch.randn(4, 3, 5, dtype=torch.complex64)
    theirs = torchs_answer(lambda: F.batch_norm(x, None, None, training=True))
    ours = torchs_answer(lambda: functional.batch_norm(x, None, None, training=True))
    assert torch.equal(ours, theirs) if isinstance(theirs, Tensor) else ours is theirs


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool], ids=str)
def test_integers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"^input: expected a floating-point dtype, got {dtype}"):
        functional.batch_norm(torch.ones(4, 3, dtype=dtype), None, None, training=True)


def test_transforms_fall_back(log: Any) -> None:
    """torch.func sees PyTorch's own operations: a gradient per sample, say."""
    x, mean, var = (
        torch.randn(4, 2, 3, dtype=torch.float64),
        torch.zeros(3).double(),
        torch.ones(3).double(),
    )

    def loss(sample: Tensor) -> Tensor:
        return functional.batch_norm(sample, mean, var, activation="silu").sum()

    ours = torch.func.vmap(torch.func.grad(loss))(x)
    theirs = torch.func.vmap(torch.func.grad(lambda s: F.silu(F.batch_norm(s, mean, var)).sum()))(x)
    torch.testing.assert_close(ours, theirs)
    assert log.messages == ["batch_norm runs in PyTorch: a torch.func transform is active"]


BAD = [
    ("activation", ValueError, {"activation": "swish"}),
    ("activation_args", ValueError, {"activation": "relu", "activation_args": (1.0,)}),
    ("activation_args", ValueError, {"activation_args": (1.0,)}),
    ("input", ValueError, {"input": torch.randn(3)}),
    ("input", ValueError, {"input": torch.ones(4, 3, 5, dtype=torch.int32)}),
    ("residual", ValueError, {"residual": torch.randn(4, 3, 1)}),
    ("residual", ValueError, {"residual": torch.randn(4, 3)}),
    ("residual", ValueError, {"residual": torch.randn(4, 3, 5, dtype=torch.float64)}),
    ("residual", ValueError, {"residual": torch.randn(4, 3, 5, device="meta")}),
    ("weight", RuntimeError, {"weight": torch.randn(4)}),
    ("bias", RuntimeError, {"bias": torch.randn(2)}),
    ("running_mean", RuntimeError, {"running_mean": torch.zeros(1)}),
    ("running_var", RuntimeError, {"running_var": torch.zeros(7)}),
    ("running_mean", ValueError, {"running_mean": torch.zeros(3, device="meta")}),
    ("weight", ValueError, {"weight": torch.randn(3, device="meta")}),
    ("running_mean", RuntimeError, {"running_mean": None, "training": False}),
    ("running_var", RuntimeError, {"running_var": None, "training": False}),
    ("running_var", ValueError, {"running_var": None}),
    ("more than 1 value per channel", ValueError, {"input": torch.randn(1, 3, 1)}),
    ("eps", ValueError, {"eps": 0.0}),
    ("eps", ValueError, {"eps": -1.0, "training": False}),
    ("momentum", ValueError, {"momentum": None, "num_batches_tracked": None}),
    ("num_batches_tracked", ValueError, {"num_batches_tracked": torch.tensor(1.0)}),
    ("num_batches_tracked", ValueError, {"num_batches_tracked": torch.tensor([1, 2])}),
    ("num_batches_tracked", ValueError, {"num_batches_tracked": torch.tensor(1, device="meta")}),
]


@pytest.mark.parametrize(("names", "error", "changes"), BAD)
@pytest.mark.parametrize("interpreting", [True, False])
def test_bad_input(
    names: str,
    error: type[Exception],
    changes: dict[str, Any],
    interpreting: bool,
    monkeypatch: Any,
) -> None:
    """The error names the argument and nothing has changed, with kernels and without."""
    monkeypatch.setattr(settings, "interpreting", lambda: interpreting)
    a = arguments(**changes)
    before = {
        n: (t.clone(), t._version) for n, t in a.items() if isinstance(t, Tensor) and not t.is_meta
    }
    with matrix.ran() as ran, pytest.raises(error, match=names):
        functional.batch_norm(**a)
    assert ran == []
    for name, (value, version) in before.items():
        assert torch.equal(a[name], value) and a[name]._version == version, name


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": torch.randn(4)},
        {"bias": torch.randn(2)},
        {"running_mean": torch.zeros(1)},
        {"running_mean": None, "training": False},
        {"running_var": None, "training": False},
        {"input": torch.randn(1, 3, 1)},
        {"eps": 0.0},
        {"eps": -1.0, "training": False},
    ],
)
def test_types_of_errors_are_torchs(changes: dict[str, Any]) -> None:
    a = arguments(**changes)
    del a["num_batches_tracked"]
    theirs = torchs_answer(lambda: F.batch_norm(**a))
    if not isinstance(theirs, type):
        pytest.skip("this torch computes it")
    with pytest.raises(theirs):
        functional.batch_norm(**a)
