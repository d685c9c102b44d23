"""The command line: help, errors in one line, exit codes."""

from __future__ import annotations

import pytest

from bench.__main__ import main


def test_without_arguments_it_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "python -m bench demo" in capsys.readouterr().out


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
