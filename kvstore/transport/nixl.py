"""Records over NIXL: RDMA where there is any, TCP and shared memory through UCX elsewhere.

Covers: both ends of the data path, offering staged records and pulling them in pieces. Does not cover: the agent and
its process (`kvstore.transport.nixl_service`, `kvstore.transport.nixl_sidecar`).

The holder's end is passive: a peer's agent reads from the staging memory, nobody asks. So a handle says where, and an
offer ends by wiping the head in front of the record. NIXL itself authenticates nobody: whoever reaches its port and
knows an agent's metadata can read and write the sidecar's memory. Use it on a private network only.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kvstore.interfaces import OnBytes
from kvstore.transport import LandingError, Offer, OfferRefusedError, PeerGoneError
from kvstore.transport.nixl_life import Outcome, PendingRead, SidecarLife
from kvstore.transport.nixl_service import NixlService
from kvstore.transport.nixl_staging import MIN_PIECE_BYTES, PAGE_BYTES, LandingSlot
from kvstore.transport.nixl_wire import (
    HEAD,
    STILL_S,
    Address,
    Handle,
    NixlUnavailableError,
    decode_address,
    decode_handle,
    encode_address,
    encode_handle,
    is_head_of,
)

__all__ = ["NixlServer", "NixlService", "NixlTransport", "NixlUnavailableError"]

log = logging.getLogger(__name__)

NAME: Final = "nixl"
_PIECES_UNDER_WAY: Final = 3
"""One is copied out while the next two arrive: a fifth faster than with one (measured)."""
_TRUST_S: Final = STILL_S / 2
"""After this long the head is looked at again: what is behind it may have changed."""
_MAX_ADDRESSES: Final = 16


class NixlServer:
    """The holder's end. Implements `kvstore.transport.TransportServer`.

    Args:
        service: The store's; closing this end leaves it running.
    """

    def __init__(self, service: NixlService) -> None:
        self._service = service
        self._is_closed = False

    @property
    def name(self) -> str:
        """The data path's name."""
        return NAME

    @property
    def address(self) -> bytes:
        """The agent's signed metadata; empty while there is no agent (`NixlService.unavailable_reason` says why)."""
        return b"" if self._is_closed else self._service.address

    def offer(self, record: memoryview, *, peer: str, lifetime_s: float) -> Offer | None:
        """Copy a record to the staging memory; None if there is no room there, or no agent.

        Cost:
            One copy of the record. NIXL cannot tell peers apart, so whoever has the handle can use it.
        """
        data = record.cast("B")
        life = None if self._is_closed else self._service.current_or_none()
        if life is None or life.address is None:
            return None
        now_s = time.monotonic()
        with self._service.lock:
            staged = life.stage(len(data), expires_s=now_s + lifetime_s, now_s=now_s)
        if staged is None:
            return None
        try:
            life.staging.fill(staged, data)
        except NixlUnavailableError:
            return None
        self._service.publish(life, staged)
        handle = Handle(
            life.agent,
            life.address.base + life.staging.head_position(staged),
            len(data),
            staged.token,
            encode_address(life.address, secret=self._service.secret),
        )
        log.debug("nixl_offer peer=%s bytes=%d", peer, len(data))
        return Offer(NAME, encode_handle(handle, secret=self._service.secret), len(data))

    def revoke(self, handle: bytes) -> None:
        """Wipe the record's head: a peer that still reads finds that out, and its room is free a moment later."""
        try:
            token = decode_handle(handle, secret=self._service.secret).token
        except OfferRefusedError:
            return
        self._service.end_offer(token)

    def close(self) -> None:
        """Offer nothing any more, and end all offers."""
        self._is_closed = True
        self._service.end_offers()


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a record, as it is read."""

    start: int
    """In the record."""
    stop: int
    head_bytes: int
    """Of the record's head, read in front of it."""


class NixlTransport:
    """The puller's end, to one life of one peer. Implements `kvstore.transport.Transport`.

    Args:
        service: The store's; closing this end leaves it running.
        address: The peer's `NixlServer.address`.

    Raises:
        OfferRefusedError: The address is damaged, forged, or signed with another secret.
        NixlUnavailableError: The peer has no agent now.
    """

    def __init__(self, service: NixlService, *, address: bytes) -> None:
        if not address:
            raise NixlUnavailableError("the peer has no NIXL agent")
        self._service = service
        self._lock = threading.Lock()
        first = decode_address(address, secret=service.secret)
        self._peer = (first.node_id, first.epoch)
        self._addresses = {first.agent: first}
        """Newest last."""
        self._pending: set[PendingRead] = set()
        self._is_closed = False

    @property
    def name(self) -> str:
        """The data path's name."""
        return NAME

    def pull(self, offer: Offer, into: memoryview, *, stop_s: float, on_bytes: OnBytes | None = None) -> None:
        """Copy one record; see `kvstore.transport.Transport.pull`.

        Raises:
            LandingError: `into` is not as long as the offer says.
            PeerGoneError: As `NixlUnavailableError` where this node's own sidecar is to blame.
            OfferRefusedError: Forged, expired, revoked (also while it was read), or of another store.
        """
        if len(into) != offer.stored_bytes:
            raise LandingError(f"the record has {offer.stored_bytes} bytes, the landing buffer {len(into)}")
        if self._is_closed:
            raise NixlUnavailableError("this transport is closed")
        target = into.cast("B")
        handle = decode_handle(offer.handle, secret=self._service.secret)
        if handle.stored_bytes != offer.stored_bytes:
            raise OfferRefusedError(f"the handle is for {handle.stored_bytes} bytes, not for {offer.stored_bytes}")
        source = self._source_of(handle)
        life = self._service.current()
        _Pull(self, life, handle, source, target, stop_s).run(on_bytes)

    def close(self) -> None:
        """End the pulls under way; they raise. Repeating it is harmless."""
        with self._lock:
            self._is_closed = True
            pending = list(self._pending)
        for read in pending:
            with self._service.lock:
                read.end(Outcome.LOST, "the transport was closed")

    def _source_of(self, handle: Handle) -> Address:
        """The agent that holds the record; a new one of the same store is taken from the handle."""
        with self._lock:
            source = self._addresses.get(handle.agent)
            if source is None:
                if not handle.address:
                    raise PeerGoneError(f"the peer's agent is now {handle.agent}: ask for its address")
                source = decode_address(handle.address, secret=self._service.secret)
                if (source.node_id, source.epoch) != self._peer or source.agent != handle.agent:
                    raise OfferRefusedError(f"the handle is one of {source.agent}, not of {self._peer}")
                self._addresses[source.agent] = source
                while len(self._addresses) > _MAX_ADDRESSES:
                    del self._addresses[next(iter(self._addresses))]
        stop = handle.head_address + HEAD.size + handle.stored_bytes
        if not source.base <= handle.head_address < stop <= source.base + source.size_bytes:
            raise OfferRefusedError(f"the handle leaves the memory of {source.agent}")
        return source

    def _register(self, pending: PendingRead) -> None:
        with self._lock:
            self._pending.add(pending)
            is_closed = self._is_closed
        if is_closed:
            with self._service.lock:
                pending.end(Outcome.LOST, "the transport was closed")

    def _unregister(self, pending: PendingRead) -> None:
        with self._lock:
            self._pending.discard(pending)


class _Pull:
    """One call of `NixlTransport.pull`."""

    def __init__(
        self,
        transport: NixlTransport,
        life: SidecarLife,
        handle: Handle,
        source: Address,
        target: memoryview,
        stop_s: float,
    ) -> None:
        self._transport = transport
        self._service = transport._service
        self._life = life
        self._handle = handle
        self._source = source
        self._target = target
        self._stop_s = stop_s
        self._seen_s = 0.0
        """The record's head was there at this time or later; bytes that arrived until `STILL_S` after it are right."""
        self._under_way: deque[tuple[_Piece, PendingRead]] = deque()

    def run(self, on_bytes: OnBytes | None) -> None:
        """Read the pieces in order, a few at a time."""
        self._seen_s = time.monotonic()
        try:
            for piece in plan_pieces(self._handle.stored_bytes, max_piece_bytes=self._life.staging.piece_bytes):
                slot = self._slot_at_once()
                while slot is None and self._under_way:
                    self._land(on_bytes)
                    slot = self._slot_at_once()
                self._under_way.append((piece, self._post(piece, slot or self._slot())))
            while self._under_way:
                self._land(on_bytes)
            self._look_again(None)
        finally:
            for _, pending in self._under_way:
                self._give_up(pending)

    def _slot_at_once(self) -> LandingSlot | None:
        return None if len(self._under_way) == _PIECES_UNDER_WAY else self._service.try_slot(self._life)

    def _slot(self) -> LandingSlot:
        """Wait for a slot, while holding none: else pulls that hold all slots together would wait for each other."""
        return self._service.take_slot(self._life, stop_s=self._stop_s)

    def _post(self, piece: _Piece, slot: LandingSlot) -> PendingRead:
        pending = self._service.post(
            self._life,
            slot,
            source=self._source,
            remote_address=self._handle.head_address + HEAD.size + piece.start - piece.head_bytes,
            num_bytes=piece.head_bytes + piece.stop - piece.start,
        )
        self._transport._register(pending)
        return pending

    def _land(self, on_bytes: OnBytes | None) -> None:
        """Wait for the oldest piece, believe it, copy it."""
        piece, pending = self._under_way[0]
        self._service.wait(pending, stop_s=self._stop_s)
        offset = pending.slot.offset
        if piece.head_bytes:
            self._check_head(offset)
        self._life.staging.copy_out(offset + piece.head_bytes, self._target[piece.start : piece.stop])
        self._under_way.popleft()
        self._transport._unregister(pending)
        if on_bytes is None:
            self._service.free_slot(self._life, pending.slot)
        else:
            # Whoever uses early bytes gets the ones that were offered.
            self._look_again(pending.slot)
            on_bytes(piece.stop)

    def _look_again(self, slot: LandingSlot | None) -> None:
        """Make sure that what has arrived is what was offered, if it took so long that it may have changed.

        Args:
            slot: Used and given back; None if the pull holds none.
        """
        now_s = time.monotonic()
        if now_s - self._seen_s <= _TRUST_S:
            if slot is not None:
                self._service.free_slot(self._life, slot)
            return
        pending = self._post(_Piece(0, 0, HEAD.size), slot or self._slot())
        try:
            self._service.wait(pending, stop_s=self._stop_s)
            self._check_head(pending.slot.offset)
        finally:
            self._give_up(pending)
        self._seen_s = now_s

    def _check_head(self, offset: int) -> None:
        if not is_head_of(self._life.staging.read(offset, HEAD.size), self._handle):
            raise OfferRefusedError(f"{self._source.agent} does not offer this record, or not any more")

    def _give_up(self, pending: PendingRead) -> None:
        """Whatever has become of it."""
        self._transport._unregister(pending)
        self._service.give_up(self._life, pending)


def plan_pieces(stored_bytes: int, *, max_piece_bytes: int) -> Iterator[_Piece]:
    """Cut a record into pieces of about one size, at page boundaries; small ones stay whole.

    Example:
        >>> [(p.start, p.stop, p.head_bytes) for p in plan_pieces(5 << 20, max_piece_bytes=2 << 20)]
        [(0, 1748992, 64), (1748992, 3497984, 0), (3497984, 5242880, 0)]
        >>> len(list(plan_pieces(1 << 20, max_piece_bytes=2 << 20)))
        1
    """
    least = -(-stored_bytes // max_piece_bytes)
    count = max(least, min(2, stored_bytes // MIN_PIECE_BYTES), 1)
    size = min(-(-stored_bytes // count // PAGE_BYTES) * PAGE_BYTES, max_piece_bytes)
    for start in range(0, stored_bytes, size):
        yield _Piece(start, min(start + size, stored_bytes), 0 if start else HEAD.size)
