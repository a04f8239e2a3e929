"""What the NIXL data path says: between a store and its sidecar, and between two stores about staged records.

Covers: control messages as bounded msgpack frames, the signed address of an agent, the signed handle of an offer, the
head of a staged record. Does not cover: who sends them (`kvstore.transport.nixl_service`,
`kvstore.transport.nixl_sidecar`), the control plane that carries addresses and handles (`kvstore.peers`).

NIXL believes whatever metadata it is given, and a forged one reads any memory of the process it points at. So an
address carries a MAC under the cluster's secret, and nothing unsigned reaches NIXL. A handle is signed as well.
"""

import hashlib
import hmac
import struct
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from cluster.errors import InvariantError
from kvstore.transport import MAX_HANDLE_BYTES, OfferRefusedError, PeerGoneError
from kvstore.untrusted import UNDECODABLE, decoder_of

MAX_FRAME_BYTES: Final = 64 << 10
"""Largest control message; metadata of an agent is 0.3 to 0.5 KB with TCP (measured)."""
MAX_METADATA_BYTES: Final = MAX_FRAME_BYTES - (4 << 10)
"""Of one agent; the rest of a frame is for names."""
TOKEN_BYTES: Final = 16
HEAD: Final = struct.Struct("<8s16sQ32x")
"""In front of a staged record: magic, token of the offer, length of the record."""
MAGIC: Final = b"\x89LOSTG\r\n"
STILL_S: Final = 0.1
"""A staged record keeps its bytes this long after its head was wiped."""
_MAC_BYTES: Final = 32
_ADDRESS_PURPOSE: Final = b"learnonce nixl address 1"
_HANDLE_PURPOSE: Final = b"learnonce nixl handle 1"


class NixlUnavailableError(PeerGoneError):
    """This node's own sidecar is away, or has no room; the peer is not to blame."""


class SidecarFrameError(InvariantError):
    """The two halves of one store do not understand each other."""


# Between two stores.


class Address(msgspec.Struct, frozen=True, array_like=True):
    """One life of one store's NIXL agent."""

    node_id: str
    epoch: str
    generation: int
    """Counts the agents of one life of the store."""
    base: int
    """Where the staging memory begins in the sidecar's address space."""
    size_bytes: int
    metadata: bytes
    """What NIXL made for `loadRemoteMD`."""

    @property
    def agent(self) -> str:
        """The agent's name: never used twice."""
        return agent_name(self.node_id, epoch=self.epoch, generation=self.generation)


class Handle(msgspec.Struct, frozen=True, array_like=True):
    """Where an offered record is."""

    agent: str
    head_address: int
    """Of the record's head, in the sidecar's address space; the record follows it."""
    stored_bytes: int
    token: bytes
    address: bytes = b""
    """The agent's signed address where it fits, so that pullers follow a new agent without asking."""


Signed = TypeVar("Signed", Address, Handle)


def agent_name(node_id: str, *, epoch: str, generation: int) -> str:
    """The name of one agent.

    Example:
        >>> agent_name("node-a", epoch="51f0", generation=3)
        'node-a-51f0-3'
    """
    return f"{node_id}-{epoch}-{generation}"


def encode_address(address: Address, *, secret: bytes) -> bytes:
    """An address for the control plane."""
    return _sign(msgspec.msgpack.encode(address), secret, _ADDRESS_PURPOSE)


def decode_address(data: bytes, *, secret: bytes) -> Address:
    """Believe or refuse an address.

    Raises:
        OfferRefusedError: Forged, cut, changed, signed with another secret, or too long for this node's sidecar.
    """
    address = _open(data, Address, secret, _ADDRESS_PURPOSE)
    if len(msgspec.msgpack.encode(AddPeer(address.agent, address.metadata))) > MAX_FRAME_BYTES:
        raise OfferRefusedError(
            f"the address of a NIXL agent has {len(data)} bytes; a sidecar takes at most {MAX_FRAME_BYTES}"
        )
    if address.base <= 0 or address.size_bytes <= 0 or not address.metadata:
        raise OfferRefusedError(f"the address of NIXL agent {address.agent} describes no memory")
    return address


def encode_handle(handle: Handle, *, secret: bytes) -> bytes:
    """A handle for an `Offer`: at most `MAX_HANDLE_BYTES`, if need be without the agent's address."""
    data = _sign(msgspec.msgpack.encode(handle), secret, _HANDLE_PURPOSE)
    if len(data) > MAX_HANDLE_BYTES and handle.address:
        return encode_handle(msgspec.structs.replace(handle, address=b""), secret=secret)
    return data


def decode_handle(data: bytes, *, secret: bytes) -> Handle:
    """Believe or refuse a handle.

    Raises:
        OfferRefusedError: Forged, cut, changed, too long, or signed with another secret.
    """
    if len(data) > MAX_HANDLE_BYTES:
        raise OfferRefusedError(f"a handle has at most {MAX_HANDLE_BYTES} bytes, this one {len(data)}")
    handle = _open(data, Handle, secret, _HANDLE_PURPOSE)
    if len(handle.token) != TOKEN_BYTES or handle.head_address <= 0 or handle.stored_bytes <= 0:
        raise OfferRefusedError(f"the handle names no record of NIXL agent {handle.agent}")
    return handle


def is_head_of(head: bytes, handle: Handle) -> bool:
    """Whether what was read in front of the record is what the handle promises."""
    magic, token, stored_bytes = HEAD.unpack(head)
    is_token = hmac.compare_digest(token, handle.token)
    return is_token and (magic, stored_bytes) == (MAGIC, handle.stored_bytes)


def _sign(body: bytes, secret: bytes, purpose: bytes) -> bytes:
    return hmac.new(secret, purpose + body, hashlib.sha256).digest() + body


def _open(data: bytes, kind: type[Signed], secret: bytes, purpose: bytes) -> Signed:
    mac, body = data[:_MAC_BYTES], data[_MAC_BYTES:]
    if not hmac.compare_digest(mac, hmac.new(secret, purpose + body, hashlib.sha256).digest()):
        raise OfferRefusedError(f"{kind.__name__.lower()} of {len(data)} bytes is not signed with the cluster's secret")
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except UNDECODABLE as error:
        raise OfferRefusedError(f"signed, but no {kind.__name__.lower()} of this version: {error}") from error


# Between a store and its sidecar.


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What a sidecar is started with, as JSON on its command line: no secrets in it."""

    agent: str
    parent_pid: int
    control_fd: int
    staging_fd: int
    staging_bytes: int
    landing_bytes: int
    """The first bytes of the staging memory: what peers send lands there. Offered records lie behind."""
    progress_delay_us: int


class AddPeer(msgspec.Struct, frozen=True, tag="add_peer"):
    """Make a peer's agent known; failures come out at the first read from it."""

    agent: str
    metadata: bytes


class Read(msgspec.Struct, frozen=True, tag="read"):
    """Copy a peer's memory to the landing part of the staging memory."""

    number: int
    agent: str
    remote_address: int
    offset: int
    """In the staging memory."""
    num_bytes: int


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Show a sign of life."""

    number: int


Order = AddPeer | Read | Ping


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The agent is up."""

    base: int
    metadata: bytes
    progress_delay_us: int
    """As the agent's configuration says after it was made."""
    library: str
    """Module that the agent comes from."""


class Unusable(msgspec.Struct, frozen=True, tag="unusable"):
    """There will be no agent; the process ends."""

    reason: str
    is_final: bool
    """Whether another try is pointless: the library is missing."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """All bytes of a read are in place, and nothing of it is under way any more."""

    number: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A read came to nothing."""

    number: int
    reason: str
    was_posted: bool
    """Whether bytes may still land."""


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """The answer to a `Ping`."""

    number: int


Report = Ready | Unusable | Done | Failed | Pong


def encode(message: Order | Report) -> bytes:
    """One message as one packet of a `SOCK_SEQPACKET` socket.

    Raises:
        SidecarFrameError: Larger than `MAX_FRAME_BYTES`.
    """
    frame = msgspec.msgpack.encode(message)
    if len(frame) > MAX_FRAME_BYTES:
        raise SidecarFrameError(f"a control message has at most {MAX_FRAME_BYTES} bytes, this one {len(frame)}")
    return frame


decode_order: Final[Callable[[bytes], Order]] = decoder_of(
    Order, what="the store sent what is no order", refusal=SidecarFrameError
)
"""A message of the store, or `SidecarFrameError`."""
decode_report: Final[Callable[[bytes], Report]] = decoder_of(
    Report, what="the sidecar sent what is no report", refusal=SidecarFrameError
)
"""A message of the sidecar, or `SidecarFrameError`."""
