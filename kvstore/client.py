"""A process' way into its node's store.

Covers: `NodeStoreClient`: deadlines, reconnecting, verified reads without a copy, writes in place.
Does not cover: one connection (`kvstore.connection`), the store (`kvstore.node`).

A store that is away costs microseconds: after a failed connection nobody tries again for a short while, and while a
frozen store owes an overdue reply nobody asks it anything.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self, TypeVar

from cluster.errors import DataError
from cluster.telemetry import short
from kvstore import metrics
from kvstore.breaker import Breaker
from kvstore.connection import StoreConnection, StoreRefusedError, StoreUnreachableError
from kvstore.container import (
    ALIGN,
    ChunkCorruptError,
    Header,
    RecordError,
    checksum,
    encode_header,
    parse_header,
    stored_bytes,
    verify_payload,
)
from kvstore.interfaces import ChunkMeta, ReadLease, WriteLease
from kvstore.keys import ChunkKey
from kvstore.protocol import (
    Abort,
    Commit,
    Done,
    Drop,
    Grant,
    Granted,
    Held,
    Lookup,
    Read,
    Release,
    Reply,
    ReportCorrupt,
    Request,
    Reserve,
    Reserved,
    Stat,
    Stats,
    Wait,
)

log = logging.getLogger(__name__)

COMMIT_DEADLINE_S: Final = 2.0
_FIRST_PAUSE_S: Final = 0.05
_MAX_PAUSE_S: Final = 1.0
_HANDSHAKE_S: Final = 1.0
_REPLY_MARGIN_RATIO: Final = 0.1
_MAX_REPLY_MARGIN_S: Final = 0.05
"""Share of a deadline that is left for the way back: the store answers before, with what it has."""

R = TypeVar("R", Held, Granted, Reserved, Done, Stats)


class NodeStoreClient:
    """Implements `kvstore.interfaces.StoreClient` over a node store's unix socket.

    Connects at the first call, and again at the first call after the store went away.

    Args:
        socket_path: The store's socket.
        secret: The cluster's.
        client_name: For the store's log.
    """

    def __init__(self, socket_path: str, *, secret: bytes, client_name: str) -> None:
        self._socket_path = socket_path
        self._secret = secret
        self._client_name = client_name
        self._lock = threading.Lock()
        self._connection: StoreConnection | None = None
        self._retired: list[StoreConnection] = []
        """Dead connections with leases that somebody still holds."""
        self._breaker = Breaker(failures=1, first_pause_s=_FIRST_PAUSE_S, max_pause_s=_MAX_PAUSE_S)
        self._is_closed = False

    def lookup(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> list[bool]:
        """Which keys can be read now (any tier)."""
        return self._ask_flags(keys, deadline_s, "lookup", lambda number, part, _: Lookup(number, part))

    def wait(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> list[bool]:
        """Block until every key can be read or `deadline_s` seconds have passed; which can be read."""
        return self._ask_flags(keys, deadline_s, "wait", Wait)

    def read(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> list[ReadLease | None]:
        """Lease chunks for reading; None per key that is missing, corrupt, or late."""
        start_s = time.monotonic()
        stop_s = start_s + deadline_s
        leases: list[ReadLease | None] = []
        connection = self._connected(stop_s)
        for part in _parts(keys, connection):
            leases += self._read_part(connection, part, stop_s)
        metrics.CLIENT_READ_SECONDS.observe(time.monotonic() - start_s)
        return leases

    def reserve(self, key: ChunkKey, meta: ChunkMeta, num_bytes: int, *, deadline_s: float) -> WriteLease | None:
        """Room for a new chunk; None if it is held already, is being written by another, or there is no room."""
        try:
            encode_header(key, meta, payload_bytes=num_bytes, payload_checksum=0)
        except RecordError as error:
            log.warning("reserve_refused key=%s error=%s", short(key), error)
            return None
        stop_s = time.monotonic() + deadline_s
        connection = self._connected(stop_s)
        reserved = self._ask(connection, lambda n: Reserve(n, key, meta, num_bytes), Reserved, "reserve", stop_s)
        if connection is None or reserved is None or reserved.grant is None:
            return None
        if reserved.grant.stored_bytes != stored_bytes(num_bytes):
            connection.end_lease(reserved.grant.lease, Abort(reserved.grant.lease))
            return None
        return NodeWriteLease(self, connection, reserved.grant, key, meta, num_bytes)

    def drop(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> bool:
        """Forget chunks in all tiers; whether there was one."""
        stop_s = time.monotonic() + deadline_s
        connection = self._connected(stop_s)
        answers = [self._drop_part(connection, part, stop_s) for part in _parts(keys, connection)]
        return any(answers)

    def stat(self, *, deadline_s: float) -> Stats | None:
        """The store's counts; None if it does not answer."""
        stop_s = time.monotonic() + deadline_s
        return self._ask(self._connected(stop_s), Stat, Stats, "stat", stop_s)

    def close(self) -> None:
        """Release everything and disconnect. Repeating it is harmless."""
        with self._lock:
            self._is_closed = True
            connections = [*self._retired, *([self._connection] if self._connection else [])]
            self._retired.clear()
            self._connection = None
        for connection in connections:
            connection.close()

    def commit(self, connection: StoreConnection, lease: int, payload_checksum: int) -> bool:
        """For `NodeWriteLease`: make a written chunk readable."""
        stop_s = time.monotonic() + COMMIT_DEADLINE_S
        done = self._ask(connection, lambda n: Commit(n, lease, payload_checksum), Done, "commit", stop_s)
        return done is not None and done.ok

    def _ask_flags(
        self,
        keys: Sequence[ChunkKey],
        deadline_s: float,
        call: str,
        request: Callable[[int, list[bytes], float], Request],
    ) -> list[bool]:
        stop_s = time.monotonic() + deadline_s
        connection = self._connected(stop_s)
        flags: list[bool] = []
        for part in _parts(keys, connection):
            flags += self._flags_of_part(connection, part, call, request, stop_s)
        return flags

    def _flags_of_part(
        self,
        connection: StoreConnection | None,
        part: list[ChunkKey],
        call: str,
        request: Callable[[int, list[bytes], float], Request],
        stop_s: float,
    ) -> list[bool]:
        timeout_s = _timeout_s(stop_s)
        keys: list[bytes] = list(part)
        # A lookup is answered at once whatever its deadline; only a wait may take its time.
        patience_s = timeout_s if call == "wait" else 0.0
        held = self._ask(connection, lambda n: request(n, keys, timeout_s), Held, call, stop_s, patience_s)
        return [flag == 1 for flag in held.flags] if held else [False] * len(part)

    def _read_part(
        self, connection: StoreConnection | None, part: list[ChunkKey], stop_s: float
    ) -> "list[NodeReadLease | None]":
        timeout_s = _timeout_s(stop_s)
        keys: list[bytes] = list(part)
        granted = self._ask(connection, lambda n: Read(n, keys, timeout_s), Granted, "read", stop_s, timeout_s)
        grants = granted.grants if granted else [None] * len(part)
        return [self._open(connection, key, grant, stop_s) for key, grant in zip(part, grants, strict=True)]

    def _drop_part(self, connection: StoreConnection | None, part: list[ChunkKey], stop_s: float) -> bool:
        keys: list[bytes] = list(part)
        done = self._ask(connection, lambda n: Drop(n, keys), Done, "drop", stop_s)
        return done is not None and done.ok

    def _ask(
        self,
        connection: StoreConnection | None,
        request: Callable[[int], Request],
        kind: type[R],
        call: str,
        stop_s: float,
        timeout_s: float = 0.0,
    ) -> R | None:
        """One request and its reply; None if there is none in time."""
        if connection is None or connection.is_stuck:
            metrics.CLIENT_CALLS.labels(call, "unavailable").inc()
            return None
        number = connection.number()
        reply: Reply | None = connection.call(request(number), number=number, stop_s=stop_s, timeout_s=timeout_s)
        if not isinstance(reply, kind):
            metrics.CLIENT_CALLS.labels(call, "unavailable" if connection.is_dead else "late").inc()
            return None
        metrics.CLIENT_CALLS.labels(call, "answered").inc()
        return reply

    def _open(
        self, connection: StoreConnection | None, key: ChunkKey, grant: Grant | None, stop_s: float
    ) -> "NodeReadLease | None":
        """Verify a leased record; None, and the lease ended, if it is damaged or the deadline has passed."""
        if connection is None or grant is None:
            metrics.CLIENT_READS.labels("miss").inc()
            return None
        if time.monotonic() > stop_s:
            connection.end_lease(grant.lease, Release([grant.lease]))
            metrics.CLIENT_READS.labels("late").inc()
            return None
        try:
            header = parse_header(connection.read_only(grant.offset, grant.offset + ALIGN), expected_key=key)
            payload_start = grant.offset + ALIGN
            payload = connection.read_only(payload_start, payload_start + header.payload_bytes)
            _check_length(header, grant)
            verify_payload(header, payload)
        except DataError as error:
            # Not the error itself: its traceback holds views of the arena, and a log handler may keep it.
            log.warning("chunk_corrupt key=%s error=%s", short(key), str(error))
            connection.end_lease(grant.lease, ReportCorrupt(grant.lease))
            metrics.CLIENT_READS.labels("corrupt").inc()
            return None
        metrics.CLIENT_READS.labels("hit").inc()
        return NodeReadLease(connection, grant.lease, header, payload)

    def _connected(self, stop_s: float) -> StoreConnection | None:
        """A live connection, made now if need be; None when the store is away."""
        now_s = time.monotonic()
        if not self._lock.acquire(timeout=max(0.0, stop_s - now_s)):
            return None
        try:
            if self._connection is not None and not self._connection.is_dead:
                return self._connection
            self._retire()
            if self._is_closed or not self._breaker.allows(now_s=now_s):
                return None
            self._connection = self._connect(min(stop_s, now_s + _HANDSHAKE_S))
            return self._connection
        finally:
            self._lock.release()

    def _connect(self, stop_s: float) -> StoreConnection | None:
        try:
            connection = StoreConnection(
                self._socket_path, secret=self._secret, client_name=self._client_name, stop_s=stop_s
            )
        except (StoreUnreachableError, StoreRefusedError) as error:
            outcome = "refused" if isinstance(error, StoreRefusedError) else "unreachable"
            metrics.CLIENT_CONNECTS.labels(outcome).inc()
            if not self._breaker.is_open:
                log.warning("store_away outcome=%s error=%s", outcome, error)
            self._breaker.record_failure(now_s=time.monotonic())
            return None
        metrics.CLIENT_CONNECTS.labels("connected").inc()
        self._breaker.record_success()
        return connection

    def _retire(self) -> None:
        """Put a dead connection aside until its leases are over."""
        if self._connection is not None:
            self._retired.append(self._connection)
            self._connection = None
        for connection in self._retired:
            connection.end_unreferenced()
        self._retired = [connection for connection in self._retired if connection.num_leases]


class NodeReadLease:
    """A verified chunk in the arena, pinned until it is released."""

    def __init__(self, connection: StoreConnection, lease: int, header: Header, payload: memoryview) -> None:
        self._connection = connection
        self._lease = lease
        self._header = header
        self._payload = payload
        self._is_released = False

    @property
    def key(self) -> ChunkKey:
        """The chunk's key."""
        return self._header.key

    @property
    def meta(self) -> ChunkMeta:
        """How to read the payload."""
        return self._header.meta

    @property
    def payload(self) -> memoryview:
        """Read-only bytes in the arena."""
        return self._payload

    def release(self) -> None:
        """Give the lease back. Repeating it is harmless."""
        if not self._is_released:
            self._is_released = True
            _release_view(self._payload)
            self._connection.end_lease(self._lease, Release([self._lease]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if not self._is_released:
            self._connection.abandon_lease(self._lease, Release([self._lease]))


class NodeWriteLease:
    """Room in the arena for one record."""

    def __init__(
        self,
        client: NodeStoreClient,
        connection: StoreConnection,
        grant: Grant,
        key: ChunkKey,
        meta: ChunkMeta,
        payload_bytes: int,
    ) -> None:
        self._client = client
        self._connection = connection
        self._lease = grant.lease
        self._key = key
        self._meta = meta
        self._payload_bytes = payload_bytes
        self._record = connection.writable(grant.offset, grant.offset + grant.stored_bytes)
        self._payload = self._record[ALIGN : ALIGN + payload_bytes]
        self._is_over = False

    @property
    def key(self) -> ChunkKey:
        """The chunk's key."""
        return self._key

    @property
    def payload(self) -> memoryview:
        """Writable bytes in the arena."""
        return self._payload

    def commit(self) -> bool:
        """Write the header and make the chunk readable."""
        if self._is_over:
            return False
        self._is_over = True
        if not self._connection.holds_lease(self._lease):
            # Closed since: the room may be another's by now.
            self._release_views()
            return False
        payload_checksum = checksum(self._payload)
        header = encode_header(
            self._key, self._meta, payload_bytes=self._payload_bytes, payload_checksum=payload_checksum
        )
        self._record[:ALIGN] = header
        padding = len(self._record) - ALIGN - self._payload_bytes
        self._record[ALIGN + self._payload_bytes :] = bytes(padding)
        self._release_views()
        ok = self._client.commit(self._connection, self._lease, payload_checksum)
        self._connection.forget_lease(self._lease)
        return ok

    def abort(self) -> None:
        """Give the room back. Repeating it, or calling it after `commit`, is harmless."""
        if not self._is_over:
            self._is_over = True
            self._release_views()
            self._connection.end_lease(self._lease, Abort(self._lease))

    def __del__(self) -> None:
        if not self._is_over:
            self._connection.abandon_lease(self._lease, Abort(self._lease))

    def _release_views(self) -> None:
        _release_view(self._payload)
        _release_view(self._record)


def _check_length(header: Header, grant: Grant) -> None:
    if header.stored_bytes != grant.stored_bytes:
        raise ChunkCorruptError(f"record of {header.stored_bytes} bytes in a slot of {grant.stored_bytes}")


def _parts(keys: Sequence[ChunkKey], connection: StoreConnection | None) -> list[list[ChunkKey]]:
    """Keys in requests that the store takes."""
    size = connection.max_keys if connection else len(keys)
    return [list(keys[start : start + size]) for start in range(0, len(keys), max(1, size))]


def _timeout_s(stop_s: float) -> float:
    """Seconds that the store may take, so that its answer is here before `stop_s`."""
    left_s = max(0.0, stop_s - time.monotonic())
    return left_s - min(_MAX_REPLY_MARGIN_S, _REPLY_MARGIN_RATIO * left_s)


def _release_view(view: memoryview) -> None:
    try:
        view.release()
    except BufferError:
        # An array over it is still alive somewhere; the caller promised not to touch it.
        log.debug("lease_released_with_views")
