"""The command line: help, errors in one line, exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.__main__ import main
from bench.commands.files import Outputs
from bench.runner import Options


def test_without_arguments_it_measures_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.commands import cpu, measure

    monkeypatch.setattr(cpu, "without_gpu", lambda console: 3)
    monkeypatch.setattr(measure, "quick", lambda console: 4)
    for here, code in ((False, 3), (True, 4)):
        monkeypatch.setattr("torch.cuda.is_available", lambda here=here: here)
        assert main([]) == code


def test_the_options_of_run_become_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.commands import measure

    seen: list[tuple[measure.Request, Outputs]] = []
    monkeypatch.setattr(measure, "run", lambda console, *given: seen.append(given) or 0)
    assert main(["run"]) == 0
    assert seen.pop() == (measure.Request(ops=["own"], dtypes=["bf16"]), Outputs())
    given = "--suite unet3d --ops BN,BN+relu --dtype fp16,fp32 --layout NCHW --mode forward"
    given += " --batch 1,2 --providers eager,cudnn --warm --rounds 9 --seconds 2 --seed 5"
    given += " --limit 60 --json a.json --csv a.csv --html a.html --md a.md --pictures p"
    assert main(["run", *given.split()]) == 0
    (request, outputs) = seen.pop()
    assert request == measure.Request(
        *("unet3d", ["BN", "BN+relu"], ["fp16", "fp32"], ["NCHW"], ["forward"], [1, 2]),
        *(["eager", "cudnn"], Options(warm=True, rounds=9, seconds=2.0, seed=5), 60.0),
    )
    files = [Path(f"a.{kind}") for kind in ("json", "csv", "html", "md")]
    assert outputs == Outputs(*files, Path("p"))


def test_compare_and_show_on_broken_files(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"schema": "something else"}')
    for arguments in (["show", broken], ["compare", broken, broken], ["show", tmp_path / "none"]):
        assert main([str(a) for a in arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("python -m bench: error: ") and str(tmp_path) in line


def test_unknown_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nonsense"], ["demo", "--device", "tpu"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "--processes", "0"], "--processes: expected at least 1, got 0"),
        (["run"], "PyTorch finds no GPU"),
        (["roofline"], "PyTorch finds no GPU"),
        (["submit"], "PyTorch finds no GPU"),
        (["run", "--suite", "nonsense"], "suite: expected one of quick"),
        (["run", "--providers", "nobody"], "providers: expected all or of tritonnorm"),
        (["run", "--batch", "many"], "--batch: expected numbers, got many"),
        (["run", "--seconds", "0"], "--seconds: expected more than 0, got 0"),
        (["run", "--dtype", "int8"], "dtype: expected one of bf16"),
        (["demo", "--device", "cuda"], "device: expected a GPU that PyTorch can use, found none"),
    ],
)
def test_an_error_is_one_line(
    arguments, message, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m bench: error: ") and message in line


def test_an_error_in_a_child_shows_where(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    from bench.demo import command
    from bench.processes import WorkFailed

    def broken(*args) -> int:
        raise WorkFailed("fold: ValueError: out of luck", "Traceback: here")

    monkeypatch.setattr(command, "main", broken)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "python -m bench: error: fold: ValueError: out of luck",
        "(in the child process:)",
        "Traceback: here",
    ]
