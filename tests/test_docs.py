"""Pages agree with the code, all are in the navigation, and no file outgrows its room."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from tritonnorm import settings

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
VARIABLE = re.compile(r"\bTRITONNORM_[A-Z0-9_]+\b")
SOURCES = sorted((ROOT / "tritonnorm").rglob("*.py"))

SOFT_LIMIT, HARD_LIMIT, PACKAGE_BUDGET = 350, 500, 25700
# Files over the soft limit, each with the reason why it is still one room.
LONG: dict[str, str] = {}


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_every_variable_is_documented_and_every_documented_one_exists() -> None:
    page = (DOCS / "environment.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## `(\w+)`\n\n(.+?)$", page, re.MULTILINE))
    assert sections == settings.VARIABLES
    assert settings.VARIABLES, "settings.py names no variable"


def variables_in(path: Path) -> set[str]:
    """TRITONNORM_* names that are a string of their own; in a docstring they are part of a text."""
    constants = (
        n.value
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(n, ast.Constant)
    )
    return {c for c in constants if isinstance(c, str) and VARIABLE.fullmatch(c)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_settings_reads_variables(path: Path) -> None:
    expected = set(settings.VARIABLES) if path.name == "settings.py" else set()
    assert variables_in(path) == expected


def pages_in(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    if isinstance(nav, dict):
        nav = list(nav.values())
    assert isinstance(nav, list)
    return [page for entry in nav for page in pages_in(entry)]


def test_every_page_is_in_the_navigation_once() -> None:
    config = yaml.safe_load((ROOT / ".ci" / "mkdocs.yml").read_text(encoding="utf-8"))
    there = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    assert sorted(pages_in(config["nav"])) == there


def test_files_keep_to_their_size() -> None:
    files = [*SOURCES, *(ROOT / "bench").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    sizes = {str(path.relative_to(ROOT)): lines_of(path) for path in files}
    over = {name: size for name, size in sizes.items() if size > SOFT_LIMIT}
    assert set(over) == set(LONG), over
    assert all(size <= HARD_LIMIT for size in over.values()), over


def test_the_package_keeps_to_its_budget() -> None:
    assert sum(map(lines_of, SOURCES)) <= PACKAGE_BUDGET


PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    """mkdocs checks the links inside docs/; this one also covers the README."""
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if not (page.parent / link).exists()] == []
