"""Which tuned result a call takes: the order, the neighbours, the modes, and what it costs."""

from __future__ import annotations

import json
import timeit
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tritonnorm
from tests import tuned
from tritonnorm import recipe as recipes
from tritonnorm import settings
from tritonnorm.device import INTERPRETER, KNOWN, Device, simulated
from tritonnorm.explanation import explain
from tritonnorm.kernels import BY_NAME
from tritonnorm.kernels.base import Config, launches_to
from tritonnorm.plan import Untuned, force_plan, plan
from tritonnorm.problem import Problem
from tritonnorm.recipe import recipe
from tritonnorm.tune import standing
from tritonnorm.tune.key import Key
from tritonnorm.tune.lookup import FARTHEST, Entries, transfer
from tritonnorm.tune.store import UserCache, write_table

H200, A100 = KNOWN["h200"], KNOWN["a100"]
SLICE = replace(H200, name="a slice", sms=32)


def ship(tmp_path: Path, device: Device, *entries: object) -> None:
    write_table(tmp_path / "shipped" / f"{device.sms}.json", device, entries)  # type: ignore[arg-type]
    standing.reload()


def candidate(p: Problem, i: int, device: Device = H200, algorithm: str = "split") -> Config:
    return BY_NAME[algorithm].configs(p, device)[i]


def test_order_of_authority(cache: UserCache, tmp_path: Path) -> None:
    p = tuned.problem()
    first, second, third = (candidate(p, i) for i in (-1, -2, -3))
    assert len({first, second, third}) == 3
    assert plan(p, H200).source == "formula"
    ship(tmp_path, SLICE, tuned.entry(p, config=first, device=SLICE))
    assert plan(p, H200).source == "nearest entry"
    ship(tmp_path, H200, tuned.entry(p, config=second))
    assert plan(p, H200) == replace(plan(p, H200), config=second, source="shipped table")
    cache.put(tuned.entry(p, config=third))
    standing.reload()
    assert (plan(p, H200).config, plan(p, H200).source) == (third, "user cache")
    with force_plan("resident"):
        assert plan(p, H200).source == "forced"
    assert plan(p, A100).source == "formula"  # another architecture: nothing of it counts


def test_extra_tables_come_before_the_shipped_one(
    cache: UserCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = tuned.problem()
    ship(tmp_path, H200, tuned.entry(p, config=candidate(p, -1)))
    write_table(tmp_path / "mine.json", H200, [tuned.entry(p, config=candidate(p, -2))])
    monkeypatch.setenv("TRITONNORM_TABLES", f"{tmp_path / 'mine.json'}:{tmp_path / 'none.json'}")
    standing.reload()
    assert plan(p, H200).config == candidate(p, -2)


def test_exact_shape_then_bucket_then_nearest(cache: UserCache) -> None:
    p = tuned.problem(n=32)
    assert Key.of(replace(p, view=replace(p.view, n=33))).bucket == Key.of(p).bucket
    cache.put(tuned.entry(p))
    cache.put(tuned.entry(tuned.problem(n=36), algorithm="resident"))
    standing.reload()

    def of(n: int, c: int = 256) -> tuple[str, str]:
        found = plan(tuned.problem(n=n, c=c), H200)
        return found.algorithm, found.source

    assert of(32) == ("split", "user cache") and of(36) == ("resident", "user cache")
    assert of(33) == ("split", "user cache") and of(35) == ("resident", "user cache")
    assert of(16) == ("split", "nearest entry") and of(72)[1] == "nearest entry"
    assert of(512)[1] == of(1)[1] == "formula"
    assert of(32, c=512)[1] == "nearest entry" and of(32, c=1024)[1] == "formula"
    other = replace(p, dtype=torch.float32)
    assert plan(other, H200).source == "formula"


def test_a_neighbour_gives_what_the_problem_can_have() -> None:
    """Splits for a GPU of another size, and only configurations that the algorithm offers."""
    big, small = tuned.problem(n=256, p=784), tuned.problem(n=64, p=784)
    for source in BY_NAME["split"].configs(big, H200):
        found = transfer(tuned.entry(big, config=source), small, SLICE)
        assert found is not None and found[1] in BY_NAME["split"].configs(small, SLICE)
    fitting = tuned.problem(n=8)
    assert transfer(tuned.entry(fitting, "resident"), tuned.problem(n=4096), H200) is None
    same = transfer(tuned.entry(fitting, "resident"), fitting, H200)
    assert same is not None and same[1] == candidate(fitting, -1, algorithm="resident")


@pytest.mark.parametrize(
    "change",
    [
        {"algorithm": "fast"},
        {"algorithm": "affine"},  # supports no statistics of the batch
        {"config": {}},
        {"config": {"block_c": 1, "block_n": 1, "block_p": 64, "danger": 1}},
        {"revision": 0},
    ],
    ids=str,
)
def test_an_entry_that_makes_no_sense_is_a_miss(change: dict[str, object]) -> None:
    p = tuned.problem()
    assert Entries("x", [replace(tuned.entry(p), **change)]).lookup(p, H200) is None


@pytest.mark.parametrize("value", [0, -4, 3, 1 << 40, 10**400])
def test_a_configuration_out_of_bounds_is_not_taken(value: int) -> None:
    p = tuned.problem()
    for name in ("block_c", "block_p", "splits", "num_warps"):
        hostile = tuned.entry(p)
        hostile = replace(hostile, config={**hostile.config, name: value})
        found = Entries("x", [hostile]).lookup(p, H200)
        assert found is None or found[1] in BY_NAME["split"].configs(p, H200)


def test_heuristic_looks_at_no_table(
    cache: UserCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache.put(tuned.entry())
    ship(tmp_path, H200, tuned.entry())
    assert plan(tuned.problem(), H200).source == "user cache"
    monkeypatch.setenv("TRITONNORM_TUNE", "heuristic")
    standing.reload()
    assert plan(tuned.problem(), H200).source == "formula"
    monkeypatch.setenv("TRITONNORM_TUNE", "sometimes")
    with pytest.raises(ValueError, match="TRITONNORM_TUNE: expected one of off, on"):
        settings.tune_mode()


def test_strict(cache: UserCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache.put(tuned.entry(tuned.problem(n=8)))
    monkeypatch.setenv("TRITONNORM_STRICT", "1")
    record = tmp_path / "unseen.jsonl"
    monkeypatch.setenv("TRITONNORM_RECORD", str(record))
    standing.reload()
    assert plan(tuned.problem(n=8), H200).source == "user cache"
    with pytest.raises(Untuned, match="near: forward 8x256x196") as error:
        plan(tuned.problem(n=16), H200)
    assert "shape: [8, 256, 196] for [16, 256, 196]" in str(error.value)
    with force_plan("split"):
        assert plan(tuned.problem(n=16), H200).source == "forced"
    (line,) = record.read_text().splitlines()
    assert Key.from_json(json.loads(line)) == Key.of(tuned.problem(n=16))
    assert plan(tuned.problem(n=16), INTERPRETER).source == "formula"


def test_the_operators_take_what_was_tuned(cache: UserCache) -> None:
    """A result that arrives later is used from then on, and the kernels compute the same."""
    x = torch.randn(4, 8, 7, 7)
    bn = tritonnorm.BatchNorm2d(8)
    with simulated(H200):
        expected = bn(x)
        (p,) = {e.problem for e in explain(bn, x) if e.problem.direction == "forward"}
        assert recipes.recipe.cache_info().currsize
        assert str(explain(bn, x)).count("(formula)") == 2
        standing.put(tuned.entry(p, algorithm="split"))
        (found,) = (e for e in explain(bn, x) if e.problem.direction == "forward")
        assert (found.plan.algorithm, found.plan.source) == ("split", "user cache")
        torch.testing.assert_close(bn(x), expected)
    assert len(UserCache(cache.root.parent).entries()) == 1  # type: ignore[union-attr]


def test_the_fold_follows_the_same_look_up(cache: UserCache) -> None:
    assert plan(tuned.FOLD, H200).source == "formula"
    cache.put(tuned.entry(tuned.FOLD, "fold"))
    standing.reload()
    found = plan(tuned.FOLD, H200)
    assert found.source == "user cache" and found.config != Config(16, 1, 64)
    with force_plan("fold", Config(8, 1, 64)):
        assert plan(tuned.FOLD, H200).config == Config(8, 1, 64)
        assert plan(tuned.problem(), H200).source == "formula"


def test_the_other_norms_follow_the_same_look_up(cache: UserCache, tmp_path: Path) -> None:
    """Forced, cache, table, nearest, formula: of group norms and of rows."""
    p, rows = tuned.group(8, 320, 64, 64), tuned.group(4096, 768)
    ship(
        tmp_path,
        H200,
        tuned.entry(rows, "group_resident"),
        tuned.entry(tuned.group(16, 320, 64, 64), "group_split"),
    )
    assert (plan(rows, H200).source, plan(p, H200).source) == ("shipped table", "nearest entry")
    assert plan(p, H200).algorithm == "group_split" != plan(p, A100).algorithm
    wider, narrower = tuned.group(8192, 1536), tuned.group(4096, 256)
    assert [plan(each, H200).source for each in (wider, narrower)] == ["formula", "formula"]
    cache.put(tuned.entry(p, "group_split", candidate(p, 1, algorithm="group_split")))
    standing.reload()
    found = plan(p, H200)
    assert found.source == "user cache" and found.config == candidate(p, 1, H200, "group_split")
    with force_plan("group_resident"):
        assert plan(p, H200).source == "forced"
    with force_plan("formula"):
        assert plan(p, H200).source == "formula"
    slice_of = transfer(tuned.entry(p, "group_split"), tuned.group(4, 320, 64, 64), SLICE)
    assert slice_of is not None and slice_of[0] == "group_split"
    assert slice_of[1] in BY_NAME["group_split"].configs(tuned.group(4, 320, 64, 64), SLICE)


def test_a_group_norm_takes_what_was_tuned(cache: UserCache) -> None:
    from tritonnorm.norms import ops

    norm, x = tritonnorm.GroupNorm(2, 8), torch.randn(4, 8, 7, 7)
    p = tuned.group(4, 8, 7, 7, groups=2, dtype=torch.float32)
    call = ("forward", x.shape, x.stride(), x.dtype, H200, None, 2, True, "", (), False)
    with simulated(H200):
        expected = norm(x)
        assert ops.recipe(*call).problem == p
        assert ops.recipe(*call).plan.algorithm == "group_resident"
        standing.put(tuned.entry(p, "group_split"))
        found = ops.recipe(*call).plan
        assert (found.algorithm, found.source) == ("group_split", "user cache")
        torch.testing.assert_close(norm(x), expected)


def test_a_rank_takes_what_was_tuned_for_ranks(cache: UserCache) -> None:
    """Both halves of a backward the same; what was tuned for a plain batch norm is no matter."""
    from tritonnorm.sync import ops

    x, vector = torch.randn(4, 8, 7, 7), torch.ones(8)
    plain = tuned.problem(4, 8, 49, dtype=torch.float32)
    forward = replace(plain, form="synced")
    saved = (x, x, None, None, vector, vector, vector, vector)

    def warps() -> list[int]:
        """Of the moments, the sums and the gradients."""
        found: list[int] = []
        with launches_to(lambda launch, _: found.append(launch.parts("cuda")[2]["num_warps"])):
            ops.call("moments", x)
            sums, _, _ = ops.call("gradient_sums", *saved, "", (), [True, False])
            ops.call("apply_gradient_sums", *saved, sums, vector, "", (), [True, True])
        return [found[0], found[2], found[4]]

    with simulated(H200):
        standing.put(tuned.entry(plain))
        assert plan(forward, H200).source == "formula" != plan(plain, H200).source
        assert warps() == [4, 4, 4]
        standing.put(tuned.entry(forward))
        assert tuned.last(forward, "split").num_warps == 8 and warps() == [8, 4, 4]
        standing.put(tuned.entry(replace(forward, direction="backward")))
        assert warps() == [8, 8, 8]


def test_a_warm_look_up_costs_less_than_a_microsecond(cache: UserCache) -> None:
    from tritonnorm.norms import ops

    for n in range(1, 200):
        cache.put(tuned.entry(tuned.problem(n=n)))
        cache.put(tuned.entry(tuned.group(n, 256, 14, 14), "group_split"))
    standing.reload()
    sizes, strides = (32, 256, 14, 14), (50176, 196, 14, 1)
    kind = ("forward", sizes, strides, torch.bfloat16, H200, None)
    for look_up, call in (
        (recipe, (*kind, True, "", (), False, False)),
        (ops.recipe, (*kind, 32, True, "", (), False)),
    ):
        assert look_up(*call).plan.source == "user cache"
        calls = 20_000
        times = timeit.repeat(lambda f=look_up, a=call: f(*a), number=calls, repeat=15)
        assert min(times) / calls < 1e-6, f"{min(times) / calls * 1e9:.0f} ns"


def test_tables_are_read_once(cache: UserCache, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    entries = UserCache.entries
    monkeypatch.setattr(UserCache, "entries", lambda self: reads.append(1) or entries(self))
    for n in range(1, 5):
        plan(tuned.problem(n=n), H200)
    assert len(reads) == 1 and FARTHEST > 0
