"""Fused batch norm for PyTorch in Triton: training, inference, and exact folding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import functional as functional
from . import nn as nn
from .conv_nn import ConvBatchNorm1d as ConvBatchNorm1d
from .conv_nn import ConvBatchNorm2d as ConvBatchNorm2d
from .conv_nn import ConvBatchNorm3d as ConvBatchNorm3d
from .conv_nn import ConvTransposeBatchNorm1d as ConvTransposeBatchNorm1d
from .conv_nn import ConvTransposeBatchNorm2d as ConvTransposeBatchNorm2d
from .conv_nn import ConvTransposeBatchNorm3d as ConvTransposeBatchNorm3d
from .conv_nn import LinearBatchNorm1d as LinearBatchNorm1d
from .fold import fold as fold
from .fold import fold_state_dict as fold_state_dict
from .freeze import freeze as freeze
from .freeze import unfreeze as unfreeze
from .nn import BatchNorm1d as BatchNorm1d
from .nn import BatchNorm2d as BatchNorm2d
from .nn import BatchNorm3d as BatchNorm3d
from .nn import BatchNormAct2d as BatchNormAct2d
from .norms.nn import GroupNorm as GroupNorm
from .norms.nn import InstanceNorm1d as InstanceNorm1d
from .norms.nn import InstanceNorm2d as InstanceNorm2d
from .norms.nn import InstanceNorm3d as InstanceNorm3d
from .norms.nn import LayerNorm as LayerNorm
from .norms.nn import RMSNorm as RMSNorm
from .replace import replace as replace
from .replace import restore as restore
from .report import Report as Report
from .sequences.masked import MaskedBatchNorm1d as MaskedBatchNorm1d
from .sequences.masked import masked_batch_norm as masked_batch_norm
from .sequences.recurrent import BatchNormLSTM as BatchNormLSTM
from .sequences.recurrent import BatchNormLSTMCell as BatchNormLSTMCell
from .sequences.recurrent import RecurrentBatchNorm as RecurrentBatchNorm
from .sync.nn import SyncBatchNorm as SyncBatchNorm
from .sync.nn import convert_sync_batchnorm as convert_sync_batchnorm
from .sync.nn import revert_sync_batchnorm as revert_sync_batchnorm

if TYPE_CHECKING:
    from .explanation import explain as explain
    from .plan import force_plan as force_plan
    from .warming import warmup as warmup

__version__ = "0.1.0"

_NEEDS_TRITON = {"explain": "explanation", "force_plan": "plan", "warmup": "warming"}


def __getattr__(name: str) -> Any:
    """Names that need triton are loaded when they are first asked for."""
    if name in _NEEDS_TRITON:
        import importlib

        return getattr(importlib.import_module(f".{_NEEDS_TRITON[name]}", __name__), name)
    raise AttributeError(f"module 'tritonnorm' has no attribute {name!r}")
