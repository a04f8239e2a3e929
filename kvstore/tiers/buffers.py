"""Page-aligned memory for direct I/O, kept for the next use: fresh pages cost as much as a copy.

Covers: taking and giving back. Does not cover: the arena (`kvstore.tiers.host`).
"""

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import numpy as np

from kvstore.container import ALIGN

_MAX_IDLE_BYTES: Final = 64 << 20


class AlignedBuffers:
    """Buffers for any number of threads.

    Args:
        max_idle_bytes: Memory that is kept for later uses; more goes back to the system.

    Example:
        >>> buffers = AlignedBuffers()
        >>> with buffers.take(8192) as view:
        ...     len(view), is_aligned(view)
        (8192, True)
        >>> buffers.close()
    """

    def __init__(self, *, max_idle_bytes: int = _MAX_IDLE_BYTES) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._idle: list[mmap.mmap] = []
        self._lock = threading.Lock()

    @contextmanager
    def take(self, num_bytes: int) -> Iterator[memoryview]:
        """A writable view of `num_bytes` for the time of a `with` block; it holds anything."""
        pages = self._pop(num_bytes) or mmap.mmap(-1, -(-num_bytes // ALIGN) * ALIGN)
        try:
            yield memoryview(pages)[:num_bytes]
        finally:
            self._push(pages)

    def close(self) -> None:
        """Free what is idle and keep nothing that comes back later."""
        with self._lock:
            self._max_idle_bytes = 0
            idle, self._idle = self._idle, []
        for pages in idle:
            _unmap(pages)

    def _pop(self, num_bytes: int) -> mmap.mmap | None:
        with self._lock:
            fitting = [pages for pages in self._idle if len(pages) >= num_bytes]
            if not fitting:
                return None
            smallest = min(fitting, key=len)
            self._idle.remove(smallest)
            return smallest

    def _push(self, pages: mmap.mmap) -> None:
        with self._lock:
            if sum(len(other) for other in self._idle) + len(pages) <= self._max_idle_bytes:
                self._idle.append(pages)
                return
        _unmap(pages)


def is_aligned(view: memoryview) -> bool:
    """Whether a view starts and ends where direct I/O can."""
    address: int = np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]
    return address % ALIGN == 0 and len(view) % ALIGN == 0


def _unmap(pages: mmap.mmap) -> None:
    # An error on its way up may still refer to a slice of it: then the pages go with the error.
    with suppress(BufferError):
        pages.close()
