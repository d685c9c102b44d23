"""When the source of a kernel changes, somebody decides whether tuned results still hold."""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from pathlib import Path

import pytest

from tritonnorm.kernels import ALGORITHMS, FOLDS, GROUP_ALGORITHMS, OTHER_FORMS
from tritonnorm.tune.revisions import REVISIONS

KERNELS = Path(__file__).resolve().parent.parent / "tritonnorm" / "kernels"
FILES = {"fold": "folding", "masked": "masked_launches"}  # the others are named after their file

# Algorithm -> its revision and the hash of its kernels' source. If a change cannot make another
# configuration the fastest, only the hash is new; otherwise raise the number in `REVISIONS` too.
DECIDED: dict[str, tuple[int, str]] = {
    "resident": (5, "ad0e3497ea08c878"),
    "persistent": (5, "37264c5d4056f746"),
    "split": (4, "804ca98ed5f8df23"),
    "affine": (3, "0887095c931cbebc"),
    "group_resident": (2, "03f0741bb46ec112"),
    "group_split": (2, "d24ffefef09bbf24"),
    "masked": (2, "ac592c61ed992c40"),
    "fold": (1, "1a75ad84064aeab0"),
}


def kernels_in(path: Path) -> list[str]:
    """The source of the functions that Triton compiles, decorators included."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    return [
        "".join(lines[node.decorator_list[0].lineno - 1 : node.end_lineno])
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.unparse(d) for d in node.decorator_list)
    ]


def files_of(name: str) -> list[Path]:
    """The file of an algorithm, and those in `kernels/` that it imports."""
    found, todo = set(), [FILES.get(name, name)]
    while todo:
        path = KERNELS / f"{todo.pop()}.py"
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                todo += [n for n in names if n and (KERNELS / f"{n}.py").exists()]
    return sorted(found)


def tokens(source: str) -> list[str]:
    """What Triton reads: neither comments nor docstrings nor line breaks."""
    dropped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE)
    found, begins = [], True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.STRING and begins:
            continue
        begins = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL)
        if token.type not in dropped:
            found.append(token.string)
    return found


def fingerprint(name: str) -> str:
    sources = [kernel for path in files_of(name) for kernel in kernels_in(path)]
    assert sources, f"{name}: no kernels found"
    words = [word for source in sources for word in tokens(source)]
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


ALL = [a.name for a in (*ALGORITHMS, *GROUP_ALGORITHMS, *OTHER_FORMS["masked"], *FOLDS)]


@pytest.mark.parametrize("name", ALL)
def test_somebody_has_decided(name: str) -> None:
    now = (REVISIONS.get(name, 0), fingerprint(name))
    assert DECIDED.get(name) == now, (
        f"the kernels of {name} changed. Can another configuration be the fastest now? Then raise "
        "its number in tritonnorm/tune/revisions.py, and tuned results of it are measured anew. In "
        f"any case set DECIDED[{name!r}] = {now}, with the new number"
    )


def test_every_algorithm_has_a_revision() -> None:
    assert set(REVISIONS) == set(ALL)
    assert min(REVISIONS.values()) >= 1


def test_words_change_nothing_and_code_does() -> None:
    one = '@triton.jit\ndef f(x):\n    """Says."""\n    y = x + 1  # adds\n    return y\n'
    other = '@triton.jit\ndef f(x):\n    """Says more."""\n\n    y = x + 1\n    return y\n'
    assert tokens(one) == tokens(other)
    assert tokens(one) != tokens(one.replace("+ 1", "+ 2"))
    assert {p.stem for p in files_of("split")} >= {"split", "streaming", "_moments", "_tile"}
