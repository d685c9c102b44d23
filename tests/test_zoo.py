"""bench.zoo: counts calls, finds what is wrong, and writes the page."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.zoo import measure as measuring
from bench.zoo.families import Entry
from bench.zoo.measure import Result, measure
from bench.zoo.table import page
from tests.fold_models import Net, bn, conv


def preactivation(m: Any, x: Tensor) -> Tensor:
    return m.c(m.b(x).relu()) + m.d(m.e(x)).tanh() + m.f(x.tanh()).tanh()


def build() -> tuple[nn.Module, Any]:
    model = Net(preactivation, b=bn(4), c=conv(4, 4), d=bn(4), e=conv(4, 4), f=bn(4))
    return model, (torch.randn(2, 4, 6, 6),)


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")


def test_measure_counts_calls_and_what_is_left_of_them() -> None:
    result = measure(Entry("own", "preactivation", build))
    assert (result.problem, result.raised, result.wrong) == ("", "", False), result
    assert (result.calls, result.shifts) == ((3, 1), 1)
    assert result.error < 1e-12 and sum(result.reasons.values()) == 1
    assert result.decisions == {
        "reduced: scale of bn -> relu -> conv2d": 1,
        "folded: conv2d -> bn": 1,
        "left: ": 1,
    }


def test_measure_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(model: nn.Module, inputs: Any) -> tuple[nn.Module, None]:
        model.e.bias.data += 1e-6
        return model, None

    def raises(model: nn.Module, inputs: Any) -> tuple[nn.Module, None]:
        raise RuntimeError("no")

    monkeypatch.setitem(measuring.TOOLS, "off", off)
    monkeypatch.setitem(measuring.TOOLS, "raises", raises)
    entry = Entry("own", "preactivation", build)
    assert measure(entry, "off").wrong and measure(entry, "off").calls == (3, 3)
    assert measure(entry, "raises").raised.startswith("RuntimeError: no")
    broken = measure(Entry("own", "broken", lambda: (nn.Linear(2, 2), (torch.zeros(3),))))
    assert broken.problem and not broken.wrong


def test_the_page_adds_up() -> None:
    ours = {
        "a/one": Result("a", "one", calls=(10, 2), shifts=3, reasons={"x.y.z stays": 2}),
        "b/two": Result("b", "two", calls=(10, 0), error=1e-3),
        "b/three": Result("b", "three", problem="not built"),
    }
    theirs = {"a/one": Result("a", "one", calls=(10, 5)), "b/two": Result("b", "two", raised="E")}
    text = page({"tritonnorm": ours, "torch.fx": theirs})
    assert "| a | 1 | 1 | 10 | 5 | 3 | 2 | 80.0 % | 0 | 0 |" in text, text
    assert "| **all** | 2 | 2 | 20 | 15 | 3 | 2 | 90.0 % | 1 | 0 |" in text
    assert "| 2 | a layer stays | one 2 |" in text and "- b three: not built" in text
    assert "| tritonnorm | 0 | 18 (90.0 %) | two |" in text
    assert "| torch.fx | 1 | 5 (25.0 %) | none |" in text
