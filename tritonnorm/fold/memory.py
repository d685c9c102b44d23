"""Which value each view of a storage shows during a recorded run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tritonnorm.fold.graph import Value

Geometry = tuple[Any, ...]


class Memory:
    """What is known about one storage: which value each view of it shows now."""

    def __init__(self, tensor: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            self.alive = StorageWeakRef(tensor.untyped_storage())  # also keeps the key unique
            self.size = tensor.untyped_storage().nbytes()
        self.views: dict[Geometry, Value] = {}
        self.parts: list[Value] = []  # older values that may still be part of the content
        self.given = False  # existed before the run
        self.written = False  # in place, during the run


def geometry_of(tensor: Tensor) -> Geometry:
    strides = tensor.stride() if tensor.layout is torch.strided else ()
    flags = (tensor.is_neg(), tensor.is_conj())
    return (tensor.storage_offset(), tuple(tensor.shape), strides, tensor.dtype, flags)
