"""How a record gets from one node's arena into another's: one interface, three data paths.

Covers: the protocols, what an offer is, how failures are told apart. Does not cover: who offers what to whom
(`kvstore.peers`), which path a pair of nodes takes (`kvstore.transport.negotiation`), the paths themselves.

A transfer has two planes. On the *control plane* (`kvstore.peers`: authenticated, one connection per pair of nodes)
the puller leases a chunk and asks for an `Offer`; on the *data plane* it shows the offer's handle and gets exactly
the bytes that were leased. A handle is good for one lease, one length, one peer and a limited time.

Whatever fails, the puller recomputes or asks another node: errors say only who is to blame, for the breakers.
"""

from typing import Protocol

import msgspec

from cluster.errors import CallerError, DataError, UnavailableError
from kvstore.interfaces import OnBytes


class PeerGoneError(UnavailableError):
    """The peer did not answer, answered too late, or went away in the middle of a transfer."""


class OfferRefusedError(DataError):
    """The peer is well, but does not know the handle: forged, used up, expired, or of another life of the store."""


class TransferCorruptError(DataError):
    """What arrived cannot be what was offered."""


class LandingError(CallerError):
    """A landing buffer that is not as long as the record."""


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """Permission to copy one record from a peer."""

    transport: str
    """Name of the data path that the handle is for."""
    handle: bytes
    """What the data plane wants to see; opaque to everybody else. At most `MAX_HANDLE_BYTES`."""
    stored_bytes: int
    """Length of the record: what the puller must have room for."""


MAX_HANDLE_BYTES = 1 << 12


class Transport(Protocol):
    """The puller's end of one data path to one life of one peer. Safe for several threads.

    Guarantees:
        `pull` returns only when all `stored_bytes` bytes have arrived, in order of their offsets.
        Once `pull` has returned or raised, nothing writes to `into` any more, whatever the peer does later.
        No call outlives `stop_s` by more than scheduling delay, also when the peer is killed, frozen or cut off.
    """

    @property
    def name(self) -> str:
        """Short closed-set name: "shm", "tcp", "nixl"."""
        ...

    def pull(self, offer: Offer, into: memoryview, *, stop_s: float, on_bytes: OnBytes | None = None) -> None:
        """Copy one record.

        Args:
            offer: From this peer's control plane.
            into: Exactly `offer.stored_bytes` writable bytes.
            stop_s: Monotonic time by which it is to be done.
            on_bytes: Told of the bytes in place so far, so that early layers can be used while later ones arrive.

        Raises:
            PeerGoneError: Dead, frozen, cut off, or too slow.
            OfferRefusedError: The peer does not honour the handle.
            TransferCorruptError: The peer broke the data path's protocol.
        """
        ...

    def close(self) -> None:
        """End transfers under way (they raise) and release everything. Repeating it is harmless."""
        ...


class TransportServer(Protocol):
    """The holder's end of one data path, for all of its peers. Safe for several threads."""

    @property
    def name(self) -> str:
        """As `Transport.name`."""
        ...

    @property
    def address(self) -> bytes:
        """What a puller needs to connect, sent over the control plane only (it may be as good as a key)."""
        ...

    def offer(self, record: memoryview, *, peer: str, lifetime_s: float) -> Offer | None:
        """Let `peer` copy `record` (pinned by the caller until `revoke`) once or several times; None: no room now."""
        ...

    def revoke(self, handle: bytes) -> None:
        """End an offer. Afterwards the server reads `record` no more; unknown handles are ignored."""
        ...

    def close(self) -> None:
        """Stop serving and release everything. Repeating it is harmless."""
        ...
