"""Who is blamed for a failed transfer between two nodes: the peer, its data path, or neither.

Covers: a peer that stands still for a moment; transfers that fail side by side, and one after the other; that the paths
to a peer are closed when it is followed no more.
Does not cover: the choice of a path (`tests/unit/kvstore_peer_choice_test.py`), a path that nobody can reach
(`tests/fault/kvstore_peers_fault_test.py`).
"""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.two_stores import SECRET, Pair, peers_of

from kvstore.client import NodeStoreClient
from kvstore.interfaces import OnBytes
from kvstore.node import NodeStore
from kvstore.peer_node import PeerNode
from kvstore.settings import PeerSettings, StoreSettings
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_key, sample_payload
from kvstore.testing.store_client import SOON_S, read_bytes, write_chunk
from kvstore.transport import Offer, PeerGoneError

CHUNK_BYTES = 100_000
TRANSFERS = 2
"""At the same time; as many failures in a row make a pair leave its path."""
SETTINGS = StoreSettings(
    host_bytes=16 << 20,
    nvme=None,
    # Silence is noticed by the transfers, not by heartbeats.
    peers=PeerSettings(transports=("tcp",), transfer_s=1.0, heartbeat_s=60.0, lease_s=120.0, breaker_pause_s=0.1),
)


def read_at_once(socket_path: str, indices: range) -> list[bytes | None]:
    """Chunks, each by a client and a thread of its own."""

    def read(index: int) -> bytes | None:
        client = NodeStoreClient(socket_path, secret=SECRET, client_name="test")
        try:
            return read_bytes(client, [sample_key(index)], SOON_S)[0]
        finally:
            client.close()

    with ThreadPoolExecutor(len(indices)) as pool:
        return list(pool.map(read, indices))


def test_path_of_a_peer_that_stood_still_is_kept(tmp_path: Path) -> None:
    """The transfers that it held up fail before it runs again; it answers the question whether it lives."""
    with Pair(tmp_path, SETTINGS) as pair:
        writer, reader = pair.observers
        keys = [sample_key(index) for index in range(TRANSFERS + 1)]
        for index in range(len(keys)):
            write_chunk(writer, index, CHUNK_BYTES)
        wait_until(lambda: all(reader.lookup(keys, deadline_s=1.0)), what="the chunks to be known")
        pair.stores[0].freeze()
        assert read_at_once(pair.paths[1], range(TRANSFERS)) == [None] * TRANSFERS
        pair.stores[0].thaw()
        # A path that is left is not tried again for half a minute.
        last = [sample_payload(TRANSFERS, CHUNK_BYTES)]
        wait_until(lambda: read_bytes(reader, keys[TRANSFERS:], SOON_S) == last, what="the path to be used again")
        wait_until(lambda: pair.leftovers() == [], what="leases to end")


class HeldUpPath:
    """Transfers that fail together."""

    name = "tcp"

    def __init__(self, transfers: int) -> None:
        self.is_closed = False
        self._all_there = threading.Barrier(transfers)

    def pull(self, offer: Offer, into: memoryview, *, stop_s: float, on_bytes: OnBytes | None = None) -> None:
        """See `Transport`."""
        self._all_there.wait(SOON_S)
        raise PeerGoneError("held up")

    def close(self) -> None:
        """See `Transport`."""
        self.is_closed = True


@pytest.fixture
def reading(tmp_path: Path) -> Iterator[tuple[NodeStore, str]]:
    """A store that knows the chunks of another, and its socket."""
    stores = [
        NodeStore(SETTINGS, secret=SECRET, node_id=f"node-{n}", socket_path=str(tmp_path / n), bind_host="127.0.0.1")
        for n in "ab"
    ]
    endpoints = [store.start() for store in stores]
    stores[1].set_peers(endpoints)
    writer, reader = (NodeStoreClient(e.socket_path, secret=SECRET, client_name="test") for e in endpoints)
    keys = [sample_key(index) for index in range(3 * TRANSFERS)]
    for index in range(len(keys)):
        write_chunk(writer, index, CHUNK_BYTES)
    wait_until(lambda: all(reader.lookup(keys, deadline_s=1.0)), what="the chunks to be known")
    yield stores[1], endpoints[1].socket_path
    for end in (writer, reader, *reversed(stores)):
        end.close() if isinstance(end, NodeStoreClient) else end.stop()


def fail_together(peer: PeerNode, socket_path: str, indices: range) -> None:
    """Let transfers fail after the loans; return when it was decided who is to blame."""
    real, peer._transports["tcp"] = peer._transports.get("tcp"), HeldUpPath(len(indices))
    assert read_at_once(socket_path, indices) == [None] * len(indices)
    # The same question as for the blame, behind all of those.
    link = peer._connected.link
    asyncio.run_coroutine_threadsafe(link.describe(timeout_s=SOON_S), peer._context.loop).result()
    del peer._transports["tcp"]
    if real is not None:
        peer._transports["tcp"] = real


def test_transfers_that_fail_side_by_side_are_one_failure_of_their_path(reading: tuple[NodeStore, str]) -> None:
    store, socket_path = reading
    client = NodeStoreClient(socket_path, secret=SECRET, client_name="test")
    peer = store._parts.peers._nodes["node-a"]
    fail_together(peer, socket_path, range(TRANSFERS))
    assert _transport(client) == "tcp"
    # A success in between: no failures in a row.
    assert read_bytes(client, [sample_key(TRANSFERS)], SOON_S) == [sample_payload(TRANSFERS, CHUNK_BYTES)]
    fail_together(peer, socket_path, range(TRANSFERS + 1, TRANSFERS + 2))
    assert _transport(client) == "tcp"
    # The second in a row began after the first had failed.
    fail_together(peer, socket_path, range(TRANSFERS + 2, TRANSFERS + 3))
    assert _transport(client) == ""
    client.close()


def test_paths_are_closed_though_the_link_takes_longer_to_end_than_the_feed(reading: tuple[NodeStore, str]) -> None:
    store, _ = reading
    peer = store._parts.peers._nodes["node-a"]
    path = peer._transports["tcp"] = HeldUpPath(1)
    link = peer._connected.link
    close = link.close

    async def close_last() -> None:
        while any(task.get_coro().__name__ == "_keep_feed" for task in asyncio.all_tasks()):
            await asyncio.sleep(0)
        # Whoever waits for the feed hears of its end now.
        for _ in range(10):
            await asyncio.sleep(0)
        await close()

    link.close = close_last
    store.set_peers([])
    wait_until(lambda: path.is_closed, what="the path to be closed")


def _transport(client: NodeStoreClient) -> str:
    (peer,) = peers_of(client).values()
    return peer.transport
