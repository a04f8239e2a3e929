"""A node store inside one process: same protocol, no socket, no arena.

Covers: `MemoryStore` (what a node store process holds) and `MemoryStoreClient` (one connection to it).
Does not cover: faults (`kvstore.testing.faults`), tiers, checksums, crashes of the store process.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence

from kvstore.container import RecordError
from kvstore.interfaces import (
    BufferUnusableError,
    ChunkMeta,
    ReadLease,
    ReleasedAtExit,
    StreamLease,
    TierStat,
    WriteLease,
)
from kvstore.keys import ChunkKey
from kvstore.whole_stream import WholeStream


class _Chunk:
    """One committed chunk: immutable bytes, and how many leases read them."""

    __slots__ = ("meta", "payload", "pins")

    def __init__(self, meta: ChunkMeta, payload: bytearray) -> None:
        self.meta = meta
        self.payload = payload
        self.pins = 0


class MemoryStore:
    """Chunks that several `MemoryStoreClient`s share, as the processes of a node share its store.

    Args:
        capacity_bytes: Payload bytes kept, least recently used chunks leave first; None keeps everything.
    """

    def __init__(self, *, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self._changed = threading.Condition()
        self._chunks: OrderedDict[ChunkKey, _Chunk] = OrderedDict()
        self._writing: dict[ChunkKey, MemoryWriteLease] = {}
        self._leases: set[MemoryReadLease] = set()
        self._pins: dict[ChunkKey, float] = {}

    def stat(self) -> TierStat:
        """Counts now; `pinned_bytes` is 0 once every lease is released."""
        with self._changed:
            return TierStat(
                chunks=len(self._chunks),
                bytes=self._used_bytes(),
                capacity_bytes=self.capacity_bytes or self._used_bytes(),
                pinned_bytes=sum(len(c.payload) for c in self._chunks.values() if c.pins),
            )

    def leftovers(self) -> list[str]:
        """Leases and reservations that nobody gave back, in words."""
        with self._changed:
            reads = [f"read lease on {lease.key.hex()[:12]}" for lease in self._leases]
            return reads + [f"reservation of {key.hex()[:12]}" for key in self._writing]

    def drop(self, key: ChunkKey) -> bool:
        """Forget one chunk; leases on it stay readable. Whether it was there."""
        with self._changed:
            return self._chunks.pop(key, None) is not None

    def keys(self) -> list[ChunkKey]:
        """Keys of committed chunks, least recently used first."""
        with self._changed:
            return list(self._chunks)

    def wait_held(self, keys: Sequence[ChunkKey], stop_s: float) -> list[bool]:
        """Wait until all keys are committed or the monotonic time `stop_s`."""
        with self._changed:
            while not all(k in self._chunks for k in keys) and (left_s := stop_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
            return [k in self._chunks for k in keys]

    def acquire(self, key: ChunkKey, owner: "MemoryStoreClient", stop_s: float) -> "MemoryReadLease | None":
        """Pin one chunk, waiting for a write under way until the monotonic time `stop_s`."""
        with self._changed:
            while key in self._writing and key not in self._chunks and (left_s := stop_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
            chunk = self._chunks.get(key)
            if chunk is None:
                return None
            self._chunks.move_to_end(key)
            chunk.pins += 1
            lease = MemoryReadLease(self, owner, key, chunk)
            self._leases.add(lease)
            return lease

    def reserve(
        self, key: ChunkKey, meta: ChunkMeta, num_bytes: int, owner: "MemoryStoreClient"
    ) -> "MemoryWriteLease | None":
        """Start the single write of `key`; None if held, being written, or no room."""
        with self._changed:
            if key in self._chunks or key in self._writing or not self._make_room(num_bytes):
                return None
            lease = MemoryWriteLease(self, owner, key, meta, bytearray(num_bytes))
            self._writing[key] = lease
            return lease

    def finish_write(self, lease: "MemoryWriteLease", buffer: bytearray | None) -> bool:
        """End a write: with its bytes to commit, with None to abort. Whether the write was still open."""
        with self._changed:
            if self._writing.get(lease.key) is not lease:
                return False
            del self._writing[lease.key]
            if buffer is not None:
                self._chunks[lease.key] = _Chunk(lease.meta, buffer)
            self._changed.notify_all()
            return True

    def finish_read(self, lease: "MemoryReadLease", chunk: _Chunk) -> None:
        """Take one pin away."""
        with self._changed:
            if lease in self._leases:
                self._leases.remove(lease)
                chunk.pins -= 1

    def pin(self, key: ChunkKey, *, until_s: float) -> bool:
        """Keep one chunk from being evicted until a monotonic time; whether it is there."""
        with self._changed:
            if key in self._chunks:
                self._pins[key] = max(until_s, self._pins.get(key, until_s))
            return key in self._chunks

    def unpin(self, key: ChunkKey) -> None:
        """End a pin."""
        with self._changed:
            self._pins.pop(key, None)

    def end_session(self, owner: "MemoryStoreClient") -> None:
        """End every lease and reservation of one client, as a closed connection does."""
        with self._changed:
            reads = [lease for lease in self._leases if lease.owner is owner]
            writes = [lease for lease in self._writing.values() if lease.owner is owner]
        for read in reads:
            read.release()
        for write in writes:
            write.abort()

    def _make_room(self, num_bytes: int) -> bool:
        if self.capacity_bytes is None:
            return True
        reserved = sum(len(lease.payload) for lease in self._writing.values())
        over = self._used_bytes() + reserved + num_bytes - self.capacity_bytes
        victims = []
        for key, chunk in self._chunks.items():
            if over <= 0:
                break
            if not chunk.pins and self._pins.get(key, 0.0) <= time.monotonic():
                victims.append(key)
                over -= len(chunk.payload)
        if over > 0:
            return False
        for key in victims:
            del self._chunks[key]
        return True

    def _used_bytes(self) -> int:
        return sum(len(c.payload) for c in self._chunks.values())


class MemoryReadLease(ReleasedAtExit):
    """A pinned chunk."""

    def __init__(self, store: MemoryStore, owner: "MemoryStoreClient", key: ChunkKey, chunk: _Chunk) -> None:
        self.owner = owner
        self._store = store
        self._key = key
        self._chunk = chunk
        self._payload = memoryview(chunk.payload).toreadonly()

    @property
    def key(self) -> ChunkKey:
        """The chunk's key."""
        return self._key

    @property
    def meta(self) -> ChunkMeta:
        """How to read the payload."""
        return self._chunk.meta

    @property
    def payload(self) -> memoryview:
        """Read-only bytes."""
        return self._payload

    def release(self) -> None:
        """Give the pin back."""
        self._store.finish_read(self, self._chunk)


class MemoryWriteLease:
    """The single write of one key."""

    def __init__(
        self, store: MemoryStore, owner: "MemoryStoreClient", key: ChunkKey, meta: ChunkMeta, buffer: bytearray
    ) -> None:
        self.owner = owner
        self.meta = meta
        self._store = store
        self._key = key
        self._buffer = buffer
        self._payload = memoryview(buffer)

    @property
    def key(self) -> ChunkKey:
        """The chunk's key."""
        return self._key

    @property
    def payload(self) -> memoryview:
        """Writable bytes of the reserved length."""
        return self._payload

    def commit(self, num_bytes: int | None = None) -> bool:
        """Make the chunk readable; False if the write was ended before.

        Raises:
            RecordError: `num_bytes` is not between 1 and what was reserved; the write is aborted.
        """
        if num_bytes is None:
            return self._store.finish_write(self, self._buffer)
        if not 0 < num_bytes <= len(self._buffer):
            self.abort()
            raise RecordError(f"a write of {len(self._buffer)} bytes cannot commit {num_bytes}")
        # A copy: the writer's view keeps the buffer from shrinking.
        return self._store.finish_write(self, self._buffer[:num_bytes])

    def abort(self) -> None:
        """Forget the write."""
        self._store.finish_write(self, None)


class MemoryStoreClient:
    """One client of a `MemoryStore`; without one given, of a store of its own.

    Example:
        >>> from kvstore.testing.samples import sample_key, sample_meta
        >>> client = MemoryStoreClient()
        >>> write = client.reserve(sample_key(1), sample_meta(), 3, deadline_s=1.0)
        >>> write.payload[:] = b"abc"
        >>> write.commit(), client.lookup([sample_key(1), sample_key(2)], deadline_s=1.0)
        (True, [True, False])
        >>> with client.read([sample_key(1)], deadline_s=1.0)[0] as lease:
        ...     bytes(lease.payload)
        b'abc'
    """

    def __init__(self, store: MemoryStore | None = None) -> None:
        self.store = store or MemoryStore()
        self._closed = False

    def lookup(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> list[bool]:
        """Which keys can be read now."""
        return self.wait(keys, deadline_s=0.0)

    def wait(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> list[bool]:
        """Block until every key can be read or `deadline_s` has passed; which can be read."""
        if self._closed:
            return [False] * len(keys)
        return self.store.wait_held(keys, time.monotonic() + deadline_s)

    def read(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> list[ReadLease | None]:
        """Lease chunks for reading; None per key that is missing or late."""
        if self._closed:
            return [None] * len(keys)
        stop_s = time.monotonic() + deadline_s
        return [self.store.acquire(key, self, stop_s) for key in keys]

    def read_into(self, key: ChunkKey, out: memoryview, *, deadline_s: float) -> ChunkMeta | None:
        """Copy one payload; None if it is missing, late, or of another length.

        Raises:
            BufferUnusableError: `out` cannot be written to, or is not contiguous.
        """
        if out.readonly or not out.c_contiguous:
            raise BufferUnusableError("read_into needs writable, contiguous memory")
        (lease,) = self.read([key], deadline_s=deadline_s)
        if lease is None:
            return None
        with lease:
            if len(lease.payload) != out.nbytes:
                return None
            out.cast("B")[:] = lease.payload
            return lease.meta

    def stream(self, key: ChunkKey, *, deadline_s: float) -> StreamLease | None:
        """Lease one chunk; None if it is missing or late."""
        if self._closed:
            return None
        lease = self.store.acquire(key, self, time.monotonic() + deadline_s)
        return WholeStream(lease) if lease else None

    def pin(self, keys: Sequence[ChunkKey], *, seconds: float, deadline_s: float) -> list[bool]:
        """Keep chunks from being evicted for so long; which are held."""
        until_s = time.monotonic() + seconds
        return [not self._closed and self.store.pin(key, until_s=until_s) for key in keys]

    def unpin(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> None:
        """End pins."""
        for key in keys if not self._closed else ():
            self.store.unpin(key)

    def reserve(self, key: ChunkKey, meta: ChunkMeta, num_bytes: int, *, deadline_s: float) -> WriteLease | None:
        """Room for a new chunk, or None."""
        if self._closed or num_bytes <= 0:
            return None
        return self.store.reserve(key, meta, num_bytes, self)

    def close(self) -> None:
        """End this client's leases and reservations."""
        self._closed = True
        self.store.end_session(self)
