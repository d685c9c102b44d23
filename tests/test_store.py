"""Tuned results on disk: nothing is lost, and nothing that is found there does harm."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from tests import tuned
from tests.test_plan import PROBLEMS
from tritonnorm.device import KNOWN, Device
from tritonnorm.norms.problem import GroupProblem
from tritonnorm.problem import FoldProblem, Problem, View
from tritonnorm.tune import store
from tritonnorm.tune.key import Key
from tritonnorm.tune.store import Entry, UserCache, read_table, slug, write_table

ROOT = Path(__file__).resolve().parent.parent


def file_of(root: Path) -> Path:
    (path,) = root.rglob("*.json")
    return path


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


BACKWARD = {"direction": "backward", "needs_dparams": False}
GROUPS = [
    tuned.group(8, 320, 64, 64),
    tuned.group(8, 320, 64, 64, channels_last=True, activity="smooth", residual=True),
    tuned.group(8, 320, 64, 64, groups=320, **BACKWARD),
    tuned.group(4096, 768, centred=False),
    tuned.group(4096, 768, **BACKWARD, needs_dresidual=True, activity="two_valued"),
    replace(tuned.group(8, 64, 4, 4), view=View(8, 64, 16, False, (2048, 16, 1))),
]


FORMS = [tuned.problem(form=form, activity="smooth") for form in ("synced", "masked")]


@pytest.mark.parametrize("p", [*PROBLEMS[::7], *FORMS, *GROUPS, tuned.FOLD], ids=str)
def test_a_key_is_the_problem(p: Problem) -> None:
    key = Key.of(p)
    again = Key.from_json(json.loads(json.dumps(key.to_json())))
    assert again == key and Key.of(again.problem()) == key
    if not isinstance(p, FoldProblem) and p.direction == "forward":
        p = replace(p, needs_dresidual=False)  # a forward has no gradients
    assert again.problem() == p


def test_a_key_knows_all_that_a_problem_has() -> None:
    """A new field of a problem belongs into the key, or two problems share their tuned results."""
    assert {f.name for f in fields(Problem)} == {
        *("direction", "batch_statistics", "view", "dtype", "activity", "residual", "mask"),
        *("needs_dx", "needs_dresidual", "needs_dparams", "form"),
    }
    assert {f.name for f in fields(GroupProblem)} == {
        *("direction", "view", "groups", "rows", "centred", "dtype", "activity", "residual"),
        *("needs_dx", "needs_dresidual", "needs_dparams"),
    }
    assert {f.name for f in fields(View)} == {"n", "c", "p", "channels_last", "strides"}
    assert {f.name for f in fields(FoldProblem)} == {
        *("dtype", "affine", "statistics", "pairs", "channels", "elements", "rows"),
    }


def test_keys_tell_apart_what_runs_other_code() -> None:
    p = tuned.problem()
    others = [
        replace(p, direction="backward"),
        replace(p, batch_statistics=False),
        replace(p, dtype=torch.float16),
        replace(p, activity="smooth"),
        replace(p, residual=True),
        replace(p, view=replace(p.view, channels_last=True)),
        replace(p, view=replace(p.view, p=198)),  # rows are no multiple of four
        replace(p, view=replace(p.view, strides=(1 << 20, 196, 1))),
        replace(p, direction="backward", needs_dx=False),
        replace(p, form="synced"),
        replace(p, form="masked"),
    ]
    groups = {Key.of(other).group for other in [p, *others]}
    assert len(groups) == len(others) + 1
    near = replace(p, view=replace(p.view, n=33))
    assert Key.of(near).bucket == Key.of(p).bucket and Key.of(near) != Key.of(p)
    far = replace(p, view=replace(p.view, n=64))
    assert Key.of(far).distance(Key.of(p)) == 1.0
    assert Key.of(replace(p, view=replace(p.view, c=512))).distance(Key.of(p)) == 2.0


def test_keys_of_group_norms() -> None:
    p = tuned.group(8, 320, 64, 64)
    others = [
        replace(p, direction="backward"),
        replace(p, centred=False),
        replace(p, groups=320),
        replace(p, view=replace(p.view, channels_last=True)),
        replace(p, view=replace(p.view, channels_last=True), groups=64),  # 5 channels in a row
        tuned.group(4096, 320),
        tuned.problem(8, 320, 4096),
    ]
    keys = [Key.of(each) for each in (p, *others)]
    assert len({key.group for key in keys}) == len(keys)
    twice, wider = tuned.group(16, 320, 64, 64), tuned.group(8, 640, 64, 64)
    assert [Key.of(each).distance(keys[0]) for each in (twice, wider)] == [1.0, 2.0]
    rows, longer = tuned.group(4096, 768), tuned.group(4096, 1536)
    assert Key.of(rows).distance(Key.of(longer)) == 2.0
    assert (Key.of(rows).log2_m, Key.of(p).log2_m) == (12, 8)


@pytest.mark.parametrize(
    "change",
    [
        {"op": "group sideways"},
        {"shape": [8, 320, 4096]},
        {"shape": [8, 320, 4096, 0]},
        {"shape": [8, 320, 4096, 7]},
        {"shape": [8, 320, 4096, 32, 1]},
        {"layout": "rows"},
        {"flags": "channel+centred"},
    ],
    ids=str,
)
def test_no_key_of_a_group_norm(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Key.from_json({**Key.of(tuned.group(8, 320, 64, 64)).to_json(), **change})


def test_a_gpu_is_what_its_silicon_is() -> None:
    whole = Device("NVIDIA A100-SXM4-80GB", "sm_80", 108, 40 << 20, 2e12, 32, 5120, 1593000)
    relabelled = replace(whole, name="NVIDIA A100 PCIe")
    forty = replace(whole, memory_khz=1215000)
    slice_ = replace(whole, sms=14, l2_bytes=5 << 20)
    assert whole.identity == relabelled.identity
    assert len({json.dumps(d.identity) for d in (whole, forty, slice_)}) == 3
    assert slug(whole) == "nvidia_a100_sxm4_80gb"


def test_what_is_put_is_there_for_the_next_process(tmp_path: Path) -> None:
    entries = [tuned.entry(), tuned.entry(tuned.FOLD, "fold"), tuned.entry(device=KNOWN["a100"])]
    cache = UserCache(tmp_path)
    assert all(cache.put(e) for e in entries)
    again = UserCache(tmp_path).entries()
    assert len(again) == 3 and all(e in again for e in entries)
    better = replace(entries[0], us=9.0)
    cache.put(better)
    assert better in UserCache(tmp_path).entries() and len(UserCache(tmp_path).entries()) == 3
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json"}


WRITER = """
import sys
from dataclasses import fields, replace
from pathlib import Path
from tests import tuned
from tritonnorm.tune.store import UserCache
cache, rank = UserCache(Path(sys.argv[1])), int(sys.argv[2])
for i in range(100):
    one = tuned.problem(n=1 + i, c=8 * (1 + rank))
    assert cache.put(tuned.entry(one, us=float(1 + i)))
    assert cache.put(tuned.entry(tuned.problem(), us=float(1 + rank)))  # all write this one
"""


@pytest.mark.slow
def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, str(rank)], cwd=ROOT)
        for rank in range(8)
    ]
    assert [child.wait(timeout=300) for child in children] == [0] * 8
    found = UserCache(tmp_path).entries()
    shapes = {e.key.shape for e in found}
    assert shapes == {(n, 8 * c, 196) for n in range(1, 101) for c in range(1, 9)} | {
        (32, 256, 196)
    }
    assert len(found) == 801 and not list(tmp_path.rglob("*.part"))


def broken(change: Callable[[dict[str, object]], object]) -> bytes:
    content = tuned.entry().to_json()
    return json.dumps(change(content) or content).encode()


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "truncated": json.dumps(tuned.entry().to_json()).encode()[:200],
    "binary": bytes(range(256)),
    "pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93.",
    "deep": b"[" * 8000,
    "large": b" " * (store.MOST_ENTRY + 1),
    "a list": b"[1, 2]",
    "a number": b"7",
    "long number": b'{"schema": ' + b"9" * 5000 + b"}",
    "other schema": broken(lambda e: e.update(schema=2)),
    "NaN": broken(lambda e: e.update(us=float("nan"))),
    "infinity": broken(lambda e: e.update(us=float("inf"))),
    "no time": broken(lambda e: e.pop("us") and None),
    "boolean time": broken(lambda e: e.update(us=True)),
    "code": broken(lambda e: e.update(config={"block_c": "__import__('os')"})),
    "algorithm": broken(lambda e: e.update(algorithm=["split"])),
    "device": broken(lambda e: e.update(device={"arch": "sm_90"})),
    "another GPU": broken(lambda e: e["device"].update(sms=14)),  # type: ignore[attr-defined]
    "another key": broken(lambda e: e["key"].update(shape=[1, 256, 6272])),  # type: ignore[attr-defined]
    "shape": broken(lambda e: e["key"].update(shape=[0, -1, 1 << 70])),  # type: ignore[attr-defined]
    "dtype": broken(lambda e: e["key"].update(dtype="int8")),  # type: ignore[attr-defined]
    "key": broken(lambda e: e.update(key={"op": {}})),
    "unhashable": broken(lambda e: e["key"].update(dtype=[])),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_no_entry_is_a_miss(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, other = UserCache(tmp_path), tuned.entry(tuned.problem(n=7))
    cache.put(tuned.entry())
    path = file_of(tmp_path)
    cache.put(other)
    path.write_bytes(HOSTILE[name])
    for _ in range(3):
        assert UserCache(tmp_path).entries() == [other]
    (warning,) = warnings(caplog)
    assert "1 of the files" in warning and path.name in warning


def test_what_is_no_plain_file_is_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    UserCache(tmp_path).put(tuned.entry())
    folder = file_of(tmp_path).parent
    os.mkfifo(folder / "pipe.json")  # opened naively, it would wait for ever
    (folder / "folder.json").mkdir()
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "zero.json").symlink_to("/dev/zero")
    (folder / ".half.json.1.part").write_text("{")
    assert UserCache(tmp_path).entries() == [tuned.entry()]
    assert len(warnings(caplog)) == 1 and "4 of the files" in warnings(caplog)[0]


def test_where_nothing_can_be_written_entries_last_as_long_as_the_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = UserCache(tmp_path / "file")
    for _ in range(2):
        assert not cache.put(tuned.entry())
    assert cache.entries() == [tuned.entry()]
    assert any("not kept" in w for w in warnings(caplog))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    UserCache(tmp_path).put(tuned.entry())
    folder = file_of(tmp_path).parent
    folder.chmod(0o500)
    try:
        cache = UserCache(tmp_path)
        assert not cache.put(tuned.entry(tuned.problem(n=7))) and len(cache.entries()) == 2
    finally:
        folder.chmod(0o700)


def test_without_platformdirs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the package runs from its sources: results last as long as the process."""
    monkeypatch.delenv("TRITONNORM_CACHE_DIR", raising=False)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.setattr(store, "_warned", set())
    cache = UserCache()
    assert cache.root is None and not cache.put(tuned.entry())
    assert cache.entries() == [tuned.entry()]
    assert any("platformdirs is not installed" in w for w in warnings(caplog))


def test_no_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("TRITONNORM_CACHE_DIR", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: Path("~/.cache") / name)
    monkeypatch.setattr(store, "_warned", set())
    cache = UserCache()
    assert cache.root is None and not cache.put(tuned.entry())
    assert cache.entries() == [tuned.entry()] and any("home" in w for w in warnings(caplog))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITONNORM_CACHE_DIR", str(tmp_path))
    assert UserCache().root == tmp_path / "v1"
    monkeypatch.delenv("TRITONNORM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert UserCache().root == tmp_path / "xdg" / "tritonnorm" / "v1"


def test_a_table_reads_well_in_a_diff(tmp_path: Path) -> None:
    device = KNOWN["h200"]
    entries = [tuned.entry(tuned.problem(n=n), environment={"torch": "2.11"}) for n in (8, 4, 16)]
    path = tmp_path / f"{slug(device)}.json"
    assert write_table(path, device, [*entries, tuned.entry(device=KNOWN["a100"])]) == 3
    lines = path.read_text().splitlines()
    assert sum('"algorithm"' in line for line in lines) == 3 and path.name == "nvidia_h200.json"
    rows = [line for line in lines if '"algorithm"' in line]
    assert rows == sorted(rows) and all(json.loads(row.rstrip("]},") + "}") for row in rows)
    assert {e.key for e in read_table(path)} == {e.key for e in entries}
    before = path.read_text()
    write_table(path, device, reversed(read_table(path)))
    assert path.read_text() == before
    more = [*read_table(path), tuned.entry(tuned.problem(n=5))]
    write_table(path, device, more)
    changed = set(path.read_text().splitlines()) - set(before.splitlines())
    assert len(changed) <= 2  # the new line, and the comma of the one that was last


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"entries": [3]}', b'{"entries": 1}'])
def test_a_table_that_is_none(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError):
        read_table(path)
    assert store.shipped([path, tmp_path / "absent.json"]) == []
    assert len(warnings(caplog)) == 2


def test_lines_of_many_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    for n in range(3):
        store.append_line(path, Key.of(tuned.problem(n=1 + n)).to_json())
    keys = [Key.from_json(json.loads(line)) for line in path.read_text().splitlines()]
    assert [k.shape[0] for k in keys] == [1, 2, 3]
    store.append_line(tmp_path, {})  # a folder: a warning, no error
    assert isinstance(tuned.entry(), Entry)
