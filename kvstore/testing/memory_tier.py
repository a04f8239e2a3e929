"""A tier in memory: what every tier promises, with nothing behind it.

Covers: `kvstore.interfaces.Tier` over a dict, for tests of what wraps a tier. Does not cover: policies, pins, devices.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator

from cluster.errors import DataError
from kvstore.container import Header, entry_of, parse_header, parse_record
from kvstore.interfaces import OnBytes, TierEntry, TierStat
from kvstore.keys import ChunkKey


class MemoryTier:
    """Records in a dict; the least recently used leave first.

    Args:
        capacity_bytes: Bytes of records.
        sealed: Whether records are sealed ones.
        records: What an earlier tier left in `records`: a tier over the same dict is the next life of that tier.
    """

    def __init__(
        self, capacity_bytes: int, *, sealed: bool = False, records: "OrderedDict[ChunkKey, bytes] | None" = None
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.records: OrderedDict[ChunkKey, bytes] = OrderedDict() if records is None else records
        """As stored; tests change them."""
        self._is_sealed = sealed
        self._lock = threading.RLock()

    @property
    def name(self) -> str:
        """The tier's name."""
        return "memory"

    def put(self, key: ChunkKey, record: memoryview) -> bool:
        """Keep a copy."""
        try:
            header = parse_header(record, expected_key=key, expected_sealed=self._is_sealed)
        except DataError:
            return False
        if len(record) != header.stored_bytes or len(record) > self.capacity_bytes:
            return False
        with self._lock:
            self.records.pop(key, None)
            while sum(map(len, self.records.values())) + len(record) > self.capacity_bytes:
                self.records.popitem(last=False)
            self.records[key] = bytes(record)
        return True

    def get(self, key: ChunkKey) -> bytearray | None:
        """A copy, verified; a damaged record is forgotten."""
        with self._lock:
            found = self.records.get(key)
            if found is None:
                return None
            try:
                parse_record(found, expected_key=key, expected_sealed=self._is_sealed)
            except DataError:
                del self.records[key]
                return None
            self.records.move_to_end(key)
            return bytearray(found)

    def read_into(
        self, key: ChunkKey, view: memoryview, *, stop_s: float, on_bytes: OnBytes | None = None
    ) -> Header | None:
        """Copy a record out."""
        record = self.get(key)
        if record is None or len(record) != len(view):
            return None
        view[:] = record
        if on_bytes is not None:
            on_bytes(len(view))
        return parse_header(view, expected_key=key, expected_sealed=self._is_sealed)

    def entry(self, key: ChunkKey) -> TierEntry | None:
        """From the record's header."""
        found = self.records.get(key)
        try:
            return entry_of(parse_header(found, expected_sealed=None)) if found is not None else None
        except DataError:
            return None

    def contains(self, key: ChunkKey) -> bool:
        """Whether there is a record."""
        return key in self.records

    def drop(self, key: ChunkKey) -> bool:
        """Forget a record."""
        with self._lock:
            return self.records.pop(key, None) is not None

    def keys(self) -> Iterator[tuple[ChunkKey, int]]:
        """Least recently used first."""
        with self._lock:
            return iter([(key, len(record)) for key, record in self.records.items()])

    def stat(self) -> TierStat:
        """Counts now."""
        with self._lock:
            return TierStat(
                chunks=len(self.records),
                bytes=sum(map(len, self.records.values())),
                capacity_bytes=self.capacity_bytes,
            )

    def close(self) -> None:
        """Nothing to release."""
