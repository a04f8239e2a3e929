r"""The host tier: records in one shared-memory arena that the node's processes map.

Covers: the arena, slots in it, leases on them, eviction. Does not cover: who holds which lease (`kvstore.desk`), which
records leave first (`kvstore.policy`).

A slot is in one of three states, and its pages belong to it until the last pin on a gone one goes:

    reserve() -> WRITING -- commit() --> HELD -- evicted, dropped --> GONE
                     \------- discard() ------------------------------> GONE

A slot that is being written may be pinned as well, by readers that follow the writer; `shrink` gives back pages that
the record turned out not to need, at the latest with the last pin.

One thread at a time: the node's event loop owns the tier.
"""

import fcntl
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from cluster.clock import Clock, SystemClock
from cluster.errors import DataError, InvariantError
from kvstore import metrics
from kvstore.container import ALIGN, Header, parse_header, parse_record
from kvstore.interfaces import EvictionPolicy, TierEntry, TierStat
from kvstore.keys import ChunkKey
from kvstore.policy import FreeRuns, Quotas, Resident, make_policy, victim_window
from kvstore.tiers.books import TierBooks
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
    tenant: str = ""
    state: SlotState = SlotState.WRITING
    header: Header | None = None
    """What was committed; None while writing."""
    pins: int = 0

    @property
    def offset(self) -> int:
        """First byte in the arena."""
        return self.start_page * PAGE_BYTES

    @property
    def is_busy(self) -> bool:
        """Whether somebody may be reading or writing its pages."""
        return self.pins > 0 or self.state is SlotState.WRITING


class HostTier:
    """A fixed arena for the life of this object, evicting records for new ones in the order of a policy.

    Args:
        capacity_bytes: Size of the arena, rounded down to pages; memory is taken from the system as pages are used.
        policy: Which records leave first; None: the least recently used.
        quotas: Bytes per tenant.
        max_pinned_ratio: Share of the arena that pins in `books` may hold; leases are not bounded by it.
        on_evict: Told of every record that leaves to make room.
        clock: For the ends of pins.

    Attributes:
        books: What the tier holds; for pins, counts of uses and age. Records leave through `drop` only.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        policy: EvictionPolicy | None = None,
        quotas: Quotas | None = None,
        max_pinned_ratio: float = 0.5,
        on_evict: Callable[[Slot], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._room = ExtentAllocator(max(1, capacity_bytes // PAGE_BYTES))
        self._free = FreeRuns(units_by_start=self._room.free_runs, start_by_stop=self._room.free_starts)
        self.capacity_bytes = self._room.num_pages * PAGE_BYTES
        self.books = TierBooks(
            capacity_bytes=self.capacity_bytes,
            policy=policy or make_policy("lru"),
            quotas=quotas or Quotas(),
            max_pinned_ratio=max_pinned_ratio,
        )
        self._clock = clock or SystemClock()
        self._held: dict[ChunkKey, Slot] = {}
        self._writing_bytes: Counter[str] = Counter()
        """Bytes that each tenant has reserved and not yet committed."""
        self._busy_bytes = 0
        self._on_evict = on_evict or (lambda slot: None)
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

    @property
    def name(self) -> str:
        """The tier's name."""
        return "host"

    @property
    def arena(self) -> memoryview:
        """All of it, for data paths that share memory."""
        return self._arena

    # Slots: what the node works with.

    def reserve(self, key: ChunkKey, stored_bytes: int, *, tenant: str = "") -> Slot | None:
        """Room for a record, evicting as needed.

        Returns:
            None if the tenant's quota is too small, or leases, pins and the shares of other tenants leave too little
            in one piece.

        Cost:
            Linear in the records that leave or are passed by the search for a piece, not in the records held.
        """
        pages = _pages(stored_bytes)
        if stored_bytes <= 0 or pages > self._room.num_pages or not self._keep_quota(tenant, stored_bytes):
            return None
        start = self._room.allocate(pages)
        if start is None:
            evicted = victim_window(self._evictable(tenant), free=self._free, need_units=pages)
            if evicted is None:
                return None
            for victim in evicted:
                self._evict(victim)
            start = self._room.allocate(pages)
        if start is None:
            raise InvariantError(f"evicted for {pages} pages, but they are not in one piece")
        self._busy_bytes += pages * PAGE_BYTES
        self._writing_bytes[tenant] += stored_bytes
        return Slot(key, start, pages, stored_bytes, tenant)

    def shrink(self, slot: Slot, stored_bytes: int) -> None:
        """The record needs fewer bytes than were reserved: the rest is free, now or with the last pin.

        Raises:
            InvariantError: The slot is not being written, or has fewer bytes.
        """
        self._expect(slot, SlotState.WRITING)
        if not 0 < stored_bytes <= slot.stored_bytes:
            raise InvariantError(f"slot of {slot.stored_bytes} bytes cannot be cut to {stored_bytes}")
        self._note_written(slot)
        slot.stored_bytes = stored_bytes
        self._writing_bytes[slot.tenant] += stored_bytes
        self._give_back(slot)

    def commit(self, slot: Slot, header: Header) -> bool:
        """Make a reserved slot readable; False (and its room freed) if the key is held already."""
        self._expect(slot, SlotState.WRITING)
        if slot.key in self._held:
            self.discard(slot)
            return False
        self._note_written(slot)
        slot.state = SlotState.HELD
        slot.header = header
        self._held[slot.key] = slot
        self.books.admit(slot.key, _entry_of(slot, header))
        self._give_back(slot)
        return True

    def discard(self, slot: Slot) -> None:
        """Give a reserved slot up; its room is freed with the last pin."""
        self._expect(slot, SlotState.WRITING)
        self._note_written(slot)
        slot.state = SlotState.GONE
        self._give_back(slot)

    def find(self, key: ChunkKey) -> Slot | None:
        """The readable slot of a key, without counting as a use."""
        return self._held.get(key)

    def pin(self, key: ChunkKey) -> Slot | None:
        """The readable slot of a key, used now and kept until `unpin`."""
        slot = self._held.get(key)
        if slot is not None:
            self.books.touch(key)
            self.hold(slot)
        return slot

    def hold(self, slot: Slot) -> None:
        """One more pin on a slot that is readable or being written; it does not count as a use."""
        if slot.state is SlotState.GONE:
            raise InvariantError(f"slot of {slot.key.hex()[:12]} is gone, and cannot be pinned")
        if not slot.is_busy:
            self._busy_bytes += slot.pages * PAGE_BYTES
        slot.pins += 1

    def unpin(self, slot: Slot) -> None:
        """Take one pin away; with the last one go pages that the slot no longer needs."""
        if slot.pins <= 0:
            raise InvariantError(f"unpinned chunk {slot.key.hex()[:12]} more often than pinned")
        slot.pins -= 1
        if not slot.pins:
            self._give_back(slot)

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
            header = None
        if header is None or len(record) != header.stored_bytes:
            metrics.TIER_WRITES.labels(self.name, "error").inc()
            return False
        slot = self.reserve(key, header.stored_bytes, tenant=header.meta.tenant)
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
        self.books.remove(key)
        return self._forget(key) is not None

    def keys(self) -> Iterator[tuple[ChunkKey, int]]:
        """Readable keys and their record bytes."""
        return iter([(key, entry.stored_bytes) for key, entry in self.books.items()])

    def stat(self) -> TierStat:
        """Counts now; `pinned_bytes` covers leases and reservations, in whole pages."""
        return TierStat(
            chunks=len(self.books),
            bytes=self.books.used_bytes,
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

    def _keep_quota(self, tenant: str, stored_bytes: int) -> bool:
        """Evict a tenant's own records until `stored_bytes` more are within its quota, bytes being written included."""
        victims = self.books.make_room_in_quota(
            stored_bytes + self._writing_bytes[tenant], tenant=tenant, now_s=self._clock.now_s(), is_busy=self._is_busy
        )
        for victim in victims or ():
            self._note_evicted(victim)
        return victims is not None

    def _evictable(self, tenant: str) -> Iterator[Resident]:
        for key in self.books.victims(tenant=tenant, now_s=self._clock.now_s(), is_busy=self._is_busy):
            slot = self._held[key]
            yield Resident(key=key, start=slot.start_page, units=slot.pages)

    def _is_busy(self, key: ChunkKey) -> bool:
        return self._held[key].pins > 0

    def _evict(self, key: ChunkKey) -> None:
        self.books.remove(key, evicted=True)
        self._note_evicted(key)

    def _note_evicted(self, key: ChunkKey) -> None:
        """A record is out of the books: its room goes, and who wants to know is told."""
        slot = self._forget(key)
        if slot is not None:
            metrics.EVICTIONS.labels(self.name).inc()
            self._on_evict(slot)

    def _forget(self, key: ChunkKey) -> Slot | None:
        slot = self._held.pop(key, None)
        if slot is not None:
            slot.state = SlotState.GONE
            if not slot.pins:
                self._room.free(slot.start_page)
        return slot

    def _note_written(self, slot: Slot) -> None:
        """The bytes of a slot that was reserved are no longer on their way."""
        self._writing_bytes[slot.tenant] -= slot.stored_bytes
        if not self._writing_bytes[slot.tenant]:
            del self._writing_bytes[slot.tenant]

    def _give_back(self, slot: Slot) -> None:
        """A busy slot became less busy: what it no longer needs goes back, unless somebody may still read it."""
        if slot.pins:
            return
        kept_pages = 0 if slot.state is SlotState.GONE else _pages(slot.stored_bytes)
        self._busy_bytes -= slot.pages * PAGE_BYTES
        if not kept_pages:
            self._room.free(slot.start_page)
            return
        self._room.shrink(slot.start_page, kept_pages)
        slot.pages = kept_pages
        if slot.is_busy:
            self._busy_bytes += kept_pages * PAGE_BYTES

    @staticmethod
    def _expect(slot: Slot, state: SlotState) -> None:
        if slot.state is not state:
            raise InvariantError(f"slot of {slot.key.hex()[:12]} is {slot.state.value}, not {state.value}")


def _pages(stored_bytes: int) -> int:
    return -(-stored_bytes // PAGE_BYTES)


def _entry_of(slot: Slot, header: Header) -> TierEntry:
    return TierEntry(
        payload_bytes=header.payload_bytes,
        stored_bytes=slot.stored_bytes,
        num_tokens=header.meta.num_tokens,
        base_position=header.meta.base_position,
        codec=header.meta.codec,
        tenant=slot.tenant,
        learned_unix_s=header.meta.learned_unix_s,
    )


assert PAGE_BYTES % ALIGN == 0
