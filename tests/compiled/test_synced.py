"""The kernels around the collectives of SyncBatchNorm compile, and launch past Triton's look-up."""

from __future__ import annotations

import pytest
import torch

from bench.lab.fake_driver import fake_driver
from tritonnorm.device import KNOWN, simulated
from tritonnorm.sync import ops

FORWARD = ["moments_kernel", "combine_moments_kernel", "combine_moments_kernel", "apply_kernel"]
BACKWARD = ["gradient_kernel", "combine_sums_kernel", "gradient_kernel"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("gpu", ["a100", "h200"])
def test_a_step_of_one_rank(gpu: str, dtype: torch.dtype) -> None:
    x, z, dy = (torch.zeros(64, 24, 28, 28, dtype=dtype) for _ in range(3))
    vector = torch.ones(24)
    buffers = (torch.zeros(24), torch.ones(24), torch.tensor(0))
    vector = vector.to(torch.promote_types(dtype, torch.float32))
    with simulated(KNOWN[gpu]), fake_driver() as log:
        for _ in range(2):  # the second is warm
            log.launches.clear()
            moments = ops.call("moments", x)
            gathered = torch.stack([moments, moments])
            _, mean, rstd, merged, mask = ops.call(
                "apply_moments", x, z, vector, vector, gathered, *buffers, None, 1e-5,
                "relu", (), True,
            )  # fmt: skip
            saved = (dy, x, None, mask, vector, vector, mean, rstd)
            sums, _, _ = ops.call("gradient_sums", *saved, "relu", (), [True, True])
            ops.call("apply_gradient_sums", *saved, sums, merged[0], "relu", (), [True, True])
        assert [launch.kernel for launch in log.launches] == FORWARD + BACKWARD
        assert len(log.variants) == 7  # a kernel for each launch, and none for the warm ones
