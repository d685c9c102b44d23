"""What a trace may change: attributes of modules, which are put back, and random generators."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict
from typing import Any

from torch import nn


class Before:
    """A module's attributes, and what is in its tables, lists, dictionaries and sets."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.attributes = module, dict(module.__dict__)
        kinds = (list, dict, set, OrderedDict)
        self.inside = [(v, copy.copy(v)) for v in self.attributes.values() if type(v) in kinds]

    def put_back(self) -> str:
        """Undo all changes; what they were, in words."""
        now, why = self.module.__dict__, ""
        if not _alike(now, self.attributes):
            why = "its code sets attributes"
            now.clear()
            now.update(self.attributes)
        for value, kept in self.inside:
            if isinstance(value, set):
                same = value == kept
            else:
                same = _alike(
                    *(dict(enumerate(v)) if type(v) is list else v for v in (value, kept))
                )
            if not same:
                why = why or "its code changes a list or dictionary"
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(kept)
        return why


def _alike(one: Any, other: Any) -> bool:
    """Whether two sets, lists or mappings hold the same objects."""
    if isinstance(one, set):
        return bool(one == other)
    if isinstance(one, list):
        return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
    return one.keys() == other.keys() and all(one[k] is other[k] for k in other)


def dice() -> tuple[Any, ...]:
    """The state of the generators of Python and NumPy; torch's are seen by the trace."""
    numpy = sys.modules.get("numpy")
    states = [random.getstate()]
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        states.append((kind, keys.tobytes(), *rest))
    return tuple(states)
