"""Looking over what a node holds: the catalogue, age, quotas, damaged records, leftovers.

Covers: what the operator's commands and the passing of time ask for, in small steps: the store never stalls for it.
Does not cover: which chunk leaves for room (`kvstore.policy`), ages (`kvstore.store_time`).

Runs on the store's event loop; media are read and changed on the threads of their tier.
"""

import asyncio
import logging
import mmap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, Protocol, runtime_checkable

from cluster.errors import DataError
from cluster.telemetry import short
from kvstore import metrics
from kvstore.container import parse_record, stored_bytes
from kvstore.index import ChunkIndex
from kvstore.interfaces import CatalogEntry, TierEntry
from kvstore.keys import ChunkKey
from kvstore.policy import Quotas
from kvstore.shelf import Shelf
from kvstore.store_time import StoreTime
from kvstore.tiers.host import HostTier

log = logging.getLogger(__name__)

_SLICE: Final = 1024
"""Entries looked at before others have their turn: about a millisecond."""
_PAGE_CHUNKS: Final = 1024
_PAGE_BYTES: Final = 512 << 10
"""Half of a frame."""
_ENTRY_BYTES: Final = 320
"""Above what an entry takes in a page beside its two texts."""
_VERIFY_S: Final = 30.0
_FEWEST_SWEEPS: Final = 10
_MIN_SWEEP_S: Final = 1.0
_MAX_SWEEP_S: Final = 60.0


@runtime_checkable
class LeavesLitter(Protocol):
    """A tier in which a crash leaves something that is no record."""

    def remove_leftovers(self) -> int:
        """Delete temporary files and unfinished uploads that nobody works on; how many there were. Blocks."""
        ...


class Upkeep:
    """One store's housekeeping.

    Args:
        host: The arena.
        shelves: The tiers below it.
        index: What is held.
        time: Ages.
        quotas: Bytes per tenant and tier.
        on_gone: Told of every chunk that leaves the arena for its age.
    """

    def __init__(
        self,
        host: HostTier,
        shelves: Sequence[Shelf],
        index: ChunkIndex,
        *,
        time: StoreTime,
        quotas: Quotas,
        on_gone: Callable[[ChunkKey], None],
    ) -> None:
        self._host = host
        self._shelves = tuple(shelves)
        self._index = index
        self._time = time
        self._quotas = quotas
        self._on_gone = on_gone

    # The catalogue

    def pages(self, *, now_s: float) -> Iterator[list[CatalogEntry]]:
        """What is held, a page at a time; chunks that come or go meanwhile may be in it or not. At least one page."""
        page: list[CatalogEntry] = []
        page_bytes = 0
        for key in self._index.keys():  # noqa: SIM118 not a dict
            entry = self._entry(key, now_s)
            if entry is None:
                continue
            page.append(entry)
            page_bytes += _ENTRY_BYTES + 4 * (len(entry.tenant) + len(entry.codec))
            if page_bytes >= _PAGE_BYTES or len(page) >= _PAGE_CHUNKS:
                yield page
                page, page_bytes = [], 0
        yield page

    def _entry(self, key: ChunkKey, now_s: float) -> CatalogEntry | None:
        known = self._index.find(key)
        if known is None:
            return None
        sizes: dict[str, int] = {}
        slot = self._host.find(key)
        if slot is not None:
            sizes[self._host.name] = slot.stored_bytes
        for shelf in self._shelves:
            entry = shelf.entry(key)
            if entry is not None:
                sizes[shelf.name] = entry.stored_bytes
        chunk = known.chunk
        return CatalogEntry(
            key=key,
            stored_bytes_by_tier=sizes,
            num_tokens=chunk.num_tokens,
            base_position=chunk.base_position,
            codec=chunk.codec,
            tenant=chunk.tenant,
            learned_unix_s=chunk.learned_unix_s,
            uses=known.uses,
            idle_s=None if known.last_used_s is None else max(0.0, now_s - known.last_used_s),
            is_pinned=self._host.books.is_pinned(key, now_s) or any(s.is_pinned(key) for s in self._shelves),
        )

    # Damage

    async def verify(self, keys: Iterable[ChunkKey]) -> Counter[str]:
        """Read records of the tiers below again, one at a time per tier; damaged ones are dropped.

        Returns:
            Records that are "good", "bad" (and dropped), "unread": the medium did not answer, or the store key is not
            here.
        """
        wanted = list(keys)
        outcomes = await asyncio.gather(*(self._verify(shelf, wanted) for shelf in self._shelves))
        return sum(outcomes, Counter())

    async def _verify(self, shelf: Shelf, keys: Sequence[ChunkKey]) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        for key in keys:
            entry = shelf.entry(key)
            if entry is None:
                continue
            outcome = await shelf.run(partial(_read_again, shelf, key, entry))
            if outcome == "unread" and shelf.entry(key) is None and shelf.medium.entry(key) is None:
                # The tier found out by itself, and has dropped it. A record of another store key is kept.
                outcome = "bad"
            elif outcome == "bad":
                # A drop that has begun is ended, also when whoever asked for this has gone.
                await asyncio.shield(shelf.drop([key]))
            outcomes[outcome] += 1
            metrics.VERIFIED.labels(shelf.name, outcome).inc()
            self._index.refresh(key)
        return outcomes

    # Age and quotas

    @property
    def sweep_interval_s(self) -> float | None:
        """Seconds between two looks for chunks that are too old; None without a TTL."""
        ttl_s = self._time.ttl_s
        return None if ttl_s is None else max(_MIN_SWEEP_S, min(_MAX_SWEEP_S, ttl_s / _FEWEST_SWEEPS))

    async def sweep(self) -> int:
        """Drop what is too old in every tier; how many records.

        What is too old is a miss already, wherever it is looked for (`StoreTime`). In the first minutes of a store
        nothing is deleted, only announced as gone.
        """
        num_gone = 0
        keys = [key for key, _ in self._host.keys()]  # noqa: SIM118 not a dict
        for part in _slices(keys):
            for key in part:
                slot = self._host.find(key)
                if slot is not None and slot.header is not None and self._is_old(slot.header.meta.learned_unix_s):
                    self._host.drop(key)
                    self._on_gone(key)
                    self._index.refresh(key)
                    metrics.EXPIRED.labels(self._host.name).inc()
                    num_gone += 1
            await asyncio.sleep(0)
        for shelf in self._shelves:
            num_gone += await self._sweep_shelf(shelf)
        return num_gone

    async def _sweep_shelf(self, shelf: Shelf) -> int:
        num_gone = 0
        for part in _slices(await shelf.run(partial(_keys_of, shelf))):
            entries = ((key, shelf.tier.entry(key)) for key in part)
            old = [key for key, entry in entries if entry is not None and self._is_old(entry.learned_unix_s)]
            if self._time.is_settled:
                num_gone += await asyncio.shield(shelf.drop(old))
                metrics.EXPIRED.labels(shelf.name).inc(len(old))
            for key in old:
                self._index.refresh(key)
            await asyncio.sleep(0)
        return num_gone

    async def announce_again(self) -> None:
        """Compare every key of every tier with what was announced: after store time has moved."""
        for shelf in self._shelves:
            for part in _slices(await shelf.run(partial(_keys_of, shelf))):
                for key in part:
                    self._index.refresh(key)
                await asyncio.sleep(0)

    async def enforce_quotas(self) -> int:
        """Drop records of tenants that hold more than a quota that was lowered since; how many records.

        Tiers keep quotas at every write; this is for what was there before.
        """
        if not self._quotas.are_set:
            return 0
        num_gone = 0
        for shelf in self._shelves:
            sizes: dict[str, list[tuple[ChunkKey, int]]] = {}
            for part in _slices(await shelf.run(partial(_keys_of, shelf))):
                for key in part:
                    entry = shelf.entry(key)
                    if entry is not None and self._quotas.limit_bytes(entry.tenant) is not None:
                        sizes.setdefault(entry.tenant, []).append((key, entry.stored_bytes))
                await asyncio.sleep(0)
            for tenant, held in sizes.items():
                over_bytes = sum(size for _, size in held) - (self._quotas.limit_bytes(tenant) or 0)
                num_gone += await asyncio.shield(shelf.drop(list(_until_freed(held, over_bytes))))
        return num_gone

    async def remove_leftovers(self) -> int:
        """Delete what crashes left in the media; how many pieces."""
        found = 0
        for shelf in self._shelves:
            if isinstance(shelf.medium, LeavesLitter):
                found += await shelf.run(shelf.medium.remove_leftovers)
        return found

    def _is_old(self, learned_unix_s: float) -> bool:
        return self._time.has_expired(learned_unix_s)


def _keys_of(shelf: Shelf) -> list[ChunkKey]:
    return [key for key, _ in shelf.tier.keys()]  # noqa: SIM118 not a dict


def _slices(keys: Sequence[ChunkKey]) -> Iterator[Sequence[ChunkKey]]:
    return (keys[start : start + _SLICE] for start in range(0, len(keys), _SLICE))


def _until_freed(held: Iterable[tuple[ChunkKey, int]], over_bytes: int) -> Iterator[ChunkKey]:
    for key, size in held:
        if over_bytes <= 0:
            return
        over_bytes -= size
        yield key


def _read_again(shelf: Shelf, key: ChunkKey, entry: TierEntry) -> str:
    """On a thread of the tier."""
    pages = mmap.mmap(-1, stored_bytes(entry.payload_bytes))
    try:
        with memoryview(pages) as view:
            if shelf.tier.read_into(key, view, stop_s=time.monotonic() + _VERIFY_S) is None:
                return "unread"
            parse_record(view, expected_key=key)
            return "good"
    except DataError as error:
        # Not the error itself: its traceback holds views of the pages.
        log.warning("verify_failed tier=%s key=%s error=%s", shelf.name, short(key), str(error))
        return "bad"
    except OSError as error:
        log.warning("verify_unread tier=%s key=%s error=%s", shelf.name, short(key), error)
        return "unread"
    finally:
        # An error on its way up may still refer to slices of the view: the pages go with it.
        with suppress(BufferError):
            pages.close()
