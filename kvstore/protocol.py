"""What a store and its clients say over the unix socket: bounded frames, a mutual proof, requests and replies.

Covers: messages, their encoding, the proof of the cluster's secret.
Does not cover: sockets (`kvstore.server`, `kvstore.connection`), what requests do (`kvstore.requests`, `kvstore.desk`).

A frame is its length (4 bytes, little-endian) and one msgpack message. A connection starts like this:

    store  -> Challenge(nonce)
    client -> Proof(name, nonce, HMAC over both nonces)
    store  -> Welcome(epoch, HMAC over both nonces), with the arena's descriptor

Requests carry a number that their reply repeats; replies come in any order. Messages without a number have no reply,
and answer none: `Progress` tells how far a streamed record has come.
"""

import hashlib
import hmac
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Annotated, Final

import msgspec

from cluster.errors import DataError
from kvstore.interfaces import CatalogEntry, ChunkMeta, TierStat
from kvstore.keys import KEY_BYTES
from kvstore.untrusted import decoder_of

PROTOCOL_VERSION: Final = 2
MAX_FRAME_BYTES: Final = 1 << 20
"""Above 16,384 keys in one request."""
MAX_HANDSHAKE_BYTES: Final = 1 << 10
NONCE_BYTES: Final = 16
LENGTH_BYTES: Final = 4
MAX_TIMEOUT_S: Final = 86_400.0
"""Longest time for which a store keeps a request waiting."""

MAX_ARENA_BYTES: Final = 1 << 48
"""Above what a process can map."""

KeyBytes = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=MAX_TIMEOUT_S)]
ArenaBytes = Annotated[int, msgspec.Meta(ge=0, le=MAX_ARENA_BYTES)]
Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]


class ProtocolError(DataError):
    """The other side sent what this protocol does not allow: the connection ends."""


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


class Challenge(_Message, frozen=True):
    """The store's first message."""

    version: int
    nonce: Nonce


class Proof(_Message, frozen=True):
    """The client knows the secret."""

    client_name: Annotated[str, msgspec.Meta(max_length=200)]
    nonce: Nonce
    mac: bytes


class Welcome(_Message, frozen=True):
    """The store knows the secret too; the arena's descriptor comes with this message."""

    mac: bytes
    epoch: str
    arena_bytes: ArenaBytes
    max_keys: int
    """Keys in one request."""


class Lookup(_Message, frozen=True):
    """Which keys can be read now?"""

    number: int
    keys: list[KeyBytes]


class Wait(_Message, frozen=True):
    """Answer when all keys can be read, or after `timeout_s`."""

    number: int
    keys: list[KeyBytes]
    timeout_s: Seconds


class Read(_Message, frozen=True):
    """Pin what can be read within `timeout_s`."""

    number: int
    keys: list[KeyBytes]
    timeout_s: Seconds


class Stream(_Message, frozen=True):
    """Lease one chunk, though it may still be arriving; `Progress` follows then. Waits for a write under way."""

    number: int
    key: KeyBytes
    timeout_s: Seconds


class Reserve(_Message, frozen=True):
    """Room for a record of one chunk."""

    number: int
    key: KeyBytes
    meta: ChunkMeta
    payload_bytes: Annotated[int, msgspec.Meta(gt=0)]


class Commit(_Message, frozen=True):
    """Header and payload are in the arena."""

    number: int
    lease: int
    payload_bytes: Annotated[int, msgspec.Meta(gt=0)]
    """At most what was reserved; the rest is given back."""
    payload_checksum: int


class Drop(_Message, frozen=True):
    """Forget chunks in all tiers."""

    number: int
    keys: list[KeyBytes]


class Pin(_Message, frozen=True):
    """Keep chunks from being evicted for so long."""

    number: int
    keys: list[KeyBytes]
    seconds: Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class Unpin(_Message, frozen=True):
    """End pins."""

    number: int
    keys: list[KeyBytes]


class Catalog(_Message, frozen=True):
    """The next page of what is held. Page 0 starts over; a connection reads one catalogue at a time."""

    number: int
    page: Annotated[int, msgspec.Meta(ge=0)]


class Verify(_Message, frozen=True):
    """Read records of lower tiers again, and drop those that are damaged."""

    number: int
    keys: list[KeyBytes]


class Gc(_Message, frozen=True):
    """Drop what is too old, what is over quota, and what crashes left behind."""

    number: int


class Stat(_Message, frozen=True):
    """How much is where?"""

    number: int


class Redeem(_Message, frozen=True):
    """Where is the record that a store of this machine was offered over the port between stores?"""

    number: int
    handle: Annotated[bytes, msgspec.Meta(max_length=4096)]


class Release(_Message, frozen=True):
    """Read leases are over. No reply."""

    leases: list[int]


class Abort(_Message, frozen=True):
    """A reservation is over. No reply."""

    lease: int


class ReportCorrupt(_Message, frozen=True):
    """The leased record is damaged in the arena; ends the lease. No reply."""

    lease: int


Request = (
    Lookup
    | Wait
    | Read
    | Stream
    | Reserve
    | Commit
    | Drop
    | Pin
    | Unpin
    | Catalog
    | Verify
    | Gc
    | Stat
    | Redeem
    | Release
    | Abort
    | ReportCorrupt
)


class Refusal(StrEnum):
    """Why there is no reservation."""

    HELD = "held"
    WRITING = "writing"
    FULL = "full"
    QUOTA = "quota"
    """The tenant holds all that it may, and nothing of it can be evicted."""
    REFUSED = "refused"
    """Too many leases, or a chunk that no record can hold."""


class Held(_Message, frozen=True):
    """One byte per key asked for: 1 if it can be read."""

    number: int
    flags: bytes


class Grant(msgspec.Struct, frozen=True, array_like=True):
    """A lease on a record in the arena."""

    lease: int
    offset: int
    stored_bytes: int


class Place(msgspec.Struct, frozen=True, array_like=True):
    """A record in the arena."""

    offset: int
    stored_bytes: int


class Redeemed(_Message, frozen=True):
    """Where a handle's record lies and is pinned now, or nothing."""

    number: int
    place: Place | None


class Granted(_Message, frozen=True):
    """A grant, or nothing, per key asked for."""

    number: int
    grants: list[Grant | None]


class Streaming(_Message, frozen=True):
    """A lease on a record that may still be arriving, or nothing."""

    number: int
    grant: Grant | None
    payload_bytes: int = 0
    done_bytes: int = 0
    """Bytes of the record that are in place, from its start."""
    is_over: bool = False
    """Nothing more arrives: no `Progress` follows."""


class Progress(_Message, frozen=True):
    """More bytes of a streamed record are in place. Sent without being asked for."""

    lease: int
    done_bytes: int
    is_over: bool
    is_whole: bool
    """Whether it ended well; the reader still compares the checksum."""


class Reserved(_Message, frozen=True):
    """Room in the arena, or why not."""

    number: int
    grant: Grant | None
    refusal: Refusal | None = None


class Done(_Message, frozen=True):
    """A commit was taken; a drop forgot at least one chunk; pins ended."""

    number: int
    ok: bool


class PeerStat(msgspec.Struct, frozen=True, kw_only=True):
    """Another node's store, as this one sees it."""

    is_up: bool
    """Whether its chunks count as readable."""
    transport: str
    """Data path of the pair; "" for none."""
    reason: str
    """Why this path, or what is wrong, in words."""
    chunks: int
    """Chunks that it is known to hold."""
    transfers: int
    """Transfers from it that are under way."""


class CatalogPage(_Message, frozen=True):
    """Some chunks; there are more unless `is_last`."""

    number: int
    entries: list[CatalogEntry]
    is_last: bool


class Verified(_Message, frozen=True):
    """What came of reading records again."""

    number: int
    good: int
    bad: int
    """Damaged, and dropped."""
    unread: int
    """The medium did not answer, or the record was sealed with a store key that is not here."""


class Collected(_Message, frozen=True):
    """What a collection dropped."""

    number: int
    expired: int
    over_quota: int
    leftovers: int
    """Temporary files and unfinished uploads."""


class Stats(_Message, frozen=True):
    """Counts now."""

    number: int
    tiers: dict[str, TierStat]
    sessions: int
    read_leases: int
    reservations: int
    write_behind_chunks: int
    hits: dict[str, int] = {}
    """Since the start: reads granted from the arena ("host"), and chunks fetched into it by where they came from."""
    host_bytes_by_tenant: dict[str, int] = {}
    """Bytes in the arena of the tenants that `quota_bytes_by_tenant` names."""
    quota_bytes_by_tenant: dict[str, int] = {}
    default_quota_bytes: int | None = None
    ttl_s: float | None = None
    peers: dict[str, PeerStat] = {}
    """The other nodes' stores, by node."""


NumberedReply = Held | Granted | Streaming | Reserved | Done | CatalogPage | Verified | Collected | Stats | Redeemed
Reply = NumberedReply | Progress

_ENCODER: Final = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """One message as a frame."""
    body = _ENCODER.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


decode_hello: Final[Callable[[bytes], Challenge | Proof | Welcome]] = decoder_of(
    Challenge | Proof | Welcome, what="not a handshake message", refusal=ProtocolError
)
"""A handshake message, or `ProtocolError`."""
decode_request: Final[Callable[[bytes], Request]] = decoder_of(Request, what="not a request", refusal=ProtocolError)
"""A client's message, or `ProtocolError`."""
decode_reply: Final[Callable[[bytes], Reply]] = decoder_of(Reply, what="not a reply", refusal=ProtocolError)
"""A store's message, or `ProtocolError`."""


def hello_mac(secret: bytes, *, side: str, challenge: bytes, nonce: bytes, name: str) -> bytes:
    """One side's proof; `side` keeps it from being worth anything as another's, or on another port."""
    return hmac.new(secret, f"learnonce {side} 1".encode() + challenge + nonce + name.encode(), hashlib.sha256).digest()


def client_mac(secret: bytes, *, challenge: bytes, nonce: bytes, client_name: str) -> bytes:
    """The client's proof."""
    return hello_mac(secret, side="client", challenge=challenge, nonce=nonce, name=client_name)


def store_mac(secret: bytes, *, challenge: bytes, nonce: bytes, epoch: str) -> bytes:
    """The store's proof."""
    return hello_mac(secret, side="store", challenge=challenge, nonce=nonce, name=epoch)


class FrameReader:
    """Cuts a byte stream into frames; holds at most one unfinished frame.

    Example:
        >>> reader = FrameReader(max_bytes=8)
        >>> list(reader.feed(bytes([2, 0, 0, 0, 65]))), list(reader.feed(bytes([66, 1, 0, 0, 0, 67])))
        ([], [b'AB', b'C'])
    """

    def __init__(self, *, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that `data` completes.

        Raises:
            ProtocolError: A frame announces more than `max_bytes`.
        """
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= LENGTH_BYTES:
            length = int.from_bytes(self._buffer[start : start + LENGTH_BYTES], "little")
            if length > self._max_bytes:
                raise ProtocolError(f"frame of {length} bytes, at most {self._max_bytes} are allowed")
            stop = start + LENGTH_BYTES + length
            if len(self._buffer) < stop:
                break
            yield bytes(self._buffer[start + LENGTH_BYTES : stop])
            start = stop
        del self._buffer[:start]
