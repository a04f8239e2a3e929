"""The seams of the store: a new tier or client implements one of these and inherits its contract suite.

Covers: protocols and the small values that cross them. Contract suites: `kvstore.testing`.
Does not cover: implementations, codecs (`kvstore.codecs`), transports between nodes (`kvstore.transport`).

Every failure below has the same meaning for a caller: the chunk is not there, compute it. So reads return None, and
writes return False; the implementation counts why.
"""

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import msgspec

from cluster.errors import CallerError
from kvstore.keys import ChunkKey

if TYPE_CHECKING:
    from kvstore.container import Header


class BufferUnusableError(CallerError):
    """Memory that a chunk cannot be copied to: read-only, or not contiguous."""


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
    tenant: str = ""
    """Whose bytes these are, for quotas and for keys at rest; "" where requests carry no `cache_salt`."""
    learned_unix_s: float = 0.0
    """When it was computed; 0 where nobody said."""
    profile: str = ""
    """Id of the profile (`kvstore.codecs.profile`) that the payload cannot be decoded without; "" where none is."""

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Canonical shape `[layer, K/V, token, head, dim]` of the decoded payload."""
        return (self.num_layers, 2, self.num_tokens, self.num_kv_heads, self.head_dim)


class ReleasedAtExit:
    """The `with` of what has a `release`."""

    def release(self) -> None:
        """See the subclass."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exit_reason: object) -> None:
        self.release()


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

    def commit(self, num_bytes: int | None = None) -> bool:
        """Make the chunk readable and announce it.

        Args:
            num_bytes: Bytes that were written, from the start, where that is less than was reserved: an encoder does
                not know before. The rest is given back.

        Returns:
            False if the store did not take it (it went away, or the lease had expired): nothing is stored.

        Raises:
            CallerError: `num_bytes` is not between 1 and what was reserved; the write is aborted.
        """
        ...

    def abort(self) -> None:
        """Give the room back. Repeating it, or calling it after `commit`, is harmless."""
        ...


class StreamLease(Protocol):
    """One chunk that stays leased while it arrives. Use as a context manager.

    Early layers of a chunk come first, and can be used before the last ones are there. But *only `finish` makes them
    true*: until then nothing has compared the checksum, and the source may break off. Whoever used early bytes throws
    the result away when `finish` says no.

    Memory under the lease is not reused before `release`, also when the source breaks off.
    """

    @property
    def key(self) -> ChunkKey:
        """The chunk's key."""
        ...

    @property
    def meta(self) -> ChunkMeta | None:
        """How to read the payload; None before the first bytes have arrived."""
        ...

    @property
    def payload(self) -> memoryview:
        """Read-only bytes of the payload's whole length; those that have not arrived mean nothing."""
        ...

    def wait_bytes(self, num_bytes: int, *, deadline_s: float) -> int:
        """Wait until the first `num_bytes` of the payload are in place, or as long as more can come.

        Returns:
            How many bytes are in place: fewer than `num_bytes` if the time is over, or the source broke off.
        """
        ...

    def finish(self, *, deadline_s: float) -> bool:
        """Wait for the whole chunk and compare its checksum: only then is any of it true.

        False: late, broken off or corrupt; a miss. After a late one, a later call may succeed.
        """
        ...

    def release(self) -> None:
        """Give the lease back; the payload must not be touched afterwards. Repeating it is harmless."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


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

    def read_into(self, key: ChunkKey, out: memoryview, *, deadline_s: float) -> ChunkMeta | None:
        """Copy one payload to the caller's memory, verifying the copy; None if it is missing, corrupt or late.

        `out` has exactly the payload's length (another length is a miss); after None its contents mean nothing.
        Faster than `read` and a copy: the checksum is taken over the copied bytes while they are in the cache.

        Raises:
            BufferUnusableError: `out` cannot be written to, or is not contiguous.
        """
        ...

    def stream(self, key: ChunkKey, *, deadline_s: float) -> StreamLease | None:
        """Lease a chunk at once, though it may still be arriving from a slower tier or another node; None: a miss.

        Where a write of the chunk is under way, the deadline includes waiting for its commit.
        """
        ...

    def reserve(self, key: ChunkKey, meta: ChunkMeta, num_bytes: int, *, deadline_s: float) -> WriteLease | None:
        """Room for a new chunk; None if it is held already, is being written by another, or there is no room.

        Room counts for `meta.tenant`: over its quota, its own chunks leave first.
        """
        ...

    def pin(self, keys: Sequence[ChunkKey], *, seconds: float, deadline_s: float) -> list[bool]:
        """Keep chunks from being evicted from this node for so long; which are.

        A pin outlives the client. It keeps no chunk from being dropped, corrupt, or too old. False: the node does not
        hold the chunk, or pins hold their share of its tiers already.
        """
        ...

    def unpin(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> None:
        """End pins, whoever made them; harmless without one."""
        ...

    def close(self) -> None:
        """Release everything and disconnect."""
        ...


class TierStat(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of one tier."""

    chunks: int
    bytes: int
    capacity_bytes: int | None
    """None: bounded by the medium only."""
    pinned_bytes: int = 0


class TierEntry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a tier knows about a record without reading it. Small: there is one per record."""

    payload_bytes: int
    """Of the plain record, as its header says in the arena."""
    stored_bytes: int
    """Room that it takes in this tier."""
    num_tokens: int
    """At least one."""
    base_position: int
    codec: str
    tenant: str = ""
    learned_unix_s: float = 0.0


OnBytes = Callable[[int], None]
"""Told how many bytes of a record are in place, from its start: never fewer than the time before."""


class Source(Protocol):
    """Where a record that is not in the arena can be fetched from: a lower tier, or the stores of other nodes.

    Guarantees:
        `read_into` returns a header only if the whole record of that key is in the view, header and padding included.
        After `read_into` returned or raised, nothing writes to the view any more.
    """

    @property
    def name(self) -> str:
        """Short closed-set name: "nvme", "object", "peer", ..."""
        ...

    def entry(self, key: ChunkKey) -> TierEntry | None:
        """What is known about a key; None if it is not here. A hint: cheap, no I/O, may be wrong."""
        ...

    def read_into(
        self, key: ChunkKey, view: memoryview, *, stop_s: float, on_bytes: OnBytes | None = None
    ) -> "Header | None":
        """Fill `view`, which has exactly the plain record's length, by monotonic time `stop_s`; None: a miss.

        Blocks; called on I/O threads.
        """
        ...


class Tier(Source, Protocol):
    """A bounded place for whole records (`kvstore.container`), by key.

    Guarantees:
        `get` returns the bytes that were put under that key, or None. Never other bytes, never part of them.
        A crash at any point loses at most records; it never makes one lie.
        `put` evicts by the tier's policy to stay within capacity; it never evicts a pinned record.
    """

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


class EvictionPolicy(Protocol):
    """In which order records leave one tier. Pure: no clock, no I/O, no randomness; not safe for several threads."""

    def admit(self, key: ChunkKey, entry: TierEntry) -> None:
        """A record came in, or replaced the one of its key."""
        ...

    def touch(self, key: ChunkKey) -> None:
        """A record was used; unknown keys are ignored."""
        ...

    def remove(self, key: ChunkKey, *, evicted: bool) -> None:
        """A record left: evicted for room, or dropped; unknown keys are ignored."""
        ...

    def victims(self) -> Iterator[ChunkKey]:
        """Records in the order in which they should leave. Lazy; changes nothing; every record comes up once."""
        ...


class CatalogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One chunk that a node holds, as `learnonce store ls` lists it."""

    key: bytes
    stored_bytes_by_tier: dict[str, int]
    """Room it takes, by the name of every tier that holds it."""
    num_tokens: int
    base_position: int
    codec: str
    tenant: str
    learned_unix_s: float
    uses: int
    """Reads on this node since it came to be known there in this life of the store."""
    idle_s: float | None
    """Seconds since its last read; None: not read in this life of the store."""
    is_pinned: bool
