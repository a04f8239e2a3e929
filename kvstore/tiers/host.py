r"""The host tier: records in one shared-memory arena that the node's processes map.

Covers: the arena, slots in it, pins, eviction. Does not cover: who holds which lease (`kvstore.desk`).

A slot is in one of three states, and its pages belong to it until the last step:

    reserve() -> WRITING -- commit() --> HELD -- evicted, dropped --> GONE (pages freed when the last pin goes)
                     \------- discard() ------------------------------> GONE

One thread at a time: the node's event loop owns the tier.
"""

import fcntl
import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from cluster.errors import DataError, InvariantError
from kvstore import metrics
from kvstore.container import ALIGN, Header, parse_header, parse_record
from kvstore.interfaces import TierStat
from kvstore.keys import ChunkKey
from kvstore.policy import Resident, lru_window
from kvstore.tiers.extents import ExtentAllocator

PAGE_BYTES: Final = 64 << 10
"""Granule of room in the arena: under 1 % is lost on a chunk of 10 MB."""


class SlotState(Enum):
    """Where a slot is in its life."""

    WRITING = "writing"
    HELD = "held"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class Slot:
    """Pages of the arena that belong to one record."""

    key: ChunkKey
    start_page: int
    pages: int
    stored_bytes: int
    state: SlotState = SlotState.WRITING
    header: Header | None = None
    """What was committed; None while writing."""
    pins: int = 0

    @property
    def offset(self) -> int:
        """First byte in the arena."""
        return self.start_page * PAGE_BYTES


class HostTier:
    """A fixed arena for the life of this object, evicting least recently used records for new ones.

    Args:
        capacity_bytes: Size of the arena, rounded down to pages; memory is taken from the system as pages are used.
        on_evict: Told of every record that leaves to make room.
    """

    def __init__(self, capacity_bytes: int, *, on_evict: Callable[[Slot], None] | None = None) -> None:
        self._room = ExtentAllocator(max(1, capacity_bytes // PAGE_BYTES))
        self.capacity_bytes = self._room.num_pages * PAGE_BYTES
        self.fd = os.memfd_create("learnonce-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.capacity_bytes)
            # Nobody with the descriptor can shrink it: a mapped page that is cut off kills its reader.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._map = mmap.mmap(self.fd, self.capacity_bytes)
        except OSError:
            os.close(self.fd)
            raise
        self._arena = memoryview(self._map)
        self._held: OrderedDict[ChunkKey, Slot] = OrderedDict()
        self._held_bytes = 0
        self._busy_bytes = 0
        self._on_evict = on_evict or (lambda slot: None)

    @property
    def name(self) -> str:
        """The tier's name."""
        return "host"

    # Slots: what the node works with.

    def reserve(self, key: ChunkKey, stored_bytes: int) -> Slot | None:
        """Room for a record, evicting as needed; None if pinned records leave too little in one piece."""
        pages = -(-stored_bytes // PAGE_BYTES)
        if stored_bytes <= 0 or pages > self._room.num_pages:
            return None
        start = self._room.allocate(pages)
        if start is None:
            victims = lru_window(self._evictable(), free_units_by_start=self._room.free_runs, need_units=pages)
            if victims is None:
                return None
            for victim in victims:
                self._evict(self._held[victim])
            start = self._room.allocate(pages)
        if start is None:
            raise InvariantError(f"evicted for {pages} pages, but they are not in one piece")
        self._busy_bytes += pages * PAGE_BYTES
        return Slot(key, start, pages, stored_bytes)

    def commit(self, slot: Slot, header: Header) -> bool:
        """Make a reserved slot readable; False (and its room freed) if the key is held already."""
        self._expect(slot, SlotState.WRITING)
        if slot.key in self._held:
            self.discard(slot)
            return False
        slot.state = SlotState.HELD
        slot.header = header
        self._busy_bytes -= slot.pages * PAGE_BYTES
        self._held[slot.key] = slot
        self._held_bytes += slot.stored_bytes
        return True

    def discard(self, slot: Slot) -> None:
        """Give a reserved slot's room back."""
        self._expect(slot, SlotState.WRITING)
        slot.state = SlotState.GONE
        self._busy_bytes -= slot.pages * PAGE_BYTES
        self._room.free(slot.start_page)

    def find(self, key: ChunkKey) -> Slot | None:
        """The readable slot of a key, without counting as a use."""
        return self._held.get(key)

    def pin(self, key: ChunkKey) -> Slot | None:
        """The readable slot of a key, used now and kept until `unpin`."""
        slot = self._held.get(key)
        if slot is not None:
            self._held.move_to_end(key)
            self.hold(slot)
        return slot

    def hold(self, slot: Slot) -> None:
        """One more pin on a readable slot that does not count as a use."""
        self._expect(slot, SlotState.HELD)
        slot.pins += 1
        if slot.pins == 1:
            self._busy_bytes += slot.pages * PAGE_BYTES

    def unpin(self, slot: Slot) -> None:
        """Take one pin away; frees the room of a record that was dropped meanwhile."""
        if slot.pins <= 0:
            raise InvariantError(f"unpinned chunk {slot.key.hex()[:12]} more often than pinned")
        slot.pins -= 1
        if slot.pins == 0:
            self._busy_bytes -= slot.pages * PAGE_BYTES
            if slot.state is SlotState.GONE:
                self._room.free(slot.start_page)

    def view(self, slot: Slot) -> memoryview:
        """The slot's bytes in the arena, writable."""
        return self._arena[slot.offset : slot.offset + slot.stored_bytes]

    # The tier protocol.

    def put(self, key: ChunkKey, record: memoryview) -> bool:
        """Copy a record in; its payload is verified when it is read."""
        if key in self._held:
            return True
        try:
            header = parse_header(record, expected_key=key)
        except DataError:
            metrics.TIER_WRITES.labels(self.name, "error").inc()
            return False
        slot = self.reserve(key, header.stored_bytes) if len(record) == header.stored_bytes else None
        if slot is None:
            metrics.TIER_WRITES.labels(self.name, "full").inc()
            return False
        self.view(slot)[:] = record
        metrics.TIER_WRITES.labels(self.name, "stored").inc()
        return self.commit(slot, header)

    def get(self, key: ChunkKey) -> bytearray | None:
        """A copy of the record; a damaged one is dropped."""
        slot = self.pin(key)
        if slot is None:
            metrics.TIER_READS.labels(self.name, "miss").inc()
            return None
        try:
            record = bytearray(self.view(slot))
            parse_record(record, expected_key=key)
        except DataError:
            metrics.TIER_READS.labels(self.name, "corrupt").inc()
            self.drop(key)
            return None
        finally:
            self.unpin(slot)
        metrics.TIER_READS.labels(self.name, "hit").inc()
        return record

    def contains(self, key: ChunkKey) -> bool:
        """Whether the key is readable."""
        return key in self._held

    def drop(self, key: ChunkKey) -> bool:
        """Forget a record; leases on it stay readable, its room is freed with the last one."""
        slot = self._held.pop(key, None)
        if slot is None:
            return False
        self._held_bytes -= slot.stored_bytes
        slot.state = SlotState.GONE
        if not slot.pins:
            self._room.free(slot.start_page)
        return True

    def keys(self) -> Iterator[tuple[ChunkKey, int]]:
        """Readable keys and their record bytes, least recently used first."""
        return iter([(key, slot.stored_bytes) for key, slot in self._held.items()])

    def stat(self) -> TierStat:
        """Counts now; `pinned_bytes` covers leases and reservations, in whole pages."""
        return TierStat(
            chunks=len(self._held),
            bytes=self._held_bytes,
            capacity_bytes=self.capacity_bytes,
            pinned_bytes=self._busy_bytes,
        )

    def close(self) -> None:
        """Unmap and forget the arena; processes that map it keep their mapping."""
        if self.fd >= 0:
            self._held.clear()
            self._arena.release()
            self._map.close()
            os.close(self.fd)
            self.fd = -1

    def _evictable(self) -> Iterator[Resident]:
        for key, slot in self._held.items():
            if not slot.pins:
                yield Resident(key=key, start=slot.start_page, units=slot.pages)

    def _evict(self, slot: Slot) -> None:
        self.drop(slot.key)
        metrics.EVICTIONS.labels(self.name).inc()
        self._on_evict(slot)

    @staticmethod
    def _expect(slot: Slot, state: SlotState) -> None:
        if slot.state is not state:
            raise InvariantError(f"slot of {slot.key.hex()[:12]} is {slot.state.value}, not {state.value}")


assert PAGE_BYTES % ALIGN == 0
