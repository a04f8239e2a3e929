"""Store clients that fail on purpose, the same way in every process and run.

Covers: misses, reads that come to nothing after a positive lookup, slowness, streams that break off, refused and failed
writes; for a seeded share of the keys or for named keys.
Does not cover: wrong bytes (a client never hands them out: its read is a miss, which is `Fault.LOST`), and failures of
the store process or its files, which `tests/fault` causes on the real thing.
"""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from enum import StrEnum

from kvstore.interfaces import ChunkMeta, ReadLease, ReleasedAtExit, StoreClient, StreamLease, WriteLease
from kvstore.keys import ChunkKey


class Fault(StrEnum):
    """What happens to one key."""

    MISS = "miss"
    """Lookups say no, reads give nothing."""
    LOST = "lost"
    """Lookups say yes, reads give nothing: evicted, or corrupt and found out by the checksum."""
    SLOW = "slow"
    """A read that holds the key takes `delay_s` longer, and the key is late when that exceeds the deadline."""
    REFUSED = "refused"
    """Reservations are refused."""
    UNCOMMITTED = "uncommitted"
    """Commits fail: the chunk is not stored."""


class FaultyStoreClient:
    """Wraps a client and fails for chosen keys.

    Args:
        inner: The client that does the work.
        ratios: Share of keys (0 to 1) per fault, chosen by a digest of seed, fault and key.
        named: Keys that always have the given fault.
        seed: Changes which keys the ratios choose.
        delay_s: Seconds added by `Fault.SLOW`.
    """

    def __init__(
        self,
        inner: StoreClient,
        *,
        ratios: Mapping[Fault, float] | None = None,
        named: Mapping[ChunkKey, Fault] | None = None,
        seed: int = 0,
        delay_s: float = 0.0,
    ) -> None:
        self.inner = inner
        self.ratios = dict(ratios or {})
        self.named = dict(named or {})
        self.seed = seed
        self.delay_s = delay_s
        self._closed = threading.Event()

    def has_fault(self, fault: Fault, key: ChunkKey) -> bool:
        """Whether `key` fails this way: a pure function of the arguments and the constructor's."""
        if key in self.named:
            return self.named[key] is fault
        digest = hashlib.blake2b(f"{self.seed}/{fault}/".encode() + key, digest_size=8).digest()
        return int.from_bytes(digest, "little") / 2**64 < self.ratios.get(fault, 0.0)

    def lookup(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> list[bool]:
        """As the inner client, without the keys that miss."""
        held = self.inner.lookup(keys, deadline_s=deadline_s)
        return [yes and not self.has_fault(Fault.MISS, key) for yes, key in zip(held, keys, strict=True)]

    def wait(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> list[bool]:
        """As the inner client; keys that miss are never waited for."""
        good = [key for key in keys if not self.has_fault(Fault.MISS, key)]
        held = dict(zip(good, self.inner.wait(good, deadline_s=deadline_s), strict=True))
        return [held.get(key, False) for key in keys]

    def read(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> list[ReadLease | None]:
        """As the inner client, without the keys that fail; slow when a slow key is among them."""
        slow = [key for key in keys if self.has_fault(Fault.SLOW, key)]
        late = bool(slow) and self.delay_s >= deadline_s
        if slow:
            self._closed.wait(min(self.delay_s, deadline_s))
            deadline_s = max(0.0, deadline_s - self.delay_s)
        gone = {key for key in keys if self.has_fault(Fault.MISS, key) or self.has_fault(Fault.LOST, key)}
        gone.update(slow if late else ())
        good = [key for key in keys if key not in gone]
        leases = iter(self.inner.read(good, deadline_s=deadline_s))
        return [None if key in gone else next(leases) for key in keys]

    def read_into(self, key: ChunkKey, out: memoryview, *, deadline_s: float) -> ChunkMeta | None:
        """As the inner client, or nothing for keys that fail."""
        left_s = self._left_s(key, deadline_s)
        return None if left_s is None else self.inner.read_into(key, out, deadline_s=left_s)

    def stream(self, key: ChunkKey, *, deadline_s: float) -> StreamLease | None:
        """As the inner client, or nothing for keys that fail; slow and lost keys never finish."""
        if self.has_fault(Fault.MISS, key):
            return None
        lease = self.inner.stream(key, deadline_s=deadline_s)
        is_broken = self.has_fault(Fault.LOST, key) or self.has_fault(Fault.SLOW, key)
        return _BrokenStream(lease) if lease is not None and is_broken else lease

    def pin(self, keys: Sequence[ChunkKey], *, seconds: float, deadline_s: float) -> list[bool]:
        """As the inner client, without the keys that miss."""
        pinned = self.inner.pin(keys, seconds=seconds, deadline_s=deadline_s)
        return [yes and not self.has_fault(Fault.MISS, key) for yes, key in zip(pinned, keys, strict=True)]

    def unpin(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> None:
        """As the inner client."""
        self.inner.unpin(keys, deadline_s=deadline_s)

    def reserve(self, key: ChunkKey, meta: ChunkMeta, num_bytes: int, *, deadline_s: float) -> WriteLease | None:
        """As the inner client, refused or doomed for the keys that fail."""
        if self.has_fault(Fault.REFUSED, key):
            return None
        lease = self.inner.reserve(key, meta, num_bytes, deadline_s=deadline_s)
        return _DoomedWrite(lease) if lease is not None and self.has_fault(Fault.UNCOMMITTED, key) else lease

    def close(self) -> None:
        """Close the inner client and wake slow reads."""
        self._closed.set()
        self.inner.close()

    def _left_s(self, key: ChunkKey, deadline_s: float) -> float | None:
        """Seconds left of a read of one key, after its slowness; None if it comes to nothing."""
        if self.has_fault(Fault.MISS, key) or self.has_fault(Fault.LOST, key):
            return None
        if not self.has_fault(Fault.SLOW, key):
            return deadline_s
        self._closed.wait(min(self.delay_s, deadline_s))
        return deadline_s - self.delay_s if self.delay_s < deadline_s else None


class _BrokenStream(ReleasedAtExit):
    """A stream that breaks off half way: early bytes are there, and never become true."""

    def __init__(self, inner: StreamLease) -> None:
        self._inner = inner

    @property
    def key(self) -> ChunkKey:
        return self._inner.key

    @property
    def meta(self) -> ChunkMeta | None:
        return self._inner.meta

    @property
    def payload(self) -> memoryview:
        return self._inner.payload

    def wait_bytes(self, num_bytes: int, *, deadline_s: float) -> int:
        half = len(self._inner.payload) // 2
        return min(half, self._inner.wait_bytes(min(num_bytes, half), deadline_s=deadline_s))

    def finish(self, *, deadline_s: float) -> bool:
        return False

    def release(self) -> None:
        self._inner.release()


class _DoomedWrite:
    """A write whose commit fails."""

    def __init__(self, inner: WriteLease) -> None:
        self._inner = inner

    @property
    def key(self) -> ChunkKey:
        return self._inner.key

    @property
    def payload(self) -> memoryview:
        return self._inner.payload

    def commit(self, num_bytes: int | None = None) -> bool:
        self._inner.abort()
        return False

    def abort(self) -> None:
        self._inner.abort()
