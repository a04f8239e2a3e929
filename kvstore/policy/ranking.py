"""Keys in the order of a number that changes: the smallest first.

Covers: a heap whose entries may be outdated. Does not cover: what the number means.
"""

import heapq
from collections.abc import Iterator
from typing import Final

from kvstore.keys import ChunkKey

_MIN_OUTDATED: Final = 64


class Ranking:
    """Keys by rank; equal ranks in the order in which they were given.

    Cost:
        `put` and `discard` O(log n) amortised; `in_order` O(log n) per key that is read.

    Example:
        >>> ranking = Ranking()
        >>> for name, rank in ((b"b", 2.0), (b"a", 1.0), (b"c", 3.0), (b"a", 9.0)):
        ...     ranking.put(ChunkKey(name), rank=rank)
        >>> list(ranking.in_order()), ranking.first()
        ([b'b', b'c', b'a'], (2.0, b'b'))
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, ChunkKey]] = []
        self._serial_of: dict[ChunkKey, int] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._serial_of)

    def __contains__(self, key: object) -> bool:
        return key in self._serial_of

    def put(self, key: ChunkKey, *, rank: float) -> None:
        """Enter a key, or change its rank."""
        self._serial += 1
        self._serial_of[key] = self._serial
        heapq.heappush(self._heap, (rank, self._serial, key))
        self._drop_outdated()

    def discard(self, key: ChunkKey) -> None:
        """Take a key out; unknown keys are ignored."""
        if self._serial_of.pop(key, None) is not None:
            self._drop_outdated()

    def first(self) -> tuple[float, ChunkKey] | None:
        """The smallest rank and its key."""
        return (self._heap[0][0], self._heap[0][2]) if self._heap else None

    def in_order(self) -> Iterator[ChunkKey]:
        """All keys, smallest rank first; the ranking must not change meanwhile."""
        # The heap is a tree whose parents are smaller: its best branches, read one by one, change nothing.
        heap = self._heap
        fringe = [(heap[0], 0)] if heap else []
        while fringe:
            ranked, at = heapq.heappop(fringe)
            for child in range(2 * at + 1, min(2 * at + 3, len(heap))):
                heapq.heappush(fringe, (heap[child], child))
            if self._serial_of.get(ranked[2]) == ranked[1]:
                yield ranked[2]

    def _drop_outdated(self) -> None:
        """At the front always, elsewhere when they are more than the valid ones."""
        heap, serial_of = self._heap, self._serial_of
        while heap and serial_of.get(heap[0][2]) != heap[0][1]:
            heapq.heappop(heap)
        if len(heap) > 2 * len(serial_of) + _MIN_OUTDATED:
            self._heap = [ranked for ranked in heap if serial_of.get(ranked[2]) == ranked[1]]
            heapq.heapify(self._heap)
