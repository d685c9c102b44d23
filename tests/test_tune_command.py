"""`tritonnorm tune`: what it tunes, what it says, what it writes."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import tritonnorm
from tests import tuned
from tests.test_tuning import everything
from tritonnorm.cli import tuning, tuning_view
from tritonnorm.cli.main import main
from tritonnorm.device import KNOWN
from tritonnorm.norms import swap
from tritonnorm.tune import problems, session, standing
from tritonnorm.tune.jobs import Job, Result
from tritonnorm.tune.key import Key
from tritonnorm.tune.networks import NETWORKS, NORM_NETWORKS, NormLayer, diffusion_unet
from tritonnorm.tune.store import UserCache, append_line, read_table, write_table

H200 = KNOWN["h200"]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UserCache]:
    monkeypatch.setenv("TRITONNORM_TUNE", "off")
    monkeypatch.setenv("TRITONNORM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning_view, "prune", everything)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(ROOT)
    standing.reload()
    yield UserCache(tmp_path / "cache")
    monkeypatch.undo()
    standing.reload()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """A GPU that answers every job; the jobs."""
    seen: list[Job] = []

    def answer(job: Job) -> Result:
        seen.append(job)
        slow = job.incumbent is not None and job.key.shape[1] == 128
        return Result(job.incumbent or job.candidates[-1], 11.0 if slow else 8.0, 10.0, 3)

    def made(device: Any, **options: Any) -> session.Session:
        return session_class(device, **options, job=answer, pruned=everything)

    session_class = session.Session
    monkeypatch.setattr(session, "Session", made)
    monkeypatch.setattr(tuning, "_device", lambda options: H200)
    return seen


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(2))


def transformer() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 32), nn.RMSNorm(32))


def tune(*arguments: object) -> int:
    return main(["tune", *map(str, arguments)])


@pytest.mark.parametrize("name", NORM_NETWORKS)
def test_presets_of_the_other_norms(name: str) -> None:
    """All layers, forward and backward; rows have one layout."""
    layers = NORM_NETWORKS[name]
    for layouts in (["NCHW"], ["NHWC"], ["NHWC", "NCHW"]):
        found = list(problems.preset(name, ["bf16", "fp32"], layouts))
        times = len(layouts) if layers[0].groups else 1
        assert len({Key.of(p) for p in found}) == len(found) == 4 * times * len(layers)
    layer, p = layers[0], found[0]
    assert p.view.numel == math.prod(layer.shape(problems.PRESETS[name]))
    assert (p.groups, p.rows) == (layer.groups or 1, not layer.groups)
    assert p.view.channels_last and p.activity == ("smooth" if layer.activation else "none")


def test_the_layers_of_the_diffusion_unet() -> None:
    """22 residual blocks, 16 attention blocks, and the output (Stable Diffusion 1)."""
    layers = list(diffusion_unet())
    assert len(layers) == 22 * 2 + 16 + 1
    assert [layer.activation for layer in layers].count(None) == 16
    joined = [(2560, 8)] * 3 + [(2560, 16)] * 2 + [(1920, 16), (1920, 32), (1280, 32), (960, 32)]
    joined += [(960, 64), (640, 64), (640, 64)]
    up = [layer for layer in layers[-(12 * 2 + 9 + 1) : -1] if layer.activation]
    assert [(layer.channels, layer.plane[0]) for layer in up[::2]] == joined


@pytest.mark.parametrize("name", [n for n in tuning.PRESETS if n not in NORM_NETWORKS])
def test_presets(name: str) -> None:
    """All layers of the network: training forward and backward, and inference."""
    found = list(problems.preset(name, ["bf16"], ["NHWC"]))
    added = {(x.channels, x.plane) for x in NETWORKS[name] if x.residual and not x.activation}
    alone = {(x.channels, x.plane) for x in NETWORKS[name] if not x.residual and not x.activation}
    # Of a batch norm whose output is only added to something the backward is that of one alone.
    assert len(found) == 3 * len(NETWORKS[name]) - len(added & alone) and set(
        problems.PRESETS
    ) == set(tuning.PRESETS)
    layer = NETWORKS[name][0]
    values = problems.PRESETS[name]
    for extent in layer.plane:
        values *= extent
    first, second, third = found[:3]
    assert first.view.channels_last and first.view.count == values
    assert (first.direction, second.direction, third.batch_statistics) == (
        *("forward", "backward"),
        False,
    )
    both = list(problems.preset(name, ["bf16", "fp32"], ["NHWC", "NCHW"], 4))
    assert len({Key.of(p) for p in both}) == len(both) == 4 * len(found)


def test_a_layer_is_the_problem_that_the_operators_have() -> None:
    """Held against the operators themselves: a layer with everything, and one with nothing."""
    from tritonnorm.device import simulated
    from tritonnorm.observe import observe

    class Layer(nn.Module):
        def __init__(self, activation: str | None, residual: bool) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)
            self.bn = tritonnorm.BatchNorm2d(8, activation=activation)
            self.residual = residual

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return self.bn(x, residual=x if self.residual else None)

    for activation in ("relu", "silu", None):
        for residual in (True, False):
            with simulated(H200):
                calls = observe(Layer(activation, residual), torch.randn(2, 8, 6, 6))
            expected = problems.of_layer((2, 8, 6, 6), torch.float32, False, activation, residual)
            found = {Key.of(p) for c in calls for p, _ in c.problems}
            assert {Key.of(p) for p in expected} == found, (activation, residual)


def test_a_norm_is_the_problem_that_the_operators_have() -> None:
    from tritonnorm.device import simulated
    from tritonnorm.observe import observe

    group, rows = NormLayer(8, (6, 6), 2, "silu"), NormLayer(24, (5,), centred=False)
    for layer, norm, shape in (
        (group, tritonnorm.GroupNorm(2, 8, activation="silu"), (2, 8, 6, 6)),
        (rows, tritonnorm.RMSNorm(24), (2, 5, 24)),
    ):
        with simulated(H200):
            calls = observe(norm, torch.randn(shape, requires_grad=True))
        found = {Key.of(p) for c in calls for p, _ in c.problems}
        assert found == {Key.of(p) for p in problems.of_norm(layer, 2, torch.float32)}


def test_a_file_of_shapes(tmp_path: Path) -> None:
    path = tmp_path / "shapes.jsonl"
    append_line(path, Key.of(tuned.problem()).to_json())
    append_line(path, Key.of(tuned.FOLD).to_json())
    with path.open("a") as file:
        file.write("\n8x64x28x28\n 128x1000 \n")
    found = list(problems.from_file(path, ["bf16"], ["NHWC", "NCHW"]))
    assert found[:2] == [tuned.problem(), tuned.FOLD] and len(found) == 2 + 6 + 3
    for line in ("8x", "{", "8xax3", "-1x3", '{"op": 1}', "[" * 5000):
        path.write_text(f"8x64x28x28\n{line}\n")
        with pytest.raises(ValueError, match="line 2"):
            list(problems.from_file(path, ["bf16"], ["NHWC"]))


def test_a_model(gpu: list[Job], cache: UserCache, capsys: pytest.CaptureFixture[str]) -> None:
    """The shapes that it calls, in mixed precision, without running it."""
    arguments = ("--model", "tests.test_tune_command:model", "--input", "4x3x18x18")
    assert tune(*arguments, "--layout", "NCHW", "--freeze") == 0
    keys = [job.key for job in gpu]
    assert [k.op for k in keys] == ["fold", "forward", "backward", "forward"]
    assert {k.dtype for k in keys[1:]} == {"bfloat16"} and keys[1].shape == (4, 16, 256)
    assert len(cache.entries()) == 4
    assert "4 of 4 problems have a result now" in capsys.readouterr().out


def test_a_model_of_other_norms(gpu: list[Job], cache: UserCache) -> None:
    """What `replace` makes of a model."""
    arguments = ("--model", "tests.test_tune_command:transformer", "--input", "4x10x8")
    assert tune(*arguments, "--layout", "NCHW", "--norms", *tuning.NORMS) == 0
    keys = [job.key for job in gpu]
    assert sorted(k.op for k in keys) == ["group backward"] * 2 + ["group forward"] * 2
    assert (
        set(tuning.NORMS) == set(swap.NORMS)
        and {k.shape for k in keys} == {(1, 32, 40, 1)}
        and len(cache.entries()) == 4
    )


def test_what_it_says(gpu: list[Job], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "shapes"
    path.write_text("8x64x28x28\n8x128x28x28\n")
    assert tune("--shapes", path, "--layout", "NCHW", "--budget", "100") == 0
    said = capsys.readouterr().out
    assert "6 of 6 problems have a result now" in said and "1.25x" in said
    assert "6 spills registers" in said and len(gpu) == 6
    assert all(job.budget <= 20 for job in gpu)
    assert tune("--shapes", path, "--layout", "NCHW", "--resume") == 0
    assert "6 were left out" in capsys.readouterr().out and len(gpu) == 6
    assert tune("--check") == 1  # the 128 channels lost
    assert tune("--check", "--shapes", path, "--layout", "NHWC") == 0
    table = tmp_path / "table.json"
    assert tune("--export", table) == 0
    assert len(read_table(table)) == 6 and "6 results of NVIDIA H200" in capsys.readouterr().out


def test_an_interrupt(gpu: list[Job], monkeypatch: pytest.MonkeyPatch, cache: UserCache) -> None:
    count: list[int] = []
    put = standing.put

    def third(entry: Any) -> bool:
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return put(entry)

    monkeypatch.setattr(standing, "put", third)
    assert tune("--preset", "resnet50", "--layout", "NHWC") == 130
    assert len(cache.entries()) == 2


def test_merge(tmp_path: Path, cache: UserCache, capsys: pytest.CaptureFixture[str]) -> None:
    for i, n in enumerate((4, 8)):
        write_table(tmp_path / f"{i}.json", H200, [tuned.entry(tuned.problem(n))])
    assert tune("--merge", tmp_path / "0.json", tmp_path / "1.json") == 0
    assert len(cache.entries()) == 2 and "1 results, 1 kept" in capsys.readouterr().out
    (tmp_path / "1.json").write_text("{}")
    assert tune("--merge", tmp_path / "1.json") == 2


def test_dry_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert tune("--dry-run", "--preset", "unet3d", "--layout", "NHWC", "--target", "mi300x") == 0
    said = capsys.readouterr().out
    count = 3 * len(NETWORKS["unet3d"])
    assert f"AMD Instinct MI300X (gfx942): {count} problems" in said
    assert f"dropped: {count} spills registers" in said

    def nothing(todo: dict[Any, Any], *args: Any) -> Iterator[Any]:
        for name, result in everything(todo):
            result.kept.clear()
            yield name, result

    monkeypatch.setattr(tuning_view, "prune", nothing)
    assert tune("--dry-run", "--preset", "unet3d") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run"], "expected what to tune"),
        (["--dry-run", "--target", "pdp11", "--preset", "resnet50"], "--target"),
        (["--dry-run", "--preset", "resnet50", "--batch", "0"], "--batch"),
        (["--dry-run", "--shapes", "/nowhere"], "nowhere"),
        (["--dry-run", "--model", "tests.test_tune_command:model"], "--input"),
    ],
)
def test_errors(arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(*arguments) == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tuning, "_device", lambda options: None)
    for arguments in (["--check"], ["--preset", "resnet50"]):
        assert tune(*arguments) == 2
        assert "--dry-run works without" in capsys.readouterr().err


def test_the_bar_shows_how_far_it_is() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)

    def run(given: Any, progress: Any) -> session.Summary:
        summary = session.Summary(total=2)
        summary.failures["spills registers"] = 7
        progress(summary, "forward 8x64")
        summary.done.append(session.Tuned(Key.of(tuned.problem()), Result(error="nothing works")))
        progress(summary, "forward 8x64")
        summary.stopped = "interrupted"
        return summary

    tuning_view.watched(run, [], console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1/2" in said and "7 spills registers" in said and "nothing works" in said
    assert "interrupted, and what was found is kept" in said


def test_info_says_where_results_are(cache: UserCache, capsys: pytest.CaptureFixture[str]) -> None:
    cache.put(tuned.entry())
    assert main(["info"]) == 0
    assert f"tuned results: 1 in {cache.root}" in capsys.readouterr().out
