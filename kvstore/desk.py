"""The desk of a node store: who may read, who may write, who waits. The store's state machine, without any I/O.

Covers: sessions, leases, streams, the single write per key, pins, waiting requests.
Does not cover: sockets and requests (`kvstore.server`, `kvstore.requests`), copying between tiers (`kvstore.mover`).

One thread at a time: the store's event loop. Three rules keep memory from being reused under somebody's hands:

- A read lease pins its slot until it is released or its session ends.
- A reservation that expired loses its key (others may write it) but keeps its pages until it is given back.
- A session ends when its connection is closed by the *client's* side (`kvstore.requests`).
"""

import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from cluster.clock import Clock, SystemClock
from cluster.errors import CallerError, DataError
from kvstore import metrics
from kvstore.container import ALIGN, Header, checksum, encode_header, parse_header, stored_bytes
from kvstore.crash import crash_point
from kvstore.index import ChunkIndex
from kvstore.interfaces import ChunkMeta
from kvstore.keys import ChunkKey
from kvstore.mover import Landing, Mover
from kvstore.policy import Quotas
from kvstore.protocol import Grant, Refusal
from kvstore.store_time import StoreTime
from kvstore.tiers.host import HostTier, Slot


@dataclass(slots=True, eq=False)
class Reservation:
    """One write under way."""

    slot: Slot
    meta: ChunkMeta
    payload_bytes: int
    expires_s: float
    is_expired: bool = False


@dataclass(slots=True, eq=False)
class Session:
    """What one connection holds."""

    client_name: str
    reads: dict[int, Slot] = field(default_factory=dict)
    streams: "dict[int, Following]" = field(default_factory=dict)
    """Those of the read leases whose record is still arriving."""
    writes: dict[int, Reservation] = field(default_factory=dict)
    is_over: bool = False

    @property
    def num_leases(self) -> int:
        """Leases and reservations."""
        return len(self.reads) + len(self.writes)


@dataclass(slots=True, eq=False)
class Following:
    """A read lease on a record that is on its way into the arena."""

    landing: Landing
    on_change: Callable[[Landing], None]


class Waiting:
    """A request that waits until each of its keys is settled, or until its caller gives up.

    Args:
        keys: Keys not settled yet.
        settle: Called when something happened to a key; True if that settles it.
        on_done: Called once, when all keys are settled.
    """

    def __init__(self, keys: set[ChunkKey], *, settle: Callable[[ChunkKey], bool], on_done: Callable[[], None]) -> None:
        self.keys = keys
        self._settle = settle
        self._on_done = on_done

    def note(self, key: ChunkKey) -> None:
        """Something happened to `key`."""
        if key in self.keys and self._settle(key):
            self.keys.discard(key)
            if not self.keys:
                self._on_done()


class Desk:
    """Leases and reservations over the tiers of one node.

    Args:
        host: The arena: everything that is read or written passes through it.
        index: Told of every key that may have changed.
        mover: Brings chunks into the arena, and writes them behind; its `on_settled` is `note_settled`, its `is_wanted`
            is `is_awaited`.
        time: Ages of chunks.
        quotas: To tell a writer that its tenant has no room, from an arena that has none.
        max_leases: Leases and reservations of one session.
        reservation_s: Seconds a writer has.
        max_pin_s: Longest pin.
        clock: For pins and times of use.
    """

    def __init__(
        self,
        host: HostTier,
        index: ChunkIndex,
        mover: Mover,
        *,
        time: StoreTime,
        quotas: Quotas,
        max_leases: int,
        reservation_s: float,
        max_pin_s: float,
        clock: Clock | None = None,
    ) -> None:
        self._host = host
        self._index = index
        self._mover = mover
        self._time = time
        self._quotas = quotas
        self._max_leases = max_leases
        self._reservation_s = reservation_s
        self._max_pin_s = max_pin_s
        self._clock = clock or SystemClock()
        self._numbers = itertools.count(1)
        self._writing: dict[ChunkKey, Reservation] = {}
        self._waiting: dict[ChunkKey, set[Waiting]] = {}
        self.sessions: set[Session] = set()
        self.num_granted = 0
        """Reads granted from the arena so far."""

    # Sessions

    def open_session(self, session: Session) -> None:
        """A connection that has proven itself."""
        self.sessions.add(session)

    def end_session(self, session: Session) -> None:
        """The client is gone: its leases and reservations end. Repeating it is harmless."""
        session.is_over = True
        self.sessions.discard(session)
        self.release(session, list(session.reads))
        for lease in list(session.writes):
            self.abort(session, lease)

    # Reading

    def can_read(self, key: ChunkKey) -> bool:
        """Whether a read would probably succeed now: from a tier of this node, or from another node."""
        if self._is_in_arena(key):
            return True
        known = self._index.find(key)
        if known is not None and self._time.has_expired(known.chunk.learned_unix_s):
            known = None
        return self._mover.can_fetch_known(key, None if known is None else known.chunk.tier)

    def is_being_written(self, key: ChunkKey) -> bool:
        """Whether the chunk is on its way into the arena: somebody writes it, or it is fetched."""
        return key in self._writing or self._mover.landing(key) is not None

    def grant_read(self, session: Session, key: ChunkKey) -> Grant | None:
        """Pin a chunk of the arena for a session; None if it is not there, or the session has too many leases."""
        if session.is_over or session.num_leases >= self._max_leases or not self._is_in_arena(key):
            return None
        slot = self._host.pin(key)
        if slot is None:
            return None
        self.num_granted += 1
        self._index.note_use(key, now_s=self._clock.now_s())
        self._mover.note_use(key)
        return self._lease(session, slot)

    def fetch(self, key: ChunkKey) -> bool:
        """Start what brings a chunk into the arena; whether a later `note_settled` is to be waited for."""
        return self._fetch(key, local_only=False)

    def fetch_here(self, key: ChunkKey) -> bool:
        """As `fetch`, from this node's own tiers only: for other nodes, which must not make us ask them in turn."""
        return self._fetch(key, local_only=True)

    def landing(self, key: ChunkKey) -> Landing | None:
        """The chunk's way into the arena, if a fetch of it is under way."""
        return self._mover.landing(key)

    def payload_bytes(self, session: Session, lease: int) -> int:
        """Length of the payload under a read lease of a readable chunk; 0 for another."""
        slot = session.reads.get(lease)
        return slot.header.payload_bytes if slot is not None and slot.header is not None else 0

    def follow(self, session: Session, key: ChunkKey, on_change: Callable[[int, Landing], None]) -> Grant | None:
        """A read lease on a chunk that is on its way into the arena.

        Args:
            session: Whose lease.
            key: The chunk.
            on_change: Called with the lease and the landing when more bytes are in place, and at the end; not after
                the lease was released.

        Returns:
            None if the chunk is not on its way. Bytes of the slot are true only when the landing is whole.
        """
        landing = self._mover.landing(key)
        if landing is None or landing.is_over or session.is_over or session.num_leases >= self._max_leases:
            return None
        self._host.hold(landing.slot)
        grant = self._lease(session, landing.slot)
        following = Following(landing, lambda changed: on_change(grant.lease, changed))
        session.streams[grant.lease] = following
        landing.follow(following.on_change)
        return grant

    def record(self, session: Session, lease: int) -> memoryview | None:
        """The bytes under a read lease; the caller releases the view before the lease."""
        slot = session.reads.get(lease)
        return None if slot is None else self._host.view(slot).toreadonly()

    def release(self, session: Session, leases: Sequence[int]) -> None:
        """End read leases; numbers that are none are ignored."""
        for lease in leases:
            slot = self._end_read(session, lease)
            if slot is not None:
                self._host.unpin(slot)

    def keep_pinned(self, session: Session, lease: int) -> None:
        """End a read lease, and never use its memory again: somebody may read it whom nothing can stop."""
        self._end_read(session, lease)

    def report_corrupt(self, session: Session, lease: int) -> None:
        """Drop a damaged record from the arena, for everybody, and end the lease."""
        slot = self._end_read(session, lease)
        if slot is None:
            return
        metrics.CORRUPT_REPORTS.inc()
        if self._host.find(slot.key) is slot:
            self._host.drop(slot.key)
            self._mover.note_corrupt(slot.key)
            self._index.refresh(slot.key)
        self._host.unpin(slot)

    # Keeping and forgetting

    def drop(self, keys: Sequence[ChunkKey]) -> Awaitable[bool]:
        """Forget chunks in all tiers of this node.

        Returns:
            When awaited, that the media have forgotten them too; whether there was one.
        """
        for key in keys:
            reservation = self._writing.get(key)
            if reservation is not None:
                # Its pages stay the writer's; its commit comes too late.
                reservation.is_expired = True
                self._free_key(reservation)
        return self._mover.drop(keys)

    def pin(self, key: ChunkKey, *, seconds: float) -> bool:
        """Keep a chunk from being evicted from the tiers of this node that hold it now; whether one does and may."""
        now_s = self._clock.now_s()
        until_s = now_s + min(seconds, self._max_pin_s)
        was_pinned = self._is_in_arena(key) and self._host.books.pin(key, until_s=until_s, now_s=now_s)
        for shelf in self._mover.shelves:
            was_pinned |= shelf.pin(key, until_s=until_s)
        return was_pinned

    def unpin(self, key: ChunkKey) -> None:
        """End a pin; harmless without one."""
        self._host.books.unpin(key)
        for shelf in self._mover.shelves:
            shelf.unpin(key)

    # Writing

    def reserve(
        self, session: Session, key: ChunkKey, meta: ChunkMeta, payload_bytes: int, *, now_s: float
    ) -> Grant | Refusal:
        """Start the single write of a key."""
        outcome = self._reserve(session, key, meta, payload_bytes, now_s)
        metrics.RESERVATIONS.labels(outcome.value if isinstance(outcome, Refusal) else "granted").inc()
        return outcome

    def commit(self, session: Session, lease: int, *, payload_bytes: int, payload_checksum: int) -> bool:
        """Make a written chunk readable, if its header is in the arena and says what was reserved.

        `payload_bytes` may be less than was reserved: the pages behind it are given back.
        """
        crash_point("header_written")
        reservation = session.writes.pop(lease, None)
        if reservation is None:
            return False
        slot = reservation.slot
        if reservation.is_expired:
            self._host.discard(slot)
            return False
        del self._writing[slot.key]
        ok = self._publish(reservation, payload_bytes, payload_checksum)
        metrics.RESERVATIONS.labels("committed" if ok else "refused").inc()
        crash_point("committed_before_announce")
        self._index.refresh(slot.key)
        crash_point("announced_before_reply")
        self.note_settled(slot.key)
        if ok:
            self._mover.note_commit(slot.key)
        return ok

    def abort(self, session: Session, lease: int) -> None:
        """Give a reservation back; a number that is none is ignored."""
        reservation = session.writes.pop(lease, None)
        if reservation is None:
            return
        self._host.discard(reservation.slot)
        if not reservation.is_expired:
            metrics.RESERVATIONS.labels("aborted").inc()
            self._free_key(reservation)

    def expire(self, *, now_s: float) -> None:
        """Take the keys of reservations whose time is over; their pages stay theirs."""
        for reservation in [r for r in self._writing.values() if r.expires_s <= now_s]:
            reservation.is_expired = True
            metrics.RESERVATIONS.labels("expired").inc()
            self._free_key(reservation)

    # Waiting

    def add_waiting(self, waiting: Waiting) -> None:
        """Tell `waiting` about its keys until `remove_waiting`."""
        for key in waiting.keys:
            self._waiting.setdefault(key, set()).add(waiting)

    def remove_waiting(self, waiting: Waiting, keys: set[ChunkKey]) -> None:
        """Forget a waiting request that was added with `keys`."""
        for key in keys:
            others = self._waiting.get(key)
            if others is not None:
                others.discard(waiting)
                if not others:
                    del self._waiting[key]

    def note_settled(self, key: ChunkKey) -> None:
        """A write or a fetch of `key` has ended, well or not; or another node says that it has the chunk."""
        for waiting in list(self._waiting.get(key, ())):
            waiting.note(key)

    def is_awaited(self, key: ChunkKey) -> bool:
        """Whether some request waits for a key."""
        return key in self._waiting

    @property
    def num_reads(self) -> int:
        """Read leases of all sessions."""
        return sum(len(s.reads) for s in self.sessions)

    @property
    def num_writes(self) -> int:
        """Reservations of all sessions, expired ones too."""
        return sum(len(s.writes) for s in self.sessions)

    def _is_in_arena(self, key: ChunkKey) -> bool:
        slot = self._host.find(key)
        return (
            slot is not None and slot.header is not None and not self._time.has_expired(slot.header.meta.learned_unix_s)
        )

    def _fetch(self, key: ChunkKey, *, local_only: bool) -> bool:
        if self._is_in_arena(key):
            return False
        if key in self._writing:
            return True
        self._forget_expired(key)
        return self._mover.fetch(key, local_only=local_only)

    def _lease(self, session: Session, slot: Slot) -> Grant:
        lease = next(self._numbers)
        session.reads[lease] = slot
        return Grant(lease, slot.offset, slot.stored_bytes)

    @staticmethod
    def _end_read(session: Session, lease: int) -> Slot | None:
        following = session.streams.pop(lease, None)
        if following is not None:
            following.landing.unfollow(following.on_change)
        return session.reads.pop(lease, None)

    def _reserve(
        self, session: Session, key: ChunkKey, meta: ChunkMeta, payload_bytes: int, now_s: float
    ) -> Grant | Refusal:
        # What only another node holds may be written: its reader may have given up waiting for it.
        # So may what a tier has said to hold, and could not give.
        is_below = self._mover.can_fetch(key, local_only=True) and not self._mover.has_failed(key)
        if is_below or self._is_in_arena(key):
            return Refusal.HELD
        if key in self._writing or self._mover.landing(key) is not None:
            return Refusal.WRITING
        try:
            # What no header can say is refused now, not when the bytes have been written.
            encode_header(key, meta, payload_bytes=payload_bytes, payload_checksum=checksum(b""))
        except CallerError:
            return Refusal.REFUSED
        if session.is_over or session.num_leases >= self._max_leases:
            return Refusal.REFUSED
        self._forget_expired(key)
        need_bytes = stored_bytes(payload_bytes)
        slot = self._host.reserve(key, need_bytes, tenant=meta.tenant)
        if slot is None:
            limit_bytes = self._quotas.limit_bytes(meta.tenant)
            is_over = limit_bytes is not None and self._host.books.used_by(meta.tenant) + need_bytes > limit_bytes
            return Refusal.QUOTA if is_over else Refusal.FULL
        crash_point("reserved")
        lease = next(self._numbers)
        reservation = Reservation(slot, meta, payload_bytes, now_s + self._reservation_s)
        session.writes[lease] = reservation
        self._writing[key] = reservation
        return Grant(lease, slot.offset, slot.stored_bytes)

    def _forget_expired(self, key: ChunkKey) -> None:
        """Make way in the arena for a chunk that is learned anew."""
        if self._host.find(key) is not None:
            self._host.drop(key)
            self._mover.note_evicted(key)
            self._index.refresh(key)

    def _publish(self, reservation: Reservation, payload_bytes: int, payload_checksum: int) -> bool:
        slot = reservation.slot
        header = self._written_header(reservation, payload_bytes, payload_checksum)
        if header is None:
            self._host.discard(slot)
            return False
        if header.stored_bytes < slot.stored_bytes:
            self._host.shrink(slot, header.stored_bytes)
        return self._host.commit(slot, header)

    def _written_header(self, reservation: Reservation, payload_bytes: int, payload_checksum: int) -> Header | None:
        """What the writer left in the arena, with a date that can be true; None if it is not what was agreed."""
        slot = reservation.slot
        view = self._host.view(slot)
        try:
            header = parse_header(bytes(view[:ALIGN]), expected_key=slot.key)
        except DataError:
            return None
        says = (header.payload_bytes, header.meta, header.payload_checksum)
        if says != (payload_bytes, reservation.meta, payload_checksum) or payload_bytes > reservation.payload_bytes:
            return None
        meta = self._time.dated(header.meta)
        if meta == header.meta:
            return header
        dated = encode_header(slot.key, meta, payload_bytes=payload_bytes, payload_checksum=payload_checksum)
        view[:ALIGN] = dated
        return parse_header(dated, expected_key=slot.key)

    def _free_key(self, reservation: Reservation) -> None:
        key = reservation.slot.key
        if self._writing.get(key) is reservation:
            del self._writing[key]
            self.note_settled(key)
