"""The study: its data, its networks, and that a verdict is what the figures say."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from bench.__main__ import main as bench
from bench.study import architectures, command, convergence, generalization, models, shift
from bench.study.data import Images, digits, folder, sequences
from bench.study.training import chosen, paired, train


@pytest.fixture(scope="module")
def images() -> Images:
    return digits()


def test_a_split_shares_out_every_image_once(images: Images) -> None:
    parts = images.split(3)
    whole = torch.cat([parts.x, parts.validation_x, parts.test_x]).flatten(1)
    assert len(whole) == len(images.y) == 1797
    assert torch.equal(whole.sum(0), images.x.flatten(1).sum(0))
    assert len(parts.test_y) == pytest.approx(0.3 * 1797, abs=5)
    for y in (parts.y, parts.validation_y, parts.test_y):
        share = torch.bincount(y, minlength=10) / len(y)
        assert (share - torch.bincount(images.y) / 1797).abs().max() < 0.01
    again, other = images.split(3), images.split(4)
    assert torch.equal(again.x, parts.x) and not torch.equal(other.x, parts.x)
    assert len(parts.first(50).y) == 50 and len(parts.first(50).test_y) == len(parts.test_y)


def photographs(at: Path, count: int = 12) -> Path:
    """Two classes that differ in colour, in files of several kinds and sizes."""
    g = np.random.default_rng(0)
    for name, channel in (("cats", 0), ("dogs", 2)):
        (at / name / "more").mkdir(parents=True)
        for i in range(count):
            pixels = g.integers(0, 90, (20 + i, 30, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            mode = "RGBA" if i % 3 == 0 else "RGB"
            inside = f"{name}/more" if i % 2 else name
            suffix = "png" if mode == "RGBA" else ("jpg", "PNG")[i % 2]
            Image.fromarray(pixels).convert(mode).save(at / inside / f"{i}.{suffix}")
        (at / name / "notes.txt").write_text("not an image")
    (at / "empty").mkdir()
    return at


def test_a_folder_of_the_users_own(tmp_path: Path) -> None:
    found = folder(photographs(tmp_path), size=8)
    assert found.classes == ("cats", "dogs") and found.name == "cats and dogs"
    assert found.x.shape == (24, 3, 8, 8) and found.target == 0.75
    assert 0.0 <= float(found.x.min()) < float(found.x.max()) <= 1.0
    red, blue = found.x[found.y == 0].mean((0, 2, 3)), found.x[found.y == 1].mean((0, 2, 3))
    assert red[0] > 0.5 > red[2] and blue[2] > 0.5 > blue[0]
    assert len(folder(tmp_path, most=10).y) == 20
    read = sequences(found.x)
    assert read.x.shape == (24, 16, 2 * 2 * 3 + 2) and read.lengths.eq(16).all()


def test_folders_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data: expected a folder, got"):
        folder(tmp_path / "none")
    photographs(tmp_path, 4)
    with pytest.raises(ValueError, match="at least 10 images of cats, got 4"):
        folder(tmp_path)
    with pytest.raises(ValueError, match=r"two or more, got \['more'\]"):
        folder(tmp_path / "cats")


def test_sequences_leave_out_what_is_blank() -> None:
    x = torch.zeros(2, 1, 8, 8)
    x[0, 0, 0, 7] = 0.5  # the last patch of the first row, and one in the middle
    x[0, 0, 4, 2] = 1.0
    found = sequences(x)
    assert found.lengths.tolist() == [2, 1]
    assert found.x[0, 0].tolist() == [0.0, 0.5, 0.0, 0.0, -1.0, 1.0]
    assert found.x[0, 1].tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0, 1 / 3, -1 / 3])
    assert not found.x[0, 2:].any()
    lengths = sequences(digits().x).lengths
    assert (int(lengths.min()), int(lengths.max())) == (7, 16)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("build", [models.lstm, models.transformer])
def test_no_network_sees_the_padding(
    build: Any, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")  # 48 batch norms, slow in the interpreter
    torch.manual_seed(0)
    net, lengths = build(6, 10, norm), torch.tensor([16, 3, 9])
    x = torch.randn(3, 16, 6)
    other = torch.where((torch.arange(16) < lengths[:, None])[..., None], x, 7.0)
    with torch.no_grad():
        torch.testing.assert_close(net(x, lengths), net(other, lengths))


@pytest.mark.parametrize("norm", models.NORMS)
def test_the_networks_for_images(norm: str) -> None:
    x = torch.rand(4, 3, 8, 8)
    assert models.cnn(3, 2, norm)(x).shape == (4, 2)
    assert models.mlp(192, 2, norm)(x).shape == (4, 2)
    kinds = {type(m).__name__ for m in models.cnn(3, 2, norm).modules()}
    assert ("BatchNorm2d" in kinds, "GroupNorm" in kinds) == (
        norm == "batch", norm in ("group", "layer"),
    )  # fmt: skip


def test_training_stops_at_the_target() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 2)
    y = (x[:, 0] > 0).long()
    net = torch.nn.Linear(2, 2)
    common: dict[str, Any] = {"steps": 200, "batch": 20, "seed": 0, "target": 0.95}
    sets = ((x,), y, ((x,), y), ((x,), y))
    run = train(net, torch.optim.SGD(net.parameters(), lr=0.5), *sets, stop=True, **common)
    assert run.steps == run.curve[-1][0] < 200 and run.test >= 0.95
    assert [s for s, _ in run.curve] == list(range(10, int(run.steps) + 1, 10))
    stuck = torch.nn.Linear(2, 2)
    run = train(stuck, torch.optim.SGD(stuck.parameters(), lr=0.0), *sets, **common)
    assert run.steps == math.inf and len(run.curve) == 20
    with torch.no_grad():
        stuck.weight.fill_(float("nan"))
    run = train(stuck, torch.optim.SGD(stuck.parameters(), lr=0.1), *sets, stop=True, **common)
    assert run.test == 0.0 and len(run.curve) == 1  # a NaN is wrong, and the end


def test_differences_are_paired_by_seed() -> None:
    a, b = pd.Series([1.0, 2.0, 3.0], [0, 1, 2]), pd.Series([3.1, 2.0, 0.9], [2, 1, 0])
    d = paired(a, b)
    assert d.mean == pytest.approx(0.0) and d.sign == 0
    assert d.half == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    assert paired(a + 1, b).sign == 1 and paired(a - 1, b).sign == -1
    assert paired(a[:1], b[2:]).sign == 0  # one repeat tells nothing


def test_a_rate_is_chosen_on_validation() -> None:
    frame = pd.DataFrame(
        {"norm": ["a"] * 4, "rate": [1, 1, 2, 2], "validation": [0.9, 0.1, 0.6, 0.6], "test": 0.0}
    )
    assert chosen(frame, ["norm"])["rate"].tolist() == [2, 2]


def steps(batch: list[float], none: list[float]) -> pd.DataFrame:
    rows = [
        {"network": "MLP", "norm": norm, "rate": 0.1, "seed": seed, "steps": s, "best": 0.5}
        for norm, found in (("batch", batch), ("none", none))
        for seed, s in enumerate(found)
    ]
    return pd.DataFrame(rows).assign(target=0.95, limit=500)


@pytest.mark.parametrize(
    ("batch", "none", "held"),
    [
        ([50, 51, 52], [200, 203, 201], True),
        ([200, 203, 201], [50, 51, 52], False),
        ([50, 200, 90], [60, 190, 95], None),
        ([50, 51, 52], [math.inf, 100, 100], True),
        ([math.inf] * 3, [50, 51, 52], False),
        ([math.inf] * 3, [math.inf] * 3, None),
    ],
)
def test_the_verdict_on_convergence(batch: list, none: list, held: bool | None) -> None:
    frame = steps(batch, none)
    (verdict,) = convergence.verdicts(frame)
    assert verdict.held is held, verdict
    assert str(verdict).startswith({True: "Held", False: "Did not hold", None: "Not told"}[held])
    cell = convergence.table(frame)["steps with BN"][0]
    assert cell == ("never (best 50.0 %)" if batch[0] == math.inf else cell)


@pytest.mark.parametrize("better", ["batch", "group", "none"])
def test_the_verdicts_on_generalization(better: str) -> None:
    rows = [
        {"part": part, "at": at, "norm": norm, "rate": 0.1, "seed": seed, "validation": 0.5}
        | {"test": 0.8 + 0.1 * (norm == better) + 0.001 * seed}
        for part, at in (("images", 50), ("images", 100), ("batch", 2), ("batch", 64))
        for norm in models.NORMS
        for seed in range(3)
    ]
    held = [v.held for v in generalization.verdicts(pd.DataFrame(rows))]
    assert held == {
        "batch": [True, False, True], "group": [None, True, False], "none": [False, None, None],
    }[better]  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings so small that the experiments say nothing, and take a second."""
    monkeypatch.setattr(convergence, "QUICK_RATES", {"MLP": (1.0,), "CNN": (0.1,)})
    monkeypatch.setattr(convergence, "QUICK_STEPS", 20)
    monkeypatch.setattr(shift, "QUICK_STEPS", 40)
    monkeypatch.setattr(generalization, "QUICK_SET_STEPS", 3)
    monkeypatch.setattr(generalization, "QUICK_LEAST", 3)
    monkeypatch.setattr(generalization, "QUICK_BATCH_EPOCHS", 0)
    monkeypatch.setattr(architectures, "QUICK_STEPS", 2)
    monkeypatch.setattr(architectures, "EVERY", 2)
    monkeypatch.setenv("TRITONNORM_DISABLE", "1")

    def here(jobs: Any, progress: Any, at_once: int) -> list[Any]:
        assert len({job.name for job in jobs}) == len(jobs)
        found = []
        for job in jobs:
            told: list[tuple[float, float]] = []
            told_of = told.append
            found.append(job.work(lambda done, of, what="", t=told_of: t((done, of)), *job.args))
            assert [done for done, _ in told] == list(range(len(told)))
            assert {of for _, of in told} == {told[-1][0]}  # as many ticks as `units` says
        return found

    monkeypatch.setattr(command, "run_jobs", here)


@pytest.mark.usefixtures("small")
def test_the_command_from_end_to_end(tmp_path: Path) -> None:
    out, text = tmp_path / "pictures", io.StringIO()
    screen = Console(file=text, width=160)
    page = tmp_path / "study.md"
    assert command.main(screen, quick=True, out=out, write_page=page) == 0
    written = page.read_text(encoding="utf-8")
    for experiment in command.EXPERIMENTS.values():
        assert f"## {experiment.TITLE}" in written and experiment.TITLE in text.getvalue()
        with Image.open(out / f"{experiment.NAME}.png") as picture:
            assert picture.width > 600 and len(picture.convert("L").getcolors(256)) > 8
        assert f"](pictures/{experiment.NAME}.png)" in written
    assert "python -m bench study --quick" in written and "2 repeats" in written
    assert "compute with PyTorch's operations" in text.getvalue() or "interpreter" in written
    before, pictures = written, {p.name: p.read_bytes() for p in out.glob("*.png")}
    arguments = ["study", "--from", str(out), "--page", str(page)]
    assert bench(arguments) == 0
    assert page.read_text(encoding="utf-8") == before
    assert {p.name: p.read_bytes() for p in out.glob("*.png")} == pictures


@pytest.mark.usefixtures("small")
def test_the_command_with_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = photographs(tmp_path / "data")
    arguments = ["study", "--quick", "--only", "convergence,architectures"]
    code = bench([*arguments, "--data", str(data), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert code == 0 and "24 images (cats and dogs) of 16x16 pixels" in printed
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == [
        "architectures.png", "convergence.png",
    ]  # fmt: skip
    assert bench(["study", "--only", "convergence,magic"]) == 2
    assert "--only: expected of convergence, shift" in capsys.readouterr().err
    assert bench(["study", "--from", str(tmp_path)]) == 2


def test_the_shift_is_measured_on_what_enters_a_layer() -> None:
    torch.manual_seed(0)
    x = torch.rand(64, 1, 8, 8)
    net = models.mlp(64, 10, "batch")
    before = {n: t.clone() for n, t in net.state_dict().items()}
    found = shift._moments(net, x)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    entered: list[Tensor] = []
    for layer in [m for m in net if isinstance(m, torch.nn.Linear)][1:]:
        layer.register_forward_hook(lambda m, given, y: entered.append(given[0].detach()))
    net.train()(x)
    for (mean, std), given in zip(found, entered, strict=True):
        torch.testing.assert_close(mean, given.mean(0))
        torch.testing.assert_close(std, given.std(0))
