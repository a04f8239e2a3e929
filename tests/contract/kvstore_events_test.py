"""The event stream: a snapshot, then every change; what is missed is noticed and made good."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from kvstore.client import NodeStoreClient
from kvstore.events import (
    ChunkChange,
    ChunkEvent,
    DirectoryFeed,
    EventPublisher,
    FeedItem,
    HeldChunk,
    PortTakenError,
    StoreLost,
    StoreSnapshot,
)
from kvstore.events_socket import SocketFactory
from kvstore.node import NodeStore
from kvstore.settings import NvmeSettings, StoreSettings
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_key
from kvstore.testing.store_client import write_chunk
from kvstore.wire import StoreEndpoint

SECRET = b"a secret of a test cluster"
DEADLINE_S = 30.0
BEAT_S = 0.05


class Node:
    """A publisher over a dict of chunks, with a way to lose messages."""

    def __init__(
        self, *, epoch: str = "e1", ring: int = 100, ports: tuple[int | None, int | None] = (None, None)
    ) -> None:
        self.held: dict[bytes, HeldChunk] = {}
        self.epoch = epoch
        self.publisher = EventPublisher(
            node_id="n1",
            epoch=epoch,
            secret=SECRET,
            bind_host="127.0.0.1",
            events_port=ports[0],
            snapshot_port=ports[1],
            ring_events=ring,
            heartbeat_s=BEAT_S,
            snapshot=lambda: tuple(self.held.values()),
        )
        self._send = self.publisher._send

    @property
    def endpoint(self) -> StoreEndpoint:
        return StoreEndpoint(
            node_id="n1",
            epoch=self.epoch,
            socket_path="",
            events_address=self.publisher.events_address,
            snapshot_address=self.publisher.snapshot_address,
        )

    @property
    def ports(self) -> tuple[int, int]:
        events, snapshot = (
            int(address.rsplit(":", 1)[1])
            for address in (self.publisher.events_address, self.publisher.snapshot_address)
        )
        return events, snapshot

    def add(self, *indexes: int) -> None:
        for index in indexes:
            chunk = HeldChunk(sample_key(index), "host", 10, 1, "raw")
            self.held[chunk.key] = chunk
            self.publisher.publish(ChunkChange.ADDED, chunk)

    def drop(self, index: int) -> None:
        self.publisher.publish(ChunkChange.DROPPED, self.held.pop(sample_key(index)))

    def lose_messages(self) -> None:
        self.publisher._send = lambda events: None  # type: ignore[method-assign]

    def send_again(self) -> None:
        self.publisher._send = self._send  # type: ignore[method-assign]


class Reader:
    """Folds a feed into a set of keys, as a router does."""

    def __init__(self, feed: DirectoryFeed) -> None:
        self.items: list[FeedItem] = []
        self.keys: set[bytes] = set()
        self._feed = feed.items()

    async def next(self) -> FeedItem:
        async with asyncio.timeout(DEADLINE_S):
            item = await anext(self._feed)
        self.items.append(item)
        match item:
            case StoreSnapshot():
                self.keys = {chunk.key for chunk in item.chunks}
            case StoreLost():
                self.keys = set()
            case ChunkEvent(change=ChunkChange.DROPPED):
                self.keys.discard(item.key)
            case ChunkEvent():
                self.keys.add(item.key)
        return item

    async def until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            await self.next()

    async def close(self) -> None:
        await self._feed.aclose()  # type: ignore[attr-defined]


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    node = Node()
    yield node
    await node.publisher.stop()


async def test_snapshot_then_changes_in_order(node: Node) -> None:
    node.add(1, 2)
    async with DirectoryFeed(node.endpoint, secret=SECRET) as feed:
        reader = Reader(feed)
        first = await reader.next()
        assert isinstance(first, StoreSnapshot)
        assert (first.node_id, first.epoch, first.seq) == ("n1", "e1", 2)
        node.add(3)
        node.drop(1)
        await reader.until(lambda: len(reader.items) == 3)
        changes = [(i.change, i.key, i.seq) for i in reader.items if isinstance(i, ChunkEvent)]
        assert changes == [
            (ChunkChange.ADDED, sample_key(3), 3),
            (ChunkChange.DROPPED, sample_key(1), 4),
        ]
        assert reader.keys == set(node.held)
        await reader.close()


async def test_lost_messages_are_replayed_in_order(node: Node) -> None:
    async with DirectoryFeed(node.endpoint, secret=SECRET) as feed:
        reader = Reader(feed)
        await reader.next()
        node.lose_messages()
        node.add(1, 2, 3)
        node.drop(2)
        node.send_again()
        # The next heartbeat tells that events are missing.
        await reader.until(lambda: len(reader.items) == 5)
        assert [i.seq for i in reader.items if isinstance(i, ChunkEvent)] == [1, 2, 3, 4]
        assert reader.keys == {sample_key(1), sample_key(3)}
        await reader.close()


async def test_more_lost_than_the_ring_keeps_gives_a_snapshot() -> None:
    node = Node(ring=3)
    async with DirectoryFeed(node.endpoint, secret=SECRET) as feed:
        reader = Reader(feed)
        await reader.next()
        node.lose_messages()
        node.add(*range(10))
        node.send_again()
        assert isinstance(await reader.next(), StoreSnapshot)
        assert reader.keys == set(node.held)
        node.add(99)
        await reader.next()
        assert reader.keys == set(node.held)
        await reader.close()
    await node.publisher.stop()


async def test_slow_subscriber_catches_up(node: Node) -> None:
    async with DirectoryFeed(node.endpoint, secret=SECRET, queued_messages=2) as feed:
        reader = Reader(feed)
        await reader.next()
        node.add(*range(3000))
        for index in range(0, 3000, 2):
            node.drop(index)
        await reader.until(lambda: reader.keys == set(node.held))
        await reader.close()


async def test_restarted_store_is_a_new_epoch() -> None:
    old = Node(epoch="e1")
    old.add(1)
    ports = old.ports
    async with DirectoryFeed(old.endpoint, secret=SECRET, silence_s=10.0) as feed:
        reader = Reader(feed)
        await reader.next()
        await old.publisher.stop()
        new = Node(epoch="e2", ports=ports)
        new.add(2)
        # Its connection broke: that says more than ten seconds of silence.
        assert await reader.next() == StoreLost(node_id="n1", epoch="e1")
        item = await reader.next()
        assert isinstance(item, StoreSnapshot)
        assert item.epoch == "e2"
        assert reader.keys == {sample_key(2)}
        await reader.close()
    await new.publisher.stop()


async def test_silent_store_is_lost_once_and_found_again() -> None:
    node = Node()
    node.add(1)
    ports = node.ports
    async with DirectoryFeed(node.endpoint, secret=SECRET, silence_s=0.3, answer_s=0.3) as feed:
        reader = Reader(feed)
        await reader.next()
        await node.publisher.stop()
        assert await reader.next() == StoreLost(node_id="n1", epoch="e1")
        waiting = asyncio.create_task(reader.next())
        done, _ = await asyncio.wait({waiting}, timeout=1.0)
        assert not done, "a store is lost once"
        again = Node(ports=ports)
        again.add(2)
        assert isinstance(await waiting, StoreSnapshot)
        assert reader.keys == {sample_key(2)}
        await reader.close()
    await again.publisher.stop()


async def test_dead_store_is_lost_when_its_connection_breaks() -> None:
    """Long before its silence says so; what it said last still counts."""
    node = Node()
    async with DirectoryFeed(node.endpoint, secret=SECRET, silence_s=DEADLINE_S) as feed:
        reader = Reader(feed)
        await reader.next()
        node.add(1, 2)
        start_s = asyncio.get_running_loop().time()
        await reader.until(lambda: len(reader.keys) == 2)
        await node.publisher.stop()
        assert await reader.next() == StoreLost(node_id="n1", epoch="e1")
        assert asyncio.get_running_loop().time() - start_s < DEADLINE_S / 3
        await reader.close()


async def test_flapping_store_is_asked_less_and_less_often() -> None:
    node = Node()
    ports = node.ports
    async with DirectoryFeed(node.endpoint, secret=SECRET) as feed:
        reader = Reader(feed)
        pauses = []
        for _ in range(4):
            await reader.until(lambda: isinstance(reader.items[-1], StoreSnapshot) if reader.items else False)
            await node.publisher.stop()
            assert isinstance(await reader.next(), StoreLost)
            pauses.append(feed.pause_s)
            node = Node(ports=ports)
        assert pauses == sorted(pauses)
        assert pauses[-1] >= 8 * pauses[0] > 0
        await reader.close()
    await node.publisher.stop()


async def test_port_tells_strangers_nothing(node: Node) -> None:
    """Neither who speaks plain ZMQ, nor who derives keys from another secret, is ever connected."""
    context = zmq.asyncio.Context()
    plain = context.socket(zmq.SUB)
    plain.setsockopt(zmq.SUBSCRIBE, b"")
    plain.connect(node.endpoint.events_address)
    sockets = SocketFactory(b"another cluster's secret")
    stranger = sockets.connected(zmq.SUB, node.endpoint.events_address, max_message_bytes=1 << 20)
    member = SocketFactory(SECRET)
    own = member.connected(zmq.SUB, node.endpoint.events_address, max_message_bytes=1 << 20)
    for _ in range(3):
        # Each beat that a member hears, strangers could have heard too.
        await asyncio.wait_for(own.recv(), DEADLINE_S)
    for sock in (plain, stranger):
        with pytest.raises(zmq.Again):
            await sock.recv(zmq.NOBLOCK)
    sockets.close()
    member.close()
    context.destroy(linger=0)


async def test_feeds_share_one_context(node: Node) -> None:
    """Threads and descriptors do not grow with two per feed, and the last one leaves nothing."""
    # The store signs snapshots on a thread of the loop, which stays: it is no feed's.
    await asyncio.to_thread(len, "")
    before = len(os.listdir("/proc/self/task"))
    feeds = [DirectoryFeed(node.endpoint, secret=SECRET) for _ in range(8)]
    for feed in feeds:
        assert isinstance(await Reader(feed).next(), StoreSnapshot)
    assert len(os.listdir("/proc/self/task")) <= before + 3
    for feed in feeds:
        feed.close()
    assert len(os.listdir("/proc/self/task")) == before


async def test_stranger_gets_nothing_and_is_not_believed(node: Node) -> None:
    node.add(1)
    async with DirectoryFeed(node.endpoint, secret=b"another cluster's secret", answer_s=0.3) as feed:
        waiting = asyncio.create_task(Reader(feed).next())
        done, _ = await asyncio.wait({waiting}, timeout=1.0)
        assert not done
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


@pytest.mark.timeout(60)
async def test_close_does_not_wait_for_a_question_without_an_answer() -> None:
    gone = Node()
    endpoint = gone.endpoint
    await gone.publisher.stop()
    feed = DirectoryFeed(endpoint, secret=SECRET, answer_s=DEADLINE_S)
    waiting = asyncio.create_task(Reader(feed).next())
    done, _ = await asyncio.wait({waiting}, timeout=0.1)
    assert not done
    feed.close()
    feed.close()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_taken_port_says_so(node: Node) -> None:
    with pytest.raises(PortTakenError, match=f"127.0.0.1:{node.ports[0]}"):
        Node(ports=node.ports)


async def test_store_announces_what_its_tiers_do(tmp_path: Path) -> None:
    settings = StoreSettings(
        host_bytes=1 << 20,
        nvme=NvmeSettings(folders=(str(tmp_path / "files"),), capacity_bytes=2 << 20),
        heartbeat_s=BEAT_S,
    )
    arguments = {"secret": SECRET, "node_id": "n1", "socket_path": str(tmp_path / "s"), "bind_host": "127.0.0.1"}
    store = NodeStore(settings, **arguments)
    endpoint = await asyncio.to_thread(store.start)
    client = NodeStoreClient(endpoint.socket_path, secret=SECRET, client_name="test")
    async with DirectoryFeed(endpoint, secret=SECRET) as feed:
        reader = Reader(feed)
        await reader.next()
        await asyncio.to_thread(write_chunk, client, 1, 600_000)
        event = await reader.next()
        assert isinstance(event, ChunkEvent)
        assert (event.change, event.tier, event.num_bytes, event.num_tokens) == ("added", "host", 600_000, 2)
        # The arena holds one of them: the first moves to its file.
        await asyncio.to_thread(_wait_for_file, client)
        await asyncio.to_thread(write_chunk, client, 2, 600_000)
        await reader.until(lambda: len(reader.items) == 4)
        moves = {(i.change.value, i.key, i.tier) for i in reader.items if isinstance(i, ChunkEvent)}
        assert moves >= {("moved", sample_key(1), "nvme"), ("added", sample_key(2), "host")}
        await asyncio.to_thread(client.drop, [sample_key(1)], deadline_s=5.0)
        await reader.until(lambda: reader.keys == {sample_key(2)})
        await reader.close()
    client.close()
    await asyncio.to_thread(store.stop)
    # After a restart the files are announced again, in another epoch.
    again = NodeStore(settings, **arguments)
    second = await asyncio.to_thread(again.start)
    async with DirectoryFeed(second, secret=SECRET) as feed:
        reader = Reader(feed)
        item = await reader.next()
        assert isinstance(item, StoreSnapshot)
        assert item.epoch != endpoint.epoch
        # In the snapshot, or by events while the folder is still being read.
        await reader.until(lambda: reader.keys == {sample_key(2)})
        await reader.close()
    await asyncio.to_thread(again.stop)


def _wait_for_file(client: NodeStoreClient) -> None:
    def is_written() -> bool:
        stats = client.stat(deadline_s=1.0)
        return stats is not None and stats.tiers["nvme"].chunks == 1

    wait_until(is_written, what="the write behind")
