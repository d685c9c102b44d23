"""Wide tiles for Triton's interpreter, which runs the programs of a launch one after another.

A program costs it tens of milliseconds whatever the size of its tile. The plan cuts a layer into
many programs, as a GPU wants it; the demo takes few wide ones to fit its time. They are the same
kernels, and the tests run them in the plan's own configurations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

__all__ = ["interpreted", "wide_tiles"]


def interpreted(device: str) -> bool:
    """Whether this process would interpret kernels on tensors of that device."""
    if device != "cpu":
        return False
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    # tl.sum is a jit function itself: it shows what TRITON_INTERPRET was when triton was imported.
    return isinstance(tl.sum, InterpretedFunction)


@contextlib.contextmanager
def wide_tiles(device: str, channels: int, positions: int) -> Iterator[None]:
    """Layers that fit one program run in tiles of this size, where kernels are interpreted.

    The size is rounded up to powers of two. What does not fit, and inference, keeps the tiles of
    the plan.
    """
    if not interpreted(device):
        yield
        return
    import triton

    from tritonnorm import force_plan
    from tritonnorm.device import INTERPRETER, simulated
    from tritonnorm.kernels.base import Config

    # One multiprocessor asks for few splits; wide warps have registers for long channels.
    with simulated(replace(INTERPRETER, sms=1, warp=128)):
        block_c, block_p = (triton.next_power_of_2(n) for n in (channels, positions))
        with force_plan("resident", Config(block_c, 1, block_p)):
            yield
