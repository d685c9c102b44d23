"""Models named on the command line, and files of weights, which are never unpickled."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["inputs_from", "load_into", "model_from", "save", "writer"]

WRITTEN = (".safetensors", ".pt", ".pt2")


def model_from(where: str, options: str = "{}") -> nn.Module:
    """Build a model.

    Args:
        where: ``package.module:factory``; the factory is called, dots reach into classes. Modules
            of the current folder are found too.
        options: keyword arguments of the factory as a JSON object.

    Raises:
        ValueError: there is no such module or factory, it raised, or made something else than a
            `torch.nn.Module`.
    """
    module, colon, factory = where.partition(":")
    if not colon or not module or not factory:
        raise ValueError(f"--model: expected package.module:factory, got {where!r}")
    try:
        given = json.loads(options)
    except ValueError as error:
        raise ValueError(f"--options: expected a JSON object, got {options!r} ({error})") from None
    if not isinstance(given, dict):
        raise ValueError(f"--options: expected a JSON object, got {options!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        made: Any = importlib.import_module(module)
        for name in factory.split("."):
            made = getattr(made, name)
        made = made(**given)
    except Exception as error:
        raise ValueError(f"--model: {where} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"--model: {where} made a {type(made).__name__}, not a torch.nn.Module")
    return made


def inputs_from(texts: list[str], seed: int = 0) -> tuple[Tensor, ...]:
    """Random tensors ``1x3x224x224`` or ``2x16:int64``: normal values, or integers 0 and 1.

    Raises:
        ValueError: a text is neither.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for text in texts:
        sizes, _, name = text.partition(":")
        dtype = getattr(torch, name or "float32", None)
        try:
            shape = [int(size) for size in sizes.split("x")]
        except ValueError:
            shape = []
        if not shape or min(shape) < 1 or not isinstance(dtype, torch.dtype):
            raise ValueError(f"--input: expected SIZExSIZE... or SIZExSIZE...:DTYPE, got {text!r}")
        if dtype.is_floating_point:
            found.append(torch.randn(shape, generator=generator).to(dtype))
        else:
            found.append(torch.randint(0, 2, shape, generator=generator).to(dtype))
    return tuple(found)


def load_into(model: nn.Module, path: Path) -> None:
    """Load weights: ``.safetensors``, or what `torch.load` reads with ``weights_only=True``.

    A checkpoint with its weights under "state_dict" or "model" is understood. Nothing is unpickled.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is broken, holds something else, or does not fit the model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--weights: there is no file {path}")
    try:
        content = _read(path)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"--weights: {path} cannot be read: {_first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"--weights: {path} holds no state_dict of tensors")
    own = model.state_dict()
    # A file may hold tied weights once.
    there = {own[key].data_ptr() for key in content if key in own}
    faults = [
        *_some(
            "missing",
            [
                key
                for key in own
                if key not in content
                and own[key].data_ptr() not in there
                and not key.endswith("num_batches_tracked")  # torch loads old files without it
            ],
        ),
        *_some("unknown", [key for key in content if key not in own]),
        *_some(
            "of another shape",
            [key for key in own if key in content and own[key].shape != content[key].shape],
        ),
    ]
    if faults:
        raise ValueError(f"--weights: {path} does not fit the model: {'; '.join(faults)}")
    model.load_state_dict(content, strict=False)  # what is missing is tied to what is there


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def writer(path: Path, force: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """What writes a model to a file; it is asked for before any work is done.

    ``.safetensors`` and ``.pt`` take the state_dict, ``.pt2`` the program of `torch.export`.

    Raises:
        ValueError: the ending is unknown, or the folder is not there.
        FileExistsError: the file is there, and not ``force``.
        ImportError: safetensors is needed and not installed.
    """
    if path.suffix not in WRITTEN:
        raise ValueError(f"--out: expected a file ending in {', '.join(WRITTEN)}, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"--out: there is no folder {path.parent}")
    if path.exists() and not force:
        raise FileExistsError(f"--out: {path} is there already; --force overwrites it")
    if path.suffix == ".safetensors":
        importlib.import_module("safetensors.torch")
    return lambda model, inputs: save(model, inputs, path)


def save(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Write a model, whole or not at all."""
    scratch = path.with_name(f"{path.name}.part{path.suffix}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_model

            save_model(model, str(scratch))
        elif path.suffix == ".pt":
            torch.save(model.state_dict(), scratch)
        else:
            with torch.no_grad():
                torch.export.save(torch.export.export(model, inputs), scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _some(what: str, keys: list[str], most: int = 3) -> list[str]:
    """``["2 missing (a, b)"]``, or nothing."""
    if not keys:
        return []
    more = ", ..." if len(keys) > most else ""
    return [f"{len(keys)} {what} ({', '.join(keys[:most])}{more})"]


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
