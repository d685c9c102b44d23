"""The tuner on a GPU: real children, real times, and plans that follow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tritonnorm
from tests import tuned
from tritonnorm.device import Device
from tritonnorm.plan import plan
from tritonnorm.tune import standing
from tritonnorm.tune.jobs import candidates_for
from tritonnorm.tune.scratch import NormTrial
from tritonnorm.tune.scratch_fold import FoldTrial
from tritonnorm.tune.session import Session
from tritonnorm.tune.store import UserCache


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UserCache]:
    monkeypatch.setenv("TRITONNORM_TUNE", "off")
    monkeypatch.setenv("TRITONNORM_CACHE_DIR", str(tmp_path))
    standing.reload()
    yield UserCache(tmp_path)
    monkeypatch.undo()
    standing.reload()


PROBLEMS = [
    tuned.problem(32, 256, 196, activity="two_valued", residual=True, mask=True),
    tuned.problem(32, 64, 3136, channels_last=True, direction="backward", activity="smooth"),
    tuned.problem(8, 64, 784, batch_statistics=False),
    tuned.FOLD,
]


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_every_candidate_is_right(p: object) -> None:
    where = torch.device("cuda", torch.cuda.current_device())
    device = Device.of(where)
    kind = FoldTrial if p is tuned.FOLD else NormTrial
    trial = kind(p, where, device)  # type: ignore[arg-type]
    for candidate in candidates_for(p, device):  # type: ignore[arg-type]
        trial.check(candidate)


def test_a_session(cache: UserCache) -> None:
    device = Device.of(torch.device("cuda"))
    summary = Session(device, index=torch.cuda.current_device(), budget=60).tune(PROBLEMS[:2])
    assert [t.result.error for t in summary.done] == [None, None], summary.failures
    for t in summary.done:
        assert 0 < t.result.us <= 1.05 * t.result.formula_us
        assert plan(t.key.problem(), device).source == "user cache"
    assert len(cache.entries()) == 2


def test_warmup_keeps_nothing_without_values() -> None:
    """Programs that meet have semaphores; those of a rehearsal have no memory."""
    bn = tritonnorm.BatchNorm2d(256, activation="relu", device="cuda", dtype=torch.bfloat16)
    x = torch.randn(64, 256, 28, 28, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    plans = {entry.plan.algorithm for entry in tritonnorm.explain(bn, x)}
    assert plans == {"persistent"}
    tritonnorm.warmup(bn, x)
    y = bn(x)
    y.sum().backward()
    torch.cuda.synchronize()
    expected = torch.relu(torch.nn.functional.batch_norm(x.float(), None, None, training=True))
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)


def test_warmup_leaves_nothing_to_compile() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 24, 3), tritonnorm.BatchNorm2d(24, activation="relu")
    ).cuda()
    x = torch.randn(4, 3, 34, 34, device="cuda")
    before = model[1].running_mean.clone()
    warm = tritonnorm.warmup(model, x)
    assert warm.launches > 0 and torch.equal(model[1].running_mean, before)
    model(x).sum().backward()
    assert tritonnorm.warmup(model, x).compiled == 0
