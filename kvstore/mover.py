"""Chunks on their way: into the arena when they are read, out of it to the tiers below.

Covers: which source a missing chunk comes from, following a chunk while it arrives, what is written where, drops.
Does not cover: threads, queues and time limits (`kvstore.shelf`), the rules (`kvstore.placement`).

Everything works in place: sources fill arena slots, and tiers are written from them. A slot that is being filled is
pinned by those who follow it, so its pages are not reused before the last of them has let go, whatever happens.

A copy that fails half way is not continued: what comes from the next source may differ in the last bit of a float, and
early bytes may have been used already. Its followers are told, and the next source gets a slot of its own.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.telemetry import short
from kvstore import metrics
from kvstore.container import Header, stored_bytes
from kvstore.crash import crash_point
from kvstore.keys import ChunkKey
from kvstore.placement import Origin, in_order, origin_of, should_write
from kvstore.shelf import Shelf, Supply
from kvstore.tiers.host import HostTier, Slot

log = logging.getLogger(__name__)

PROGRESS_PARTS: Final = 16
"""Followers are told about so many times how much has arrived."""
_FAILURE_S: Final = 30.0
"""For so long a chunk that could not be fetched may be written anew, though a tier says that it has it."""
_MAX_FAILURES: Final = 4096
_IDLE_POLL_S: Final = 0.01


class Landing:
    """One record on its way into the arena."""

    def __init__(self, key: ChunkKey, slot: Slot, payload_bytes: int, *, source_name: str) -> None:
        self.key = key
        self.slot = slot
        self.payload_bytes = payload_bytes
        self.source_name = source_name
        self.done_bytes = 0
        """Bytes of the record that are in place, from its start. Written by the thread that reads."""
        self.was_told = False
        """Whether the source has written any byte, be it fewer than were worth telling."""
        self.is_over = False
        self.is_whole = False
        """Whether it ended with a readable record in `slot`."""
        self.is_unwanted = False
        """Dropped while it was on its way."""
        self._followers: set[Callable[[Landing], None]] = set()

    @property
    def is_followed(self) -> bool:
        """Whether anybody wants to know how it goes on."""
        return bool(self._followers)

    def follow(self, on_change: Callable[["Landing"], None]) -> None:
        """Call back when more bytes are in place, and at the end."""
        self._followers.add(on_change)

    def unfollow(self, on_change: Callable[["Landing"], None]) -> None:
        """No longer; harmless if it did not follow."""
        self._followers.discard(on_change)

    def tell(self) -> None:
        """Something has changed."""
        for on_change in list(self._followers):
            on_change(self)

    def end(self, *, is_whole: bool) -> None:
        """Nothing more comes into this slot."""
        if not self.is_over:
            self.is_over, self.is_whole = True, is_whole
            self.tell()
            self._followers.clear()


@dataclass(slots=True)
class _Fresh:
    """A chunk of the arena that some tier below may still want."""

    origin: Origin
    uses: int = 0


class Mover:
    """Runs on the store's event loop.

    Args:
        host: The arena.
        shelves: The tiers below it; closed by `stop`.
        peers: The stores of other nodes; closed by `stop`.
        on_moved: Told of every key whose tiers changed.
        on_settled: Told of every key whose way into the arena has ended, well or not.
        is_wanted: Whether anybody waits for a chunk; asked before a read begins.
        has_expired: Whether a chunk of that date is a miss.
    """

    def __init__(
        self,
        host: HostTier,
        shelves: Sequence[Shelf],
        *,
        peers: Supply | None = None,
        on_moved: Callable[[ChunkKey], None],
        on_settled: Callable[[ChunkKey], None],
        is_wanted: Callable[[ChunkKey], bool] = lambda key: True,
        has_expired: Callable[[float], bool] = lambda learned_unix_s: False,
    ) -> None:
        self.shelves = tuple(shelves)
        self._shelf_by_name = {shelf.name: shelf for shelf in shelves}
        self._host = host
        self._peers = peers
        self._on_moved = on_moved
        self._on_settled = on_settled
        self._is_wanted = is_wanted
        self._has_expired = has_expired
        supplies: list[Supply] = [*shelves, *([peers] if peers else [])]
        self._supplies = in_order((supply.name, supply) for supply in supplies)
        self._landings: dict[ChunkKey, Landing] = {}
        self._fetches: set[asyncio.Task[None]] = set()
        self._fresh: dict[ChunkKey, _Fresh] = {}
        self._is_stopping = False
        self._has_told_all = False
        self._failures: OrderedDict[ChunkKey, float] = OrderedDict()
        """When fetches failed that somebody wanted, latest last."""
        self.fetched: Counter[str] = Counter()
        """Chunks brought into the arena so far, by source."""

    @property
    def queued_chunks(self) -> int:
        """Chunks that wait to be written, over all tiers."""
        return sum(shelf.num_queued for shelf in self.shelves)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way."""
        return not self._fetches and all(shelf.is_idle for shelf in self.shelves)

    # Into the arena

    def can_fetch(self, key: ChunkKey, *, local_only: bool = False) -> bool:
        """Whether a source below the arena probably has a chunk."""
        return any(supply.can_read(key) for supply in self._sources(local_only))

    def can_fetch_known(self, key: ChunkKey, tier: str | None) -> bool:
        """As `can_fetch`, quicker, for whoever knows what was announced.

        Args:
            key: The chunk.
            tier: The tier that was announced to hold it; None: none.
        """
        if tier is not None:
            shelf = self._shelf_by_name.get(tier)
            if shelf is not None and shelf.answers_for(key):
                return True
        elif self._has_told_all or all(shelf.has_told_all for shelf in self.shelves):
            self._has_told_all = True
            return self._peers is not None and self._peers.can_read(key)
        return self.can_fetch(key)

    def has_failed(self, key: ChunkKey) -> bool:
        """Whether a chunk that a source said to have could not be fetched a moment ago."""
        failed_s = self._failures.get(key)
        return failed_s is not None and time.monotonic() - failed_s < _FAILURE_S

    def landing(self, key: ChunkKey) -> Landing | None:
        """The chunk's way into the arena, if it is on it."""
        return self._landings.get(key)

    def fetch(self, key: ChunkKey, *, local_only: bool = False) -> bool:
        """Bring a chunk into the arena; joins a fetch that is under way.

        Args:
            key: The chunk.
            local_only: Not from other nodes, and not waiting for them: two stores could wait for each other.

        Returns:
            Whether `on_settled` will follow.
        """
        landing = self._landings.get(key)
        if landing is not None:
            return not (local_only and self._peers is not None and landing.source_name == self._peers.name)
        if self._is_stopping:
            return False
        for supply in self._sources(local_only):
            landing = self._reserve(key, supply) if supply.can_read(key) else None
            if landing is not None:
                crash_point("promotion_opened")
                self._landings[key] = landing
                task = asyncio.get_running_loop().create_task(self._fetch(landing, local_only))
                self._fetches.add(task)
                task.add_done_callback(self._fetches.discard)
                return True
        return False

    # Out of it

    def note_commit(self, key: ChunkKey) -> None:
        """A chunk that was computed here is readable in the arena."""
        self._admit(key, Origin.COMMIT)

    def note_use(self, key: ChunkKey) -> None:
        """A chunk of the arena was read: tiers that wanted to see that may take it now."""
        fresh = self._fresh.get(key)
        if fresh is not None:
            fresh.uses += 1
            self._offer(key, fresh)

    def note_evicted(self, key: ChunkKey) -> None:
        """A chunk has left the arena for room."""
        self._fresh.pop(key, None)

    def note_corrupt(self, key: ChunkKey) -> None:
        """A record of the arena was found to be damaged: copies of it that are being made are worth nothing."""
        self._fresh.pop(key, None)
        for shelf in self.shelves:
            if shelf.is_writing(key):
                shelf.drop([key])

    def drop(self, keys: Collection[ChunkKey]) -> Awaitable[bool]:
        """Forget chunks in all tiers of this node, at once for everybody who asks.

        Returns:
            When awaited, that the media have forgotten them too; whether there was one.
        """
        was_held = False
        for key in keys:
            was_held |= any(shelf.entry(key) is not None for shelf in self.shelves)
            landing = self._landings.pop(key, None)
            if landing is not None:
                landing.is_unwanted = True
            self._fresh.pop(key, None)
            was_held |= self._host.drop(key)
        drops = [shelf.drop(keys) for shelf in self.shelves]
        for key in keys:
            self._on_moved(key)
        return self._all_dropped(drops, was_held)

    async def stop(self, *, drain_s: float) -> None:
        """Finish copies for at most `drain_s` seconds, drop the rest of the queues, and end the threads."""
        loop = asyncio.get_running_loop()
        stop_s = loop.time() + drain_s
        while not self.is_idle and loop.time() < stop_s:
            await asyncio.sleep(_IDLE_POLL_S)
        # Clients go on until the server stops: from here on nothing new is copied, or this would never end.
        self._is_stopping = True
        # Copies under way end by themselves; their memory must not go before.
        supplies: list[Supply] = [*self.shelves, *([self._peers] if self._peers else [])]
        for shelf in self.shelves:
            shelf.clear_queue()
        await asyncio.gather(*self._fetches)
        await asyncio.gather(*(supply.close() for supply in supplies))

    def _sources(self, local_only: bool) -> Sequence[Supply]:
        return [supply for supply in self._supplies if not (local_only and supply is self._peers)]

    def _reserve(self, key: ChunkKey, supply: Supply) -> Landing | None:
        """A slot for what a source says it has; None if it has nothing, or there is no room."""
        entry = supply.entry(key)
        if entry is None:
            return None
        slot = self._host.reserve(key, stored_bytes(entry.payload_bytes), tenant=entry.tenant)
        if slot is None:
            metrics.TIER_WRITES.labels(self._host.name, "full").inc()
            return None
        return Landing(key, slot, entry.payload_bytes, source_name=supply.name)

    async def _fetch(self, landing: Landing, local_only: bool) -> None:
        """Ask one source after the other until one has given the whole record."""
        header: Header | None = None
        has_tried = False
        try:
            for supply in self._tries(landing.key, local_only):
                fitting = self._fitting(landing, supply)
                if fitting is None:
                    continue
                landing = fitting
                landing.source_name = supply.name
                try:
                    header = await self._read(supply, landing)
                except Exception:
                    # A source that breaks its promise is one without the chunk.
                    log.exception("fetch_failed key=%s source=%s", short(landing.key), supply.name)
                has_tried = has_tried or self._still_wanted(landing)
                metrics.FETCHES.labels(supply.name, "failed" if header is None else "whole").inc()
                if header is not None:
                    break
        except Exception:
            log.exception("fetch_failed key=%s source=%s", short(landing.key), landing.source_name)
        finally:
            if has_tried and header is None:
                self._note_failure(landing.key)
            self._land(landing, header)

    def _tries(self, key: ChunkKey, local_only: bool) -> Iterator[Supply]:
        """The sources in order. One that broke off half way is asked once more: it may have another copy."""
        for supply in self._sources(local_only):
            yield supply
            landing = self._landings.get(key)
            if landing is not None and landing.was_told:
                yield supply

    def _fitting(self, landing: Landing, supply: Supply) -> Landing | None:
        """What a source can be read into: the same slot, or another if it has the wrong size or was used in part."""
        key = landing.key
        entry = supply.entry(key) if supply.can_read(key) and not landing.is_unwanted else None
        if entry is None:
            return None
        is_used = landing.slot.pins > 0 and landing.done_bytes > 0
        if landing.slot.stored_bytes == stored_bytes(entry.payload_bytes) and not is_used:
            landing.done_bytes = 0
            landing.was_told = False
            return landing
        other = self._reserve(key, supply)
        if other is not None:
            if self._landings.get(key) is landing:
                self._landings[key] = other
            self._host.discard(landing.slot)
            landing.end(is_whole=False)
        return other

    async def _read(self, supply: Supply, landing: Landing) -> Header | None:
        key, slot = landing.key, landing.slot
        loop = asyncio.get_running_loop()
        step = max(1, slot.stored_bytes // PROGRESS_PARTS)
        next_bytes = step

        def on_bytes(num_bytes: int) -> None:
            # On the thread that reads, perhaps for every packet.
            nonlocal next_bytes
            landing.was_told = True
            if num_bytes * 2 >= slot.stored_bytes:
                crash_point("promotion_half")
            if num_bytes >= next_bytes or num_bytes == slot.stored_bytes:
                next_bytes = num_bytes + step
                landing.done_bytes = num_bytes
                if landing.is_followed:
                    loop.call_soon_threadsafe(landing.tell)

        return await supply.read(
            key, self._host.view(slot), is_wanted=lambda: self._still_wanted(landing), on_bytes=on_bytes
        )

    def _still_wanted(self, landing: Landing) -> bool:
        return not landing.is_unwanted and (landing.is_followed or self._is_wanted(landing.key))

    def _note_failure(self, key: ChunkKey) -> None:
        self._failures[key] = time.monotonic()
        self._failures.move_to_end(key)
        if len(self._failures) > _MAX_FAILURES:
            self._failures.popitem(last=False)

    def _land(self, landing: Landing, header: Header | None) -> None:
        key = landing.key
        if self._landings.get(key) is landing:
            del self._landings[key]
        crash_point("promotion_before_commit")
        if header is None or landing.is_unwanted or self._has_expired(header.meta.learned_unix_s):
            self._host.discard(landing.slot)
            is_held = False
        else:
            is_held = self._host.commit(landing.slot, header)
        crash_point("promoted")
        if is_held:
            self.fetched[landing.source_name] += 1
            self._failures.pop(key, None)
            landing.done_bytes = landing.slot.stored_bytes
        landing.end(is_whole=is_held)
        self._on_moved(key)
        if is_held:
            self._admit(key, origin_of(landing.source_name))
        self._on_settled(key)

    def _admit(self, key: ChunkKey, origin: Origin) -> None:
        """A chunk has come into the arena: which tiers below it want it, now or when it is used."""
        if self.shelves and not self._is_stopping:
            fresh = self._fresh[key] = _Fresh(origin)
            self._offer(key, fresh)

    def _offer(self, key: ChunkKey, fresh: _Fresh) -> None:
        lacking = [shelf for shelf in self.shelves if shelf.lacks(key)]
        if not lacking:
            self._fresh.pop(key, None)
        for shelf in lacking:
            if not self._is_stopping and should_write(
                shelf.name, admit=shelf.admit, origin=fresh.origin, uses=fresh.uses
            ):
                shelf.write_behind(key)

    async def _all_dropped(self, drops: Sequence["asyncio.Task[int]"], was_held: bool) -> bool:
        await asyncio.gather(*(asyncio.shield(drop) for drop in drops))
        return was_held
