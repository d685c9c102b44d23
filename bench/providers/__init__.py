"""Who is measured. A new peer is an object in a file here, and an entry in the tuple below."""

from __future__ import annotations

from collections.abc import Sequence

from bench.providers.base import Provider
from bench.providers.compiled import Compiled
from bench.providers.eager import Cudnn, Eager
from bench.providers.liger import Liger
from bench.providers.ours import Ours
from bench.providers.peers import Apex, Attorch, FlagGems, InPlaceABN

__all__ = ["DEFAULT", "PROVIDERS", "Provider", "select"]

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Ours(),
        Eager(),
        Compiled("compile", "torch.compile"),
        Compiled(
            "compile-max",
            "torch.compile, mode max-autotune without CUDA graphs",
            mode="max-autotune-no-cudagraphs",
        ),
        Compiled(
            "compile-coop",
            "torch.compile with Inductor's cooperative reductions",
            options={"triton.cooperative_reductions": True},
        ),
        Cudnn(),
        Apex(),
        Attorch(),
        FlagGems(),
        InPlaceABN(),
        Liger(),
    )
}

DEFAULT = ("tritonnorm", "eager", "compile")


def select(names: Sequence[str]) -> list[Provider]:
    """Providers by name, in the order given; ``all`` stands for every one.

    Raises:
        ValueError: a name is unknown.
    """
    chosen: dict[str, Provider] = {}
    for name in names:
        if name == "all":
            chosen |= PROVIDERS
        elif name in PROVIDERS:
            chosen[name] = PROVIDERS[name]
        else:
            raise ValueError(f"providers: expected all or of {', '.join(PROVIDERS)}; got {name!r}")
    return list(chosen.values())
