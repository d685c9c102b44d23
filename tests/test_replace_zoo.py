"""replace on other libraries' models: what is fusable is fused, and a step is the original's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo import __main__ as command
from bench.zoo import replacing
from bench.zoo.consumers import fusable
from bench.zoo.families import Entry, entries
from bench.zoo.replacing import Replaced, measure
from bench.zoo.replacing_table import page
from tests.fold_models import Net, bn

# name: batch norms that can be fused by the operations of a run, those that are, and others
SAMPLE: dict[str, tuple[int, int, int]] = {
    "pytorchcv/densenet_cifar": (39, 39, 0),
    "pytorchcv/diapreresnet": (10, 10, 0),
    "pytorchcv/diaresnet_cifar": (12, 12, 0),
    "pytorchcv/espnetv2": (58, 58, 0),
    "pytorchcv/fdmobilenet": (23, 23, 0),
    "pytorchcv/fractalnet_cifar": (35, 35, 0),
    "pytorchcv/lwopenpose_cmupan": (33, 33, 0),
    "pytorchcv/octresnet": (15, 8, 0),
    "pytorchcv/resdropresnet_cifar": (19, 10, 0),
    "pytorchcv/resnesta": (19, 19, 0),
    "pytorchcv/sepreresnet_cifar": (19, 19, 0),
    "pytorchcv/seresnet_cub": (8, 8, 0),
    "pytorchcv/shakedropresnet_cifar": (12, 10, 0),
    "pytorchcv/shufflenet": (30, 30, 0),
    "pytorchcv/wrn1bit_cifar": (19, 19, 0),
    "transformers/beit_segmentation": (14, 14, 0),
    "transformers/data2vec_segmentation": (14, 14, 0),
    "transformers/dpt_batch_norm": (16, 16, 2),
    "transformers/glpn": (6, 6, 0),
    "transformers/informer": (2, 2, 0),
    "transformers/mobilevitv2": (17, 17, 0),
    "transformers/pp_lcnet": (27, 27, 0),
    "transformers/segformer": (1, 0, 0),
    "transformers/textnet": (36, 36, 0),
    "transformers/wav2vec2_conformer": (3, 3, 0),
}


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")


def uses(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    y = m.b(y) + m.c(y)
    z = m.d(y)
    z = z * torch.sigmoid(z)
    w = m.e(z)
    return m.p(m.f(w.relu() + w.tanh()))


def build() -> tuple[nn.Module, Any]:
    return Net(uses, **{name: bn(4) for name in "abcdef"}, p=nn.PReLU()), (torch.randn(2, 4, 5, 5),)


def test_what_is_fusable_is_seen_by_the_operations() -> None:
    model, inputs = build()
    model.eval()
    found = fusable(model, lambda: model(*inputs))
    names = {m: name for name, m in model.named_modules()}
    groups = sorted("".join(sorted(names[m] for m in group)) for group in found.groups)
    assert groups == ["a", "bc", "d", "f"]  # e has two users
    assert {names[m] for group in found.slopes for m in group} == {"f"}


def test_measure() -> None:
    result = measure(Entry("own", "uses", build))
    assert (result.problem, result.raised, result.wrong) == ("", "", False), result
    assert (result.norms, result.fusable, result.slopes, result.fused) == (6, 4, 1, 4)
    assert set(result.errors) == {"eval", "train", "gradients", "statistics"}
    assert not result.reasons


def test_measure_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import tritonnorm

    real = tritonnorm.replace

    def off(model: nn.Module, **options: Any) -> Any:
        found = real(model, **options)
        model.a.running_var += 1e-6  # type: ignore[union-attr]
        return found

    def raises(model: nn.Module, **options: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(replacing.tritonnorm, "replace", off)
    result = measure(Entry("own", "uses", build))
    assert result.wrong and result.errors["eval"] > 1e-8 and result.errors["statistics"] > 1e-8
    monkeypatch.setattr(replacing.tritonnorm, "replace", raises)
    assert measure(Entry("own", "uses", build)).raised.startswith("RuntimeError: no")


def test_the_page_adds_up() -> None:
    results = {
        "a/one": Replaced("a", "one", norms=9, fusable=8, fused=6, slopes=1, more=1,
                          reasons={"x; not fused: q.w is a PReLU of another class": 2},
                          errors={"eval": 1e-12}, seconds=1.0),
        "b/two": Replaced("b", "two", norms=2, fusable=2, fused=2, errors={"train": 1e-3}),
        "b/three": Replaced("b", "three", problem="not built"),
    }  # fmt: skip
    text = page(results, 4)
    assert "| a | 1 | 1 | 9 | 8 | 1 | 6 | 75.0 % | 1 | 0 | 0 |" in text, text
    assert "| **all** | 2 | 2 | 11 | 10 | 1 | 8 | 80.0 % | 1 | 1 | 0 |" in text
    assert "| 2 | a module is a PReLU of another class | one 2 |" in text
    assert "**3 of 4 models**" in text and "- b three: not built" in text
    assert "- b two: errors {'train': 0.001}" in text


def test_the_page_is_that_of_the_stored_rows() -> None:
    rows = command.replaced(command.ROOT / "bench" / "zoo" / "replace.jsonl")
    text = (command.ROOT / "docs" / "coverage_replace.md").read_text(encoding="utf-8")
    written = page(rows, len(rows)).splitlines()  # PyTorch's version is that of the machine
    there, wanted = (
        [x for x in lines if "PyTorch 2." not in x] for lines in (text.splitlines(), written)
    )
    assert there == wanted and len(rows) > 180


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_models(name: str) -> None:
    library, _, short = name.partition("/")
    found = [e for e in entries() if (e.library, e.name) == (library, short)]
    if not found:
        pytest.skip(f"{library} is not installed")
    result = measure(found[0])
    assert (result.problem, result.raised, result.wrong) == ("", "", False), result
    assert (result.fusable, result.fused, result.more) == SAMPLE[name], result.reasons
