"""The contract of `kvstore.interfaces.StoreClient`, as a suite to inherit.

A new client subclasses `StoreClientContract` in a test module and implements `make` and `leftovers`.

Covers: what every client promises. Does not cover: killed or frozen store processes (`tests/fault`).
"""

import threading
import time
from collections.abc import Iterator

import pytest

from cluster.errors import CallerError
from kvstore.interfaces import BufferUnusableError, ChunkMeta, StoreClient, StreamLease
from kvstore.keys import ChunkKey
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_key, sample_meta, sample_payload

SOON_S = 20.0
"""A deadline that passes only when something is broken."""
SHORT_S = 0.15
"""A deadline that is meant to pass."""
WAIT_S = 2.0
"""A deadline that passes too, but with its answer there: a tenth of it is left for the way back, twice the 105 ms that
were measured with six busy processes beside the tests on two cores."""
LATE_S = 8.0
"""Scheduling delay that a busy test machine may add: below it nothing hangs."""
MIN_CAPACITY_BYTES = 4 << 20


class StoreClientContract:
    """Subclass this; pytest collects the subclass."""

    # What a subclass provides.

    def make(self) -> StoreClient:
        """A client; all clients made in one test share one store of at least `MIN_CAPACITY_BYTES`, empty at first."""
        raise NotImplementedError

    def leftovers(self) -> list[str]:
        """Leases and reservations that the store still holds, in words."""
        raise NotImplementedError

    # The suite.

    @pytest.fixture
    def client(self) -> Iterator[StoreClient]:
        """One client; the store is checked for leftovers before and after it closes."""
        client = self.make()
        yield client
        wait_until(lambda: not self.leftovers(), what="leases to end")
        client.close()

    @pytest.fixture
    def other(self) -> Iterator[StoreClient]:
        """Another process' client."""
        client = self.make()
        yield client
        client.close()

    def test_written_chunk_is_read_by_another(self, client: StoreClient, other: StoreClient) -> None:
        """Bytes, key and metadata arrive as they were, for ragged lengths."""
        for index, size in enumerate((1, 4096, 100_001)):
            payload = write_chunk(client, index, size)
            (lease,) = other.read([sample_key(index)], deadline_s=SOON_S)
            assert lease is not None
            with lease:
                assert (lease.key, lease.meta) == (sample_key(index), sample_meta(index + 1))
                assert bytes(lease.payload) == payload
                assert lease.payload.readonly

    def test_answers_are_in_the_order_of_the_keys(self, client: StoreClient) -> None:
        """Repeated keys included; no keys, no answers."""
        write_chunk(client, 1, 10)
        keys = [sample_key(2), sample_key(1), sample_key(3), sample_key(1)]
        assert client.lookup(keys, deadline_s=SOON_S) == [False, True, False, True]
        leases = client.read(keys, deadline_s=SOON_S)
        assert [lease is not None for lease in leases] == [False, True, False, True]
        for lease in leases:
            if lease is not None:
                lease.release()
        assert client.lookup([], deadline_s=SOON_S) == []
        assert client.read([], deadline_s=SOON_S) == []

    def test_many_keys_in_one_call(self, client: StoreClient) -> None:
        """More than a store may take in one request."""
        write_chunk(client, 7, 10)
        keys = [sample_key(i) for i in range(20_000)]
        held = client.lookup(keys, deadline_s=SOON_S)
        assert [i for i, yes in enumerate(held) if yes] == [7]

    def test_chunk_is_unreadable_before_its_commit(self, client: StoreClient, other: StoreClient) -> None:
        """Neither for others nor for the writer."""
        lease = client.reserve(sample_key(1), sample_meta(), 10, deadline_s=SOON_S)
        assert lease is not None
        assert len(lease.payload) == 10
        for reader in (client, other):
            assert reader.lookup([sample_key(1)], deadline_s=SOON_S) == [False]
        lease.abort()

    def test_one_writer_per_key(self, client: StoreClient, other: StoreClient) -> None:
        """The second is refused while the first writes, and after it has committed."""
        lease = client.reserve(sample_key(1), sample_meta(), 10, deadline_s=SOON_S)
        assert lease is not None
        assert other.reserve(sample_key(1), sample_meta(), 10, deadline_s=SOON_S) is None
        assert lease.commit()
        assert other.reserve(sample_key(1), sample_meta(), 10, deadline_s=SOON_S) is None

    def test_aborted_write_leaves_nothing(self, client: StoreClient, other: StoreClient) -> None:
        """And frees the key for others; ends repeat harmlessly."""
        lease = client.reserve(sample_key(1), sample_meta(), 10, deadline_s=SOON_S)
        assert lease is not None
        lease.abort()
        lease.abort()
        assert not lease.commit()
        wait_until(lambda: not self.leftovers(), what="the reservation to end")
        assert client.lookup([sample_key(1)], deadline_s=SOON_S) == [False]
        write_chunk(other, 1, 10)

    def test_abort_after_commit_is_harmless(self, client: StoreClient) -> None:
        """The chunk stays; a second commit says no."""
        lease = client.reserve(sample_key(1), sample_meta(), 10, deadline_s=SOON_S)
        assert lease is not None
        assert lease.commit()
        lease.abort()
        assert not lease.commit()
        assert client.lookup([sample_key(1)], deadline_s=SOON_S) == [True]

    @pytest.mark.parametrize("num_bytes", [0, -1])
    def test_empty_chunk_is_refused(self, client: StoreClient, num_bytes: int) -> None:
        """A chunk has at least one byte."""
        assert client.reserve(sample_key(1), sample_meta(), num_bytes, deadline_s=SOON_S) is None

    def test_read_waits_for_a_write_under_way(self, client: StoreClient, other: StoreClient) -> None:
        """So that nobody computes what is about to be there."""
        lease = client.reserve(sample_key(1), sample_meta(), 10, deadline_s=SOON_S)
        assert lease is not None
        lease.payload[:] = b"0123456789"
        found: list[bytes | None] = []
        reader = threading.Thread(target=lambda: found.extend(read_bytes(other, [sample_key(1)], SOON_S)))
        reader.start()
        assert lease.commit()
        reader.join(SOON_S)
        assert found == [b"0123456789"]

    def test_read_gives_up_waiting_at_its_deadline(self, client: StoreClient, other: StoreClient) -> None:
        """And still leases what is there."""
        payload = write_chunk(client, 2, 10)
        lease = client.reserve(sample_key(1), sample_meta(), 10, deadline_s=SOON_S)
        assert lease is not None
        start_s = time.monotonic()
        # Long enough for the answer to come back in time on a busy machine.
        deadline_s = 20 * SHORT_S
        try:
            assert read_bytes(other, [sample_key(1), sample_key(2)], deadline_s) == [None, payload]
            assert time.monotonic() - start_s < deadline_s + LATE_S
        finally:
            lease.abort()

    def test_read_learns_of_an_aborted_write(self, client: StoreClient, other: StoreClient) -> None:
        """Long before its deadline."""
        lease = client.reserve(sample_key(1), sample_meta(), 10, deadline_s=SOON_S)
        assert lease is not None
        found: list[bytes | None] = []
        reader = threading.Thread(target=lambda: found.extend(read_bytes(other, [sample_key(1)], 60.0)))
        reader.start()
        lease.abort()
        reader.join(SOON_S)
        assert found == [None]

    def test_wait_returns_when_all_are_there(self, client: StoreClient, other: StoreClient) -> None:
        """Keys that nobody writes yet are waited for too."""
        write_chunk(client, 1, 10)
        found: list[bool] = []
        keys = [sample_key(1), sample_key(2)]
        waiter = threading.Thread(target=lambda: found.extend(other.wait(keys, deadline_s=60.0)))
        waiter.start()
        write_chunk(client, 2, 10)
        waiter.join(SOON_S)
        assert found == [True, True]

    def test_wait_returns_at_its_deadline(self, client: StoreClient) -> None:
        """With what is there."""
        write_chunk(client, 1, 10)
        assert client.wait([sample_key(1)], deadline_s=SOON_S) == [True]
        start_s = time.monotonic()
        assert client.wait([sample_key(1), sample_key(2)], deadline_s=WAIT_S) == [True, False]
        assert WAIT_S / 2 < time.monotonic() - start_s < WAIT_S + LATE_S

    def test_leased_chunk_is_not_evicted(self, client: StoreClient) -> None:
        """While others come and go around it, its bytes stay."""
        payload = write_chunk(client, 0, 200_000)
        (lease,) = client.read([sample_key(0)], deadline_s=SOON_S)
        assert lease is not None
        for index in range(1, 100):
            write_chunk(client, index, 200_000)
        assert bytes(lease.payload) == payload
        lease.release()
        lease.release()

    @pytest.mark.parametrize("size", [1, 4096, 100_001, 1_500_000])
    def test_read_into_copies_a_payload(self, client: StoreClient, other: StoreClient, size: int) -> None:
        """All of it, into memory of the caller, of any item type."""
        payload = write_chunk(client, 1, size)
        out = bytearray(size)
        assert other.read_into(sample_key(1), memoryview(out), deadline_s=SOON_S) == sample_meta(2)
        assert out == payload

    def test_read_into_of_what_is_not_there_or_another_length_is_a_miss(self, client: StoreClient) -> None:
        """Nothing is written past the end; the chunk stays."""
        payload = write_chunk(client, 1, 1000)
        for size in (1, 999, 1001, 100_000):
            assert client.read_into(sample_key(1), memoryview(bytearray(size)), deadline_s=SOON_S) is None
        assert client.read_into(sample_key(2), memoryview(bytearray(1000)), deadline_s=SOON_S) is None
        assert read_bytes(client, [sample_key(1)], SOON_S) == [payload]

    def test_read_into_refuses_memory_that_it_cannot_fill(self, client: StoreClient) -> None:
        """A mistake of the caller, said as such."""
        write_chunk(client, 1, 1000)
        for out in (memoryview(bytes(1000)), memoryview(bytearray(2000))[::2]):
            with pytest.raises(BufferUnusableError):
                client.read_into(sample_key(1), out, deadline_s=SOON_S)

    def test_read_into_waits_for_a_write_under_way(self, client: StoreClient, other: StoreClient) -> None:
        """As `read` does."""
        lease = client.reserve(sample_key(1), sample_meta(2), 10, deadline_s=SOON_S)
        assert lease is not None
        lease.payload[:] = b"0123456789"
        out = bytearray(10)
        found: list[ChunkMeta | None] = []
        reader = threading.Thread(
            target=lambda: found.append(other.read_into(sample_key(1), memoryview(out), deadline_s=SOON_S))
        )
        reader.start()
        assert lease.commit()
        reader.join(SOON_S)
        assert (found, bytes(out)) == ([sample_meta(2)], b"0123456789")

    def test_stream_of_a_chunk_that_is_there(self, client: StoreClient, other: StoreClient) -> None:
        """All of it at once, and it keeps its memory as any lease."""
        payload = write_chunk(client, 1, 100_001)
        lease = other.stream(sample_key(1), deadline_s=SOON_S)
        assert lease is not None
        with lease:
            assert lease.wait_bytes(10, deadline_s=SOON_S) >= 10
            assert lease.wait_bytes(len(payload), deadline_s=SOON_S) == len(payload)
            assert (lease.key, lease.meta) == (sample_key(1), sample_meta(2))
            assert lease.finish(deadline_s=SOON_S)
            assert lease.finish(deadline_s=SOON_S)
            assert bytes(lease.payload) == payload
            assert lease.payload.readonly
        lease.release()

    def test_stream_of_nothing_is_a_miss(self, client: StoreClient) -> None:
        """At once."""
        assert client.stream(sample_key(1), deadline_s=SOON_S) is None

    def test_stream_waits_for_a_writer(self, client: StoreClient, other: StoreClient) -> None:
        """Until its commit, its abort, or the deadline."""
        lease = client.reserve(sample_key(1), sample_meta(), 10, deadline_s=SOON_S)
        assert lease is not None
        assert other.stream(sample_key(1), deadline_s=SHORT_S) is None
        found: list[StreamLease | None] = []
        reader = threading.Thread(target=lambda: found.append(other.stream(sample_key(1), deadline_s=60.0)))
        reader.start()
        lease.payload[:] = b"0123456789"
        assert lease.commit()
        reader.join(SOON_S)
        assert found[0] is not None
        with found[0] as stream:
            assert stream.finish(deadline_s=SOON_S)
            assert bytes(stream.payload) == b"0123456789"

    @pytest.mark.parametrize("num_bytes", [1, 4096, 65_536, 199_999, 200_000])
    def test_commit_of_fewer_bytes(self, client: StoreClient, other: StoreClient, num_bytes: int) -> None:
        """An encoder that needed less than it asked for gives the rest back."""
        lease = client.reserve(sample_key(1), sample_meta(2), 200_000, deadline_s=SOON_S)
        assert lease is not None
        lease.payload[:num_bytes] = sample_payload(1, num_bytes)
        assert lease.commit(num_bytes)
        assert read_bytes(other, [sample_key(1)], SOON_S) == [sample_payload(1, num_bytes)]

    @pytest.mark.parametrize("num_bytes", [0, -1, 11])
    def test_commit_of_what_was_not_reserved(self, client: StoreClient, num_bytes: int) -> None:
        """A mistake of the caller, and the write is over."""
        lease = client.reserve(sample_key(1), sample_meta(), 10, deadline_s=SOON_S)
        assert lease is not None
        with pytest.raises(CallerError):
            lease.commit(num_bytes)
        assert not lease.commit()
        wait_until(lambda: not self.leftovers(), what="the reservation to end")
        write_chunk(client, 1, 10)

    def test_given_back_room_is_used_again(self, client: StoreClient) -> None:
        """Many large reservations of small chunks all fit, at the same time."""
        for index in range(12):
            lease = client.reserve(sample_key(index), sample_meta(index + 1), 2_000_000, deadline_s=SOON_S)
            assert lease is not None
            lease.payload[:100] = sample_payload(index, 100)
            assert lease.commit(100)
        held = client.lookup([sample_key(index) for index in range(12)], deadline_s=SOON_S)
        assert held == [True] * 12

    def test_pinned_chunk_is_not_evicted(self, client: StoreClient, other: StoreClient) -> None:
        """While others come and go, also when the client that pinned it is gone; until it is unpinned."""
        payload = write_chunk(client, 0, 200_000)
        assert other.pin([sample_key(0), sample_key(500)], seconds=600.0, deadline_s=SOON_S) == [True, False]
        other.close()
        for index in range(1, 100):
            write_chunk(client, index, 200_000)
        assert read_bytes(client, [sample_key(0)], SOON_S) == [payload]
        client.unpin([sample_key(0), sample_key(500)], deadline_s=SOON_S)

    def test_closed_client_leaves_nothing(self, client: StoreClient, other: StoreClient) -> None:
        """Leases and reservations end; later calls are misses; its write can be done by another."""
        write_chunk(client, 1, 10)
        read = other.read([sample_key(1)], deadline_s=SOON_S)
        write = other.reserve(sample_key(2), sample_meta(), 10, deadline_s=SOON_S)
        assert read[0] is not None
        assert write is not None
        other.close()
        other.close()
        wait_until(lambda: not self.leftovers(), what="the closed client's leases to end")
        assert not write.commit()
        assert other.lookup([sample_key(1)], deadline_s=SOON_S) == [False]
        assert other.read([sample_key(1)], deadline_s=SOON_S) == [None]
        assert other.reserve(sample_key(3), sample_meta(), 10, deadline_s=SOON_S) is None
        write_chunk(client, 2, 10)

    def test_threads_share_a_client(self, client: StoreClient) -> None:
        """Each gets its own answers; of several writers of one key exactly one wins."""
        wins: list[int] = []

        def work(thread: int) -> None:
            for index in range(20):
                lease = client.reserve(sample_key(index), sample_meta(index + 1), 1000, deadline_s=SOON_S)
                if lease is not None:
                    lease.payload[:] = sample_payload(index, 1000)
                    if lease.commit():
                        wins.append(index)
                expected = [sample_payload(index, 1000)]
                assert read_bytes(client, [sample_key(index)], SOON_S) == expected, f"thread {thread}"

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(wins) == list(range(20))


def write_chunk(client: StoreClient, index: int, num_bytes: int) -> bytes:
    """Store a sample chunk; its payload."""
    payload = sample_payload(index, num_bytes)
    lease = client.reserve(sample_key(index), sample_meta(index + 1), num_bytes, deadline_s=SOON_S)
    assert lease is not None, f"no room for chunk {index}"
    lease.payload[:] = payload
    assert lease.commit()
    return payload


def read_bytes(client: StoreClient, keys: list[ChunkKey], deadline_s: float) -> list[bytes | None]:
    """Copies of chunks, leases given back."""
    found: list[bytes | None] = []
    for lease in client.read(keys, deadline_s=deadline_s):
        if lease is None:
            found.append(None)
            continue
        with lease:
            found.append(bytes(lease.payload))
    return found
