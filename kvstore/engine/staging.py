"""Host memory for decoded KV between the loader's threads and the engine's.

Covers: one bound for all loads, and memory that is used again, because fresh pages cost as much as decoding into them.
Does not cover: what is decoded (`kvstore.engine.reading`), KV that waits to be saved (`kvstore.engine.saver`).
"""

import threading
import time
from typing import Final

import torch

_KEEP_RATIO: Final = 0.25
"""Share of the bound that is kept while nobody uses it."""
_GRANULE_BYTES: Final = 1 << 20
_POLL_S: Final = 0.1


class StagedMemory:
    """Some bytes, until they are released."""

    def __init__(self, staging: "Staging", memory: torch.Tensor, num_bytes: int) -> None:
        self._staging = staging
        self._memory: torch.Tensor | None = memory
        self._num_bytes = num_bytes

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The bytes as a tensor of that shape; not to be touched after `release`."""
        assert self._memory is not None
        return self._memory[: self._num_bytes].view(dtype).view(shape)

    def release(self) -> None:
        """Give the memory back. Repeating it is harmless."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self._staging.take_back(memory)


class Staging:
    """Safe for several threads.

    Guarantees:
        What is handed out never exceeds the bound, except that one piece larger than it is handed out alone.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._used_bytes = 0
        self._idle: list[torch.Tensor] = []

    @property
    def used_bytes(self) -> int:
        """Handed out now."""
        with self._changed:
            return self._used_bytes

    def take(self, num_bytes: int, *, deadline_s: float) -> StagedMemory | None:
        """Memory, or None if none became free in time. May be called again at once to wait on."""
        stop_s = time.monotonic() + deadline_s
        size = -(-num_bytes // _GRANULE_BYTES) * _GRANULE_BYTES
        with self._changed:
            while self._used_bytes and self._used_bytes + size > self._max_bytes:
                left_s = stop_s - time.monotonic()
                if left_s <= 0:
                    return None
                self._changed.wait(min(left_s, _POLL_S))
            memory = self._idle_memory(size)
            self._used_bytes += len(memory) if memory is not None else size
        if memory is None:
            memory = torch.empty(size, dtype=torch.uint8)
        return StagedMemory(self, memory, num_bytes)

    def take_back(self, memory: torch.Tensor) -> None:
        """Only for `StagedMemory`."""
        with self._changed:
            self._used_bytes -= len(memory)
            self._idle.append(memory)
            while sum(map(len, self._idle)) > self._max_bytes * _KEEP_RATIO:
                self._idle.pop(0)
            self._changed.notify_all()

    def _idle_memory(self, size: int) -> torch.Tensor | None:
        """The smallest that fits and is not wasted on so little."""
        fitting = [memory for memory in self._idle if size <= len(memory) <= 2 * size]
        best = min(fitting, key=len, default=None)
        if best is None or (self._used_bytes and self._used_bytes + len(best) > self._max_bytes):
            return None
        self._idle = [memory for memory in self._idle if memory is not best]
        return best
