"""These tests need a GPU, and a process in which Triton compiles (TRITON_INTERPRET=0)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, help="run every so manieth test of tests/gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    kept = set(ours[:: config.getoption("--every", 1)])
    config.hook.pytest_deselected(items=[item for item in ours if item not in kept])
    items[:] = [item for item in items if item in kept or HERE not in item.path.parents]
    if torch.cuda.is_available():
        return
    for item in kept:
        item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Each test starts with the memory of the one before given back."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def no_waiting() -> Callable[[], AbstractContextManager[None]]:
    """A context within which it is an error that the host waits for the GPU."""

    @contextmanager
    def within() -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            try:
                torch.cuda.set_sync_debug_mode("error")
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)

    return within


@pytest.fixture
def room(request: pytest.FixtureRequest) -> None:
    """Skip unless the GPU has as many free GiB as the test's `gibibytes` parameter asks for."""
    needed = request.node.callspec.params["gibibytes"]
    free, _ = torch.cuda.mem_get_info()
    if free < needed << 30:
        pytest.skip(f"needs {needed} GiB of free GPU memory, has {free / 2**30:.1f}")
