"""What a process holds of its node's arena: chunks to read, chunks that still arrive, room to write.

Covers: leases over one connection. Does not cover: how they are asked for (`kvstore.client`).
"""

import logging
import time
from typing import Any, Final, Protocol

import xxhash

from cluster.errors import DataError
from cluster.telemetry import short
from kvstore import metrics
from kvstore.connection import Arrival, StoreConnection
from kvstore.container import (
    ALIGN,
    ChunkCorruptError,
    Header,
    RecordError,
    checksum,
    encode_header,
    parse_header,
    stored_bytes,
)
from kvstore.interfaces import ChunkMeta, ReleasedAtExit
from kvstore.keys import ChunkKey
from kvstore.protocol import Abort, Grant, Release, ReportCorrupt

log = logging.getLogger(__name__)

HASHED_BYTES: Final = 256 << 10
"""Bytes hashed at once: they are in the cache, and the interpreter lock is free meanwhile."""


class Committer(Protocol):
    """Whoever makes a written chunk readable."""

    def commit(self, connection: StoreConnection, lease: int, *, payload_bytes: int, payload_checksum: int) -> bool:
        """Whether the store took it."""
        ...


class NodeReadLease(ReleasedAtExit):
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
            release_view(self._payload)
            self._connection.end_lease(self._lease, Release([self._lease]))

    def __del__(self) -> None:
        if not self._is_released:
            self._connection.abandon_lease(self._lease, Release([self._lease]))


class NodeWriteLease:
    """Room in the arena for one record."""

    def __init__(
        self,
        client: Committer,
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

    def commit(self, num_bytes: int | None = None) -> bool:
        """Write the header and make the chunk readable; with fewer bytes than reserved, the rest is given back.

        Raises:
            RecordError: `num_bytes` is not between 1 and what was reserved; the write is aborted.
        """
        if self._is_over:
            return False
        payload_bytes = self._payload_bytes if num_bytes is None else num_bytes
        if not 0 < payload_bytes <= self._payload_bytes:
            self.abort()
            raise RecordError(f"a write of {self._payload_bytes} bytes cannot commit {payload_bytes}")
        self._is_over = True
        if not self._connection.holds_lease(self._lease):
            # Closed since: the room may be another's by now.
            self._release_views()
            return False
        payload_checksum = checksum(self._payload[:payload_bytes])
        header = encode_header(self._key, self._meta, payload_bytes=payload_bytes, payload_checksum=payload_checksum)
        self._record[:ALIGN] = header
        stop = stored_bytes(payload_bytes)
        self._record[ALIGN + payload_bytes : stop] = bytes(stop - ALIGN - payload_bytes)
        self._release_views()
        ok = self._client.commit(
            self._connection, self._lease, payload_bytes=payload_bytes, payload_checksum=payload_checksum
        )
        if ok:
            self._connection.forget_lease(self._lease)
        else:
            # The commit may never have been sent. Behind one that was, this is ignored.
            self._connection.end_lease(self._lease, Abort(self._lease))
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
        release_view(self._payload)
        release_view(self._record)


class NodeStreamLease(ReleasedAtExit):
    """A chunk in the arena that may still be arriving, pinned until it is released. See `StreamLease`.

    Bytes are hashed while there is nothing better to do, so `finish` is cheap. For one thread at a time.
    """

    def __init__(
        self, connection: StoreConnection, grant: Grant, arrival: Arrival, *, key: ChunkKey, payload_bytes: int
    ) -> None:
        self._connection = connection
        self._lease = grant.lease
        self._record = connection.read_only(grant.offset, grant.offset + grant.stored_bytes)
        self._payload = self._record[ALIGN : ALIGN + payload_bytes]
        self._arrival = arrival
        self._key = key
        self._header: Header | None = None
        self._digest: Any = xxhash.xxh3_64()
        self._hashed_bytes = 0
        self._is_true: bool | None = None
        """What `finish` found; None while it is open."""
        self._is_corrupt = False
        self._is_released = False

    @property
    def key(self) -> ChunkKey:
        """The chunk's key."""
        return self._key

    @property
    def meta(self) -> ChunkMeta | None:
        """How to read the payload; None before the first bytes have arrived."""
        header = None if self._is_released else self._parsed_header()
        return header.meta if header else None

    @property
    def payload(self) -> memoryview:
        """Read-only bytes in the arena; those that have not arrived mean nothing."""
        return self._payload

    def wait_bytes(self, num_bytes: int, *, deadline_s: float) -> int:
        """Wait until the first `num_bytes` of the payload are in place, or as long as more can come."""
        stop_s = time.monotonic() + deadline_s
        wanted_bytes = min(num_bytes, len(self._payload))
        while self._usable_bytes() < wanted_bytes and self._may_grow and time.monotonic() < stop_s:
            if not self._hash_some():
                self._arrival.wait(min(ALIGN + wanted_bytes, len(self._record)), stop_s=stop_s)
        return self._usable_bytes()

    def finish(self, *, deadline_s: float) -> bool:
        """Wait for the whole chunk and compare its checksum."""
        stop_s = time.monotonic() + deadline_s
        while self._is_true is None and not self._is_released:
            if self._hash_some():
                if time.monotonic() > stop_s:
                    break
            elif not self._arrival.is_over:
                if time.monotonic() >= stop_s:
                    break
                self._arrival.wait(len(self._record), stop_s=stop_s)
            elif self._usable_bytes() == self._hashed_bytes:
                self._conclude()
        if self._is_true is None:
            metrics.CLIENT_READS.labels("late").inc()
        return self._is_true is True

    def release(self) -> None:
        """Give the lease back. Repeating it is harmless."""
        if not self._is_released:
            self._is_released = True
            release_view(self._payload)
            release_view(self._record)
            # Not before: a report ends the lease, and with it the claim on the pages.
            is_corrupt = self._is_corrupt
            self._connection.end_lease(
                self._lease, ReportCorrupt(self._lease) if is_corrupt else Release([self._lease])
            )

    def __del__(self) -> None:
        if not self._is_released:
            self._connection.abandon_lease(self._lease, Release([self._lease]))

    @property
    def _may_grow(self) -> bool:
        return self._is_true is None and not self._is_released and not self._arrival.is_over

    def _usable_bytes(self) -> int:
        """Bytes of the payload that are in place behind a sound header."""
        if self._is_released or self._parsed_header() is None:
            return 0
        done_bytes = len(self._record) if self._arrival.is_whole else self._arrival.done_bytes
        return max(0, min(done_bytes - ALIGN, len(self._payload)))

    def _parsed_header(self) -> Header | None:
        """The record's header, once its bytes are there and sound."""
        has_arrived = self._arrival.done_bytes >= ALIGN or self._arrival.is_whole
        if self._header is None and self._is_true is None and has_arrived:
            try:
                header = parse_header(self._record[:ALIGN], expected_key=self._key)
                if header.stored_bytes != len(self._record) or header.payload_bytes != len(self._payload):
                    raise ChunkCorruptError(f"record of {header.stored_bytes} bytes in a slot of {len(self._record)}")
                self._header = header
            except DataError as error:
                self._refuse(str(error))
        return self._header

    def _hash_some(self) -> bool:
        """Hash a piece of what has arrived; whether there was one."""
        stop = min(self._usable_bytes(), self._hashed_bytes + HASHED_BYTES)
        if stop <= self._hashed_bytes:
            return False
        self._digest.update(self._payload[self._hashed_bytes : stop])
        self._hashed_bytes = stop
        return True

    def _conclude(self) -> None:
        """Nothing more comes, and all of it is hashed: is it the chunk?"""
        if not self._arrival.is_whole:
            self._is_true = False
            metrics.CLIENT_READS.labels("miss").inc()
        elif self._header is None or self._digest.intdigest() != self._header.payload_checksum:
            self._refuse("payload checksum differs")
        else:
            self._is_true = True
            metrics.CLIENT_READS.labels("hit").inc()

    def _refuse(self, reason: str) -> None:
        log.warning("chunk_corrupt key=%s error=%s", short(self._key), reason)
        self._is_true, self._is_corrupt = False, True
        metrics.CLIENT_READS.labels("corrupt").inc()


def release_view(view: memoryview) -> None:
    """End a view of the arena, unless somebody still uses it."""
    try:
        view.release()
    except BufferError:
        # An array over it is still alive somewhere; the caller promised not to touch it.
        log.debug("lease_released_with_views")
