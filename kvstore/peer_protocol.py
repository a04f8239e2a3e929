"""What the stores of two nodes say to each other: few bounded messages behind a mutual proof.

Covers: the control plane between nodes. Does not cover: bytes of chunks (`kvstore.transport`), events
(`kvstore.events`), sockets (`kvstore.peer_server`, `kvstore.peer_link`).

Frames and handshake are those of the unix socket (`kvstore.protocol`), with other words in the proofs, so that a proof
for one port is worth nothing on the other, and without a descriptor. Then the puller says:

    Describe()                      -> Described: which data paths the holder serves
    Lend(key, transport, timeout)   -> Lent: a lease and an offer for that path, or nothing
    Heartbeat()                     -> Alive; leases of a puller that is silent for `lease_s` end
    Release(leases)                 no reply

Nothing else is understood on this port: it can neither write, drop, nor list chunks.
"""

import hashlib
import hmac
from typing import Annotated, Final

import msgspec

from kvstore.protocol import KeyBytes, ProtocolError, Release, Seconds
from kvstore.transport import Offer
from kvstore.transport.negotiation import Reach

MAX_REQUEST_BYTES: Final = 16 << 10
"""Above every honest request: a release of a thousand leases."""


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


class Describe(_Message, frozen=True):
    """Which data paths do you serve?"""

    number: int


class Lend(_Message, frozen=True):
    """Pin one chunk of your own tiers and let me copy it; it may take `timeout_s` to bring it into memory."""

    number: int
    key: KeyBytes
    transport: Annotated[str, msgspec.Meta(max_length=16)]
    timeout_s: Seconds


class Heartbeat(_Message, frozen=True):
    """I am there; are you?"""

    number: int


PeerRequest = Describe | Lend | Heartbeat | Release


class Described(_Message, frozen=True):
    """The holder's data paths and its patience."""

    number: int
    reach: Reach
    lease_s: float
    """Seconds of silence after which leases end."""


class Lent(_Message, frozen=True):
    """A pinned record; no offer: a miss, or no room for more transfers."""

    number: int
    lease: int
    offer: Offer | None


class Alive(_Message, frozen=True):
    """The holder's loop runs."""

    number: int


PeerReply = Described | Lent | Alive

_UNDECODABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_REQUEST_DECODER: Final = msgspec.msgpack.Decoder(PeerRequest)
_REPLY_DECODER: Final = msgspec.msgpack.Decoder(PeerReply)


def decode_peer_request(body: bytes) -> PeerRequest:
    """A puller's message.

    Raises:
        ProtocolError: Something else.
    """
    try:
        message: PeerRequest = _REQUEST_DECODER.decode(body)
    except _UNDECODABLE as error:
        raise ProtocolError(f"not a request between stores: {error}") from error
    return message


def decode_peer_reply(body: bytes) -> PeerReply:
    """A holder's message.

    Raises:
        ProtocolError: Something else.
    """
    try:
        message: PeerReply = _REPLY_DECODER.decode(body)
    except _UNDECODABLE as error:
        raise ProtocolError(f"not a reply between stores: {error}") from error
    return message


def puller_mac(secret: bytes, *, challenge: bytes, nonce: bytes, node_id: str) -> bytes:
    """The connecting store's proof."""
    return hmac.new(secret, b"learnonce puller 1" + challenge + nonce + node_id.encode(), hashlib.sha256).digest()


def holder_mac(secret: bytes, *, challenge: bytes, nonce: bytes, epoch: str) -> bytes:
    """The listening store's proof."""
    return hmac.new(secret, b"learnonce holder 1" + challenge + nonce + epoch.encode(), hashlib.sha256).digest()
