"""The `tritonnorm` command: what it writes, and what it says of input that cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tritonnorm
from tritonnorm.cli.main import main

safetensors = pytest.importorskip("safetensors.torch")
ROOT = Path(__file__).resolve().parent.parent
HERE = "tests.test_cli"


def small(width: int = 4) -> nn.Module:
    """Two pairs that fold, with statistics that are not those of a new module."""
    net = nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2, 1), nn.BatchNorm2d(2),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    for bn in (net[1], net[4]):
        bn.running_mean.normal_(generator=generator)
        bn.running_var.uniform_(0.5, 2.0, generator=generator)
    return net


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.two(self.one(x)))


class Left(nn.Module):
    """A batch norm that nothing can take."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.bn(torch.sin(x)))


def raising() -> nn.Module:
    raise KeyError("no such size")


def number() -> int:
    return 3


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def fold(*arguments: object, model: str = "small") -> int:
    return main(["fold", "--model", f"{HERE}:{model}", *map(str, arguments)])


def trained() -> nn.Module:
    torch.manual_seed(11)
    net = small().eval()
    for p in net.parameters():
        nn.init.normal_(p)
    return net


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_weights_in_folded_weights_out(tmp_path: Path, ending: str) -> None:
    net = trained()
    weights, out = tmp_path / f"in{ending}", tmp_path / f"folded{ending}"
    if ending == ".pt":
        torch.save({"state_dict": net.state_dict(), "epoch": 3}, weights)
    else:
        safetensors.save_file(net.state_dict(), weights)
    assert fold("--input", "2x3x8x8", "--weights", weights, "--out", out) == 0
    state = torch.load(out, weights_only=True) if ending == ".pt" else safetensors.load_file(out)
    assert sorted(state) == ["0.bias", "0.weight", "3.bias", "3.weight"]
    folded, _ = tritonnorm.fold(net)
    folded.load_state_dict(state)
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(folded(x), net(x), rtol=1e-4, atol=1e-5)
    assert list(tmp_path.glob("*.part*")) == []


# torch 2.11 makes tensors of bytes that it read
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_an_exported_program_needs_no_model(tmp_path: Path) -> None:
    net = trained()
    weights, out = tmp_path / "in.safetensors", tmp_path / "folded.pt2"
    safetensors.save_file(net.state_dict(), weights)
    assert fold("--input", "2x3x8x8", "--weights", weights, "--out", out) == 0
    program = torch.export.load(out)
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(program.module()(x), net(x), rtol=1e-4, atol=1e-5)
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)


def test_the_report_is_printed_and_a_page(tmp_path: Path, capsys) -> None:
    page = tmp_path / "report.html"
    assert fold("--input", "2x3x8x8", "--html", page, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "2 batch norms: 2 folded" in printed and str(page) in printed
    text = page.read_text(encoding="utf-8")
    assert "conv2d" in text.lower() and "2 folded" in text
    assert "http" not in text and "<script" not in text


def test_an_output_is_not_overwritten(tmp_path: Path, capsys) -> None:
    out = tmp_path / "folded.safetensors"
    out.write_text("precious")
    assert fold("--out", out) == 2
    assert "is there already; --force overwrites it" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert fold("--out", out, "--force") == 0
    assert len(safetensors.load_file(out)) == 4


def test_strict_writes_nothing_if_a_batch_norm_is_left(tmp_path: Path, capsys) -> None:
    out = tmp_path / "folded.pt"
    assert fold("--input", "2x3x4x4", "--out", out, "--strict", model="Left") == 1
    assert "a batch norm is left" in capsys.readouterr().err and not out.exists()
    assert fold("--input", "2x3x4x4", "--out", out, model="Left") == 0 and out.exists()


def test_tied_weights(tmp_path: Path) -> None:
    weights = tmp_path / "in.safetensors"
    net = Tied()
    nn.init.normal_(net.one.weight)
    safetensors.save_model(net, str(weights))
    assert len(safetensors.load_file(weights)) < len(net.state_dict())
    out = tmp_path / "out.pt"
    assert fold("--weights", weights, "--input", "2x4", "--out", out, model="Tied") == 0


def pickled(path: Path) -> None:
    torch.save(small(), path)  # a whole model, which only unpickling could read


def nested(path: Path) -> None:
    torch.save({"state_dict": {"a": 1}}, path)


def truncated(path: Path) -> None:
    safetensors.save_file(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:100])


def other(path: Path) -> None:
    safetensors.save_file(small(width=5).state_dict() | {"extra": torch.zeros(1)}, path)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("in.pt", pickled, "cannot be read"),
        ("in.pt", lambda p: p.write_bytes(b"not a checkpoint"), "cannot be read"),
        ("in.safetensors", lambda p: p.write_bytes(b""), "cannot be read"),
        ("in.safetensors", truncated, "cannot be read"),
        ("in.pt", nested, "holds no state_dict of tensors"),
        ("in.safetensors", other, "does not fit the model: 1 unknown (extra); 7 of another shape"),
        ("in.safetensors", lambda p: None, "there is no file"),
    ],
)
def test_bad_weights_are_one_line_and_leave_nothing(
    tmp_path: Path, capsys, name: str, make, message: str
) -> None:
    weights, out = tmp_path / name, tmp_path / "out.safetensors"
    make(weights)
    assert fold("--weights", weights, "--out", out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tritonnorm: error: --weights: ") and message in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nonsense"], "--model: expected package.module:factory, got 'nonsense'"),
        (["--model", "no.such:thing"], "No module named 'no'"),
        (["--model", f"{HERE}:absent"], "has no attribute 'absent'"),
        (["--model", f"{HERE}:raising"], "KeyError: 'no such size'"),
        (["--model", f"{HERE}:number"], "made a int, not a torch.nn.Module"),
        (["--model", f"{HERE}:small", "--options", "[1]"], "--options: expected a JSON object"),
        (["--model", f"{HERE}:small", "--options", "{"], "--options: expected a JSON object"),
        (["--model", f"{HERE}:small", "--input", "1x3xa"], "--input: expected SIZExSIZE..."),
        (["--model", f"{HERE}:small", "--input", "1x3:floaty"], "--input: expected SIZExSIZE..."),
        (["--model", f"{HERE}:small", "--input", "2x4x8x8"], "raised"),
        (["--model", f"{HERE}:small", "--out", "x.onnx"], "--out: expected a file ending in"),
        (
            ["--model", f"{HERE}:small", "--out", "no/such/x.pt"],
            "--out: there is no folder no/such",
        ),
        (["--model", f"{HERE}:small", "--out", "x.pt2"], "--input: a .pt2 file is exported with"),
    ],
)
def test_an_error_is_one_line(arguments: list[str], message: str, capsys) -> None:
    assert main(["fold", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tritonnorm: error: ") and message in line


def test_options_of_the_factory_and_several_inputs(capsys) -> None:
    from tritonnorm.cli.files import inputs_from

    assert fold("--options", '{"width": 7}', "--input", "1x3x5x5", "--dry-run") == 0
    assert "2 folded" in capsys.readouterr().out
    x, ids = inputs_from(["2x3", "4:int64"])
    assert x.shape == (2, 3) and ids.dtype == torch.int64 and ids.shape == (4,)
    assert torch.equal(inputs_from(["2x3"])[0], x) and not torch.equal(
        inputs_from(["2x3"], 1)[0], x
    )


def test_replace_only_says(capsys) -> None:
    assert main(["replace", "--model", f"{HERE}:small"]) == 0
    assert "dry run" in capsys.readouterr().out


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tritonnorm", "info"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("TRITON")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith(f"tritonnorm {tritonnorm.__version__}")
