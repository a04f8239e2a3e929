"""How old a chunk is, on machines whose wall clock may jump.

Covers: the store's own time, when a chunk has expired, dates that cannot be true.
Does not cover: dropping what has expired (`kvstore.upkeep`).

A chunk's date (`ChunkMeta.learned_unix_s`) is wall time, because it outlives processes and machines. Wall clocks jump:
a machine gets its time late, somebody mends it. A naive comparison then forgets every chunk, or keeps them for years.

1. *Store time* is the wall clock when the store started, plus steady seconds since. A jump later changes no age.
   Steady seconds go on while the machine sleeps, because chunks age then too.
2. A chunk that is committed under a TTL gets store time as its date unless its writer's is within `TOLERANCE_S` of it.
   So dates on this node are those of one clock.
3. A date ahead of store time is no age yet (another node's clock, or an earlier life's). More than a TTL ahead it means
   nothing, and the chunk is a miss. So no chunk outlives two TTLs of steady time.
4. A store may have started before its machine knew the time. A jump in the first `SETTLING_S` moves store time, and for
   so long nothing is *deleted* for its age: what looks expired is a miss, and comes back if the clock is mended.
5. A chunk without a date (version 1 of the record) counts as learned when this life of the store began.
"""

import logging
import time
from collections.abc import Callable
from typing import Final

import msgspec

from kvstore.interfaces import ChunkMeta

log = logging.getLogger(__name__)

TOLERANCE_S: Final = 120.0
"""Dates of one node's writers and store time differ by less: a commit follows the computation within a minute."""
SETTLING_S: Final = 600.0
"""Seconds in which a machine that boots gets its time."""
_JUMP_S: Final = 5.0
"""Smaller steps are drift."""


def steady_s() -> float:
    """Seconds since the machine booted, sleep included; no jump of the wall clock changes them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class StoreTime:
    """Ages of chunks in one life of a store.

    Args:
        ttl_s: Seconds after which a chunk has expired; None: never.
        wall_s: Unix time.
        steady: Seconds that never jump.

    Example:
        >>> now = [1000.0]
        >>> age = StoreTime(ttl_s=60.0, wall_s=lambda: 5e9, steady=lambda: now[0])
        >>> age.has_expired(5e9 - 30), age.has_expired(5e9 - 61)
        (False, True)
        >>> now[0] += 31
        >>> age.has_expired(5e9 - 30)
        True
    """

    def __init__(
        self,
        *,
        ttl_s: float | None,
        wall_s: Callable[[], float] = time.time,
        steady: Callable[[], float] = steady_s,
    ) -> None:
        self.ttl_s = ttl_s
        self._wall_s = wall_s
        self._steady = steady
        self._start_s = steady()
        self._offset_s = wall_s() - self._start_s

    def now_unix_s(self) -> float:
        """Store time."""
        return self._steady() + self._offset_s

    @property
    def is_settled(self) -> bool:
        """Whether what has expired may be deleted."""
        return self._steady() - self._start_s >= SETTLING_S

    def has_expired(self, learned_unix_s: float) -> bool:
        """Whether a chunk of this date is a miss."""
        if self.ttl_s is None:
            return False
        if learned_unix_s <= 0:
            return self._steady() - self._start_s > self.ttl_s
        age_s = self.now_unix_s() - learned_unix_s
        return age_s > self.ttl_s or age_s < -self.ttl_s

    def dated(self, meta: ChunkMeta) -> ChunkMeta:
        """The metadata of a chunk that is committed now: with a date that can be true."""
        if self.ttl_s is None:
            return meta
        now_unix_s = self.now_unix_s()
        if abs(now_unix_s - meta.learned_unix_s) <= TOLERANCE_S:
            return meta
        return msgspec.structs.replace(meta, learned_unix_s=now_unix_s)

    def tick(self) -> bool:
        """Notice a jump of the wall clock; call it now and then. Whether store time has moved."""
        jump_s = self._wall_s() - self._steady() - self._offset_s
        if not self.is_settled and abs(jump_s) > _JUMP_S:
            log.warning("store_time_moved jump_s=%.0f", jump_s)
            self._offset_s += jump_s
            return True
        return False
