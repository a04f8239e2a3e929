"""What a node store promises beyond every client's contract: sources, streams, age, quotas, pins, the catalogue."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support.gated_store import GatedStore

from kvstore.client import NodeStoreClient
from kvstore.events import ChunkChange
from kvstore.interfaces import StreamLease
from kvstore.policy import Quotas
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_key, sample_meta, sample_payload
from kvstore.testing.store_client import LATE_S, SHORT_S, SOON_S, read_bytes, write_chunk
from kvstore.testing.tier import record_of

SIZE = 1_000_000
KEY = sample_key(1)
PAYLOAD = sample_payload(1, SIZE)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[GatedStore]:
    with GatedStore(tmp_path) as store:
        yield store


@pytest.fixture
def client(store: GatedStore) -> NodeStoreClient:
    return store.client()


def stream_of(client: NodeStoreClient) -> StreamLease:
    lease = client.stream(KEY, deadline_s=SOON_S)
    assert lease is not None
    return lease


# Streams


@pytest.mark.parametrize("source", ["nvme", "peer", "bucket"])
def test_early_bytes_of_a_stream_are_there_before_the_last(
    store: GatedStore, client: NodeStoreClient, source: str
) -> None:
    tier = getattr(store, source)
    tier.put(KEY, memoryview(record_of(1, SIZE)))
    tier.close_gate("read")
    with stream_of(client) as lease:
        early = lease.wait_bytes(SIZE // 5, deadline_s=SOON_S)
        assert SIZE // 5 <= early < SIZE
        assert lease.meta == sample_meta(2)
        assert bytes(lease.payload[:early]) == PAYLOAD[:early]
        assert lease.wait_bytes(SIZE, deadline_s=SHORT_S) == early
        assert not lease.finish(deadline_s=SHORT_S)
        tier.open_gate("read")
        assert lease.finish(deadline_s=SOON_S)
        assert bytes(lease.payload) == PAYLOAD
    assert read_bytes(client, [KEY], SOON_S) == [PAYLOAD]


def test_stream_is_granted_before_the_first_byte(store: GatedStore, client: NodeStoreClient) -> None:
    store.peer.put(KEY, memoryview(record_of(1, SIZE)))
    store.peer.pieces = 1
    held_up = threading.Event()
    get = store.peer.get
    store.peer.get = lambda key: held_up.wait(30) and get(key)  # type: ignore[method-assign,assignment,return-value]
    with stream_of(client) as lease:
        assert lease.meta is None
        assert len(lease.payload) == SIZE
        assert lease.wait_bytes(1, deadline_s=SHORT_S) == 0
        held_up.set()
        assert lease.finish(deadline_s=SOON_S)


def test_several_streams_and_reads_share_one_fetch(store: GatedStore, client: NodeStoreClient) -> None:
    store.nvme.put(KEY, memoryview(record_of(1, SIZE)))
    store.nvme.close_gate("read")
    leases = [stream_of(client) for _ in range(3)]
    found: list[bytes | None] = []
    reader = threading.Thread(target=lambda: found.extend(read_bytes(client, [KEY], SOON_S)))
    reader.start()
    wait_until(lambda: store.run(lambda: store.desk.is_awaited(KEY)), what="the reader to wait")
    store.nvme.open_gate("read")
    assert [lease.finish(deadline_s=SOON_S) for lease in leases] == [True] * 3
    reader.join(SOON_S)
    assert found == [PAYLOAD]
    assert store.mover.fetched == {"nvme": 1}
    for lease in leases:
        lease.release()


def test_stream_whose_source_breaks_off_never_finishes(store: GatedStore, client: NodeStoreClient) -> None:
    """Its early bytes stay readable; the next read takes the next source."""
    store.peer.put(KEY, memoryview(record_of(1, SIZE)))
    store.bucket.put(KEY, memoryview(record_of(1, SIZE)))
    store.peer.close_gate("read")
    with stream_of(client) as lease:
        early = lease.wait_bytes(1, deadline_s=SOON_S)
        store.peer.breaks_after = SIZE // 2
        store.peer.open_gate("read")
        assert not lease.finish(deadline_s=SOON_S)
        assert lease.wait_bytes(SIZE, deadline_s=SOON_S) < SIZE
        assert read_bytes(client, [KEY], SOON_S) == [PAYLOAD]
        for index in range(2, 30):
            write_chunk(client, index, 200_000)
        assert bytes(lease.payload[:early]) == PAYLOAD[:early]


def test_stream_of_damaged_bytes_never_finishes(store: GatedStore, client: NodeStoreClient) -> None:
    """Peers' bytes are verified by the reader: the arena forgets them, and nobody else gets them."""
    damaged = record_of(1, SIZE)
    damaged[4096 + SIZE - 1] ^= 1
    store.peer.records[KEY] = bytes(damaged)
    store.peer.get = lambda key: bytearray(store.peer.records[key])  # type: ignore[method-assign]
    with stream_of(client) as lease:
        assert lease.wait_bytes(SIZE, deadline_s=SOON_S) == SIZE
        assert not lease.finish(deadline_s=SOON_S)
    wait_until(lambda: not store.run(lambda: store.host.contains(KEY)), what="the damaged record to be dropped")


def test_stream_that_is_given_up_leaves_nothing(store: GatedStore, client: NodeStoreClient) -> None:
    store.nvme.put(KEY, memoryview(record_of(1, SIZE)))
    store.nvme.close_gate("read")
    stream_of(client).release()
    forgotten = stream_of(client)
    del forgotten
    client.lookup([KEY], deadline_s=SOON_S)
    wait_until(lambda: store.run(lambda: store.desk.num_reads) == 0, what="leases to end")
    store.nvme.open_gate("read")
    assert read_bytes(client, [KEY], SOON_S) == [PAYLOAD]


def test_closed_client_ends_its_streams(store: GatedStore, client: NodeStoreClient) -> None:
    store.nvme.put(KEY, memoryview(record_of(1, SIZE)))
    store.nvme.close_gate("read")
    lease = stream_of(client)
    ends: list[bool] = []
    waiter = threading.Thread(target=lambda: ends.append(lease.finish(deadline_s=60.0)))
    waiter.start()
    client.close()
    waiter.join(SOON_S)
    assert ends == [False]
    wait_until(lambda: store.run(lambda: store.desk.num_reads) == 0, what="leases to end")


def test_read_into_of_damaged_bytes_is_a_miss_and_said(store: GatedStore, client: NodeStoreClient) -> None:
    """Also when the damage is in the last byte, or in the header; the tiers below are not touched."""
    for at_byte in (4096 + SIZE - 1, 100, 4096):
        write_chunk(client, 1, SIZE)
        wait_until(lambda: store.nvme.records and store.bucket.records, what="write-behind")
        store.run(lambda at_byte=at_byte: _flip(store, at_byte))
        out = bytearray(SIZE)
        assert client.read_into(KEY, memoryview(out), deadline_s=SOON_S) is None
        wait_until(lambda: not store.run(lambda: store.host.contains(KEY)), what="the damaged record to be dropped")
        assert client.read_into(KEY, memoryview(out), deadline_s=SOON_S) == sample_meta(2)
        assert out == PAYLOAD
        client.drop([KEY], deadline_s=SOON_S)


def test_read_into_ends_at_its_deadline(store: GatedStore, client: NodeStoreClient) -> None:
    store.nvme.put(KEY, memoryview(record_of(1, SIZE)))
    store.nvme.close_gate("read")
    start_s = time.monotonic()
    assert client.read_into(KEY, memoryview(bytearray(SIZE)), deadline_s=SHORT_S) is None
    assert time.monotonic() - start_s < SHORT_S + LATE_S


# Sources


def test_lookups_and_waits_see_what_peers_hold(store: GatedStore, client: NodeStoreClient) -> None:
    found: list[bool] = []
    waiter = threading.Thread(target=lambda: found.extend(client.wait([KEY], deadline_s=60.0)))
    waiter.start()
    wait_until(lambda: store.run(lambda: store.desk.is_awaited(KEY)), what="the waiter")
    store.peer.put(KEY, memoryview(record_of(1, SIZE)))
    store.run(lambda: store.desk.note_settled(KEY))
    waiter.join(SOON_S)
    assert found == [True]
    assert client.lookup([KEY, sample_key(2)], deadline_s=SOON_S) == [True, False]
    assert read_bytes(client, [KEY], SOON_S) == [PAYLOAD]


def test_news_of_a_peer_do_not_end_a_read_that_waits_for_another_source(
    store: GatedStore, client: NodeStoreClient
) -> None:
    store.nvme.put(KEY, memoryview(record_of(1, SIZE)))
    store.nvme.close_gate("read")
    found: list[bytes | None] = []
    reader = threading.Thread(target=lambda: found.extend(read_bytes(client, [KEY], SOON_S)))
    reader.start()
    wait_until(lambda: store.run(lambda: store.desk.is_awaited(KEY)), what="the reader")
    store.run(lambda: store.desk.note_settled(KEY))
    store.nvme.open_gate("read")
    reader.join(SOON_S)
    assert found == [PAYLOAD]


def test_a_chunk_that_only_a_peer_holds_can_be_written_here(store: GatedStore, client: NodeStoreClient) -> None:
    store.peer.put(KEY, memoryview(record_of(1, SIZE)))
    write_chunk(client, 1, SIZE)
    store.nvme.put(sample_key(2), memoryview(record_of(2, SIZE)))
    assert client.reserve(sample_key(2), sample_meta(), 10, deadline_s=SOON_S) is None


def test_a_chunk_that_cannot_be_read_can_be_learned_again(store: GatedStore, client: NodeStoreClient) -> None:
    store.nvme.put(KEY, memoryview(record_of(1, SIZE)))
    store.nvme.breaks_after = 0
    assert client.reserve(KEY, sample_meta(2), SIZE, deadline_s=SOON_S) is None
    assert read_bytes(client, [KEY], SOON_S) == [None]
    write_chunk(client, 1, SIZE)
    assert read_bytes(client, [KEY], SOON_S) == [PAYLOAD]


def test_dropped_chunk_is_gone_at_once_though_the_media_are_slow(store: GatedStore, client: NodeStoreClient) -> None:
    write_chunk(client, 1, SIZE)
    wait_until(lambda: store.nvme.records and store.bucket.records, what="the tiers to have the chunk")
    store.bucket.close_gate("drop")
    assert not client.drop([KEY], deadline_s=SHORT_S), "late: the bucket has not answered"
    assert client.lookup([KEY], deadline_s=SOON_S) == [False]
    assert store.events[-1][0] is ChunkChange.DROPPED
    store.bucket.open_gate("drop")
    wait_until(lambda: not store.bucket.records, what="the bucket to forget the chunk")
    assert client.lookup([KEY], deadline_s=SOON_S) == [False]


# Age


def test_expired_chunk_is_a_miss_everywhere_before_any_sweep(tmp_path: Path) -> None:
    with GatedStore(tmp_path, ttl_s=60.0) as store:
        client = store.client()
        write_chunk(client, 1, SIZE)
        wait_until(lambda: store.nvme.records and store.bucket.records, what="the tiers to have the chunk")
        store.clock.pass_s(59.0)
        assert client.lookup([KEY], deadline_s=SOON_S) == [True]
        store.clock.pass_s(2.0)
        assert client.lookup([KEY], deadline_s=SOON_S) == [False]
        assert client.read([KEY], deadline_s=SOON_S) == [None]
        assert client.stream(KEY, deadline_s=SOON_S) is None
        assert client.pin([KEY], seconds=60.0, deadline_s=SOON_S) == [False]
        # It can be learned again at once.
        write_chunk(client, 1, SIZE)
        assert read_bytes(client, [KEY], SOON_S) == [PAYLOAD]


def test_sweep_drops_what_is_too_old_and_says_so(tmp_path: Path) -> None:
    with GatedStore(tmp_path, ttl_s=600.0) as store:
        client = store.client()
        write_chunk(client, 1, SIZE)
        wait_until(lambda: store.nvme.records and store.bucket.records, what="the tiers to have the chunk")
        store.clock.pass_s(500.0)
        write_chunk(client, 2, SIZE)
        wait_until(lambda: len(store.bucket.records) == 2, what="the bucket to have both")
        store.clock.pass_s(150.0)
        collected = client.gc(deadline_s=SOON_S)
        assert collected is not None
        assert (collected.expired, collected.over_quota) == (3, 0)
        assert [set(tier.records) for tier in (store.nvme, store.bucket)] == [{sample_key(2)}] * 2
        assert (ChunkChange.DROPPED, KEY) in [(change, chunk.key) for change, chunk in store.events]
        assert client.lookup([KEY, sample_key(2)], deadline_s=SOON_S) == [False, True]


def test_dates_are_those_of_the_store(tmp_path: Path) -> None:
    """A writer without a date, or with one that cannot be true, does not make a chunk that lives for ever."""
    with GatedStore(tmp_path, ttl_s=60.0) as store:
        client = store.client()
        now = store.clock.wall_s
        for index, said, kept in ((1, 0.0, now), (2, now - 30, now - 30), (3, now + 1e6, now), (4, now - 1e6, now)):
            meta = msgspec.structs.replace(sample_meta(), learned_unix_s=said)
            lease = client.reserve(sample_key(index), meta, 10, deadline_s=SOON_S)
            assert lease is not None
            lease.payload[:] = bytes(10)
            assert lease.commit()
            (read,) = client.read([sample_key(index)], deadline_s=SOON_S)
            assert read is not None
            assert read.meta.learned_unix_s == pytest.approx(kept)
            read.release()


# Quotas and pins


def test_over_quota_evicts_ones_own_and_refuses_what_cannot_fit(tmp_path: Path) -> None:
    quotas = Quotas(by_tenant={"a": 1_000_000})
    with GatedStore(tmp_path, quotas=quotas) as store:
        client = store.client()

        def write(index: int, tenant: str) -> bool:
            meta = msgspec.structs.replace(sample_meta(index + 1), tenant=tenant)
            # A chunk that is being written behind cannot leave.
            wait_until(lambda: store.run(lambda: store.mover.is_idle), what="write-behind")
            lease = client.reserve(sample_key(index), meta, 400_000, deadline_s=SOON_S)
            return lease is not None and lease.commit()

        assert all(write(index, "b") for index in range(4))
        assert all(write(index, "a") for index in range(10, 14))
        in_arena = store.run(lambda: [store.host.contains(sample_key(i)) for i in (0, 1, 2, 3, 10, 11, 12, 13)])
        assert in_arena == [True] * 4 + [False, False, True, True]
        leases = client.read([sample_key(12), sample_key(13)], deadline_s=SOON_S)
        assert not write(14, "a"), "both of its chunks are being read"
        assert write(14, "b")
        for lease in leases:
            assert lease is not None
            lease.release()
        assert write(15, "a")


def test_pins_are_bounded_in_time_and_share(store: GatedStore, client: NodeStoreClient) -> None:
    for index in range(3):
        write_chunk(client, index, SIZE)
    keys = [sample_key(index) for index in range(3)]
    assert client.pin(keys, seconds=1e8, deadline_s=SOON_S) == [True, True, False]
    ends = store.run(lambda: [store.host.books.is_pinned(key, time.monotonic() + 601) for key in keys])
    assert ends == [False] * 3, "no pin is longer than the settings allow"


# The catalogue, verification


def test_catalogue_lists_what_is_where(store: GatedStore, client: NodeStoreClient) -> None:
    write_chunk(client, 1, SIZE)
    write_chunk(client, 2, 100)
    wait_until(lambda: len(store.nvme.records) == 2 and len(store.bucket.records) == 2, what="write-behind")
    store.run(lambda: store.host.drop(sample_key(2)))
    store.run(lambda: store.index.refresh(sample_key(2)))
    read_bytes(client, [KEY, KEY], SOON_S)
    client.pin([KEY], seconds=100.0, deadline_s=SOON_S)
    entries = {entry.key: entry for entry in client.catalog(deadline_s=SOON_S) or ()}
    assert set(entries) == {KEY, sample_key(2)}
    first, second = entries[KEY], entries[sample_key(2)]
    length = len(record_of(1, SIZE))
    assert first.stored_bytes_by_tier == {"host": length, "nvme": length, "object": length}
    assert set(second.stored_bytes_by_tier) == {"nvme", "object"}
    assert (first.uses, second.uses) == (2, 0)
    assert first.idle_s is not None
    assert (first.is_pinned, second.is_pinned, second.idle_s) == (True, False, None)
    assert (first.num_tokens, first.codec) == (2, "raw")


def test_catalogue_of_many_chunks_comes_in_pages(store: GatedStore, client: NodeStoreClient) -> None:
    """And other requests are answered between them."""
    record = bytes(record_of(0, 10))
    keys = [sample_key(index) for index in range(5000)]
    entry = (store.nvme.put(sample_key(0), memoryview(bytearray(record))), store.nvme.entry(sample_key(0)))[1]
    store.nvme.entry = lambda key: entry  # type: ignore[method-assign]
    store.run(lambda: [store.index.refresh(key) for key in keys])
    client.lookup(keys[:1], deadline_s=SOON_S)
    assert client.catalog(deadline_s=0.0) is None
    found = client.catalog(deadline_s=SOON_S)
    assert found is not None
    assert {entry.key for entry in found} == set(keys)
    assert len(found) == 5000


def test_empty_store_has_an_empty_catalogue(client: NodeStoreClient) -> None:
    assert client.catalog(deadline_s=SOON_S) == []


def test_verify_drops_damaged_records(store: GatedStore, client: NodeStoreClient) -> None:
    for index in (1, 2):
        write_chunk(client, index, 10_000)
    wait_until(lambda: len(store.nvme.records) == 2 and len(store.bucket.records) == 2, what="write-behind")
    damaged = bytearray(store.nvme.records[KEY])
    damaged[5000] ^= 1
    store.nvme.records[KEY] = bytes(damaged)
    verified = client.verify([sample_key(1), sample_key(2)], deadline_s=SOON_S)
    assert verified is not None
    assert (verified.good, verified.bad, verified.unread) == (3, 1, 0)
    assert set(store.nvme.records) == {sample_key(2)}
    assert client.lookup([KEY], deadline_s=SOON_S) == [True], "the bucket has it"


def test_quotas_that_were_lowered_are_enforced_by_gc(tmp_path: Path) -> None:
    with GatedStore(tmp_path, quotas=Quotas(default=300_000)) as store:
        for index in range(5):
            store.nvme.put(sample_key(index), memoryview(record_of(index, 100_000)))
        collected = store.client().gc(deadline_s=SOON_S)
        assert collected is not None
        assert collected.over_quota == 3
        assert len(store.nvme.records) == 2


def _flip(store: GatedStore, at_byte: int) -> None:
    slot = store.host.find(KEY)
    assert slot is not None
    store.host.view(slot)[at_byte] ^= 0x20


# Dropping while others work


def test_drop_that_names_a_key_twice_ends(store: GatedStore, client: NodeStoreClient) -> None:
    store.nvme.put(KEY, memoryview(record_of(1, 5000)))
    assert client.drop([KEY, KEY], deadline_s=SOON_S)
    assert client.lookup([KEY], deadline_s=SOON_S) == [False]
    write_chunk(client, 1, 5000)
    assert client.drop([KEY], deadline_s=SOON_S)


def test_chunk_dropped_while_it_is_written_does_not_appear(client: NodeStoreClient) -> None:
    lease = client.reserve(KEY, sample_meta(2), 5000, deadline_s=SOON_S)
    assert lease is not None
    client.drop([KEY], deadline_s=SOON_S)
    assert not lease.commit()
    assert client.lookup([KEY], deadline_s=SOON_S) == [False]
    write_chunk(client, 1, 5000)
    stats = client.stat(deadline_s=SOON_S)
    assert stats is not None
    assert stats.reservations == 0
