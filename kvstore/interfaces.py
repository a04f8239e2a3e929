"""The seams of the store: a new tier or client implements one of these and inherits its contract suite.

Covers: protocols and the small values that cross them. Contract suites: `kvstore.testing`.
Does not cover: implementations, codecs (`kvstore.codecs`), transports between nodes (there is none yet).

Every failure below has the same meaning for a caller: the chunk is not there, compute it. So reads return None, and
writes return False; the implementation counts why.
"""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self

import msgspec

from kvstore.keys import ChunkKey


class ChunkMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What is needed to read a chunk's payload."""

    num_tokens: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    """Dtype of the decoded KV: "float32", "bfloat16" or "float16"."""
    base_position: int
    """Position of the first token when the KV was computed; K is rotated for it."""
    codec: str = "raw"

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Canonical shape `[layer, K/V, token, head, dim]` of the decoded payload."""
        return (self.num_layers, 2, self.num_tokens, self.num_kv_heads, self.head_dim)


class ReadLease(Protocol):
    """A chunk that stays readable until released. Use as a context manager."""

    @property
    def key(self) -> ChunkKey:
        """The chunk's key."""
        ...

    @property
    def meta(self) -> ChunkMeta:
        """How to read the payload."""
        ...

    @property
    def payload(self) -> memoryview:
        """Read-only bytes, verified against the record's checksum."""
        ...

    def release(self) -> None:
        """Give the lease back; the payload must not be touched afterwards. Repeating it is harmless."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class WriteLease(Protocol):
    """Room reserved for a chunk that nobody can read before `commit`."""

    @property
    def key(self) -> ChunkKey:
        """The chunk's key."""
        ...

    @property
    def payload(self) -> memoryview:
        """Writable bytes of exactly the reserved length."""
        ...

    def commit(self) -> bool:
        """Make the chunk readable and announce it.

        Returns:
            False if the store did not take it (it went away, or the lease had expired): nothing is stored.
        """
        ...

    def abort(self) -> None:
        """Give the room back. Repeating it, or calling it after `commit`, is harmless."""
        ...


class StoreClient(Protocol):
    """One process' way into its node's store. Safe for several threads.

    Guarantees:
        No call outlives its deadline by more than scheduling delay, whatever happens to the store process.
        A store that died is a miss; the client reconnects by itself at the next call.
        All leases of a process end when the process dies.
    """

    def lookup(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> list[bool]:
        """Which keys can be read now (any tier)."""
        ...

    def wait(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> list[bool]:
        """Block until every key can be read or `deadline_s` seconds have passed; which can be read."""
        ...

    def read(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> "list[ReadLease | None]":
        """Lease chunks for reading; None per key that is missing, corrupt, or late.

        Chunks whose write is under way are waited for within the deadline.
        """
        ...

    def reserve(self, key: ChunkKey, meta: ChunkMeta, num_bytes: int, *, deadline_s: float) -> WriteLease | None:
        """Room for a new chunk; None if it is held already, is being written by another, or there is no room."""
        ...

    def close(self) -> None:
        """Release everything and disconnect."""
        ...


class TierStat(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of one tier."""

    chunks: int
    bytes: int
    capacity_bytes: int
    pinned_bytes: int = 0


class Tier(Protocol):
    """A bounded place for whole records (`kvstore.container`), by key.

    Guarantees:
        `get` returns the bytes that were put under that key, or None. Never other bytes, never part of them.
        A crash at any point loses at most records; it never makes one lie.
        `put` evicts by the tier's policy to stay within capacity; it never evicts a pinned record.
    """

    @property
    def name(self) -> str:
        """Short closed-set name: "host", "file", ..."""
        ...

    def put(self, key: ChunkKey, record: memoryview) -> bool:
        """Store one record; False if it cannot be kept (full of pins, device error). Idempotent per key."""
        ...

    def get(self, key: ChunkKey) -> bytearray | None:
        """One record's bytes, verified, or None."""
        ...

    def contains(self, key: ChunkKey) -> bool:
        """Whether `get` would probably succeed. A hint: cheap, may be wrong after a device error."""
        ...

    def drop(self, key: ChunkKey) -> bool:
        """Forget one record; whether it was there."""
        ...

    def keys(self) -> Iterator[tuple[ChunkKey, int]]:
        """Keys held and their record bytes, in no order."""
        ...

    def stat(self) -> TierStat:
        """Counts now."""
        ...

    def close(self) -> None:
        """Release the tier's resources; what is durable stays."""
        ...
