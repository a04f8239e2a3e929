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

from collections.abc import Callable
from typing import Annotated, Final

import msgspec

from kvstore.protocol import KeyBytes, ProtocolError, Release, Seconds, hello_mac
from kvstore.transport import Offer
from kvstore.transport.negotiation import Reach
from kvstore.untrusted import decoder_of

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

decode_peer_request: Final[Callable[[bytes], PeerRequest]] = decoder_of(
    PeerRequest, what="not a request between stores", refusal=ProtocolError
)
"""A puller's message, or `ProtocolError`."""
decode_peer_reply: Final[Callable[[bytes], PeerReply]] = decoder_of(
    PeerReply, what="not a reply between stores", refusal=ProtocolError
)
"""A holder's message, or `ProtocolError`."""


def puller_mac(secret: bytes, *, challenge: bytes, nonce: bytes, node_id: str) -> bytes:
    """The connecting store's proof."""
    return hello_mac(secret, side="puller", challenge=challenge, nonce=nonce, name=node_id)


def holder_mac(secret: bytes, *, challenge: bytes, nonce: bytes, epoch: str) -> bytes:
    """The listening store's proof."""
    return hello_mac(secret, side="holder", challenge=challenge, nonce=nonce, name=epoch)
