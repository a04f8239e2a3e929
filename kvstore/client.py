"""A process' way into its node's store.

Covers: `NodeStoreClient`: deadlines, reconnecting, verified reads with and without a copy, streams, writes in place,
pins, and what operators ask.
Does not cover: one connection (`kvstore.connection`), what is leased (`kvstore.leases`), the store (`kvstore.node`).

A store that is away costs microseconds: after a failed connection nobody tries again for a short while, and while a
frozen store owes an overdue reply nobody asks it anything.
"""

import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from cluster.errors import DataError
from cluster.telemetry import short
from kvstore import metrics
from kvstore.breaker import Breaker
from kvstore.connection import StoreConnection
from kvstore.container import (
    ALIGN,
    ChunkCorruptError,
    Header,
    RecordError,
    encode_header,
    parse_header,
    stored_bytes,
    verify_payload,
)
from kvstore.handshake import StoreRefusedError, StoreUnreachableError
from kvstore.interfaces import BufferUnusableError, CatalogEntry, ChunkMeta, ReadLease, StreamLease, WriteLease
from kvstore.keys import ChunkKey
from kvstore.leases import NodeReadLease, NodeStreamLease, NodeWriteLease
from kvstore.protocol import (
    MAX_TIMEOUT_S,
    Abort,
    Catalog,
    CatalogPage,
    Collected,
    Commit,
    Done,
    Drop,
    Gc,
    Grant,
    Granted,
    Held,
    Lookup,
    Pin,
    Read,
    Release,
    ReportCorrupt,
    Request,
    Reserve,
    Reserved,
    Stat,
    Stats,
    Stream,
    Streaming,
    Unpin,
    Verified,
    Verify,
    Wait,
)

log = logging.getLogger(__name__)

COMMIT_DEADLINE_S: Final = 2.0
_FIRST_PAUSE_S: Final = 0.05
_MAX_PAUSE_S: Final = 1.0
_HANDSHAKE_S: Final = 1.0
_REPLY_MARGIN_RATIO: Final = 0.1
_MAX_REPLY_MARGIN_S: Final = 0.2
"""Share of a deadline that is left for the way back: the store answers before, with what it has.

An answer that comes after the deadline is lost as a whole, also the chunks that were there. Measured on two cores, 400
answers each, at the end of a wait: beside a test suite the last came 13 ms late, with two busy processes more 45 ms,
with six more 105 ms; there 19 were later than 50 ms.
"""

_VERIFIED_KEYS: Final = 64
"""Keys per request to verify: their records are read before the answer comes."""
_OPERATOR_PATIENCE_S: Final = 60.0
"""How long a store may take for a request that reads or deletes many records."""

R = TypeVar("R", Held, Granted, Streaming, Reserved, Done, CatalogPage, Verified, Collected, Stats)


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
        self._catalog_lock = threading.Lock()
        self._connection: StoreConnection | None = None
        self._retired: list[StoreConnection] = []
        """Dead connections with leases that somebody still holds."""
        self._breaker = Breaker(failures=1, first_pause_s=_FIRST_PAUSE_S, max_pause_s=_MAX_PAUSE_S)
        self.away: StoreUnreachableError | StoreRefusedError | None = None
        """Why the last try to connect came to nothing; None: it did not."""
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

    def read_into(self, key: ChunkKey, out: memoryview, *, deadline_s: float) -> ChunkMeta | None:
        """Copy one payload to the caller's memory, verifying the copy; None if it is missing, corrupt or late.

        Args:
            key: The chunk.
            out: Writable, contiguous, and exactly as long as the payload; another length is a miss.
            deadline_s: Seconds, the copy included.

        Raises:
            CallerError: `out` cannot be written to, or is not contiguous.

        Cost:
            One pass over the payload (`kvstore.copying`).
        """
        if out.readonly or not out.c_contiguous:
            raise BufferUnusableError("read_into needs writable, contiguous memory")
        start_s = time.monotonic()
        stop_s = start_s + deadline_s
        connection = self._connected(stop_s)
        timeout_s = _timeout_s(stop_s)
        granted = self._ask(connection, lambda n: Read(n, [key], timeout_s), Granted, "read", stop_s, timeout_s)
        grant = granted.grants[0] if granted and granted.grants else None
        if connection is None or grant is None:
            metrics.CLIENT_READS.labels("miss").inc()
            return None
        outcome, meta = _copy_out(connection, key, grant, out.cast("B"), stop_s)
        message = ReportCorrupt(grant.lease) if outcome == "corrupt" else Release([grant.lease])
        connection.end_lease(grant.lease, message)
        metrics.CLIENT_READS.labels(outcome).inc()
        metrics.CLIENT_READ_SECONDS.observe(time.monotonic() - start_s)
        return meta

    def stream(self, key: ChunkKey, *, deadline_s: float) -> StreamLease | None:
        """Lease a chunk at once, though it may still be arriving; None: a miss. See `StreamLease`."""
        stop_s = time.monotonic() + deadline_s
        timeout_s = _timeout_s(stop_s)
        connection = self._connected(stop_s)
        streaming = self._ask(connection, lambda n: Stream(n, key, timeout_s), Streaming, "stream", stop_s, timeout_s)
        grant = streaming.grant if streaming else None
        arrival = connection.arrival(grant.lease) if connection is not None and grant is not None else None
        if connection is None or streaming is None or grant is None or arrival is None:
            metrics.CLIENT_READS.labels("miss").inc()
            return None
        if stored_bytes(streaming.payload_bytes) != grant.stored_bytes:
            connection.end_lease(grant.lease, Release([grant.lease]))
            return None
        return NodeStreamLease(connection, grant, arrival, key=key, payload_bytes=streaming.payload_bytes)

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
        answers = [self._ask_done(connection, part, "drop", Drop, stop_s) for part in _parts(keys, connection)]
        return any(answers)

    def pin(self, keys: Sequence[ChunkKey], *, seconds: float, deadline_s: float) -> list[bool]:
        """Keep chunks from being evicted from this node for so long; which are."""
        return self._ask_flags(keys, deadline_s, "pin", lambda number, part, _: Pin(number, part, seconds))

    def unpin(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> None:
        """End pins, whoever made them; harmless without one."""
        stop_s = time.monotonic() + deadline_s
        connection = self._connected(stop_s)
        for part in _parts(keys, connection):
            self._ask_done(connection, part, "unpin", Unpin, stop_s)

    def catalog(self, *, deadline_s: float) -> list[CatalogEntry] | None:
        """All chunks of this node; None if the store does not answer, or not in time.

        Chunks that come or go meanwhile may be in it or not. A client reads one catalogue at a time.
        """
        stop_s = time.monotonic() + deadline_s
        if not self._catalog_lock.acquire(timeout=deadline_s):
            return None
        try:
            return self._all_pages(self._connected(stop_s), stop_s)
        finally:
            self._catalog_lock.release()

    def verify(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> Verified | None:
        """Have records of the tiers below the arena read again, and dropped if they are damaged.

        Args:
            keys: The chunks.
            deadline_s: Seconds for all of them.

        Returns:
            Sums over all keys and tiers; None if the store did not answer in time: some may have been read.
        """
        stop_s = time.monotonic() + deadline_s
        connection = self._connected(stop_s)
        sums = [0, 0, 0]
        for start in range(0, len(keys), _VERIFIED_KEYS):
            part: list[bytes] = list(keys[start : start + _VERIFIED_KEYS])
            request = functools.partial(_verify_request, part)
            verified = self._ask(connection, request, Verified, "verify", stop_s, _OPERATOR_PATIENCE_S)
            if verified is None:
                return None
            counts = (verified.good, verified.bad, verified.unread)
            sums = [total + count for total, count in zip(sums, counts, strict=True)]
        return Verified(0, *sums)

    def gc(self, *, deadline_s: float) -> Collected | None:
        """Drop what is too old, over quota, or left by crashes; None if the store did not answer in time."""
        stop_s = time.monotonic() + deadline_s
        return self._ask(self._connected(stop_s), Gc, Collected, "gc", stop_s, _OPERATOR_PATIENCE_S)

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

    def commit(self, connection: StoreConnection, lease: int, *, payload_bytes: int, payload_checksum: int) -> bool:
        """For `NodeWriteLease`: make a written chunk readable."""
        stop_s = time.monotonic() + COMMIT_DEADLINE_S
        done = self._ask(
            connection, lambda n: Commit(n, lease, payload_bytes, payload_checksum), Done, "commit", stop_s
        )
        return done is not None and done.ok

    def _all_pages(self, connection: StoreConnection | None, stop_s: float) -> list[CatalogEntry] | None:
        entries: list[CatalogEntry] = []
        for number in itertools.count():
            request = functools.partial(_catalog_request, number)
            page = self._ask(connection, request, CatalogPage, "catalog", stop_s, _OPERATOR_PATIENCE_S)
            if page is None:
                return None
            entries += page.entries
            if page.is_last:
                break
        return entries

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

    def _ask_done(
        self,
        connection: StoreConnection | None,
        part: list[ChunkKey],
        call: str,
        request: Callable[[int, list[bytes]], Request],
        stop_s: float,
    ) -> bool:
        keys: list[bytes] = list(part)
        done = self._ask(connection, lambda n: request(n, keys), Done, call, stop_s, _OPERATOR_PATIENCE_S)
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
        reply = connection.call(request(number), number=number, stop_s=stop_s, timeout_s=timeout_s)
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
            self.away = error
            return None
        metrics.CLIENT_CONNECTS.labels("connected").inc()
        self._breaker.record_success()
        self.away = None
        return connection

    def _retire(self) -> None:
        """Put a dead connection aside until its leases are over."""
        if self._connection is not None:
            self._retired.append(self._connection)
            self._connection = None
        for connection in self._retired:
            connection.end_unreferenced()
        self._retired = [connection for connection in self._retired if connection.num_leases]


def _copy_out(
    connection: StoreConnection, key: ChunkKey, grant: Grant, out: memoryview, stop_s: float
) -> tuple[str, ChunkMeta | None]:
    """Copy a leased payload and hash the copy; how it went, and its metadata if it went well."""
    try:
        header = parse_header(connection.read_only(grant.offset, grant.offset + ALIGN), expected_key=key)
        _check_length(header, grant)
    except DataError as error:
        log.warning("chunk_corrupt key=%s error=%s", short(key), str(error))
        return "corrupt", None
    if header.payload_bytes != len(out):
        return "miss", None
    # Not at the top: vLLM 0.32 on CPUs fails to start in a process that has imported llvmlite before.
    from kvstore.copying import copy_hashed

    start = grant.offset + ALIGN
    with connection.read_only(start, start + header.payload_bytes) as payload:
        checksum = copy_hashed(payload, out, stop_s=stop_s)
    if checksum is None:
        return "late", None
    if checksum != header.payload_checksum:
        log.warning("chunk_corrupt key=%s error=payload checksum differs", short(key))
        return "corrupt", None
    return "hit", header.meta


def _catalog_request(page: int, number: int) -> Request:
    return Catalog(number, page)


def _verify_request(keys: list[bytes], number: int) -> Request:
    return Verify(number, keys)


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
    return min(MAX_TIMEOUT_S, left_s - min(_MAX_REPLY_MARGIN_S, _REPLY_MARGIN_RATIO * left_s))
