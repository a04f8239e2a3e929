"""Least recently used: the baseline that every other order has to beat.

Covers: the order by last use. Does not cover: sizes, which it ignores.
"""

from collections import OrderedDict
from collections.abc import Iterator

from kvstore.interfaces import TierEntry
from kvstore.keys import ChunkKey


class LruPolicy:
    """Oldest use first.

    Cost:
        O(1) per call; one dict entry per record.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[ChunkKey, None] = OrderedDict()

    def admit(self, key: ChunkKey, entry: TierEntry) -> None:
        """A record came in: it counts as used now."""
        self._order[key] = None
        self._order.move_to_end(key)

    def touch(self, key: ChunkKey) -> None:
        """A record was used."""
        if key in self._order:
            self._order.move_to_end(key)

    def remove(self, key: ChunkKey, *, evicted: bool) -> None:
        """A record left."""
        self._order.pop(key, None)

    def victims(self) -> Iterator[ChunkKey]:
        """Least recently used first."""
        return iter(self._order)
