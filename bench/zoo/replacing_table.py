"""The results of `bench.zoo.replacing` as a page of the documentation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

import torch

from bench.zoo.measure import MAX_PARAMETERS
from bench.zoo.replacing import LIMIT, Replaced

__all__ = ["page"]

HEAD = """# Coverage of replacing

Written from the rows in `bench/zoo/replace.jsonl`, of which the last of each model counts, by
`python -m bench.zoo --replace --results bench/zoo --page docs/coverage_replace.md`. With names of
models and `--again` it measures these anew. The models are those of [Coverage of
folding](coverage.md). A run of the original counts, by the operations that it
executes, which batch norms have an activation or an addition of an equal shape as their only
consumer: those are *fusable*; of two batch norms that are added to each other one is. An activation
is one that the kernels know, `x * sigmoid(x)`, or a prelu. *Fused* is how many of them `replace`
fused, and *more* are fused ones that the count does not know, such as a hard swish written by hand.
`replace` gets no example inputs; a model where it did not fuse all that is fusable is replaced
again with example inputs, and that counts.

Outputs in eval mode, and outputs, gradients and running statistics of a training step, are compared
with the original's in float64, in PyTorch's operations on a CPU.

"""


def page(results: Mapping[str, Replaced], total: int) -> str:
    """The page in Markdown.

    Args:
        results: by library and name.
        total: how many models there are, measured or not.
    """
    ordered = sorted(results.values(), key=lambda r: (r.library, r.name))
    return HEAD + "\n".join(_lines(ordered, total)) + "\n"


def _lines(results: list[Replaced], total: int) -> Iterator[str]:
    run = [r for r in results if not r.problem]
    norms = [r for r in run if r.norms]
    if len(results) < total:
        yield f"**{len(results)} of {total} models**, in a random order, have been measured.\n"
    yield "## Sum\n"
    columns = "library|models|with batch norms|batch norms|fusable|after prelu|fused|share|more"
    columns += "|wrong|raised"
    yield f"| {columns.replace('|', ' | ')} |"
    yield "|" + " --- |" * len(columns.split("|"))
    for library in (*dict.fromkeys(r.library for r in results), ""):
        yield _sum(library, run, norms)
    worst = max((error for r in norms for error in r.errors.values()), default=0.0)
    seconds = sorted(r.seconds for r in norms)
    yield (
        f"\n*Wrong* is an error of more than {LIMIT:.0e} of the largest value; the largest of any "
        f"model is {worst:.1e}. Finding and fusing took {seconds[len(seconds) // 2]:.1f} s in the "
        f"median and {seconds[-1]:.0f} s at most, on one core that others used, too. "
        f"PyTorch {torch.__version__.partition('+')[0]}.\n"
    )
    yield "## Fusable and not fused, and why\n"
    yield "| batch norms | reason | models |"
    yield "| --- | --- | --- |"
    yield from _reasons(norms)
    yield "\n## Each model\n"
    yield "| model | batch norms | fusable | fused | more | largest error | seconds |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for r in norms:
        error = max(r.errors.values(), default=float("nan"))
        numbers = " | ".join(map(str, (r.norms, r.fusable, r.fused, r.more)))
        yield f"| {r.library} {r.name} | {numbers} | {error:.0e} | {r.seconds:.1f} |"
    broken = [r for r in norms if r.wrong or r.raised]
    if broken:
        yield "\n## Wrong or raised\n"
        for r in broken:
            text = " ".join(r.raised.split())[:200] or f"errors {r.errors}"
            yield f"- {r.library} {r.name}: {text}"
    yield "\n## Not run\n"
    yield f"Models of more than {MAX_PARAMETERS / 1e6:.0f} million parameters, and these:\n"
    for r in results:
        if r.problem and "M parameters" not in r.problem:
            yield f"- {r.library} {r.name}: {r.problem}"


def _sum(library: str, run: list[Replaced], norms: list[Replaced]) -> str:
    models = [r for r in run if library in (r.library, "")]
    some = [r for r in norms if library in (r.library, "")]
    fusable, fused = sum(r.fusable for r in some), sum(r.fused for r in some)
    share = f"{100 * fused / fusable:.1f} %" if fusable else ""
    cells = (
        library or "**all**",
        len(models),
        len(some),
        sum(r.norms for r in some),
        fusable,
        sum(r.slopes for r in some),
        fused,
        share,
        sum(r.more for r in some),
        sum(r.wrong for r in some),
        sum(bool(r.raised) for r in some),
    )
    return f"| {' | '.join(map(str, cells))} |"


def _reasons(results: list[Replaced]) -> Iterator[str]:
    counts: Counter[str] = Counter()
    where: dict[str, Counter[str]] = {}
    for r in results:
        for reason, count in r.reasons.items():
            text = _general(reason)
            counts[text] += count
            where.setdefault(text, Counter())[r.name] += count
    for text, count in counts.most_common():
        named = where[text].most_common()
        shown = ", ".join(f"{name} {n}" for name, n in named[:6])
        more = f" and {len(named) - 6} more" if len(named) > 6 else ""
        yield f"| {count} | {text} | {shown}{more} |"


def _general(reason: str) -> str:
    """The reason without the names of one model."""
    text = reason.partition("not fused: ")[2] or reason
    text = re.sub(r"the code of \S+ cannot", "the code of a module cannot", text)
    text = re.sub(r"the fused code of \S+ was", "the fused code of a module was", text)
    return re.sub(r"\b\w+(\.\w+)+\b", "a module", text).replace("|", "or")
