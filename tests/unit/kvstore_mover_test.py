"""Chunks on their way between the tiers: from which source, to which tier, and what drops and failures leave."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from support.gated_tier import GatedTier

from kvstore import metrics
from kvstore.container import Header, parse_header, parse_record
from kvstore.keys import ChunkKey
from kvstore.mover import Landing, Mover
from kvstore.placement import Admission
from kvstore.shelf import Patience, Shelf, Supply
from kvstore.testing.samples import sample_key
from kvstore.testing.tier import record_of
from kvstore.tiers.host import HostTier

DEADLINE_S = 30.0
SIZE = 100_000
KEY = sample_key(1)
PATIENCE = Patience(base_s=10.0, min_bytes_per_s=1e6)


@dataclass
class Rig:
    """An arena, two tiers and a peer, with a mover between them."""

    host: HostTier
    nvme: GatedTier
    bucket: GatedTier
    peer: GatedTier
    mover: Mover
    moved: list[ChunkKey] = field(default_factory=list)
    settled: list[ChunkKey] = field(default_factory=list)

    def shelf(self, name: str) -> Shelf:
        return next(shelf for shelf in self.mover.shelves if shelf.name == name)

    def commit(self, index: int = 1, size: int = SIZE) -> ChunkKey:
        """A chunk that somebody computed here."""
        record = record_of(index, size)
        slot = self.host.reserve(sample_key(index), len(record))
        assert slot is not None
        self.host.view(slot)[:] = record
        assert self.host.commit(slot, parse_header(record))
        self.mover.note_commit(slot.key)
        return slot.key

    def is_held_right(self, index: int = 1) -> bool:
        slot = self.host.find(sample_key(index))
        return slot is not None and bytes(self.host.view(slot)) == bytes(record_of(index, SIZE))

    async def until(self, is_true: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not is_true():
                await asyncio.sleep(0.001)

    async def until_settled(self) -> None:
        await self.until(lambda: self.settled)


@asynccontextmanager
async def rig(
    *,
    nvme_admit: Admission = "all",
    object_admit: Admission = "all",
    max_queued: int = 100,
    is_wanted: Callable[[ChunkKey], bool] = lambda key: True,
    has_expired: Callable[[float], bool] = lambda learned_unix_s: False,
    host_bytes: int = 4 << 20,
) -> AsyncIterator[Rig]:
    host = HostTier(host_bytes)
    nvme, bucket, peer = (GatedTier(name) for name in ("nvme", "object", "peer"))
    moved: list[ChunkKey] = []
    settled: list[ChunkKey] = []

    def shelf(tier: GatedTier, admit: Admission) -> Shelf:
        return Shelf(
            tier, host, admit=admit, max_queued=max_queued, threads=2, patience=PATIENCE, on_moved=moved.append
        )

    mover = Mover(
        host,
        [shelf(nvme, nvme_admit), shelf(bucket, object_admit)],
        peers=Supply(peer, threads=2, patience=PATIENCE),
        on_moved=moved.append,
        on_settled=settled.append,
        is_wanted=is_wanted,
        has_expired=has_expired,
    )
    yield Rig(host, nvme, bucket, peer, mover, moved, settled)
    for tier, what in itertools.product((nvme, bucket, peer), ("put", "read", "drop")):
        tier.open_gate(what)
    async with asyncio.timeout(DEADLINE_S):
        await mover.stop(drain_s=0.0)
    assert mover.is_idle
    assert host.stat().pinned_bytes == 0
    host.close()


# Where from


@pytest.mark.parametrize(
    ("holders", "source"),
    [
        (("nvme", "peer", "object"), "nvme"),
        (("peer", "object"), "peer"),
        (("object",), "object"),
    ],
)
async def test_a_missing_chunk_comes_from_the_first_source_that_has_it(holders: tuple[str, ...], source: str) -> None:
    async with rig() as r:
        for tier in (r.nvme, r.peer, r.bucket):
            if tier.name in holders:
                tier.put(KEY, memoryview(record_of(1, SIZE)))
        assert r.mover.fetch(KEY)
        await r.until_settled()
        assert r.is_held_right()
        assert r.mover.fetched == {source: 1}


async def test_the_next_source_is_asked_when_one_fails() -> None:
    async with rig() as r:
        for tier in (r.nvme, r.peer, r.bucket):
            tier.put(KEY, memoryview(record_of(1, SIZE)))
        r.nvme.breaks_after, r.peer.breaks_after = 0, SIZE // 2
        assert r.mover.fetch(KEY)
        await r.until_settled()
        assert r.is_held_right()
        assert r.mover.fetched == {"object": 1}


async def test_a_node_that_breaks_off_may_not_be_the_only_one() -> None:
    """The peers are asked once more, which then take another holder; one that has nothing is not."""
    async with rig() as r:
        r.peer.put(KEY, memoryview(record_of(1, SIZE)))
        r.peer.breaks_after = SIZE // 2
        tries = itertools.count(1)
        read_into = r.peer.read_into

        def read(key: ChunkKey, view: memoryview, **arguments: Any) -> Header | None:
            r.peer.breaks_after = SIZE // 2 if next(tries) == 1 else None
            return read_into(key, view, **arguments)

        r.peer.read_into = read  # type: ignore[method-assign]
        assert r.mover.fetch(KEY)
        await r.until_settled()
        assert r.is_held_right()
        assert next(tries) == 3


async def test_a_source_that_lies_about_the_length_is_passed_over() -> None:
    async with rig() as r:
        r.nvme.put(KEY, memoryview(record_of(1, SIZE)))
        r.bucket.put(KEY, memoryview(record_of(1, SIZE)))
        entry = r.nvme.entry(KEY)
        r.nvme.records[KEY] = bytes(record_of(1, 2 * SIZE))
        r.nvme.entry = lambda key: entry  # type: ignore[method-assign]
        assert r.mover.fetch(KEY)
        await r.until_settled()
        assert r.is_held_right()


async def test_the_next_source_may_have_a_record_of_another_length() -> None:
    async with rig() as r:
        r.nvme.put(KEY, memoryview(record_of(1, 2 * SIZE)))
        r.bucket.put(KEY, memoryview(record_of(1, SIZE)))
        r.nvme.breaks_after = 0
        assert r.mover.fetch(KEY)
        await r.until_settled()
        assert r.is_held_right()


async def test_a_record_of_another_chunk_is_a_miss() -> None:
    async with rig() as r:
        r.peer.put(KEY, memoryview(record_of(1, SIZE)))
        other = bytes(record_of(2, SIZE))
        r.peer.read_into = lambda key, view, **_: _fill(view, other)  # type: ignore[method-assign,assignment]
        assert r.mover.fetch(KEY)
        await r.until_settled()
        assert not r.host.contains(KEY)


async def test_a_chunk_that_could_not_be_fetched_is_known_as_such_until_it_can() -> None:
    """So that it can be learned again, though a tier goes on saying that it has it."""
    async with rig() as r:
        r.nvme.put(KEY, memoryview(record_of(1, SIZE)))
        assert not r.mover.has_failed(KEY)
        r.nvme.breaks_after = 0
        assert r.mover.fetch(KEY)
        await r.until_settled()
        assert r.mover.has_failed(KEY)
        r.nvme.breaks_after = None
        assert r.mover.fetch(KEY)
        await r.until(lambda: r.host.contains(KEY))
        assert not r.mover.has_failed(KEY)


async def test_nothing_to_fetch_is_said_at_once() -> None:
    async with rig() as r:
        assert not r.mover.fetch(KEY)
        r.nvme.put(KEY, memoryview(record_of(1, 8 << 20)))
        assert not r.mover.fetch(KEY), "longer than the arena"


async def test_other_nodes_do_not_make_us_ask_other_nodes() -> None:
    async with rig() as r:
        r.peer.put(KEY, memoryview(record_of(1, SIZE)))
        assert r.mover.can_fetch(KEY)
        assert not r.mover.can_fetch(KEY, local_only=True)
        assert not r.mover.fetch(KEY, local_only=True)
        r.peer.close_gate("read")
        assert r.mover.fetch(KEY)
        await r.until(lambda: r.peer.started)
        assert not r.mover.fetch(KEY, local_only=True), "two stores could wait for each other"
        assert r.mover.fetch(KEY), "but others join"


async def test_what_nobody_waits_for_any_more_is_not_read() -> None:
    async with rig(is_wanted=lambda key: False) as r:
        r.nvme.put(KEY, memoryview(record_of(1, SIZE)))
        r.nvme.started.clear()
        assert r.mover.fetch(KEY)
        await r.until_settled()
        assert not r.nvme.started
        assert not r.host.contains(KEY)


async def test_an_expired_record_does_not_come_in() -> None:
    async with rig(has_expired=lambda learned_unix_s: True) as r:
        r.nvme.put(KEY, memoryview(record_of(1, SIZE)))
        assert r.mover.fetch(KEY)
        await r.until_settled()
        assert not r.host.contains(KEY)


# Following


async def test_followers_see_bytes_before_the_record_is_whole() -> None:
    async with rig() as r:
        r.nvme.put(KEY, memoryview(record_of(1, SIZE)))
        r.nvme.close_gate("read")
        assert r.mover.fetch(KEY)
        landing = r.mover.landing(KEY)
        assert landing is not None
        seen: list[tuple[int, bool, bool]] = []
        landing.follow(lambda now: seen.append((now.done_bytes, now.is_over, now.is_whole)))
        await r.until(lambda: seen)
        done_bytes = seen[0][0]
        assert 0 < done_bytes < landing.slot.stored_bytes
        assert bytes(r.host.view(landing.slot)[:done_bytes]) == bytes(record_of(1, SIZE))[:done_bytes]
        r.nvme.open_gate("read")
        await r.until_settled()
        assert seen[-1] == (landing.slot.stored_bytes, True, True)
        assert [n for n, _, _ in seen] == sorted(n for n, _, _ in seen)


async def test_a_source_that_breaks_off_ends_its_followers_and_spares_their_memory() -> None:
    """The next source's bytes may differ: they go elsewhere, and the old pages stay until they are let go."""
    async with rig() as r:
        r.nvme.put(KEY, memoryview(record_of(1, SIZE)))
        r.bucket.put(KEY, memoryview(record_of(1, SIZE)))
        r.nvme.close_gate("read")
        r.nvme.breaks_after = SIZE // 2
        assert r.mover.fetch(KEY)
        landing = r.mover.landing(KEY)
        assert landing is not None
        r.host.hold(landing.slot)
        ends: list[Landing] = []
        landing.follow(lambda now: ends.append(now) if now.is_over else None)
        await r.until(lambda: landing.done_bytes)
        early = bytes(r.host.view(landing.slot)[: landing.done_bytes])
        r.nvme.open_gate("read")
        await r.until_settled()
        assert r.is_held_right()
        assert [(end.is_over, end.is_whole) for end in ends] == [(True, False)]
        slot = r.host.find(KEY)
        assert slot is not None
        assert slot.start_page != landing.slot.start_page
        for index in range(2, 60):
            r.commit(index)
        assert bytes(r.host.view(landing.slot)[: len(early)]) == early
        r.host.unpin(landing.slot)


@pytest.mark.parametrize("breaks", [1, 2])
async def test_other_nodes_are_asked_once_more_when_one_breaks_off(breaks: int) -> None:
    """The source behind them is the next holder; a bucket comes after it, if there is one."""
    async with rig() as r:
        r.peer.put(KEY, memoryview(record_of(1, SIZE)))
        read_into, tries = r.peer.read_into, itertools.count(1)

        def read_and_break(key: ChunkKey, view: memoryview, **options: Any) -> Header | None:
            r.peer.breaks_after = SIZE // 2 if next(tries) <= breaks else None
            return read_into(key, view, **options)

        r.peer.read_into = read_and_break  # type: ignore[method-assign]
        assert r.mover.fetch(KEY)
        await r.until_settled()
        assert r.is_held_right() is (breaks == 1)
        assert next(tries) == 3


# Where to


@pytest.mark.parametrize(("admit", "uses", "written"), [("all", 0, True), ("reused", 0, False), ("reused", 1, True)])
async def test_admission_of_what_is_learned_here(admit: Admission, uses: int, written: bool) -> None:
    async with rig(nvme_admit=admit) as r:
        r.commit()
        for _ in range(uses):
            r.mover.note_use(KEY)
        await r.until(lambda: r.mover.is_idle)
        assert r.nvme.contains(KEY) is written
        assert r.bucket.contains(KEY)


@pytest.mark.parametrize(("source", "uses", "writes_to"), [("peer", 1, set()), ("peer", 2, {"nvme", "object"})])
async def test_copies_from_peers_are_written_when_they_are_used_again(
    source: str, uses: int, writes_to: set[str]
) -> None:
    async with rig() as r:
        r.peer.put(KEY, memoryview(record_of(1, SIZE)))
        assert r.mover.fetch(KEY)
        await r.until_settled()
        for _ in range(uses):
            r.mover.note_use(KEY)
        await r.until(lambda: r.mover.is_idle)
        assert {tier.name for tier in (r.nvme, r.bucket) if tier.contains(KEY)} == writes_to


async def test_what_comes_from_the_bucket_goes_to_the_disk() -> None:
    async with rig(nvme_admit="reused") as r:
        r.bucket.put(KEY, memoryview(record_of(1, SIZE)))
        r.bucket.started.clear()
        assert r.mover.fetch(KEY)
        await r.until_settled()
        await r.until(lambda: r.mover.is_idle)
        assert r.nvme.contains(KEY)
        assert ("put", KEY) not in r.bucket.started


async def test_a_full_queue_drops_and_counts_and_tries_again_on_reuse() -> None:
    async with rig(max_queued=2) as r:
        dropped = metrics.WRITE_BEHIND.labels("object", "dropped")._value.get()
        r.bucket.close_gate("put")
        for index in range(1, 7):
            r.commit(index)
            await r.until(lambda: not r.shelf("nvme").num_queued)
        assert metrics.WRITE_BEHIND.labels("object", "dropped")._value.get() - dropped >= 3
        await r.until(lambda: r.shelf("nvme").is_idle)
        assert all(r.nvme.contains(sample_key(i)) for i in range(1, 7)), "a slow bucket does not keep disks waiting"
        r.bucket.open_gate("put")
        await r.until(lambda: r.mover.is_idle)
        assert not r.bucket.contains(sample_key(6))
        r.mover.note_use(sample_key(6))
        await r.until(lambda: r.bucket.contains(sample_key(6)))


async def test_a_failing_tier_does_not_stop_the_queue() -> None:
    async with rig() as r:
        calls = itertools.count()
        put = r.nvme.put
        r.nvme.put = lambda key, record: next(calls) > 0 and put(key, record)  # type: ignore[method-assign]
        for index in (1, 2):
            r.commit(index)
        await r.until(lambda: r.mover.is_idle)
        assert not r.nvme.contains(sample_key(1))
        assert r.nvme.contains(sample_key(2))


# Drops


async def test_a_drop_while_the_chunk_is_written_is_not_undone() -> None:
    async with rig() as r:
        r.nvme.close_gate("put")
        r.commit()
        await r.until(lambda: ("put", KEY) in r.nvme.started)
        dropped = r.mover.drop([KEY])
        assert not r.mover.can_fetch(KEY)
        # The write ends, and for a moment the tier has the record: nobody may see it.
        r.nvme.close_gate("drop")
        r.nvme.open_gate("put")
        await r.until(lambda: ("drop", KEY) in r.nvme.started)
        assert KEY in r.nvme.records
        assert not r.mover.can_fetch(KEY)
        assert not r.mover.fetch(KEY)
        r.nvme.open_gate("drop")
        assert await dropped
        assert KEY not in r.nvme.records


async def test_a_drop_while_the_chunk_is_fetched_and_written_is_not_undone() -> None:
    """The end of the write must not make the fetch forget that nobody wants its chunk."""
    async with rig() as r:
        r.bucket.put(KEY, memoryview(record_of(1, SIZE)))
        r.bucket.close_gate("read")
        r.nvme.close_gate("put")
        r.commit()
        await r.until(lambda: ("put", KEY) in r.nvme.started)
        r.host.drop(KEY)
        assert r.mover.fetch(KEY)
        await r.until(lambda: ("read", KEY) in r.bucket.started)
        dropped = r.mover.drop([KEY])
        r.nvme.open_gate("put")
        assert await dropped
        r.bucket.open_gate("read")
        await r.until_settled()
        await r.until(lambda: r.mover.is_idle)
        assert not r.host.contains(KEY)
        assert not r.nvme.records
        assert not r.bucket.records


async def test_a_chunk_that_is_learned_again_after_its_drop_is_kept() -> None:
    async with rig() as r:
        r.nvme.close_gate("put")
        r.commit()
        await r.until(lambda: ("put", KEY) in r.nvme.started)
        dropped = r.mover.drop([KEY])
        r.commit()
        r.nvme.open_gate("put")
        await dropped
        await r.until(lambda: r.mover.is_idle)
        parse_record(r.nvme.records[KEY], expected_key=KEY)
        assert r.is_held_right()
        assert r.mover.can_fetch(KEY)


async def test_many_drops_at_once_end() -> None:
    """Also with the same keys in another order: two that want several keys do not wait for each other."""
    async with rig() as r:
        keys = [sample_key(index) for index in range(200)]
        for index in range(200):
            r.nvme.put(sample_key(index), memoryview(record_of(index, 100)))
        drops = [r.mover.drop(keys), r.mover.drop(keys[::-1]), r.mover.drop(keys[100:] + keys[:100])]
        async with asyncio.timeout(DEADLINE_S):
            assert any(await asyncio.gather(*drops))
        assert not r.nvme.records


async def test_a_damaged_record_is_not_left_in_the_tier_it_is_copied_to() -> None:
    async with rig() as r:
        r.nvme.close_gate("put")
        r.commit()
        await r.until(lambda: ("put", KEY) in r.nvme.started)
        r.host.drop(KEY)
        r.mover.note_corrupt(KEY)
        r.nvme.open_gate("put")
        await r.until(lambda: r.mover.is_idle)
        assert KEY not in r.nvme.records


# The end


async def test_stop_ends_though_chunks_keep_coming() -> None:
    async with rig() as r:
        indexes = itertools.count(10)
        commits = asyncio.create_task(_keep_committing(r, indexes))
        await r.until(lambda: r.nvme.records)
        async with asyncio.timeout(DEADLINE_S):
            await r.mover.stop(drain_s=0.0)
        commits.cancel()
        await asyncio.gather(commits, return_exceptions=True)
        assert r.mover.is_idle
        # A read that comes now learns at once that the chunk stays where it is.
        key = next(iter(r.nvme.records))
        r.host.drop(key)
        assert not r.mover.fetch(key)


async def _keep_committing(r: Rig, indexes: "itertools.count[int]") -> None:
    while True:
        r.commit(next(indexes), 1000)
        await asyncio.sleep(0)


def _fill(view: memoryview, record: bytes) -> object:
    view[:] = record
    return parse_header(record)
