"""What the oldest Triton that is served asks of the source of a kernel, and its newest does not."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parent.parent / "tritonnorm" / "kernels"


def jitted(source: str) -> list[ast.FunctionDef]:
    return [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]


def texts_as_defaults(source: str) -> list[str]:
    """Functions with a text as a default, which Triton 3.6 does not make a constant."""
    return [
        f.name
        for f in jitted(source)
        for value in (*f.args.defaults, *filter(None, f.args.kw_defaults))
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    ]


def returned_nothing(source: str) -> list[str]:
    """Functions that return None, alone or among others, which Triton 3.6 cannot."""
    return [
        f.name
        for f in jitted(source)
        for node in ast.walk(f)
        if isinstance(node, ast.Return) and node.value is not None
        for value in (node.value.elts if isinstance(node.value, ast.Tuple) else [node.value])
        if isinstance(value, ast.Constant) and value.value is None
    ]


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda p: p.stem)
def test_no_text_is_a_default(path: Path) -> None:
    assert texts_as_defaults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda p: p.stem)
def test_nothing_is_no_result(path: Path) -> None:
    assert returned_nothing(path.read_text(encoding="utf-8")) == []


def test_one_would_be_found() -> None:
    source = '@triton.jit\ndef f(x, P: tl.constexpr = ""):\n    pass\n\ndef g(x=""):\n    pass\n'
    assert texts_as_defaults(source) == ["f"]
    source = "@triton.jit\ndef f(x):\n    return x, None\n\ndef g():\n    return None\n"
    assert returned_nothing(source) == ["f"]
    assert sum(len(jitted(p.read_text(encoding="utf-8"))) for p in KERNELS.glob("*.py")) > 30
