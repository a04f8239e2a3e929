"""What a store and its clients say over the unix socket: bounded frames, a mutual proof, requests and replies.

Covers: messages, their encoding, the proof of the cluster's secret.
Does not cover: sockets (`kvstore.server`, `kvstore.connection`), meaning (`kvstore.desk`).

A frame is its length (4 bytes, little-endian) and one msgpack message. A connection starts like this:

    store  -> Challenge(nonce)
    client -> Proof(name, nonce, HMAC over both nonces)
    store  -> Welcome(epoch, HMAC over both nonces), with the arena's descriptor

Requests carry a number that their reply repeats; replies come in any order. Messages without a number have no reply.
"""

import hashlib
import hmac
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Final

import msgspec

from cluster.errors import DataError
from kvstore.interfaces import ChunkMeta, TierStat
from kvstore.keys import KEY_BYTES

PROTOCOL_VERSION: Final = 1
MAX_FRAME_BYTES: Final = 1 << 20
"""Above 16,384 keys in one request."""
MAX_HANDSHAKE_BYTES: Final = 1 << 10
NONCE_BYTES: Final = 16
LENGTH_BYTES: Final = 4

KeyBytes = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
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
    arena_bytes: int
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
    payload_checksum: int


class Drop(_Message, frozen=True):
    """Forget chunks in all tiers."""

    number: int
    keys: list[KeyBytes]


class Stat(_Message, frozen=True):
    """How much is where?"""

    number: int


class Release(_Message, frozen=True):
    """Read leases are over. No reply."""

    leases: list[int]


class Abort(_Message, frozen=True):
    """A reservation is over. No reply."""

    lease: int


class ReportCorrupt(_Message, frozen=True):
    """The leased record is damaged in the arena; ends the lease. No reply."""

    lease: int


Request = Lookup | Wait | Read | Reserve | Commit | Drop | Stat | Release | Abort | ReportCorrupt


class Refusal(StrEnum):
    """Why there is no reservation."""

    HELD = "held"
    WRITING = "writing"
    FULL = "full"
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


class Granted(_Message, frozen=True):
    """A grant, or nothing, per key asked for."""

    number: int
    grants: list[Grant | None]


class Reserved(_Message, frozen=True):
    """Room in the arena, or why not."""

    number: int
    grant: Grant | None
    refusal: Refusal | None = None


class Done(_Message, frozen=True):
    """A commit was taken; a drop forgot at least one chunk."""

    number: int
    ok: bool


class Stats(_Message, frozen=True):
    """Counts now."""

    number: int
    tiers: dict[str, TierStat]
    sessions: int
    read_leases: int
    reservations: int
    write_behind_chunks: int


Reply = Held | Granted | Reserved | Done | Stats

_UNDECODABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for hostile bytes: text that is not UTF-8 is no `DecodeError`."""
_ENCODER: Final = msgspec.msgpack.Encoder()
_HELLO_DECODER: Final = msgspec.msgpack.Decoder(Challenge | Proof | Welcome)
_REQUEST_DECODER: Final = msgspec.msgpack.Decoder(Request)
_REPLY_DECODER: Final = msgspec.msgpack.Decoder(Reply)


def encode(message: msgspec.Struct) -> bytes:
    """One message as a frame."""
    body = _ENCODER.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def decode_hello(body: bytes) -> Challenge | Proof | Welcome:
    """A handshake message.

    Raises:
        ProtocolError: Something else.
    """
    try:
        message: Challenge | Proof | Welcome = _HELLO_DECODER.decode(body)
    except _UNDECODABLE as error:
        raise ProtocolError(f"not a handshake message: {error}") from error
    return message


def decode_request(body: bytes) -> Request:
    """A client's message.

    Raises:
        ProtocolError: Something else.
    """
    try:
        message: Request = _REQUEST_DECODER.decode(body)
    except _UNDECODABLE as error:
        raise ProtocolError(f"not a request: {error}") from error
    return message


def decode_reply(body: bytes) -> Reply:
    """A store's message.

    Raises:
        ProtocolError: Something else.
    """
    try:
        message: Reply = _REPLY_DECODER.decode(body)
    except _UNDECODABLE as error:
        raise ProtocolError(f"not a reply: {error}") from error
    return message


def client_mac(secret: bytes, *, challenge: bytes, nonce: bytes, client_name: str) -> bytes:
    """The client's proof."""
    return hmac.new(secret, b"learnonce client 1" + challenge + nonce + client_name.encode(), hashlib.sha256).digest()


def store_mac(secret: bytes, *, challenge: bytes, nonce: bytes, epoch: str) -> bytes:
    """The store's proof."""
    return hmac.new(secret, b"learnonce store 1" + challenge + nonce + epoch.encode(), hashlib.sha256).digest()


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
