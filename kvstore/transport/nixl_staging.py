r"""The memory that a store shares with its NIXL sidecar: where reads land, and where offered records stand.

Covers: the memory, which parts of it are free, landing slots, staged records. Does not cover: moving bytes.

The first half is for landing, in slots of one size. A slot that something may still write to is never free:

    free -- take() --> posted -- done() --> free
                           \---- quarantine() --> quarantined -- done() --> free

The last step needs the word of NIXL that the read has ended *well*, however late. A read that failed leaves its slot
in quarantine until the sidecar's process is gone, and this memory with it: every sidecar gets new memory.

The second half holds offered records, each behind a head with the offer's token. An offer ends by wiping the head;
the record keeps its bytes for `STILL_S` more. So whoever saw the head less than that before its last byte arrived has
the bytes that were offered, and whoever was slower looks at the head again.
"""

import fcntl
import mmap
import os
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
import numpy.typing as npt

from cluster.errors import InvariantError, SettingsError
from kvstore.settings import MIN_STAGING_BYTES
from kvstore.tiers.extents import ExtentAllocator
from kvstore.transport.nixl_wire import HEAD, MAGIC, STILL_S, NixlUnavailableError

PAGE_BYTES: Final = 4096
MIN_PIECE_BYTES: Final = 1 << 20
"""Smaller reads cost several times more per byte (measured)."""
MAX_PIECE_BYTES: Final = 2 << 20
"""Larger pieces are hardly faster (measured); smaller ones let early layers be used sooner."""
_WANTED_SLOTS: Final = 16


_Bytes = npt.NDArray[np.uint8]


class SlotState(Enum):
    """Where a landing slot is in its life."""

    FREE = "free"
    POSTED = "posted"
    QUARANTINED = "quarantined"


@dataclass(slots=True, eq=False)
class LandingSlot:
    """Memory for one piece, and a page for a head in front of it."""

    offset: int
    num_bytes: int
    state: SlotState = SlotState.FREE


@dataclass(slots=True, eq=False)
class StagedRecord:
    """A record that peers may read."""

    token: bytes
    offset: int
    """Of its first page; the head is at the end of that page, the record behind it."""
    pages: int
    expires_s: float

    @property
    def head_offset(self) -> int:
        """Where the head begins."""
        return self.offset + PAGE_BYTES - HEAD.size


class Staging:
    """The books are not for several threads; copying is, into and out of memory that the caller holds.

    Args:
        num_bytes: Size of the memory, taken from the system as it is used.

    Raises:
        SettingsError: Less than `MIN_STAGING_BYTES`.
        OSError: No such memory.
    """

    def __init__(self, num_bytes: int) -> None:
        if num_bytes < MIN_STAGING_BYTES:
            raise SettingsError(f"nixl.staging_bytes must be at least {MIN_STAGING_BYTES}, is {num_bytes}")
        self.num_bytes = num_bytes // (2 * PAGE_BYTES) * (2 * PAGE_BYTES)
        self.landing_bytes = self.num_bytes // 2
        wanted = self.landing_bytes // _WANTED_SLOTS // PAGE_BYTES * PAGE_BYTES
        self.piece_bytes = min(max(wanted, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
        slot_bytes = self.piece_bytes + PAGE_BYTES
        self.slots = [LandingSlot(n * slot_bytes, slot_bytes) for n in range(self.landing_bytes // slot_bytes)]
        self._free = self.slots[::-1]
        """The last one was used last: its pages exist, and may be in a cache."""
        self.quarantined_bytes = 0
        """Of slots in quarantine."""
        self._room = ExtentAllocator((self.num_bytes - self.landing_bytes) // PAGE_BYTES)
        self._still: deque[tuple[float, StagedRecord]] = deque()
        """Wiped records, and until when they keep their bytes."""
        fd = os.memfd_create("learnonce-nixl", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, self.num_bytes)
            # The sidecar cannot take pages away under the store's hands.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._mapped: _Bytes | None = np.frombuffer(mmap.mmap(fd, self.num_bytes), dtype=np.uint8)
        except OSError:
            os.close(fd)
            raise
        self.fd = fd

    def close_fd(self) -> None:
        """Close the descriptor; the mapping stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def unmap(self) -> None:
        """Give the memory back, when the last copy under way has ended."""
        self._mapped = None

    @property
    def _bytes(self) -> _Bytes:
        mapped = self._mapped
        if mapped is None:
            raise NixlUnavailableError("the NIXL sidecar has gone, and its memory with it")
        return mapped

    # Landing.

    def take(self) -> LandingSlot | None:
        """A slot to post a read to; None if there is none."""
        if not self._free:
            return None
        slot = self._free.pop()
        slot.state = SlotState.POSTED
        return slot

    def done(self, slot: LandingSlot) -> None:
        """The slot's read has ended well, or never began, and its bytes are of no more use."""
        if slot.state is SlotState.FREE:
            raise InvariantError(f"landing slot at {slot.offset} is free already")
        if slot.state is SlotState.QUARANTINED:
            self.quarantined_bytes -= slot.num_bytes
        slot.state = SlotState.FREE
        self._free.append(slot)

    def quarantine(self, slot: LandingSlot) -> None:
        """Something may still write to the slot."""
        if slot.state is not SlotState.POSTED:
            raise InvariantError(f"landing slot at {slot.offset} is {slot.state.value}, not posted")
        slot.state = SlotState.QUARANTINED
        self.quarantined_bytes += slot.num_bytes

    @property
    def quarantined_ratio(self) -> float:
        """Share of the landing slots that is in quarantine."""
        return self.quarantined_bytes / (len(self.slots) * (self.piece_bytes + PAGE_BYTES))

    @property
    def free_slots(self) -> int:
        """Slots that can be taken."""
        return len(self._free)

    def read(self, offset: int, num_bytes: int) -> bytes:
        """A copy of a few bytes; like all copying it raises `NixlUnavailableError` after `unmap`."""
        return self._bytes[offset : offset + num_bytes].tobytes()

    def copy_out(self, offset: int, into: memoryview) -> None:
        """Copy what landed; releases the interpreter lock."""
        np.copyto(np.frombuffer(into, dtype=np.uint8), self._bytes[offset : offset + len(into)])

    # Offered records.

    def stage(self, token: bytes, num_bytes: int, *, now_s: float, expires_s: float) -> StagedRecord | None:
        """Room for a record; None if there is none now."""
        while self._still and self._still[0][0] <= now_s:
            self._room.free(self._still.popleft()[1].offset // PAGE_BYTES)
        pages = 1 + -(-num_bytes // PAGE_BYTES)
        start = self._room.allocate(pages)
        return None if start is None else StagedRecord(token, start * PAGE_BYTES, pages, expires_s)

    def head_position(self, record: StagedRecord) -> int:
        """Where the record's head begins, from the start of the memory."""
        return self.landing_bytes + record.head_offset

    def fill(self, record: StagedRecord, data: memoryview) -> None:
        """Copy a record in, then its head; releases the interpreter lock."""
        start = self.head_position(record) + HEAD.size
        np.copyto(self._bytes[start : start + len(data)], np.frombuffer(data, dtype=np.uint8))
        self._write_head(record, HEAD.pack(MAGIC, record.token, len(data)))

    def unstage(self, record: StagedRecord, *, now_s: float) -> None:
        """End an offer: pullers see a wiped head from now on, and the bytes stay for a moment."""
        self._write_head(record, bytes(HEAD.size))
        self._still.append((now_s + STILL_S, record))

    @property
    def staged_bytes(self) -> int:
        """Bytes taken by offered records, just ended ones included."""
        return (self._room.num_pages - self._room.free_pages) * PAGE_BYTES

    def _write_head(self, record: StagedRecord, head: bytes) -> None:
        start = self.head_position(record)
        self._bytes[start : start + HEAD.size] = np.frombuffer(head, dtype=np.uint8)
