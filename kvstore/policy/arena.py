"""Victims in an arena, where their room must be in one piece, for any order in which records should leave.

Covers: which records to evict for a run of units. Does not cover: the order (`kvstore.interfaces.EvictionPolicy`),
which units are free (`kvstore.tiers.extents`).
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
    """Units of room it occupies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeRuns:
    """The free room of an arena; live views, not copies."""

    units_by_start: Mapping[int, int]
    """Length of every free run, by its first unit; no two touch."""
    start_by_stop: Mapping[int, int]
    """First unit of every free run, by the unit behind its last."""


def victim_window(victims: Iterable[Resident], *, free: FreeRuns, need_units: int) -> list[ChunkKey] | None:
    """Victims whose room, with the free room between them, is one piece of at least `need_units`.

    Records are freed in thought, in the given order, and joined with their neighbours, until a piece is long enough;
    only the records inside that piece are victims, and of those only a window that is needed. So the last victim comes
    as early in the order as it can, and records before it that would not help stay.

    Args:
        victims: Evictable records in the order in which they should leave.
        free: Free runs of the arena, none of which is long enough.
        need_units: Length of the piece.

    Returns:
        Keys to evict; None if no piece is long enough.

    Cost:
        Linear in the records that are freed in thought, whatever the number of records and free runs.

    Example:
        >>> def at(key, start, units):
        ...     return Resident(key=ChunkKey(key), start=start, units=units)
        >>> old, far, near = at(b"old", 0, 4), at(b"far", 20, 4), at(b"near", 6, 4)
        >>> free = FreeRuns(units_by_start={4: 2, 24: 1}, start_by_stop={6: 4, 25: 24})
        >>> victim_window([old, far, near], free=free, need_units=9)
        [b'old', b'near']
    """
    freed: dict[int, Resident] = {}
    stop_by_start: dict[int, int] = {}
    start_by_stop: dict[int, int] = {}
    for resident in victims:
        start, stop = resident.start, resident.start + resident.units
        freed[start] = resident
        # A free run beside a piece is part of it already: a bare run can touch only where no piece does.
        before = start_by_stop.pop(start, None)
        behind = stop_by_start.pop(stop, None)
        start = free.start_by_stop.get(start, start) if before is None else before
        stop = stop + free.units_by_start.get(stop, 0) if behind is None else behind
        stop_by_start[start] = stop
        start_by_stop[stop] = start
        if stop - start >= need_units:
            return _cheapest_window(_segments(start, stop, freed, free), need_units)
    return None


@dataclass(frozen=True, slots=True)
class _Segment:
    units: int
    key: ChunkKey | None


def _segments(start: int, stop: int, freed: Mapping[int, Resident], free: FreeRuns) -> list[_Segment]:
    """What a piece consists of, from its first unit to its last."""
    segments: list[_Segment] = []
    while start < stop:
        resident = freed.get(start)
        segment = _Segment(resident.units, resident.key) if resident else _Segment(free.units_by_start[start], None)
        segments.append(segment)
        start += segment.units
    return segments


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
