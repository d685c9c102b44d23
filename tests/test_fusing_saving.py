"""The predicted traffic of fused batch norms, and the command that prints it."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from tests.fold_models import bn, conv
from tests.test_fusing import block
from tritonnorm.cli.main import main
from tritonnorm.device import KNOWN
from tritonnorm.fusing.saving import predicted, separate, together
from tritonnorm.replace import replace

S = 2 * 8 * 4 * 4 * 4  # bytes of the input
MASK = S // 4 // 8


@pytest.mark.parametrize(
    ("rule", "one", "several"),
    [
        ("class swap", 5 * S, 5 * S),  # x, y; dy, x, dx
        ("bn -> relu", 5 * S, 10 * S),  # and x, y; dy, y, dx of the activation
        ("bn -> add", 6 * S, 8 * S),
        ("bn -> add -> relu", 7 * S + 2 * MASK, 13 * S),
        ("bn -> add -> silu", 8 * S, 13 * S),  # the residual is read again
        ("bn -> prelu", 5 * S, 10 * S),
        ("bn -> add -> prelu", 8 * S, 13 * S),
        ("gn -> silu", 5 * S, 10 * S),
        ("ln -> add -> relu", 8 * S, 13 * S),  # no bits are kept
    ],
)
def test_bytes_of_a_rule(rule: str, one: int, several: int) -> None:
    x = torch.zeros(2, 8, 4, 4)
    for given in (x, x.to(memory_format=torch.channels_last), torch.zeros(2, 16, 4, 4)[:, ::2]):
        assert (together(given, rule), separate(given, rule)) == (one, several)


def test_a_model_adds_up() -> None:
    model, x = block(), torch.zeros(2, 4, 8, 8)
    _, report = replace(model, dry_run=True)
    size = x.numel() * 4
    saving = predicted(model, report, x)
    # bn -> relu, bn -> add -> relu with its mask, and the batch norm of the shortcut
    assert saving.before == (10 + 13 + 5) * size
    assert saving.after == (5 + 7 + 5) * size + 2 * x.numel() // 8
    replace(model)
    assert predicted(model, report, x) == saving


def small() -> nn.Module:
    return nn.Sequential(conv(3, 4), bn(4), nn.ReLU())


def test_the_command_names_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    model = f"{__name__}:small"
    assert main(["replace", "--model", model, "--input", "2x3x8x8", "--gpu", "b200"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    size = 2 * 4 * 8 * 8 * 4
    assert "dry run" in text and "bn -> relu" in text
    found = re.search(r"saves ([\d.]+) of ([\d.]+) MB \((\d+) %\).*: ([\d.]+) ms", text)
    assert found is not None, text
    assert found.groups() == (f"{5 * size / 1e6:.1f}", f"{10 * size / 1e6:.1f}", "50", "0.000")
    assert KNOWN["b200"].name in text
    assert main(["replace", "--model", model]) == 0
    assert "saves" not in capsys.readouterr().out
