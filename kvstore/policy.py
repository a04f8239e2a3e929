"""What leaves a full tier: pure decisions, `state, need -> victims`.

Covers: least-recently-used by bytes for tiers without places (files), and for arenas, where the victims' room must be
in one piece. Does not cover: carrying it out (`kvstore.tiers`), or policies that weigh recompute cost (a later issue
adds them beside these).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvstore.keys import ChunkKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A record that may be evicted, and where it lies in its arena."""

    key: ChunkKey
    start: int
    """First unit of room it occupies."""
    units: int
    """Units of room it occupies: bytes in a file tier, pages in an arena."""


def lru_victims(oldest_first: Iterable[Resident], *, need_units: int) -> list[ChunkKey] | None:
    """The least recently used records whose room together is enough; None if all of it is not.

    Example:
        >>> a, b = (Resident(key=ChunkKey(k), start=0, units=5) for k in (b"a", b"b"))
        >>> lru_victims([a, b], need_units=4), lru_victims([a, b], need_units=11), lru_victims([a, b], need_units=0)
        ([b'a'], None, [])
    """
    victims: list[ChunkKey] = []
    for resident in oldest_first:
        if need_units <= 0:
            break
        victims.append(resident.key)
        need_units -= resident.units
    return victims if need_units <= 0 else None


def lru_window(
    oldest_first: Iterable[Resident], *, free_units_by_start: Mapping[int, int], need_units: int
) -> list[ChunkKey] | None:
    """Victims whose room, with the free room between them, is one piece of at least `need_units`.

    Records are freed in thought, oldest first, and joined with their neighbours, until a piece is long enough; only
    the records inside that piece are victims, and of those only a window that is needed. So the youngest victim is as
    old as it can be, and old records that would not help stay.

    Args:
        oldest_first: Evictable records (no pinned ones) in order of their last use.
        free_units_by_start: Free runs of the arena, no two adjacent.
        need_units: Length of the piece.

    Returns:
        Keys to evict, [] if a free run is long enough already; None if pinned records leave no such piece.

    Cost:
        Linear in the records that are freed in thought: few, as records written together lie together.

    Example:
        >>> def at(key, start, units):
        ...     return Resident(key=ChunkKey(key), start=start, units=units)
        >>> old, far, near = at(b"old", 0, 4), at(b"far", 20, 4), at(b"near", 6, 4)
        >>> lru_window([old, far, near], free_units_by_start={4: 2, 24: 1}, need_units=9)
        [b'old', b'near']
    """
    if any(units >= need_units for units in free_units_by_start.values()):
        return []
    pieces = _Pieces(free_units_by_start)
    for resident in oldest_first:
        piece = pieces.add(resident)
        if sum(segment.units for segment in piece) >= need_units:
            return _cheapest_window(piece, need_units)
    return None


@dataclass(frozen=True, slots=True)
class _Segment:
    start: int
    units: int
    key: ChunkKey | None


class _Pieces:
    """Free room after freeing records in thought: maximal runs of segments, by first and by last unit."""

    def __init__(self, free_units_by_start: Mapping[int, int]) -> None:
        self._by_start = {start: [_Segment(start, units, None)] for start, units in free_units_by_start.items()}
        self._by_stop = {start + units: self._by_start[start] for start, units in free_units_by_start.items()}

    def add(self, resident: Resident) -> list[_Segment]:
        """Free one more record; the piece that it is now part of."""
        stop = resident.start + resident.units
        left = self._by_stop.pop(resident.start, [])
        right = self._by_start.pop(stop, [])
        piece = [*left, _Segment(resident.start, resident.units, resident.key), *right]
        self._by_start[piece[0].start] = piece
        self._by_stop[piece[-1].start + piece[-1].units] = piece
        return piece


def _cheapest_window(piece: list[_Segment], need_units: int) -> list[ChunkKey]:
    """The consecutive segments that are long enough and evict the fewest units."""
    best: tuple[int, int, int] | None = None
    first = 0
    length = 0
    evicted = 0
    for last, segment in enumerate(piece):
        length += segment.units
        evicted += segment.units if segment.key else 0
        while length - piece[first].units >= need_units:
            length -= piece[first].units
            evicted -= piece[first].units if piece[first].key else 0
            first += 1
        if length >= need_units and (best is None or (evicted, first, last) < best):
            best = (evicted, first, last)
    assert best is not None, "the piece is long enough"
    return [segment.key for segment in piece[best[1] : best[2] + 1] if segment.key]
