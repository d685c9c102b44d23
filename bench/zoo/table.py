"""The results as a page of the documentation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

import torch

from bench.zoo.measure import LIMIT, MAX_PARAMETERS, Result

__all__ = ["page"]

HEAD = """# Coverage of folding

Written by `python -m bench.zoo --page docs/coverage.md`. One model of each family of pytorchcv, and
the models of transformers that have batch norms, with random weights. Scales are uniform in
[0.5, 1.5] and shifts in [-0.5, 0.5]; the statistics are those of one random batch. Each model is
folded in float64 with one example input of 2 samples, and its outputs are compared with those of
the original. A *call* is one batch norm executed in eval mode in one run of the model.

- *folded*: nothing is left of the batch norm.
- *reduced*: its scale is in the layers behind it, and one addition per channel is left. That needs
  scales that are not negative, as all are here; trained models have a few that are.
- *left*: it runs, with the reason in the report; together with its activation where one follows.

"""


def page(tools: Mapping[str, Mapping[str, Result]]) -> str:
    """The page in Markdown, from the results of each tool by model."""
    ours = sorted(tools["tritonnorm"].values(), key=lambda r: (r.library, r.name))
    lines = [*_lines(ours), *_others(tools)]
    return HEAD + "\n".join(lines) + "\n"


def _others(tools: Mapping[str, Mapping[str, Result]]) -> Iterator[str]:
    """The tools on the models that all of them were tried on."""
    ours = tools["tritonnorm"]
    tools = {tool: results for tool, results in tools.items() if results}
    names = [key for key, r in ours.items() if r.calls[0] and all(key in t for t in tools.values())]
    total = sum(ours[key].calls[0] for key in names)
    yield "\n## Beside other tools\n"
    yield f"{len(names)} models with {total} batch norm calls, in float64. torch.fx is the `fuse`"
    yield "of its experimental optimizations; torchao is `_fuse_conv_bn_` and `_fuse_linear_bn_` on"
    yield "the exported program; MMCV is `fuse_conv_bn`. Calls of a model that comes out wrong"
    yield "count as gone.\n"
    yield "| tool | models it raised on | calls gone | wrong |"
    yield "| --- | --- | --- | --- |"
    for tool, results in tools.items():
        some = [results[key] for key in names]
        right = [r for r in some if not r.raised]
        gone = sum(r.calls[0] - r.calls[1] for r in right)
        wrong = ", ".join(r.name for r in right if r.wrong) or "none"
        share = f"{100 * gone / total:.1f} %" if total else ""
        yield f"| {tool} | {len(some) - len(right)} | {gone} ({share}) | {wrong} |"


def _lines(results: list[Result]) -> Iterator[str]:
    run = [r for r in results if not r.problem]
    norms = [r for r in run if r.calls[0] or r.raised]
    yield "## Sum\n"
    columns = "library models with-batch-norms calls folded reduced left gone wrong raised"
    yield "| " + " | ".join(columns.split()).replace("-", " ") + " |"
    yield "|" + " --- |" * len(columns.split())
    for library in (*dict.fromkeys(r.library for r in results), ""):
        some = [r for r in norms if library in (r.library, "")]
        models = [r for r in run if library in (r.library, "")]
        yield _sum(library or "**all**", models, some)
    worst = max((r.error for r in norms), default=0.0)
    seconds = sorted(r.seconds for r in norms)
    yield (
        f"\n*Gone* is folded and reduced. *Wrong* is an error of more than {LIMIT:.0e} of the "
        f"largest output; the largest error of any model is {worst:.1e}. Folding took "
        f"{seconds[len(seconds) // 2]:.1f} s in the median and {seconds[-1]:.0f} s at most, on one "
        f"core, checks included. PyTorch {torch.__version__.partition('+')[0]}.\n"
    )
    yield "## What is left, and why\n"
    yield "| batch norms | reason | models |"
    yield "| --- | --- | --- |"
    yield from _reasons(norms)
    yield "\n## Each model\n"
    yield "| model | calls | folded | reduced | left | error | seconds |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for r in norms:
        folded, reduced, left = _split(r)
        numbers = (r.calls[0], folded, reduced, left)
        shown = " | ".join(map(str, numbers))
        yield f"| {r.library} {r.name} | {shown} | {r.error:.0e} | {r.seconds:.1f} |"
    yield "\n## Not run\n"
    yield f"Models of more than {MAX_PARAMETERS / 1e6:.0f} million parameters, and these:\n"
    for r in results:
        if r.problem and "M parameters" not in r.problem:
            yield f"- {r.library} {r.name}: {r.problem}"
    none = [r.name for r in run if not r.calls[0] and not r.raised]
    yield f"\nWithout a batch norm call: {', '.join(none)}."


def _sum(title: str, models: list[Result], norms: list[Result]) -> str:
    folded, reduced, left = (sum(part) for part in zip(*map(_split, norms), strict=True))
    calls = folded + reduced + left
    gone = 100 * (folded + reduced) / calls
    wrong, raised = sum(r.wrong for r in norms), sum(bool(r.raised) for r in norms)
    cells = (title, len(models), len(norms), calls, folded, reduced, left)
    return f"| {' | '.join(map(str, cells))} | {gone:.1f} % | {wrong} | {raised} |"


def _split(result: Result) -> tuple[int, int, int]:
    """Calls that are folded, reduced and left; a batch norm that is reduced may be called often."""
    return result.calls[0] - result.calls[1] - result.shifts, result.shifts, result.calls[1]


def _reasons(results: list[Result]) -> Iterator[str]:
    counts: Counter[str] = Counter()
    where: dict[str, dict[str, int]] = {}
    for r in results:
        for reason, count in r.reasons.items():
            text = _general(reason)
            counts[text] += count
            models = where.setdefault(text, {})
            models[r.name] = models.get(r.name, 0) + count
    for text, count in counts.most_common():
        named = sorted(where[text].items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {n}" for name, n in named[:6])
        more = f" and {len(named) - 6} more" if len(named) > 6 else ""
        yield f"| {count} | {text} | {shown}{more} |"


def _general(reason: str) -> str:
    """The reason without the names of one model."""
    text = re.sub(r"\b\w+(\.\w+)+\b", "a layer", reason)
    text = text.removesuffix("; so it runs in one launch with its activation")
    return re.sub(r"its (in|out)put is \([\d, ]+\)", "by the shapes", text)
