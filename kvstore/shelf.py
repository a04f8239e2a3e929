"""One source of chunks below the arena, with the threads that work for it; and one tier, with its queue of writes.

Covers: reads with a time limit, writes behind commits, drops; which records must not be seen while they are on their
way out. Does not cover: what is moved when (`kvstore.mover`), the media themselves (`kvstore.tiers`).

Every source has threads of its own, so that a bucket that stalls does not keep disks waiting. Everything here runs on
the store's event loop but the calls of the source.

A drop is true at once: the key is *hidden* until the tier has forgotten it. Writes and drops of one key follow each
other, so neither a write under way nor a crowded queue can bring a dropped chunk back.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, TypeVar, runtime_checkable

from cluster.telemetry import short
from kvstore import metrics
from kvstore.container import Header
from kvstore.crash import crash_point
from kvstore.interfaces import OnBytes, Source, Tier, TierEntry
from kvstore.keys import ChunkKey
from kvstore.placement import Admission
from kvstore.tiers.host import HostTier, Slot

log = logging.getLogger(__name__)

_DROP_BATCH: Final = 64
_ANSWER_S: Final = 0.05
_MAX_PINS_TOLD: Final = 4096
"""From here on ended pins are forgotten before new ones are noted."""
T = TypeVar("T")


@runtime_checkable
class Pinnable(Protocol):
    """A tier that evicts by itself, and can be told what to keep."""

    def pin(self, key: ChunkKey, *, until_s: float) -> bool:
        """Keep a record until a monotonic time; False if it is not there, or pins hold their share already."""
        ...

    def unpin(self, key: ChunkKey) -> None:
        """End a pin; harmless without one."""
        ...


@runtime_checkable
class Scanned(Protocol):
    """A tier that finds the records of a former life in the background."""

    def wait_scanned(self, timeout_s: float | None = None) -> bool:
        """Whether all of them are found."""
        ...


@runtime_checkable
class Listed(Protocol):
    """A tier that lists a medium which others write to as well."""

    @property
    def has_listed(self) -> bool:
        """Whether it knows all that was there at some time after the start."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long one read may take."""

    base_s: float
    min_bytes_per_s: float

    def limit_s(self, num_bytes: int) -> float:
        """Seconds for a record of `num_bytes`.

        Example:
            >>> Patience(base_s=1.0, min_bytes_per_s=100.0).limit_s(50)
            1.5
        """
        return self.base_s + num_bytes / self.min_bytes_per_s


class Supply:
    """Something to fetch records from.

    Args:
        source: Asked on threads of its own, but for `entry`.
        threads: Reads (and, in a tier, writes and drops) at the same time.
        patience: After how long a read is given up.
        has_expired: Whether a chunk of that date is a miss.
    """

    def __init__(
        self,
        source: Source,
        *,
        threads: int,
        patience: Patience,
        has_expired: Callable[[float], bool] = lambda learned_unix_s: False,
    ) -> None:
        self.source = source
        self._patience = patience
        self._has_expired = has_expired
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"kvstore-{source.name}")
        self._reads = asyncio.Semaphore(threads)

    @property
    def name(self) -> str:
        """The source's name."""
        return self.source.name

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way but reads."""
        return True

    def entry(self, key: ChunkKey) -> TierEntry | None:
        """What is known about a key that may be read; a hint."""
        entry = self.source.entry(key)
        return None if entry is None or self._has_expired(entry.learned_unix_s) else entry

    def can_read(self, key: ChunkKey) -> bool:
        """Whether a read would probably succeed."""
        return self.entry(key) is not None

    async def read(
        self, key: ChunkKey, view: memoryview, *, is_wanted: Callable[[], bool], on_bytes: OnBytes
    ) -> Header | None:
        """Fill `view` with a record; None: a miss, or when its turn came nobody wanted it any more."""
        async with self._reads:
            if not is_wanted():
                return None
            header = await self._run(partial(self._read, key, view, on_bytes))
        if header is not None and (header.key != key or header.stored_bytes != len(view)):
            log.warning("source_lied source=%s key=%s record_of=%s", self.name, short(key), short(header.key))
            return None
        return header

    async def close(self) -> None:
        """End the threads, after what they are doing."""
        await asyncio.to_thread(self._pool.shutdown)

    def _read(self, key: ChunkKey, view: memoryview, on_bytes: OnBytes) -> Header | None:
        # The limit counts from here: waiting for a thread is nobody's fault.
        stop_s = time.monotonic() + self._patience.limit_s(len(view))
        return self.source.read_into(key, view, stop_s=stop_s, on_bytes=on_bytes)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


class Shelf(Supply):
    """A tier below the arena.

    Args:
        tier: Closed by its owner, after `close`.
        host: What is written comes from here.
        admit: Which chunks it takes.
        max_queued: Chunks that may wait to be written.
        threads: As `Supply`; at most half of them write.
        patience: As `Supply`.
        on_moved: Told of every key whose record was written, failed, or dropped.
        has_expired: As `Supply`.
        medium: The tier that `tier` wraps, where it wraps one: it evicts, so pins go there, and it leaves litter.
    """

    def __init__(
        self,
        tier: Tier,
        host: HostTier,
        *,
        admit: Admission,
        max_queued: int,
        threads: int,
        patience: Patience,
        on_moved: Callable[[ChunkKey], None],
        has_expired: Callable[[float], bool] = lambda learned_unix_s: False,
        medium: Tier | None = None,
    ) -> None:
        super().__init__(tier, threads=threads, patience=patience, has_expired=has_expired)
        self.tier = tier
        self.medium = medium or tier
        self.admit = admit
        self._host = host
        self._max_queued = max_queued
        self._max_writers = max(1, threads // 2)
        self._on_moved = on_moved
        self._queue: dict[ChunkKey, None] = {}
        self._writers: set[asyncio.Task[None]] = set()
        self._num_draining = 0
        """Writers that will look at the queue again: a task that is about to end will not."""
        self._writing: set[ChunkKey] = set()
        self._drops: set[asyncio.Task[int]] = set()
        self._hidden: Counter[ChunkKey] = Counter()
        self._order = _KeyLocks()
        self._answered_s = -math.inf
        self._has_told_all = False
        self._pinnable = self.medium if isinstance(self.medium, Pinnable) else None
        self._pins: dict[ChunkKey, float] = {}
        """Ends of pins, to tell of them; the tier keeps its own books."""

    @property
    def num_queued(self) -> int:
        """Chunks that wait to be written."""
        return len(self._queue)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being written or dropped, or waits to be."""
        return not self._queue and not self._writers and not self._drops

    def entry(self, key: ChunkKey) -> TierEntry | None:
        """As `Supply`; None for what is being dropped."""
        return None if key in self._hidden else super().entry(key)

    def can_read(self, key: ChunkKey) -> bool:
        """As `Supply`; not while the device pauses."""
        return self.entry(key) is not None and self.tier.contains(key)

    def answers_for(self, key: ChunkKey) -> bool:
        """As `can_read`, for a key that the index knows to be here: any key of the last moments speaks for it.

        A lookup of a thousand keys cannot ask the devices about each.
        """
        now_s = time.monotonic()
        if now_s - self._answered_s > _ANSWER_S:
            if not self.can_read(key):
                return False
            self._answered_s = now_s
        return True

    @property
    def has_told_all(self) -> bool:
        """Whether everything in the tier was announced: what the index does not know is not here."""
        if not self._has_told_all:
            medium = self.medium
            if isinstance(medium, Scanned):
                self._has_told_all = medium.wait_scanned(0)
            elif isinstance(medium, Listed):
                self._has_told_all = medium.has_listed
        return self._has_told_all

    def lacks(self, key: ChunkKey) -> bool:
        """Whether the tier neither holds a record nor is about to; what it is about to drop does not count."""
        is_coming = key in self._queue or (key in self._writing and key not in self._hidden)
        return not is_coming and self.entry(key) is None

    def write_behind(self, key: ChunkKey) -> None:
        """Queue a chunk of the arena; not taken, and counted, when the queue is full."""
        if len(self._queue) >= self._max_queued:
            metrics.WRITE_BEHIND.labels(self.name, "dropped").inc()
            return
        self._queue[key] = None
        if self._num_draining < self._max_writers:
            self._num_draining += 1
            writer = asyncio.get_running_loop().create_task(self._drain())
            self._writers.add(writer)
            writer.add_done_callback(self._writers.discard)

    def drop(self, keys: Collection[ChunkKey]) -> "asyncio.Task[int]":
        """Forget records, also those that are being written: hidden now, gone when the task ends.

        Returns:
            A task; its result is how many there were.
        """
        # A set: two locks of one key would wait for each other.
        leaving = sorted({key for key in keys if key in self._writing or self.tier.entry(key) is not None})
        self._hidden.update(leaving)
        task = asyncio.get_running_loop().create_task(self._drop(leaving))
        self._drops.add(task)
        task.add_done_callback(self._drops.discard)
        return task

    def pin(self, key: ChunkKey, *, until_s: float) -> bool:
        """Keep a record from being evicted until a monotonic time; whether it is there and may be kept."""
        if self._pinnable is None or self.entry(key) is None or not self._pinnable.pin(key, until_s=until_s):
            return False
        if len(self._pins) >= _MAX_PINS_TOLD:
            now_s = time.monotonic()
            self._pins = {pinned: end_s for pinned, end_s in self._pins.items() if end_s > now_s}
        self._pins[key] = max(until_s, self._pins.get(key, until_s))
        return True

    def unpin(self, key: ChunkKey) -> None:
        """End a pin; harmless without one."""
        self._pins.pop(key, None)
        if self._pinnable is not None:
            self._pinnable.unpin(key)

    def is_pinned(self, key: ChunkKey) -> bool:
        """Whether a pin of this life of the store holds the record."""
        return self._pins.get(key, 0.0) > time.monotonic()

    def is_writing(self, key: ChunkKey) -> bool:
        """Whether the chunk is being copied out of the arena."""
        return key in self._writing

    async def run(self, work: Callable[[], T]) -> T:
        """Something else on the tier's threads."""
        return await self._run(work)

    def clear_queue(self) -> None:
        """Write nothing more but what is being written."""
        if self._queue:
            metrics.WRITE_BEHIND.labels(self.name, "dropped").inc(len(self._queue))
            self._queue.clear()

    async def close(self) -> None:
        """Wait for what is under way, and end the threads."""
        self.clear_queue()
        while self._writers or self._drops:
            await asyncio.gather(*self._writers, *self._drops)
        await super().close()

    async def _drain(self) -> None:
        try:
            while self._queue:
                key = next(iter(self._queue))
                del self._queue[key]
                async with self._order.of([key]):
                    # Only now: a drop that came before may have taken it; somebody may have learned it again since.
                    slot = self._host.find(key)
                    outcome = "evicted" if slot is None else await self._write(key, slot)
                metrics.WRITE_BEHIND.labels(self.name, outcome).inc()
                self._on_moved(key)
        finally:
            self._num_draining -= 1

    async def _write(self, key: ChunkKey, slot: Slot) -> str:
        self._host.hold(slot)
        self._writing.add(key)
        try:
            stored = await self._run(partial(self.tier.put, key, self._host.view(slot)))
            crash_point("write_behind_stored")
        except Exception:
            log.exception("write_behind_failed tier=%s key=%s", self.name, short(key))
            return "failed"
        finally:
            self._writing.discard(key)
            self._host.unpin(slot)
        return "stored" if stored else "failed"

    async def _drop(self, keys: Sequence[ChunkKey]) -> int:
        num_dropped = 0
        for start in range(0, len(keys), _DROP_BATCH):
            batch = keys[start : start + _DROP_BATCH]
            async with self._order.of(batch):
                try:
                    num_dropped += await self._run(partial(self._drop_batch, batch))
                except Exception:
                    log.exception("drop_failed tier=%s chunks=%d", self.name, len(batch))
            self._hidden.subtract(batch)
            for key in batch:
                if not self._hidden[key]:
                    del self._hidden[key]
                self._on_moved(key)
        return num_dropped

    def _drop_batch(self, keys: Sequence[ChunkKey]) -> int:
        return sum(self.tier.drop(key) for key in keys)


class _KeyLocks:
    """One thing at a time per key."""

    def __init__(self) -> None:
        self._locks: dict[ChunkKey, asyncio.Lock] = {}
        self._users: Counter[ChunkKey] = Counter()

    @asynccontextmanager
    async def of(self, keys: Sequence[ChunkKey]) -> AsyncIterator[None]:
        """Alone with some keys, which are sorted: two who want several would wait for each other otherwise."""
        self._users.update(keys)
        try:
            async with AsyncExitStack() as stack:
                for key in keys:
                    await stack.enter_async_context(self._locks.setdefault(key, asyncio.Lock()))
                yield
        finally:
            self._users.subtract(keys)
            for key in keys:
                if not self._users[key]:
                    del self._users[key]
                    self._locks.pop(key, None)
