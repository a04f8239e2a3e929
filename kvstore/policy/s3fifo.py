"""S3-FIFO: three FIFO queues; what is not used again while it is young leaves early.

Covers: the order and the ghosts. Does not cover: values of records, which it ignores (`kvstore.policy.cost`).

Source:
    Yang, Zhang, Qiu, Yue, Rashmi: "FIFO queues are all you need for cache eviction", SOSP 2023, Algorithm 1. Ours
    counts bytes where the paper counts objects: the small queue is due for eviction from a tenth of the bytes held,
    and the ghosts stand for as many bytes as the main queue holds.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kvstore.interfaces import TierEntry
from kvstore.keys import ChunkKey

SMALL_RATIO: Final = 0.1
"""Share of the bytes that new records have; the paper's figure."""
MAX_FREQUENCY: Final = 3
"""Uses that are counted, two bits in the paper."""
_PROMOTE_ABOVE: Final = 1
"""Uses in the small queue above which a record goes to the main queue instead of leaving."""


@dataclass(slots=True)
class _Resident:
    stored_bytes: int
    frequency: int = 0
    is_main: bool = False


class S3FifoPolicy:
    """Small, main and ghost queue, by bytes.

    Cost:
        O(1) amortised per call: what an eviction moves was paid for by the uses that it takes away.
    """

    def __init__(self) -> None:
        self._resident: dict[ChunkKey, _Resident] = {}
        self._small: OrderedDict[ChunkKey, _Resident] = OrderedDict()
        self._main: OrderedDict[ChunkKey, _Resident] = OrderedDict()
        self._ghosts: OrderedDict[ChunkKey, int] = OrderedDict()
        self._small_bytes = 0
        self._main_bytes = 0
        self._ghost_bytes = 0

    def admit(self, key: ChunkKey, entry: TierEntry) -> None:
        """A new record is small; one that left the small queue a short while ago goes to the main queue."""
        before = self._resident.get(key)
        if before is not None:
            self._resize(before, entry.stored_bytes)
            return
        resident = _Resident(entry.stored_bytes)
        ghost_bytes = self._ghosts.pop(key, None)
        self._ghost_bytes -= ghost_bytes or 0
        self._resident[key] = resident
        if ghost_bytes is None:
            self._small[key] = resident
            self._small_bytes += resident.stored_bytes
        else:
            self._enter_main(key, resident)

    def touch(self, key: ChunkKey) -> None:
        """Count a use; nothing moves."""
        resident = self._resident.get(key)
        if resident is not None:
            resident.frequency = min(resident.frequency + 1, MAX_FREQUENCY)

    def remove(self, key: ChunkKey, *, evicted: bool) -> None:
        """Take a record out; for an eviction the queues move on first, as the algorithm does on its way to a victim."""
        if key not in self._resident:
            return
        if evicted:
            self._move_on()
        resident = self._resident.pop(key)
        if resident.is_main:
            del self._main[key]
            self._main_bytes -= resident.stored_bytes
            return
        del self._small[key]
        self._small_bytes -= resident.stored_bytes
        if evicted:
            self._ghosts[key] = resident.stored_bytes
            self._ghost_bytes += resident.stored_bytes
            self._trim_ghosts()

    def victims(self) -> Iterator[ChunkKey]:
        """What the algorithm would evict, played forward on copies of what would move."""
        small, main = iter(self._small.items()), iter(self._main.items())
        again: OrderedDict[ChunkKey, tuple[_Resident, int]] = OrderedDict()
        small_bytes, main_bytes = self._small_bytes, self._main_bytes
        while small_bytes + main_bytes > 0 or again:
            if small_bytes and (not main_bytes or small_bytes >= SMALL_RATIO * (small_bytes + main_bytes)):
                key, resident = next(small)
                small_bytes -= resident.stored_bytes
                if resident.frequency > _PROMOTE_ABOVE:
                    main_bytes += resident.stored_bytes
                    again[key] = (resident, 0)
                    continue
            else:
                found = next(main, None)
                if found is not None:
                    key, resident = found
                    frequency = resident.frequency
                else:
                    key, (resident, frequency) = again.popitem(last=False)
                if frequency:
                    again[key] = (resident, frequency - 1)
                    continue
                main_bytes -= resident.stored_bytes
            yield key

    def _enter_main(self, key: ChunkKey, resident: _Resident) -> None:
        resident.is_main = True
        resident.frequency = 0
        self._main[key] = resident
        self._main_bytes += resident.stored_bytes

    def _move_on(self) -> None:
        """Promote and reinsert at the tails until a record is due to leave."""
        while self._resident:
            if self._is_small_due():
                key, resident = next(iter(self._small.items()))
                if resident.frequency <= _PROMOTE_ABOVE:
                    return
                del self._small[key]
                self._small_bytes -= resident.stored_bytes
                self._enter_main(key, resident)
            else:
                key, resident = next(iter(self._main.items()))
                if not resident.frequency:
                    return
                resident.frequency -= 1
                self._main.move_to_end(key)

    def _is_small_due(self) -> bool:
        held_bytes = self._small_bytes + self._main_bytes
        return bool(self._small) and (not self._main or self._small_bytes >= SMALL_RATIO * held_bytes)

    def _trim_ghosts(self) -> None:
        while self._ghosts and self._ghost_bytes > self._main_bytes:
            self._ghost_bytes -= self._ghosts.popitem(last=False)[1]

    def _resize(self, resident: _Resident, stored_bytes: int) -> None:
        if resident.is_main:
            self._main_bytes += stored_bytes - resident.stored_bytes
        else:
            self._small_bytes += stored_bytes - resident.stored_bytes
        resident.stored_bytes = stored_bytes
