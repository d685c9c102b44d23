"""Tables, Markdown and HTML say what the rows say."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from rich.console import Console

from bench.record.file import Record
from bench.record.rows import SkippedRow
from bench.report.cells import OPS, number, sections
from bench.report.html import record_html, save_html
from bench.report.sentences import empty_columns, legend, method, summary
from bench.report.table import record_markdown, record_table
from bench.report.terminal import plain, show
from tests.bench.samples import TENSORS, sample, without_gpu

ISSUE = (  # the columns that were asked for
    "op mode layout dtype shape provider|p50 us|p20/p80|noise|GB/s|%peak|%copy|host us|peak MB|"
    "x eager|x compile|flags|plan"
)
FULL = sample(layers=5, caches=("cold", "warm"))


def words(record: Record) -> str:
    return plain(record_table(record))


def test_the_columns_are_those_asked_for() -> None:
    titles = [column.title for column in OPS]
    assert titles == [*ISSUE.split("|")[0].split(), *ISSUE.split("|")[1:]]


def test_terminal_shows_every_row_whole() -> None:
    text = words(FULL)
    assert "…" not in text
    for row in FULL.ops:
        (found,) = (
            line.split()
            for line in text.splitlines()
            if re.search(rf"^{re.escape(row.op)} +{re.escape(row.mode)} ", line)
            and f" {row.shape} " in line
            and f" {row.provider} " in line
            and f" {number(row.p20_us)}/{number(row.p80_us)} " in line
        )
        assert f"{row.gb_s:,.0f}" in found or f"{row.gb_s:,.1f}" in found
        assert f"{row.x_eager:.2f}" in found and f"{row.copy_percent:.1f}" in found
    for part in ("driver 1.0", "torch 2.0.0", "commit 0123456789ab", "theoretical 2,000"):
        assert part in text
    assert "(warm)" in text and "Whole models" in text and "not installed" in text


def test_a_narrow_terminal_cuts_nothing_off() -> None:
    console = Console(width=60, file=io.StringIO())
    show(console, record_table(FULL))
    assert isinstance(console.file, io.StringIO)
    shown = re.sub(r"\s", "", console.file.getvalue())
    assert shown == re.sub(r"\s", "", words(FULL))


def test_brackets_are_text() -> None:
    row = replace(FULL.ops[0], plan="[bold]x[/bold] [red]", provider="a|b")
    text = words(replace(FULL, ops=[row]))
    assert "[bold]x[/bold] [red]" in text


def test_columns_without_figures_are_left_out() -> None:
    record = sample(layers=2, providers=("tritonnorm", "eager"), peak=False)
    titles = [column.title for column in sections(record)[0].columns]
    assert "%copy" in titles and "x eager" in titles
    assert "%peak" not in titles and "x compile" not in titles
    assert empty_columns(record) == "Left out, empty in every row: %peak, x compile."
    assert empty_columns(FULL) is None


def test_without_a_gpu() -> None:
    record = without_gpu()
    text = words(record)
    assert text.startswith("tritonnorm on a CPU\n")
    sentence = empty_columns(record)
    assert sentence is not None and sentence in text and sentence in record_markdown(record)
    assert sentence.startswith("There was no GPU") and "GB/s" in sentence and "x eager" in sentence
    assert "network18" in text and "import tritonnorm" in text
    assert not any("CUDA" in line for line in method(record))
    timed = replace(record, ops=[replace(FULL.ops[0], peak_percent=None, copy_percent=None)])
    assert empty_columns(timed) == "There was no GPU, which these columns need: %peak, %copy."


def test_legend_explains_the_flags_that_occur() -> None:
    rows = [replace(FULL.ops[0], flags=flags) for flags in ("N", "NH", "")]
    assert [line[:2] for line in legend(Record(FULL.environment, ops=rows))] == ["N:", "H:"]
    assert legend(Record(FULL.environment)) == []


def test_summary() -> None:
    row = replace(FULL.ops[0], mode="forward", cache="cold", provider="tritonnorm")
    rows = [
        replace(row, x_eager=2.0, x_compile=1.0, copy_percent=80.0),
        replace(row, x_eager=4.5, x_compile=None, copy_percent=90.0),
        replace(row, x_eager=3.0, x_compile=4.0, copy_percent=40.0),
        replace(row, x_eager=99.0, x_compile=99.0, provider="eager"),
        replace(row, mode="inference", x_eager=None, x_compile=None, copy_percent=70.0),
    ]
    assert summary(Record(FULL.environment, ops=rows)) == [
        "tritonnorm, forward, 3 cases: 3.00x eager and 2.00x compile (geometric mean), "
        "80.0 % of the copy roof (median)",
        "tritonnorm, inference, 1 case: 70.0 % of the copy roof (median)",
    ]


@pytest.mark.parametrize(
    ("x", "text"),
    [(None, ""), (12345.6, "12,346"), (58.14, "58.1"), (5.814, "5.81"), (0.5, "0.500")],
)
def test_number(x: float | None, text: str) -> None:
    assert number(x) == text


def test_markdown_is_a_table_with_every_row() -> None:
    record = replace(FULL, ops=[replace(FULL.ops[0], plan="a|b <c> *d* `e`\nf"), *FULL.ops[1:]])
    text = record_markdown(record)
    assert r"a\|b \<c> \*d\* \`e\` f" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len([line for line in rows if line.startswith("| BN") and "host" not in line]) == (
        len(record.ops) + 2  # two rows of the table of host times
    )
    tables = re.split(r"\n\n", text)
    for table in (part.splitlines() for part in tables if part.startswith("|")):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "<details>" in text and text.count("<details>") == text.count("</details>")
    assert f"- {record.environment['command']}" in text


def test_markdown_fits_in_a_comment() -> None:
    record = sample(layers=60, modes=list(TENSORS), models=1)
    text = record_markdown(record)
    assert 64_000 < len(text) <= 65_000
    shown = len(re.findall(r"^\| BN\S* \| \w", text, re.MULTILINE))
    (left_out,) = re.findall(r"^(\d+) more rows are in the results file", text, re.MULTILINE)
    assert shown + int(left_out) == len(record.ops)
    assert "| import tritonnorm |" in text  # what follows the long table is still there
    assert "more rows" not in record_markdown(record, longest=10**6)


class Page(HTMLParser):
    """Rows of the tables by the id of the heading above, and everything the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.links: list[str] = []
        self.tags: set[str] = set()
        self._heading = ""
        self._cell: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.add(tag)
        self.links += [v or "" for k, v in attributes if k in ("src", "href", "srcset", "action")]
        if tag == "h2":
            self._heading = values.get("id") or ""
        elif tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[self._heading][-1].append("".join(self._cell))
            self._cell = None


EVIL = '<img src="http://example.invalid/x.png" onerror="document.title=1">'


def evil() -> Record:
    """A record that would break out of a page, or load something, if it were not escaped."""
    record = sample(layers=5, modes=("forward",), models=1)
    record.ops[0] = replace(record.ops[0], plan=f"</td>{EVIL}", provider="{{ 7 * 7 }}")
    record.skipped.append(SkippedRow(EVIL, EVIL, f"</script><script>throw 1</script>{EVIL}"))
    record.environment["variables"] = {"TRITON_X": EVIL}
    record.environment["command"] = f"python -m bench {EVIL}"
    return record


@pytest.mark.parametrize("record", [FULL, evil(), without_gpu()], ids=["gpu", "evil", "no gpu"])
def test_html_has_every_cell_and_refers_to_nothing(record: Record) -> None:
    text = record_html(record)
    page = Page(text)
    for section in sections(record):
        header, *rows = page.tables[section.name]
        assert header == [column.title for column in section.columns]
        assert rows == [[cell.text for cell in row] for row in section.rows]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert {link[1:] for link in page.links if link[0] == "#"} <= {
        *re.findall(r'id="([^"]+)"', text)
    }
    assert not page.tags & {"link", "iframe", "object", "embed", "base", "form"}
    assert "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text
    facts = dict(page.tables["environment"])
    assert facts["gpu.name"] == record.environment["gpu"]["name"]
    assert facts["commit"] == record.environment["commit"]
    assert text.count("<script") == 1


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# Before the page: what goes wrong. After it: what is there before and after sorting.
WATCH = """<script>
window.wrong = [];
addEventListener("error", e => wrong.push("error: " + e.message), true);
addEventListener("securitypolicyviolation", e => wrong.push("refused: " + e.blockedURI));
</script>"""
PROBE = """<script>
addEventListener("load", () => {
  const table = document.querySelector("#ops + .table table");
  const titles = [...table.tHead.rows[0].cells];
  const column = i => [...table.tBodies[0].rows].map(row => row.cells[i].textContent);
  const click = name => {
    const i = titles.findIndex(title => title.textContent === name);
    titles[i].querySelector("button").click();
    return [titles[i].ariaSort, column(i)];
  };
  const found = {
    wrong,
    title: document.title,
    rows: column(0).length,
    times: [click("p50 us"), click("p50 us")],
    shapes: click("shape"),
    sorted: titles.filter(title => title.ariaSort).length,
    loaded: performance.getEntriesByType("resource").map(e => e.name.slice(0, 40)),
    pictures: [...document.images].map(image => image.naturalWidth),
    wide: document.documentElement.scrollWidth - innerWidth,
  };
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = encodeURIComponent(JSON.stringify(found));
  document.body.append(out);
});
</script>"""


def opened(path: Path, browser: str) -> dict[str, Any]:
    """What the browser says of a page."""
    page = path.read_text(encoding="utf-8")
    page = page.replace("<title>", f"{WATCH}<title>", 1).replace("</body>", f"{PROBE}</body>", 1)
    probed = path.with_name("probed.html")
    probed.write_text(page, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    flags += ["--no-first-run", "--disable-background-networking", "--window-size=1400,900"]
    done = subprocess.run(
        [browser, *flags, f"--user-data-dir={path.parent}/user", "--dump-dom", probed.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    (answer,) = re.findall(r'<pre id="probe">(.*?)</pre>', done.stdout)
    unquoted: dict[str, Any] = json.loads(unquote(answer))
    return unquoted


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_html_in_a_browser(tmp_path: Path) -> None:
    assert BROWSER is not None
    record = evil()
    path = tmp_path / "report.html"
    save_html(record, path)
    found = opened(path, BROWSER)
    assert found["wrong"] == []
    assert found["title"] == "tritonnorm on Simulated GPU (sm_00, 100 multiprocessors, 40 MiB L2)"
    assert found["rows"] == len(record.ops)
    assert all(name.startswith("data:") for name in found["loaded"])
    assert len(found["pictures"]) == 4 and min(found["pictures"]) > 500
    assert found["wide"] <= 0  # nothing makes the page itself scroll sideways
    times = sorted(row.p50_us for row in record.ops)
    down, up = found["times"]
    assert down == ["descending", [number(x) for x in reversed(times)]]
    assert up == ["ascending", [number(x) for x in times]]
    expected = sorted((row.shape for row in record.ops), key=lambda s: int(s.split("x")[1]))
    assert found["shapes"] == ["ascending", expected]
    assert found["sorted"] == 1
