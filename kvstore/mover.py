"""Copies between the arena and the files: promotion on reads, write-behind after commits.

Covers: what is copied when, with bounded work on I/O threads. Does not cover: the tiers' own I/O.

Both directions work in place: files are read into arena slots and written from them.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from cluster.telemetry import short
from kvstore import metrics
from kvstore.container import Header
from kvstore.keys import ChunkKey
from kvstore.tiers.file import FileTier
from kvstore.tiers.host import HostTier, Slot

log = logging.getLogger(__name__)

_IDLE_POLL_S: Final = 0.01
T = TypeVar("T")


class Mover:
    """Runs on the store's event loop; file I/O runs on a pool of threads.

    Args:
        host: The arena.
        file: The files.
        io_threads: Threads for file I/O.
        max_queued: Committed chunks that may wait to be written.
        on_moved: Told of every key whose tiers changed.
        on_settled: Told of every key whose promotion ended, well or not.
    """

    def __init__(
        self,
        host: HostTier,
        file: FileTier,
        *,
        io_threads: int,
        max_queued: int,
        on_moved: Callable[[ChunkKey], None],
        on_settled: Callable[[ChunkKey], None],
    ) -> None:
        self._host = host
        self._file = file
        self._max_queued = max_queued
        self._on_moved = on_moved
        self._on_settled = on_settled
        self._pool = ThreadPoolExecutor(io_threads, thread_name_prefix="kvstore-io")
        self._max_writers = max(1, io_threads // 2)
        self._queue: deque[ChunkKey] = deque()
        self._writers: set[asyncio.Task[None]] = set()
        self._promotions: dict[ChunkKey, asyncio.Task[None]] = {}
        self._writing: set[ChunkKey] = set()
        self._is_stopping = False
        self._unwanted: set[ChunkKey] = set()
        """Keys dropped while they were being copied."""

    @property
    def queued_chunks(self) -> int:
        """Chunks that wait to be written."""
        return len(self._queue)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being copied."""
        return not self._queue and not self._writers and not self._promotions

    def promote(self, key: ChunkKey) -> None:
        """Bring a chunk into the arena; joins a promotion that is under way."""
        if key in self._promotions:
            return
        entry = None if self._is_stopping else self._file.entry(key)
        slot = self._host.reserve(key, entry.stored_bytes) if entry else None
        if slot is None:
            metrics.TIER_WRITES.labels(self._host.name, "full").inc()
            asyncio.get_running_loop().call_soon(self._on_settled, key)
            return
        self._promotions[key] = asyncio.get_running_loop().create_task(self._promote(key, slot))

    def write_behind(self, key: ChunkKey) -> None:
        """Queue a committed chunk for the files; dropped (and counted) when the queue is full."""
        if self._file.entry(key) is not None:
            return
        if self._is_stopping or len(self._queue) >= self._max_queued:
            metrics.WRITE_BEHIND.labels("dropped").inc()
            return
        self._queue.append(key)
        if len(self._writers) < self._max_writers:
            writer = asyncio.get_running_loop().create_task(self._drain())
            self._writers.add(writer)
            writer.add_done_callback(self._writers.discard)

    def forget(self, key: ChunkKey) -> None:
        """The chunk was dropped: a copy of it that is under way must not bring it back."""
        if key in self._writing or key in self._promotions:
            self._unwanted.add(key)

    async def stop(self, *, drain_s: float) -> None:
        """Finish copies for at most `drain_s` seconds, drop the rest of the queue, and end the threads."""
        loop = asyncio.get_running_loop()
        stop_s = loop.time() + drain_s
        while not self.is_idle and loop.time() < stop_s:
            await asyncio.sleep(_IDLE_POLL_S)
        # Clients go on until the server stops: from here on nothing new is copied, or this would never end.
        self._is_stopping = True
        if self._queue:
            metrics.WRITE_BEHIND.labels("dropped").inc(len(self._queue))
            self._queue.clear()
        # Copies under way end by themselves; their memory must not go before.
        await asyncio.gather(*self._writers, *self._promotions.values())
        await asyncio.to_thread(self._pool.shutdown)

    async def _promote(self, key: ChunkKey, slot: Slot) -> None:
        header: Header | None = None
        try:
            header = await self._run(self._file.read_into, key, self._host.view(slot))
        except Exception:
            log.exception("promotion_failed key=%s", short(key))
        finally:
            del self._promotions[key]
            if header is None or key in self._unwanted:
                self._unwanted.discard(key)
                self._host.discard(slot)
            else:
                self._host.commit(slot, header)
            self._on_moved(key)
            self._on_settled(key)

    async def _drain(self) -> None:
        while self._queue:
            key = self._queue.popleft()
            slot = self._host.find(key)
            if slot is None:
                metrics.WRITE_BEHIND.labels("evicted").inc()
                continue
            outcome = "stored" if await self._write(key, slot) else "failed"
            metrics.WRITE_BEHIND.labels(outcome).inc()
            self._on_moved(key)

    async def _write(self, key: ChunkKey, slot: Slot) -> bool:
        self._host.hold(slot)
        self._writing.add(key)
        stored = False
        try:
            stored = await self._run(self._file.put, key, self._host.view(slot))
        except Exception:
            log.exception("write_behind_failed key=%s", short(key))
        finally:
            self._writing.discard(key)
            self._host.unpin(slot)
            if key in self._unwanted:
                self._unwanted.discard(key)
                self._file.drop(key)
        return stored

    async def _run(self, function: Callable[[ChunkKey, memoryview], T], key: ChunkKey, view: memoryview) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, key, view)
