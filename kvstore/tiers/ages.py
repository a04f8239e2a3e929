"""When the records of a tier were learned, in the order in which they grow too old.

Covers: finding expired records without looking at all. Does not cover: what is done with them.
"""

import heapq
from collections.abc import Iterable

from kvstore.keys import ChunkKey

_MIN_STALE = 1024


class Ages:
    """Dates of records. A record without one counts as learned when `expired` is first asked with it inside.

    Args:
        dates: Keys held so far, and when each was learned; 0 where nobody said.

    Cost:
        O(log n) per record that comes in or is found; one heap and one dict entry per record.

    Example:
        >>> ages = Ages([(ChunkKey(b"old"), 10.0), (ChunkKey(b"unknown"), 0.0)])
        >>> ages.expired(50.0, ttl_s=30.0), ages.expired(80.0, ttl_s=30.0)
        ([b'old'], [b'old', b'unknown'])
    """

    def __init__(self, dates: Iterable[tuple[ChunkKey, float]]) -> None:
        self._date_of: dict[ChunkKey, float] = {}
        self._undated: dict[ChunkKey, None] = {}
        self._heap: list[tuple[float, ChunkKey]] = []
        for key, learned_unix_s in dates:
            self.add(key, learned_unix_s=learned_unix_s)

    def add(self, key: ChunkKey, *, learned_unix_s: float) -> None:
        """A record came in, or its date became known."""
        if not learned_unix_s:
            if key not in self._date_of:
                self._undated[key] = None
            return
        self._undated.pop(key, None)
        if self._date_of.get(key) != learned_unix_s:
            self._date_of[key] = learned_unix_s
            heapq.heappush(self._heap, (learned_unix_s, key))

    def remove(self, key: ChunkKey) -> None:
        """A record left; unknown keys are ignored."""
        self._undated.pop(key, None)
        self._date_of.pop(key, None)
        if len(self._heap) > 2 * len(self._date_of) + _MIN_STALE:
            self._heap = [(date_s, held) for held, date_s in self._date_of.items()]
            heapq.heapify(self._heap)

    def expired(self, now_unix_s: float, *, ttl_s: float) -> list[ChunkKey]:
        """Records learned `ttl_s` ago or earlier, oldest first; they come again until they are removed."""
        for key in self._undated:
            self._date_of[key] = now_unix_s
            heapq.heappush(self._heap, (now_unix_s, key))
        self._undated.clear()
        found: dict[tuple[float, ChunkKey], None] = {}
        while self._heap and self._heap[0][0] <= now_unix_s - ttl_s:
            dated = heapq.heappop(self._heap)
            if self._date_of.get(dated[1]) == dated[0]:
                found[dated] = None
        for dated in found:
            heapq.heappush(self._heap, dated)
        return [key for _, key in found]
