"""The desk of a node store: who may read, who may write, who waits. The store's state machine, without any I/O.

Covers: sessions, leases, the single write per key, waiting requests. Time comes in as `now_s`.
Does not cover: sockets (`kvstore.server`), copying between tiers (`kvstore.mover`).

One thread at a time: the store's event loop. Three rules keep memory from being reused under somebody's hands:

- A read lease pins its slot until it is released or its session ends.
- A reservation that expired loses its key (others may write it) but keeps its pages until it is given back.
- A session ends when its connection is closed by the *client's* side (`kvstore.server`).
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.errors import CallerError, DataError
from kvstore import metrics
from kvstore.container import ALIGN, checksum, encode_header, parse_header, stored_bytes
from kvstore.index import ChunkIndex
from kvstore.interfaces import ChunkMeta
from kvstore.keys import ChunkKey
from kvstore.protocol import Grant, Refusal
from kvstore.tiers.file import FileTier
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
    writes: dict[int, Reservation] = field(default_factory=dict)
    is_over: bool = False

    @property
    def num_leases(self) -> int:
        """Leases and reservations."""
        return len(self.reads) + len(self.writes)


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
        file: The tier below, if there is one.
        index: Told of every key that may have changed.
        promote: Starts to bring a chunk from the file tier into the arena; `note_settled` follows.
        on_commit: Told of every chunk that became readable by a commit.
        on_drop: Told of every chunk that was dropped on purpose.
        max_leases: Leases and reservations of one session.
        reservation_s: Seconds a writer has.
    """

    def __init__(
        self,
        host: HostTier,
        file: FileTier | None,
        index: ChunkIndex,
        *,
        promote: Callable[[ChunkKey], None],
        on_commit: Callable[[ChunkKey], None],
        on_drop: Callable[[ChunkKey], None],
        max_leases: int,
        reservation_s: float,
    ) -> None:
        self._host = host
        self._file = file
        self._index = index
        self._promote = promote
        self._on_commit = on_commit
        self._on_drop = on_drop
        self._max_leases = max_leases
        self._reservation_s = reservation_s
        self._numbers = itertools.count(1)
        self._writing: dict[ChunkKey, Reservation] = {}
        self._waiting: dict[ChunkKey, set[Waiting]] = {}
        self.sessions: set[Session] = set()

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
        """Whether a read would probably succeed now."""
        return self._host.contains(key) or (self._file is not None and self._file.contains(key))

    def is_being_written(self, key: ChunkKey) -> bool:
        """Whether somebody holds an unexpired reservation of the key."""
        return key in self._writing

    def grant_read(self, session: Session, key: ChunkKey) -> Grant | None:
        """Pin a chunk of the arena for a session; None if it is not there, or the session has too many leases."""
        if session.is_over or session.num_leases >= self._max_leases:
            return None
        slot = self._host.pin(key)
        if slot is None:
            return None
        lease = next(self._numbers)
        session.reads[lease] = slot
        return Grant(lease, slot.offset, slot.stored_bytes)

    def fetch(self, key: ChunkKey) -> bool:
        """Start what brings a chunk into the arena; whether a later `note_settled` is to be waited for."""
        if self._host.contains(key):
            return False
        if self.is_being_written(key):
            return True
        if not self.can_read(key):
            return False
        self._promote(key)
        return True

    def release(self, session: Session, leases: Sequence[int]) -> None:
        """End read leases; numbers that are none are ignored."""
        for lease in leases:
            slot = session.reads.pop(lease, None)
            if slot is not None:
                self._host.unpin(slot)

    def report_corrupt(self, session: Session, lease: int) -> None:
        """Drop a damaged record from the arena, for everybody, and end the lease."""
        slot = session.reads.pop(lease, None)
        if slot is None:
            return
        metrics.CORRUPT_REPORTS.inc()
        if self._host.find(slot.key) is slot:
            self._host.drop(slot.key)
            self._on_drop(slot.key)
            self._index.refresh(slot.key)
        self._host.unpin(slot)

    def drop(self, keys: Sequence[ChunkKey]) -> bool:
        """Forget chunks in all tiers; whether there was one."""
        any_dropped = False
        for key in keys:
            self._on_drop(key)
            any_dropped |= self._host.drop(key)
            any_dropped |= self._file is not None and self._file.drop(key)
            self._index.refresh(key)
        return any_dropped

    # Writing

    def reserve(
        self, session: Session, key: ChunkKey, meta: ChunkMeta, payload_bytes: int, *, now_s: float
    ) -> Grant | Refusal:
        """Start the single write of a key."""
        outcome = self._reserve(session, key, meta, payload_bytes, now_s)
        metrics.RESERVATIONS.labels(outcome.value if isinstance(outcome, Refusal) else "granted").inc()
        return outcome

    def commit(self, session: Session, lease: int, payload_checksum: int) -> bool:
        """Make a written chunk readable, if its header is in the arena and says what was reserved."""
        reservation = session.writes.pop(lease, None)
        if reservation is None:
            return False
        slot = reservation.slot
        if reservation.is_expired:
            self._host.discard(slot)
            return False
        del self._writing[slot.key]
        ok = self._publish(reservation, payload_checksum)
        metrics.RESERVATIONS.labels("committed" if ok else "refused").inc()
        self._index.refresh(slot.key)
        self.note_settled(slot.key)
        if ok:
            self._on_commit(slot.key)
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
        """A write or a promotion of `key` has ended, well or not."""
        for waiting in list(self._waiting.get(key, ())):
            waiting.note(key)

    @property
    def num_waiting_keys(self) -> int:
        """Keys that some request waits for."""
        return len(self._waiting)

    @property
    def num_reads(self) -> int:
        """Read leases of all sessions."""
        return sum(len(s.reads) for s in self.sessions)

    @property
    def num_writes(self) -> int:
        """Reservations of all sessions, expired ones too."""
        return sum(len(s.writes) for s in self.sessions)

    def _reserve(
        self, session: Session, key: ChunkKey, meta: ChunkMeta, payload_bytes: int, now_s: float
    ) -> Grant | Refusal:
        if self.can_read(key):
            return Refusal.HELD
        if key in self._writing:
            return Refusal.WRITING
        try:
            # What no header can say is refused now, not when the bytes have been written.
            encode_header(key, meta, payload_bytes=payload_bytes, payload_checksum=checksum(b""))
        except CallerError:
            return Refusal.REFUSED
        if session.is_over or session.num_leases >= self._max_leases:
            return Refusal.REFUSED
        slot = self._host.reserve(key, stored_bytes(payload_bytes))
        if slot is None:
            return Refusal.FULL
        lease = next(self._numbers)
        reservation = Reservation(slot, meta, payload_bytes, now_s + self._reservation_s)
        session.writes[lease] = reservation
        self._writing[key] = reservation
        return Grant(lease, slot.offset, slot.stored_bytes)

    def _publish(self, reservation: Reservation, payload_checksum: int) -> bool:
        slot = reservation.slot
        try:
            header = parse_header(bytes(self._host.view(slot)[:ALIGN]), expected_key=slot.key)
        except DataError:
            header = None
        says = header and (header.payload_bytes, header.meta, header.payload_checksum)
        if header is None or says != (reservation.payload_bytes, reservation.meta, payload_checksum):
            self._host.discard(slot)
            return False
        return self._host.commit(slot, header)

    def _free_key(self, reservation: Reservation) -> None:
        key = reservation.slot.key
        if self._writing.get(key) is reservation:
            del self._writing[key]
            self.note_settled(key)
