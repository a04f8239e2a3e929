"""Two stores as one: what is written to the first is read from the second, over each data path, under the client
contract.

What single-node clients promise about writes that are under way holds for one node only: there is one writer per key
and node, and a reader waits for the writes of its own node. The tests below say so where they differ.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.two_stores import Pair, is_up, peers_of

from kvstore.client import NodeStoreClient
from kvstore.interfaces import StoreClient
from kvstore.settings import NvmeSettings, PeerSettings, StoreSettings
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_key, sample_meta
from kvstore.testing.store_client import (
    LATE_S,
    MIN_CAPACITY_BYTES,
    SHORT_S,
    SOON_S,
    StoreClientContract,
    read_bytes,
    write_chunk,
)


class TestOverSharedMemory(StoreClientContract):
    transport = "shm"
    has_files = False
    pair: Pair

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _stores(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        folder = tmp_path_factory.mktemp("stores")
        settings = StoreSettings(
            host_bytes=MIN_CAPACITY_BYTES, nvme=None, peers=PeerSettings(transports=(cls.transport,))
        )
        with Pair(folder, settings) as pair:
            cls.pair = pair
            yield
            for store in pair.stores:
                store.stop()

    @pytest.fixture(autouse=True)
    def _empty(self) -> None:
        self.pair.empty()

    def make(self) -> StoreClient:
        return self.pair.split()

    def leftovers(self) -> list[str]:
        return self.pair.leftovers()

    def test_read_learns_of_an_aborted_write(self, client: StoreClient, other: StoreClient) -> None:
        """Across nodes: a write elsewhere is not waited for at all, so the read is a miss at once."""
        lease = client.reserve(sample_key(1), sample_meta(), 10, deadline_s=SOON_S)
        assert lease is not None
        start_s = time.monotonic()
        assert read_bytes(self.pair.observers[1], [sample_key(1)], 60.0) == [None]
        assert time.monotonic() - start_s < LATE_S
        lease.abort()

    def test_closed_client_leaves_nothing(self, client: StoreClient, other: StoreClient) -> None:
        """As for one store; the chunk that the other wrote meanwhile is found."""
        write_chunk(client, 1, 10)
        (read,) = other.read([sample_key(1)], deadline_s=SOON_S)
        write = other.reserve(sample_key(2), sample_meta(), 10, deadline_s=SOON_S)
        assert read is not None
        assert write is not None
        other.close()
        wait_until(lambda: not self.leftovers(), what="the closed client's leases to end")
        assert not write.commit()
        assert other.lookup([sample_key(1)], deadline_s=SOON_S) == [False]
        write_chunk(client, 2, 10)

    def test_pair_took_the_path_and_says_why(self) -> None:
        stats = self.pair.observers[1].stat(deadline_s=SOON_S)
        assert stats is not None
        (peer,) = stats.peers.values()
        assert (peer.is_up, peer.transport) == (True, self.transport)
        assert peer.reason.startswith(f"{self.transport}: ")

    def test_records_of_any_size_arrive_whole(self, client: StoreClient) -> None:
        for index, size in enumerate((1, 4095, 4096, 4097, 100_001, 1_500_000)):
            payload = write_chunk(client, index, size)
            assert read_bytes(client, [sample_key(index)], SOON_S) == [payload]

    def test_what_was_read_is_kept_and_announced_by_the_reader_too(self, client: StoreClient) -> None:
        payload = write_chunk(client, 1, 100_000)
        assert read_bytes(client, [sample_key(1)], SOON_S) == [payload]
        self.pair.observers[0].drop([sample_key(1)], deadline_s=SOON_S)
        assert read_bytes(self.pair.observers[1], [sample_key(1)], SOON_S) == [payload]
        # And back: the first store gets it from the second.
        assert read_bytes(self.pair.observers[0], [sample_key(1)], SOON_S) == [payload]

    def test_read_waits_a_moment_for_news_of_another_node(self, client: StoreClient) -> None:
        """So that what a prefill replica has just saved on its node is not missed on the decode replica's."""
        reader = self.pair.observers[1]
        writer = self.pair.client(0)
        missed = 0
        for index in range(50):
            payload = write_chunk(writer, index, 10_000)
            (found,) = read_bytes(reader, [sample_key(index)], SOON_S)
            assert found in (payload, None)
            missed += found is None
        assert missed <= 2
        start_s = time.monotonic()
        assert read_bytes(reader, [sample_key(199)], SOON_S) == [None]
        assert time.monotonic() - start_s < LATE_S
        writer.close()

    def test_dropped_chunk_is_forgotten_elsewhere(self, client: StoreClient) -> None:
        write_chunk(client, 1, 100_000)
        self.pair.observers[0].drop([sample_key(1)], deadline_s=SOON_S)
        wait_until(lambda: client.lookup([sample_key(1)], deadline_s=1.0) == [False], what="the drop to be known")

    def test_short_deadline_is_kept(self, client: StoreClient) -> None:
        write_chunk(client, 1, 1_000_000)
        start_s = time.monotonic()
        read_bytes(client, [sample_key(1), sample_key(2)], SHORT_S)
        assert time.monotonic() - start_s < SHORT_S + LATE_S


class TestOverTcp(TestOverSharedMemory):
    transport = "tcp"


def test_pair_falls_to_tcp_where_the_socket_is_not_visible(tmp_path: Path) -> None:
    settings = StoreSettings(host_bytes=MIN_CAPACITY_BYTES, nvme=None)
    with Pair(tmp_path, settings) as pair:
        (tmp_path / "a").rename(tmp_path / "moved")
        pair.stores[1].set_peers([])
        wait_until(lambda: not peers_of(pair.observers[1]), what="the peer to be left")
        pair.stores[1].set_peers([store.endpoint for store in pair.stores])
        wait_until(lambda: is_up(pair.observers[1]), what="the peer to be found again")
        (peer,) = peers_of(pair.observers[1]).values()
        assert (peer.transport, "not visible here" in peer.reason) == ("tcp", True)
        (tmp_path / "moved").rename(tmp_path / "a")
        writer = pair.client(0)
        payload = write_chunk(writer, 1, 100_000)
        reader = pair.observers[1]
        assert reader.wait([sample_key(1)], deadline_s=SOON_S) == [True]
        assert read_bytes(reader, [sample_key(1)], SOON_S) == [payload]
        writer.close()


def test_chunk_that_is_only_in_a_file_is_read_from_another_node(tmp_path: Path) -> None:
    def settings(name: str) -> StoreSettings:
        files = NvmeSettings(folders=(str(tmp_path / f"files-{name}"),), capacity_bytes=8 * MIN_CAPACITY_BYTES)
        return StoreSettings(host_bytes=MIN_CAPACITY_BYTES, nvme=files)

    with Pair(tmp_path, settings("a"), settings("b")) as pair:
        writer, reader = pair.observers
        payloads = [write_chunk(writer, index, 1_000_000) for index in range(8)]
        wait_until(lambda: _chunks(writer, "nvme") == 8, what="the files")
        assert _chunks(writer, "host") < 8
        assert reader.wait([sample_key(i) for i in range(8)], deadline_s=SOON_S) == [True] * 8
        for index, payload in enumerate(payloads):
            assert read_bytes(reader, [sample_key(index)], SOON_S) == [payload]


def _chunks(client: NodeStoreClient, tier: str) -> int:
    stats = client.stat(deadline_s=SOON_S)
    assert stats is not None
    return stats.tiers[tier].chunks
