"""The last-level cache, idealized: any sector in any place, and the least recently used one goes,
unless one is marked to go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

__all__ = ["SECTOR", "Cache"]

SECTOR = 32  # bytes that are moved together


class Cache:
    """Write-back; a sector that is written is not read first.

    Attributes:
        loaded: bytes that came from memory.
        stored: bytes that went there.
    """

    def __init__(self, size: int) -> None:
        self._most = size // SECTOR
        self._changed: OrderedDict[int, bool] = OrderedDict()  # sector -> whether memory is behind
        self.loaded = self.stored = 0

    def access(self, sectors: Iterable[int], store: bool, evict_first: bool = False) -> None:
        """Sectors by number, in order."""
        held = self._changed
        for sector in sectors:
            before = held.pop(sector, None)
            if before is None:
                self.loaded += 0 if store else SECTOR
                if len(held) >= self._most:
                    self.stored += SECTOR * held.popitem(last=False)[1]
            held[sector] = store or bool(before)
            if evict_first:
                held.move_to_end(sector, last=False)

    def flush(self) -> int:
        """Write back what memory is behind in; all bytes moved so far."""
        self.stored += SECTOR * sum(self._changed.values())
        self._changed.clear()
        return self.loaded + self.stored
