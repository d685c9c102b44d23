"""torch.compile, which fuses batch norm, addition and activation by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.call import Tensors
from bench.providers.base import Forward, Provider
from bench.providers.eager import of_call
from bench.suites import Case

__all__ = ["Compiled"]


class Compiled(Provider):
    """The operators of eager PyTorch, compiled for static shapes without graph breaks.

    CUDA graphs stay off: the timer captures all providers into graphs of its own.
    """

    norms = True

    def __init__(self, name: str, what: str, **options: Any) -> None:
        self.name = name
        self.what = what
        self.options = options

    def absent(self) -> str | None:
        from torch._dynamo.eval_frame import is_dynamo_supported

        return None if is_dynamo_supported() else "torch.compile does not work with this Python"

    def setup(self, case: Case) -> Forward:
        from torch._functorch import config

        # A backward that is called again and again may give none of its saved tensors away.
        config.donated_buffer = case.mode != "backward"

        operators = of_call(case.call)

        def whole(*tensors: Any) -> Tensor:
            return operators(case.call, *tensors)

        compiled = torch.compile(whole, fullgraph=True, dynamic=False, **self.options)

        def forward(t: Tensors) -> Tensor:
            y: Tensor = compiled(*t.all)
            return y

        return forward
