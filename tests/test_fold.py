"""fold: what folds is exact, options do what they say, and nothing else changes."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tritonnorm
from tests.fold_models import LIMIT, Chain, X, error, rand, reason, trained
from tritonnorm.fold import fold

LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), (2, 4, 7)),
    "conv2d": (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), X),
    "conv3d": (nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), (2, 3, 4, 4, 4)),
    "no bias": (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), X),
    "groups": (nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), (2, 4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (2, 4, 6, 6)),
    "stride": (nn.Conv2d(3, 4, 3, stride=2, dilation=2, padding=2), nn.BatchNorm2d(4), X),
    "reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), X),
    "replicate": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), nn.BatchNorm2d(4), X),
    "circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4), X),
    "same": (nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), X),
    "transpose1d": (nn.ConvTranspose1d(4, 4, 3, groups=2), nn.BatchNorm1d(4), (2, 4, 5)),
    "transpose2d": (nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), X),
    "transpose square": (nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4), (2, 4, 5, 5)),
    "transpose groups": (nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), (2, 4, 5, 5)),
    "transpose 4 to 6": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transpose3d": (nn.ConvTranspose3d(4, 4, 2, groups=4), nn.BatchNorm3d(4), (2, 4, 3, 3, 3)),
    "linear": (nn.Linear(5, 4), nn.BatchNorm1d(4), (6, 5)),
    "linear no bias": (nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4), (6, 5)),
    "affine=False": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), X),
    "linear affine=False": (nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), (6, 5)),
    "no beta": (nn.Conv2d(3, 4, 3), tritonnorm.BatchNorm2d(4, bias=False), X),
    "sync": (nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), X),
    "ours": (nn.Conv2d(3, 4, 3), tritonnorm.BatchNorm2d(4), X),
    "ours relu": (nn.Conv2d(3, 4, 3), tritonnorm.BatchNorm2d(4, activation="relu"), X),
    "ours elu": (
        nn.Conv2d(3, 4, 3),
        tritonnorm.BatchNorm2d(4, activation="elu", activation_args=(0.3,)),
        X,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_folds_exactly(name: str) -> None:
    layer, bn, shape = LAYERS[name]
    model = trained(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(bn), nn.Tanh()))
    x = rand(*shape)
    folded, report = fold(model, x)
    assert report.counts == {"folded": 1}, str(report)
    assert error(model, folded, x) <= LIMIT
    assert report.error is not None and report.error <= LIMIT
    row = report.rows[0]
    assert row.partner == "0" and row.rule.endswith("-> bn") and row.scale > 0
    assert row.error is not None and row.error <= LIMIT
    has_activation = getattr(bn, "activation", None)
    expected = {None: nn.Identity, "relu": nn.ReLU, "elu": nn.ELU}[has_activation]
    assert type(folded[1]) is expected
    if has_activation == "elu":
        assert folded[1].alpha == 0.3


@pytest.mark.parametrize("name", LAYERS)
def test_structure_alone_proves_where_ranks_are_certain(name: str) -> None:
    layer, bn, shape = LAYERS[name]
    model = trained(nn.Sequential(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(bn))))
    folded, report = fold(model)
    certain = isinstance(bn, nn.BatchNorm2d | nn.BatchNorm3d)
    assert report.counts == ({"folded": 1} if certain else {"left": 1}), str(report)
    if certain:
        assert "nn.Sequential" in report.rows[0].reason
        assert error(model, folded, rand(*shape)) <= LIMIT
    else:
        assert "give example_inputs" in report.rows[0].reason


def test_what_is_kept() -> None:
    conv = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last)
    conv.weight.requires_grad_(False)
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    trained(model).to(torch.bfloat16)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    folded, report = fold(model, rand(*X).bfloat16())
    assert report.counts == {"folded": 2} and folded is not model
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    weight, bias = folded[0].weight, folded[0].bias
    assert weight.dtype == bias.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.requires_grad and not bias.requires_grad
    assert folded[2].weight.requires_grad and folded[2].bias.requires_grad
    model[0].weight.mark = "kept"
    fold(model, inplace=True)
    assert model[0].weight.mark == "kept"
    assert set(folded.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    # folding in bf16 may round each parameter once; float64 is the judge, not the bf16 model
    assert report.error is not None and report.error <= LIMIT
    assert all(row.error < 2**-8 for row in report.rows)


def test_the_analysis_leaves_no_trace() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.other = nn.BatchNorm2d(4)
            self.register_buffer("steps", torch.zeros(1))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.steps += 1
            x.mul_(2)
            return self.other(self.bn(self.conv(x)).relu() + torch.rand(1, dtype=x.dtype))

    model = trained(Counting())
    model.other.train()  # would update its statistics
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x, random = rand(*X), torch.random.get_rng_state()
    for inputs in (x, None):
        _, report = fold(model, inputs, inplace=True, dry_run=True)
        assert report.counts == {"folded": 1, "left": 1}, str(report)
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert model.calls == 0 and torch.equal(x, rand(*X))
        assert torch.equal(torch.random.get_rng_state(), random)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert type(model.bn) is nn.BatchNorm2d


def test_whole_model_check_rolls_back_and_names_the_bad_pair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = trained(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))
    )
    sites, verify = (sys.modules[f"tritonnorm.fold.{name}"] for name in ("sites", "verify"))
    real = sites.after_layer

    def wrong(site: Any, affine: Any) -> Any:
        if site.module.out_channels == 5:
            affine.shift.add_(0.01)
        return real(site, affine)

    monkeypatch.setattr(sites, "after_layer", wrong)
    # the check of the pair sees it
    _, report = fold(model, rand(*X))
    assert [row.decision for row in report.rows] == ["folded", "left"]
    assert "check failed" in report.rows[1].reason
    # and without that check, the check of the whole model
    monkeypatch.setattr(verify, "check_pair", lambda *_: verify.PairCheck(0.0, 0.0))
    folded, report = fold(model, rand(*X))
    assert [row.decision for row in report.rows] == ["folded", "left"], str(report)
    assert "rolled back: relative error" in report.rows[1].reason and report.rows[1].name == "3"
    assert error(model, folded, rand(*X)) <= LIMIT
    # verify=False trusts the algebra
    folded, report = fold(model, rand(*X), verify=False)
    assert report.counts == {"folded": 2} and error(model, folded, rand(*X)) > 1e-4


def test_a_forward_that_reads_the_batch_norm_is_rolled_back() -> None:
    model = trained(Chain(lambda m, x: m.bn(m.conv(x)) * m.bn.num_features, tail=nn.BatchNorm2d(4)))
    del model.tail
    assert "folded model raised AttributeError" in reason(model, rand(*X))


def test_forward_with_casts_to_float32_is_checked_in_float64() -> None:
    # the cast does nothing in the float32 model; in a plain float64 copy it would round the output
    # of the convolution, and the batch norm would not take it
    model = trained(Chain(lambda m, x: m.bn(m.conv(x).float()).softmax(1, dtype=torch.float32)))
    _, report = fold(model.float(), rand(*X).float())
    assert report.counts == {"folded": 1}
    assert report.error is not None and report.error <= LIMIT


def test_options() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    same, report = fold(model, dry_run=True)
    assert same is model and type(model[1]) is nn.BatchNorm2d and "dry run" in str(report)
    assert report.counts == {"folded": 1, "left": 1}
    with pytest.raises(ValueError, match="strict: expected every batch norm to fold") as caught:
        fold(model, strict=True, inplace=True)
    assert "2     BatchNorm2d" in str(caught.value) and type(model[1]) is nn.BatchNorm2d
    asked: list[str] = []
    _, report = fold(model, filter_fn=lambda m, name: asked.append(name) or name != "1")
    assert asked == ["1", "2"] and report.rows[0].reason == "left out by filter_fn"
    same, report = fold(model, inplace=True)
    assert same is model and type(model[1]) is nn.Identity
    _, report = fold(nn.Linear(2, 2))
    assert report.rows == [] and "no batch norm" in str(report)


def test_never_trained_statistics_are_mentioned() -> None:
    _, report = fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    assert "never updated" in report.rows[0].reason and "checkpoint" in str(report)
    _, report = fold(trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    assert report.notes == []


def test_half_precision_overflow_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval().half()
    with torch.no_grad():
        model[1].weight[3] = 300
        model[1].running_var[3] = 0
        model[0].weight[3, 0, 0, 0] = 2
    assert "overflows in float16 (channel 3)" in reason(model)
    assert fold(model.float())[1].counts == {"folded": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "model: expected a torch.nn.Module, got int"),
        ({"rules": "most"}, "rules: expected 'exact' or 'all', got 'most'"),
        ({"rules": "all", "inplace": True}, "rules: expected 'exact' with inplace=True"),
        ({"example_inputs": []}, "example_inputs: expected at least one input"),
        ({"example_inputs": "x"}, "example_inputs: expected a tensor.*got str"),
        ({"example_inputs": (1,)}, "example_inputs: expected at least one tensor"),
        ({"example_inputs": torch.zeros(2, 9)}, "example_inputs: .* input 0 raised RuntimeError"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(ValueError, match=message):
        fold(**({"model": model} | arguments))


def test_keyword_and_nested_inputs() -> None:
    class Takes(Chain):
        def forward(self, pair: Any, *, scale: Tensor) -> dict[str, Tensor]:
            return {"y": self.bn(self.conv(pair[0] + pair[1])) * scale}

    model = trained(Takes(lambda m, x: x))
    inputs = {"pair": [rand(*X), rand(*X)], "scale": rand(1)}
    folded, report = fold(model, inputs)
    assert report.counts == {"folded": 1}
    with torch.no_grad():
        torch.testing.assert_close(folded(**inputs)["y"], model(**inputs)["y"], rtol=0, atol=1e-12)


def test_model_that_cannot_be_copied() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model.lock = __import__("threading").Lock()
    with pytest.raises(ValueError, match="inplace=True"):
        fold(model)
    _, report = fold(model, rand(*X), inplace=True)
    assert report.counts == {"folded": 1} and "whole-model check not run" in report.notes[0]
