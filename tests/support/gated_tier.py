"""A tier whose reads and writes wait until the test lets them go on, or fail half way."""

import threading
from collections import deque

from kvstore.container import Header, parse_header
from kvstore.interfaces import OnBytes
from kvstore.keys import ChunkKey
from kvstore.testing.memory_tier import MemoryTier

_STUCK_S = 30.0


class GatedTier(MemoryTier):
    """Open gates at first; `close_gate` makes the next calls wait for `open_gate`."""

    def __init__(self, name: str, capacity_bytes: int = 1 << 30) -> None:
        super().__init__(capacity_bytes)
        self._name = name
        self._gates = {what: _opened() for what in ("put", "read", "drop")}
        self.started: deque[tuple[str, ChunkKey]] = deque()
        self.breaks_after: int | None = None
        """Bytes after which reads break off."""
        self.pieces = 4

    @property
    def name(self) -> str:
        return self._name

    def close_gate(self, what: str) -> None:
        self._gates[what].clear()

    def open_gate(self, what: str) -> None:
        self._gates[what].set()

    def put(self, key: ChunkKey, record: memoryview) -> bool:
        self._pass("put", key)
        return super().put(key, record)

    def drop(self, key: ChunkKey) -> bool:
        self._pass("drop", key)
        return super().drop(key)

    def read_into(
        self, key: ChunkKey, view: memoryview, *, stop_s: float, on_bytes: OnBytes | None = None
    ) -> Header | None:
        record = self.get(key)
        if record is None or len(record) != len(view):
            return None
        step = max(1, len(record) // self.pieces)
        for start in range(0, len(record), step):
            if self.breaks_after is not None and start >= self.breaks_after:
                return None
            view[start : start + step] = record[start : start + step]
            if on_bytes is not None:
                on_bytes(min(len(record), start + step))
            self._pass("read", key)
        return parse_header(view, expected_key=key)

    def _pass(self, what: str, key: ChunkKey) -> None:
        self.started.append((what, key))
        assert self._gates[what].wait(_STUCK_S), f"{what} was never let go on"


def _opened() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate
