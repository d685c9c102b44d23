"""What a module is, and the reasons against folding it that show without running it."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from tritonnorm import nn as ours
from tritonnorm.flow.guard import storage_key
from tritonnorm.sync.nn import SyncBatchNorm, SyncBatchNormAct2d

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRODUCERS: tuple[type[nn.Module], ...] = (*CONVS, *TRANSPOSED, nn.Linear)
OURS: tuple[type[nn.Module], ...] = (
    ours.BatchNorm1d,
    ours.BatchNorm2d,
    ours.BatchNorm3d,
    SyncBatchNorm,
    ours.BatchNormAct2d,
    SyncBatchNormAct2d,
)
FOLDABLE: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    *OURS,
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def layer_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of `PRODUCERS` whose forward the module runs, also when it is of a subclass."""
    for base in PRODUCERS:
        if isinstance(module, base):
            own = type(module)
            same = own.forward is base.forward and getattr(own, "_conv_forward", None) is getattr(
                base, "_conv_forward", None
            )
            return base if same else None
    return None


def is_layer(module: nn.Module) -> bool:
    """Whether the module is a convolution or linear layer that computes what torch's does."""
    return layer_class(module) is not None


def is_plain_norm(module: nn.Module) -> bool:
    """Whether the module is a batch norm that computes what torch's or ours does."""
    own = type(module).forward
    if isinstance(module, OURS):
        unknown = module.epilogue() is None  # type: ignore[operator]
        if unknown or any(map(hooked, module.children())):
            return False
    return any(isinstance(module, base) and own is base.forward for base in FOLDABLE)


@dataclass(frozen=True)
class Names:
    """The modules of a model by identity: the first name, and whether there are others."""

    first: dict[int, str]
    modules: dict[str, nn.Module]

    @classmethod
    def of(cls, model: nn.Module) -> Names:
        """Names of all modules, each module once, in the order of `named_modules`."""
        modules = dict(model.named_modules())
        return cls({id(module): name for name, module in modules.items()}, modules)

    def __getitem__(self, module: nn.Module) -> str:
        return self.first.get(id(module), "") or "(root)"


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a report has a row for this module: every batch norm, foldable or not."""
    if isinstance(module, _BatchNorm):
        return True
    named = "BatchNorm" in type(module).__name__ or "BatchNorm" in str(
        getattr(module, "original_name", "")
    )
    return named and not list(module.children()) and hasattr(module, "running_mean")


def batch_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every batch norm once, with its first name."""
    for name, module in model.named_modules():
        if is_batch_norm(module):
            yield name, module


def frozen_reason(model: nn.Module) -> str | None:
    """Why nothing in the model may be edited, or None."""
    if isinstance(model, torch.jit.ScriptModule):
        return "the model is a TorchScript module: fold before scripting"
    if "" in compiled_parts(model):
        return "the model is compiled: fold before torch.compile"
    tensors = (*model.parameters(), *model.buffers())
    if any(nn.parameter.is_lazy(tensor) for tensor in tensors):
        return "the model has lazy parameters: run it once, then fold"
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return "the model is wrapped for data parallelism: fold model.module before wrapping"
    return None


def compiled_parts(model: nn.Module) -> list[str]:
    """Names of the submodules that torch.compile has wrapped, or that were compiled in place."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch._dynamo.eval_frame.OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
    ]


def _common_reason(module: nn.Module, what: str) -> str | None:
    """Reasons that hold for a batch norm and for the layer before it alike."""
    if isinstance(module, torch.jit.ScriptModule):
        return f"the {what} is a TorchScript module"
    if parametrize.is_parametrized(module):
        return f"the {what} is parametrised: its tensors are computed at every access"
    if any(getattr(module, name, None) for name in _HOOKS):
        return f"the {what} has a hook, which would see another value"
    patched = module.__dict__.keys() & {"forward", "_conv_forward"}
    if patched or module._compiled_call_impl is not None:
        return f"the forward of this {what} has been patched or compiled"
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            return f"the {name} of the {what} is a {type(tensor).__name__}, not a plain tensor"
        if tensor.is_meta:
            return f"the {name} of the {what} is on the meta device: it has no values yet"
        if tensor._backward_hooks:
            return f"the {name} of the {what} has a gradient hook"
    return None


def batch_norm_reason(bn: nn.Module) -> str | None:
    """Why a batch norm cannot be folded into anything, or None."""
    if isinstance(bn, torch.jit.ScriptModule) or parametrize.is_parametrized(bn):
        return _common_reason(bn, "batch norm")
    if bn.training and isinstance(bn, _BatchNorm):
        return "the batch norm is in training mode: call model.eval() first"
    if bn.running_mean is None or bn.running_var is None:
        return "the batch norm keeps no running statistics, so it uses those of the batch"
    return _common_reason(bn, "batch norm")


def hooked(module: nn.Module) -> bool:
    """Whether the module has a hook, or a forward that was patched."""
    patched = "forward" in module.__dict__ or module._compiled_call_impl is not None
    return patched or any(getattr(module, name, None) for name in _HOOKS)


def bake(model: nn.Module) -> int:
    """Give the parametrised layers of a model plain weights; how many there were.

    Not by `remove_parametrizations`: it edits the class, which a copy shares with its original.
    """
    layers = [m for m in model.modules() if parametrize.is_parametrized(m) and is_layer(m)]
    for layer in layers:
        values = {
            name: (
                getattr(layer, name).detach().clone(),
                any(p.requires_grad for p in of.parameters()),
            )
            for name, of in layer.parametrizations.items()  # type: ignore[union-attr, operator]
        }
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer._modules["parametrizations"]
        for name, (value, learned) in values.items():
            layer.register_parameter(name, nn.Parameter(value, requires_grad=learned))
    return len(layers)


def unknown_class(bn: nn.Module) -> str:
    """The reason for leaving a class of which no run shows what it computes."""
    path = f"{type(bn).__module__}.{type(bn).__qualname__}"
    return f"{path} is not a class known to be plain; give example_inputs"


def layer_reason(producer: nn.Module) -> str | None:
    """Why the parameters of a layer must stay as they are, or None."""
    kind = layer_class(producer)
    if kind is None:
        return f"the batch norm follows {_article(type(producer).__name__)}"
    what = "linear layer" if kind is nn.Linear else "convolution"
    if parametrize.is_parametrized(producer):
        return f"the {what} is parametrised: rules='all' makes its weight plain"
    if "weight" not in producer._parameters or "bias" not in producer._parameters:
        return f"the weight of the {what} is computed, not a parameter"
    if reason := _common_reason(producer, what):
        return reason
    weight, bias = producer.weight, producer.bias
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return f"the weight of the {what} is not a real floating-point tensor"
    if weight.layout is not torch.strided or weight.is_quantized:
        return f"the weight of the {what} is sparse or quantised"
    if not weight.numel():
        return f"the weight of the {what} has no elements"
    if isinstance(bias, Tensor) and bias.dtype != weight.dtype:
        return f"weight and bias of the {what} have different dtypes"
    return None


def producer_reason(producer: nn.Module, bn: nn.Module) -> str | None:
    """Why `bn` cannot be folded into the layer before it, or None."""
    if reason := layer_reason(producer):
        return reason
    what = "linear layer" if isinstance(producer, nn.Linear) else "convolution"
    channels = out_channels(producer)
    if channels != bn.num_features:
        return f"the {what} gives {channels} channels, the batch norm takes {bn.num_features}"
    devices = {t.device for t in (*producer.parameters(), *bn.parameters(), *bn.buffers())}
    if len(devices) > 1:
        return f"the {what} and the batch norm are on different devices"
    return None


def out_channels(producer: nn.Module) -> int:
    """Number of output channels of a convolution or linear layer."""
    linear = isinstance(producer, nn.Linear)
    return int(producer.out_features if linear else producer.out_channels)  # type: ignore[arg-type]


def rule_name(producer: nn.Module) -> str:
    """The rule of a pair, such as "conv2d -> bn"; grouped convolutions are named as such."""
    name = (
        (layer_class(producer) or type(producer))
        .__name__.lower()
        .replace("convtranspose", "conv_transpose")
    )
    grouped = getattr(producer, "groups", 1) != 1
    return f"{'grouped ' if grouped else ''}{name} -> bn"


def held(model: nn.Module) -> dict[int, str]:
    """Modules that a module of the model holds beside its submodules, in a list for example, by id:
    the name of the attribute. What takes their place in the model does not take it there."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name not in ("_modules", "forward") and not name.endswith("_hooks"):
                for inner in _modules_in(value):
                    found.setdefault(id(inner), f"{path}.{name}".lstrip("."))
    return found


def _modules_in(value: object, depth: int = 4) -> Iterator[nn.Module]:
    """Modules in nested containers, partial functions and bound methods."""
    inner: Iterable[object] = ()
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        inner = value
    elif isinstance(value, functools.partial):
        inner = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        inner = (value.__self__,)
    if depth:
        for item in inner:
            yield from _modules_in(item, depth - 1)


def never_trained(bn: nn.Module) -> bool:
    """Whether the running statistics still have the values a new batch norm starts with."""
    steps = getattr(bn, "num_batches_tracked", None)
    return bool(
        isinstance(steps, Tensor)
        and steps.item() == 0
        and (bn.running_mean == 0).all()  # type: ignore[union-attr]
        and (bn.running_var == 1).all()  # type: ignore[union-attr]
    )


def weight_owners(model: nn.Module) -> dict[int, set[str]]:
    """For the storage of each parameter and buffer, the names under which the model holds it."""
    owners: dict[int, set[str]] = {}
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if isinstance(tensor, Tensor) and (key := storage_key(tensor)) is not None:
                owners.setdefault(key, set()).add(f"{prefix}.{name}".lstrip("."))
    return owners


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
