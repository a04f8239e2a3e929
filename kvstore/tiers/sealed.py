"""A tier whose records are encrypted: it seals what it is given and opens what it gives back.

Covers: the tier protocol around another tier, what happens to records that cannot be opened.
Does not cover: the cipher and the keys (`kvstore.sealing`), the medium (the inner tier).

The inner tier must be one that takes sealed records (`sealed=True` where it has that option).
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

import msgspec

from cluster.errors import DataError
from cluster.telemetry import short
from kvstore import metrics
from kvstore.container import Header, RecordError, parse_header, stored_bytes
from kvstore.interfaces import OnBytes, Tier, TierEntry, TierStat
from kvstore.keys import ChunkKey
from kvstore.sealing import OtherStoreKeyError, Sealer, plain_payload_bytes, sealed_payload_bytes
from kvstore.tiers.buffers import AlignedBuffers

log = logging.getLogger(__name__)

_MAX_FOREIGN: Final = 1 << 17
"""Records of other keys that are remembered; further ones are found out again at each read."""


class SealedTier:
    """Records of another tier, encrypted. As safe for several threads as that tier.

    A record that was changed is dropped from the inner tier. One that was sealed with a key that is not here is kept,
    because a node that shares the medium may have the key, but it counts as missing and is replaced when its chunk is
    learned again.

    Args:
        inner: Where sealed records live; closed with this tier.
        sealer: Has the keys.
    """

    def __init__(self, inner: Tier, *, sealer: Sealer) -> None:
        self.inner = inner
        self._sealer = sealer
        self._buffers = AlignedBuffers()
        self._foreign: OrderedDict[ChunkKey, None] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The inner tier's name."""
        return self.inner.name

    def put(self, key: ChunkKey, record: memoryview) -> bool:
        """Seal one plain record and store it."""
        try:
            header = parse_header(record, expected_key=key)
            with self._buffers.take(stored_bytes(sealed_payload_bytes(header.payload_bytes))) as buffer:
                sealed = self._sealer.seal(record, into=buffer, expected_key=key)
                if self._forget_foreign(key):
                    # The inner tier would keep what it has: the bytes of one key do not differ, but for this.
                    self.inner.drop(key)
                stored = self.inner.put(key, sealed)
        except (DataError, RecordError) as error:
            metrics.SEALED.labels(self.name, "refused").inc()
            log.warning("sealing_refused key=%s error=%s", short(key), str(error))
            return False
        metrics.SEALED.labels(self.name, "sealed").inc()
        return stored

    def get(self, key: ChunkKey) -> bytearray | None:
        """One plain record's bytes, or None."""
        sealed = None if key in self._foreign else self.inner.get(key)
        if sealed is None:
            return None
        record = bytearray(_plain_record_bytes(sealed))
        return record if self._open(key, memoryview(sealed), memoryview(record)) else None

    def read_into(
        self, key: ChunkKey, view: memoryview, *, stop_s: float, on_bytes: OnBytes | None = None
    ) -> Header | None:
        """Read and open one record; `on_bytes` is told only when all of it has been proven."""
        entry = None if key in self._foreign else self.inner.entry(key)
        if entry is None or len(view) != stored_bytes(_plain_bytes(entry)):
            return None
        with self._buffers.take(entry.stored_bytes) as buffer:
            if self.inner.read_into(key, buffer, stop_s=stop_s) is None:
                return None
            header = self._open(key, buffer, view)
        if header is not None and on_bytes is not None:
            on_bytes(len(view))
        return header

    def entry(self, key: ChunkKey) -> TierEntry | None:
        """What is known about a key: the plain payload's length, and the room that the sealed record takes."""
        entry = None if key in self._foreign else self.inner.entry(key)
        return None if entry is None else msgspec.structs.replace(entry, payload_bytes=_plain_bytes(entry))

    def contains(self, key: ChunkKey) -> bool:
        """Whether the inner tier has the record, and it is not known to be of another key."""
        return key not in self._foreign and self.inner.contains(key)

    def drop(self, key: ChunkKey) -> bool:
        """Forget one record, whoever sealed it."""
        was_foreign = self._forget_foreign(key)
        return self.inner.drop(key) and not was_foreign

    def keys(self) -> Iterator[tuple[ChunkKey, int]]:
        """Keys held, and the bytes of their sealed records."""
        return ((key, size) for key, size in self.inner.keys() if key not in self._foreign)  # noqa: SIM118 not a dict

    def stat(self) -> TierStat:
        """The inner tier's counts."""
        return self.inner.stat()

    def close(self) -> None:
        """Close the inner tier and free the buffers."""
        self.inner.close()
        self._buffers.close()

    def _open(self, key: ChunkKey, sealed: memoryview, view: memoryview) -> Header | None:
        try:
            header = self._sealer.open(sealed, into=view, expected_key=key)
        except DataError as error:
            self._note_failure(key, error)
            return None
        metrics.SEALED.labels(self.name, "opened").inc()
        return header

    def _note_failure(self, key: ChunkKey, error: DataError) -> None:
        is_foreign = isinstance(error, OtherStoreKeyError)
        metrics.SEALED.labels(self.name, "other_key" if is_foreign else "tampered").inc()
        # Not the error itself: its traceback holds views of the buffers, and a log handler may keep it.
        log.warning("unsealing_failed tier=%s key=%s error=%s", self.name, short(key), str(error))
        if not is_foreign:
            self.inner.drop(key)
            return
        with self._lock:
            self._foreign[key] = None
            while len(self._foreign) > _MAX_FOREIGN:
                self._foreign.popitem(last=False)

    def _forget_foreign(self, key: ChunkKey) -> bool:
        with self._lock:
            was_foreign = key in self._foreign
            self._foreign.pop(key, None)
        return was_foreign


def _plain_bytes(entry: TierEntry) -> int:
    """The plain payload's length; of what is too short to be sealed its own, so that a reader finds it out.

    Names of objects do not tell which records are sealed. A plain one is known until it is read, and dropped then.
    """
    return plain_payload_bytes(entry.payload_bytes) or entry.payload_bytes


def _plain_record_bytes(sealed: bytearray) -> int:
    """Room for what is in a sealed record; 0, which nothing fits, if it is none."""
    try:
        payload_bytes = plain_payload_bytes(parse_header(sealed, expected_sealed=True).payload_bytes)
    except DataError:
        return 0
    return stored_bytes(payload_bytes) if payload_bytes is not None and payload_bytes < len(sealed) else 0
