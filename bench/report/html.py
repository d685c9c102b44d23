"""A record as one page of HTML that needs nothing but itself."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from bench.record.file import Record
from bench.report.cells import sections
from bench.report.pictures import pictures, png
from bench.report.sentences import empty_columns, header, legend, method, summary, title

__all__ = ["record_html", "save_html"]

TEMPLATE = "template.html.j2"
# Name of a picture, up to the first hyphen -> what it shows, for those who cannot see it.
CAPTIONS = {
    "roof": "Percent of the roof per layer",
    "bandwidth": "Bandwidth against bytes, with the roofs and the size of the L2 cache",
    "speedup": "Speed-up over eager by channels and N*H*W",
    "training": "Forward, backward and optimizer of a training step",
}


@dataclass(frozen=True)
class _Picture:
    name: str
    caption: str
    data: str  # base64 of a PNG


def record_html(record: Record) -> str:
    """The page: environment, summary, pictures, tables that can be sorted, legend, method.

    It refers to nothing outside itself, and its policy forbids the browser to load anything.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        title=title(record),
        header=header(record),
        command=record.environment.get("command"),
        summary=summary(record),
        empty=empty_columns(record),
        pictures=list(_pictures(record)),
        sections=sections(record),
        legend=legend(record),
        method=method(record),
        facts=list(_facts(record.environment)),
    )


def save_html(record: Record, path: Path) -> None:
    """Write `record_html` to a file; its folder is made if need be."""
    text = record_html(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _pictures(record: Record) -> Iterator[_Picture]:
    for name, figure in pictures(record).items():
        caption = CAPTIONS[name.partition("-")[0]]
        yield _Picture(name, caption, base64.b64encode(png(figure)).decode("ascii"))


def _facts(environment: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every value of the environment by its path, as ``gpu.name``."""
    for name, value in environment.items():
        inner = value.items() if isinstance(value, dict) else [(None, value)]
        for key, each in inner:
            text = each if isinstance(each, str) else json.dumps(each)
            yield (name if key is None else f"{name}.{key}"), text
