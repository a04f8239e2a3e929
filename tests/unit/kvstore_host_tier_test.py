"""Slots of the arena while they are written, read and given up; quotas and pins there.

Covers: readers that follow a writer, tails given back, who is evicted. Does not cover: the tier contract
(`tests/contract`), how full an arena stays (`tests/sim`).
"""

from collections.abc import Iterator

import pytest

from cluster.clock import ManualClock
from cluster.errors import InvariantError
from kvstore.container import Header, encode_record, parse_header
from kvstore.interfaces import ChunkMeta
from kvstore.keys import ChunkKey
from kvstore.policy import Quotas, make_policy
from kvstore.testing.samples import sample_key, sample_meta
from kvstore.tiers.host import PAGE_BYTES, HostTier, Slot, SlotState

PAGES = 8


@pytest.fixture
def host() -> Iterator[HostTier]:
    tier = HostTier(PAGES * PAGE_BYTES)
    yield tier
    for key, _ in list(tier.keys()):
        tier.drop(key)
    assert tier.stat().pinned_bytes == 0
    everything = tier.reserve(sample_key(0), PAGES * PAGE_BYTES)
    assert everything is not None, "room leaked"
    tier.discard(everything)
    tier.close()


def header_of(key: ChunkKey, stored_bytes: int, meta: ChunkMeta | None = None) -> Header:
    return parse_header(encode_record(key, meta or sample_meta(), bytes(stored_bytes - 4096)), expected_key=key)


def reserved(host: HostTier, index: int, pages: int, *, tenant: str = "") -> Slot:
    slot = host.reserve(sample_key(index), pages * PAGE_BYTES, tenant=tenant)
    assert slot is not None
    return slot


def stored(host: HostTier, index: int, pages: int, *, tenant: str = "") -> Slot:
    slot = reserved(host, index, pages, tenant=tenant)
    assert host.commit(slot, header_of(slot.key, slot.stored_bytes))
    return slot


class TestReadersThatFollowAWriter:
    def test_a_slot_being_written_can_be_read(self, host: HostTier) -> None:
        slot = reserved(host, 1, 2)
        host.hold(slot)
        assert host.stat().pinned_bytes == 2 * PAGE_BYTES
        assert host.commit(slot, header_of(slot.key, slot.stored_bytes))
        assert host.stat().pinned_bytes == 2 * PAGE_BYTES
        host.unpin(slot)
        assert host.stat().pinned_bytes == 0
        assert host.contains(slot.key)

    def test_pages_of_a_write_that_was_given_up_stay_their_readers(self, host: HostTier) -> None:
        slot = reserved(host, 1, 5)
        host.view(slot)[:3] = b"abc"
        host.hold(slot)
        host.hold(slot)
        host.discard(slot)
        assert slot.state is SlotState.GONE
        assert host.reserve(sample_key(2), 4 * PAGE_BYTES) is None, "the pages are still being read"
        host.unpin(slot)
        assert host.stat().pinned_bytes == 5 * PAGE_BYTES
        assert host.view(slot)[:3] == b"abc"
        host.unpin(slot)
        stored(host, 2, PAGES)

    def test_nobody_can_follow_what_is_gone(self, host: HostTier) -> None:
        slot = reserved(host, 1, 1)
        host.discard(slot)
        with pytest.raises(InvariantError, match="gone"):
            host.hold(slot)
        with pytest.raises(InvariantError, match="more often"):
            host.unpin(slot)

    def test_who_loses_the_race_for_a_key_leaves_its_readers_their_pages(self, host: HostTier) -> None:
        first, second = reserved(host, 1, 2), reserved(host, 1, 2)
        host.hold(second)
        assert host.commit(first, header_of(first.key, first.stored_bytes))
        assert not host.commit(second, header_of(second.key, second.stored_bytes))
        assert host.stat().pinned_bytes == 2 * PAGE_BYTES
        host.unpin(second)
        assert host.find(first.key) is first


class TestShrinking:
    def test_the_tail_is_free_at_once(self, host: HostTier) -> None:
        slot = reserved(host, 1, 6)
        host.shrink(slot, PAGE_BYTES + 4096)
        assert (slot.pages, slot.stored_bytes, host.stat().pinned_bytes) == (2, PAGE_BYTES + 4096, 2 * PAGE_BYTES)
        stored(host, 2, 6)
        assert host.commit(slot, header_of(slot.key, slot.stored_bytes))
        assert dict(host.keys()) == {slot.key: PAGE_BYTES + 4096, sample_key(2): 6 * PAGE_BYTES}

    def test_a_reader_keeps_the_tail_until_it_is_done(self, host: HostTier) -> None:
        """It was told the longer length, and may still look there."""
        slot = reserved(host, 1, 6)
        host.hold(slot)
        host.shrink(slot, PAGE_BYTES)
        assert host.commit(slot, header_of(slot.key, slot.stored_bytes))
        assert host.reserve(sample_key(2), 3 * PAGE_BYTES) is None
        host.unpin(slot)
        stored(host, 2, 7)
        assert host.contains(slot.key)

    def test_a_cut_within_the_last_page_frees_nothing(self, host: HostTier) -> None:
        slot = reserved(host, 1, 3)
        host.shrink(slot, 3 * PAGE_BYTES - 4096)
        assert slot.pages == 3
        host.discard(slot)

    @pytest.mark.parametrize("stored_bytes", [0, -1, 2 * PAGE_BYTES + 1])
    def test_no_slot_grows_or_vanishes(self, host: HostTier, stored_bytes: int) -> None:
        slot = reserved(host, 1, 2)
        with pytest.raises(InvariantError, match="cannot be cut"):
            host.shrink(slot, stored_bytes)
        host.discard(slot)

    def test_what_is_committed_keeps_its_length(self, host: HostTier) -> None:
        slot = stored(host, 1, 2)
        with pytest.raises(InvariantError, match="held, not writing"):
            host.shrink(slot, PAGE_BYTES)


def test_evicted_records_are_told_and_their_readers_keep_their_pages() -> None:
    evicted: list[Slot] = []
    host = HostTier(4 * PAGE_BYTES, on_evict=evicted.append)
    first, second = stored(host, 1, 2), stored(host, 2, 2)
    assert host.pin(first.key) is first
    third = stored(host, 3, 2)
    assert evicted == [second]
    assert host.reserve(sample_key(4), 3 * PAGE_BYTES) is None, "first is being read"
    assert host.contains(third.key), "and nobody lost their place for nothing"
    host.unpin(first)
    host.close()


def test_the_policy_decides_who_leaves() -> None:
    host = HostTier(4 * PAGE_BYTES, policy=make_policy("s3fifo"))
    for index in range(4):
        stored(host, index, 1)
    for _ in range(2):
        host.unpin(slot) if (slot := host.pin(sample_key(0))) else None
    stored(host, 4, 1)
    assert not host.contains(sample_key(1))
    assert host.contains(sample_key(0))
    host.close()


def test_pins_of_clients_end_by_the_clock() -> None:
    clock = ManualClock()
    host = HostTier(4 * PAGE_BYTES, clock=clock)
    slot = stored(host, 1, 2)
    assert host.books.pin(slot.key, until_s=10.0)
    assert host.reserve(sample_key(2), 4 * PAGE_BYTES) is None
    assert host.stat().pinned_bytes == 0, "that counts leases"
    clock.advance_s(10.0)
    stored(host, 2, 4)
    assert not host.contains(slot.key)
    host.close()


def test_a_tenants_writes_under_way_count_against_its_quota() -> None:
    host = HostTier(8 * PAGE_BYTES, quotas=Quotas(by_tenant={"t": 3 * PAGE_BYTES}))
    stored(host, 1, 1, tenant="t")
    first = reserved(host, 2, 2, tenant="t")
    second = host.reserve(sample_key(3), PAGE_BYTES, tenant="t")
    assert second is not None
    assert not host.contains(sample_key(1)), "its own record made way"
    assert host.reserve(sample_key(4), PAGE_BYTES, tenant="t") is None
    assert host.reserve(sample_key(5), 4 * PAGE_BYTES, tenant="u") is not None
    host.discard(first)
    assert host.reserve(sample_key(4), 2 * PAGE_BYTES, tenant="t") is not None
    assert host.commit(second, header_of(second.key, second.stored_bytes))
    assert host.books.used_by("t") == PAGE_BYTES
    host.close()
