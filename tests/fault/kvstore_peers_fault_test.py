"""What happens to a node when another one dies, freezes, restarts or lies: a miss or the right bytes, in time, and
nothing left on either side.
"""

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.two_stores import SECRET, Pair, is_up, peers_of

from cluster.errors import InvariantError
from kvstore.client import NodeStoreClient
from kvstore.node import NodeStore
from kvstore.peer_link import split_address
from kvstore.peer_protocol import Describe, Heartbeat, Lend, Lent, decode_peer_reply, puller_mac
from kvstore.protocol import (
    LENGTH_BYTES,
    NONCE_BYTES,
    Challenge,
    Drop,
    Lookup,
    Proof,
    Release,
    Stat,
    Welcome,
    client_mac,
    decode_hello,
    encode,
)
from kvstore.settings import PeerSettings, StoreSettings
from kvstore.testing.certificates import SampleAuthority
from kvstore.testing.poll import wait_until
from kvstore.testing.process import StoreProcess
from kvstore.testing.samples import sample_key, sample_payload
from kvstore.testing.store_client import LATE_S, SOON_S, read_bytes, write_chunk
from kvstore.transport.tcp_server import TcpServer

TRANSFER_S = 1.0
LEASE_S = 1.5
CHUNKS = 6
CHUNK_BYTES = 4_000_000


def settings(*transports: str) -> StoreSettings:
    peers = PeerSettings(
        transports=transports,
        transfer_s=TRANSFER_S,
        lease_s=LEASE_S,
        heartbeat_s=0.3,
        breaker_pause_s=0.1,
        min_bytes_per_s=50e6,
    )
    return StoreSettings(host_bytes=48 << 20, nvme=None, peers=peers, handshake_s=1.0)


@pytest.fixture(params=["shm", "tcp"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    before = len(os.listdir("/proc/self/fd"))
    with Pair(tmp_path, settings(request.param)) as pair:
        yield pair
        wait_until(lambda: pair.leftovers() == [], what=f"nothing to be left: {pair.leftovers()}")
    assert len(os.listdir("/proc/self/fd")) <= before


class Readers:
    """Threads that read the same chunks from the second store again and again, and drop them there in between."""

    def __init__(self, pair: Pair) -> None:
        self.hits = 0
        self.misses = 0
        self.problems: list[str] = []
        self._pair = pair
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(3)]

    def __enter__(self) -> "Readers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _work(self, index: int) -> None:
        client = self._pair.client(1)
        limit_s = TRANSFER_S + CHUNK_BYTES / 50e6
        while not self._over.is_set():
            index = (index + 1) % CHUNKS
            start_s = time.monotonic()
            (found,) = read_bytes(client, [sample_key(index)], limit_s)
            seconds = time.monotonic() - start_s
            if seconds > limit_s + LATE_S:
                self.problems.append(f"a read took {seconds:.1f} s")
            if found is None:
                self.misses += 1
            elif found == sample_payload(index, CHUNK_BYTES):
                self.hits += 1
            else:
                self.problems.append(f"wrong bytes of chunk {index}")
            client.drop([sample_key(index)], deadline_s=1.0)
        client.close()

    def wait_hits(self, number: int = 5) -> None:
        target = self.hits + number
        wait_until(lambda: self.hits >= target or self.problems, what=f"{number} more reads that hit")

    def wait_misses(self, number: int = 5) -> None:
        target = self.misses + number
        wait_until(lambda: self.misses >= target or self.problems, what=f"{number} more misses")


def write_all(client: NodeStoreClient) -> None:
    for index in range(CHUNKS):
        write_chunk(client, index, CHUNK_BYTES)


def wait_known(client: NodeStoreClient, *, held: bool) -> None:
    keys = [sample_key(index) for index in range(CHUNKS)]
    wait_until(lambda: client.lookup(keys, deadline_s=1.0) == [held] * CHUNKS, what=f"lookups to say {held}")


def test_peer_killed_and_restarted_under_the_same_name_during_transfers(pair: Pair) -> None:
    writer, reader = pair.observers
    write_all(writer)
    wait_known(reader, held=True)
    with Readers(pair) as readers:
        readers.wait_hits()
        # With one data path open, and the readers connected.
        descriptors = pair.stores[1].num_open_descriptors()
        for _ in range(3):
            readers.wait_hits()
            pair.stores[0].kill()
            readers.wait_misses()
            pair.stores[0].restart()
            for store in pair.stores:
                store.set_peers([other.endpoint for other in pair.stores])
            wait_until(lambda: is_up(reader), what="the peer's next life")
            wait_until(lambda: writer.stat(deadline_s=1.0), what="the store to answer its own client")
            write_all(writer)
        readers.wait_hits()
    assert readers.problems == []
    wait_until(
        lambda: pair.stores[1].num_open_descriptors() <= descriptors,
        what=f"{pair.stores[1].num_open_descriptors()} descriptors to be {descriptors}",
    )


def test_dead_peers_chunks_disappear_at_once(pair: Pair) -> None:
    writer, reader = pair.observers
    write_all(writer)
    wait_known(reader, held=True)
    pair.stores[0].kill()
    start_s = time.monotonic()
    wait_known(reader, held=False)
    # Far below the three seconds of silence that a feed waits for.
    assert time.monotonic() - start_s < 1.0
    pair.stores[0].restart()
    for store in pair.stores:
        store.set_peers([other.endpoint for other in pair.stores])
    wait_until(lambda: is_up(reader), what="the peer's next life")


def test_peer_frozen_and_thawed_during_transfers(pair: Pair) -> None:
    writer, reader = pair.observers
    write_all(writer)
    wait_known(reader, held=True)
    with Readers(pair) as readers:
        for _ in range(2):
            readers.wait_hits()
            pair.stores[0].freeze()
            readers.wait_misses()
            wait_known(reader, held=False)
            pair.stores[0].thaw()
            wait_known(reader, held=True)
        readers.wait_hits()
    assert readers.problems == []


def test_frozen_puller_loses_its_leases_and_comes_back(pair: Pair) -> None:
    writer, reader = pair.observers
    write_all(writer)
    wait_known(reader, held=True)
    with Readers(pair) as readers:
        readers.wait_hits()
        pair.stores[1].freeze()
        wait_until(lambda: pair.leftovers_of(0) == [], what="the frozen puller's leases to end")
        pair.stores[1].thaw()
        readers.wait_hits()
    assert readers.problems == []


def test_frozen_holder_is_replaced_by_the_next_one(tmp_path: Path) -> None:
    with (
        Pair(tmp_path, settings("tcp")) as pair,
        StoreProcess(settings("tcp"), secret=SECRET, socket_path=str(tmp_path / "c"), node_id="node-c") as third,
    ):
        endpoints = [third.endpoint, *(store.endpoint for store in pair.stores)]
        for store in (third, *pair.stores):
            store.set_peers(endpoints)
        writer, second = pair.observers
        reader = NodeStoreClient(third.socket_path, secret=SECRET, client_name="test")
        write_all(writer)
        wait_known(second, held=True)
        for index in range(CHUNKS):
            assert read_bytes(second, [sample_key(index)], SOON_S) == [sample_payload(index, CHUNK_BYTES)]

        def both_known() -> bool:
            return [peer.chunks for peer in peers_of(reader).values()] == [CHUNKS, CHUNKS]

        wait_until(both_known, what="both copies to be known")
        pair.stores[0].freeze()
        limit_s = TRANSFER_S + CHUNK_BYTES / 50e6
        for index in range(CHUNKS):
            assert read_bytes(reader, [sample_key(index)], limit_s + LATE_S) == [sample_payload(index, CHUNK_BYTES)]
        pair.stores[0].thaw()
        wait_until(lambda: pair.leftovers() == [], what="leases to end")
        reader.close()


def test_peer_at_the_same_port_in_another_life_is_not_believed(tmp_path: Path) -> None:
    with Pair(tmp_path, settings("tcp")) as pair:
        reader = pair.observers[1]
        stale = pair.stores[0].endpoint
        pair.stores[0].kill()
        host, port = split_address(stale.peer_address)
        ported = PeerSettings(transports=("tcp",), port=port, breaker_pause_s=0.1)
        pair.stores[0].settings = settings("tcp").model_copy(update={"peers": ported})
        pair.stores[0].restart()
        assert split_address(pair.stores[0].endpoint.peer_address) == (host, port)
        wait_until(lambda: "epoch" in _only(reader).reason, what="the stale endpoint to be refused by its epoch")
        assert not _only(reader).is_up
        pair.stores[1].set_peers([store.endpoint for store in pair.stores])
        wait_until(lambda: is_up(reader), what="the new life")


def test_wrong_secret_is_refused_both_ways(tmp_path: Path) -> None:
    foreign = StoreProcess(
        settings("tcp"), secret=b"another cluster's secret", socket_path=str(tmp_path / "x"), node_id="foreign"
    )
    with foreign, Pair(tmp_path, settings("tcp")) as pair:
        stranger = NodeStoreClient(foreign.socket_path, secret=foreign.secret, client_name="test")
        write_chunk(stranger, 1, 1000)
        write_chunk(pair.observers[0], 2, 1000)
        endpoints = [foreign.endpoint, *(store.endpoint for store in pair.stores)]
        foreign.set_peers(endpoints)
        pair.stores[1].set_peers(endpoints)
        reader = pair.observers[1]
        wait_until(
            lambda: "another secret" in _reason(reader, "foreign"),
            what=f"the foreign store to be refused: {_reason(reader, 'foreign')}",
        )
        wait_until(lambda: len(peers_of(stranger)) == 2, what="the stranger to have looked")
        assert reader.wait([sample_key(2)], deadline_s=SOON_S) == [True]
        assert reader.lookup([sample_key(1)], deadline_s=SOON_S) == [False]
        assert stranger.lookup([sample_key(2)], deadline_s=SOON_S) == [False]
        assert not any(peer.is_up or peer.chunks for peer in peers_of(stranger).values())
        stranger.close()


# The port itself.


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeStore]:
    store = NodeStore(
        settings("tcp"), secret=SECRET, node_id="node-a", socket_path=str(tmp_path / "s"), bind_host="127.0.0.1"
    )
    endpoint = store.start()
    client = NodeStoreClient(endpoint.socket_path, secret=SECRET, client_name="test")
    write_chunk(client, 1, 100_000)
    yield store
    wait_until(lambda: client.stat(deadline_s=1.0).read_leases == 0, what="leases to end")
    client.close()
    store.stop()
    assert [t.name for t in threading.enumerate() if t.name.startswith("kvstore")] == []


class Visitor:
    """A raw connection to the port."""

    def __init__(self, node: NodeStore) -> None:
        assert node._parts is not None
        self.address = split_address(node._parts.endpoint.peer_address)
        self.sock = socket.create_connection(self.address, timeout=SOON_S)
        challenge = decode_hello(self.frame() or b"")
        assert isinstance(challenge, Challenge)
        self.challenge = challenge.nonce
        self.nonce = secrets.token_bytes(NONCE_BYTES)

    def frame(self) -> bytes | None:
        """The next frame; None at the end."""
        head = self._receive(LENGTH_BYTES)
        return None if head is None else self._receive(int.from_bytes(head, "little"))

    def prove(self, mac: bytes) -> None:
        self.sock.sendall(encode(Proof("visitor", self.nonce, mac)))

    def prove_well(self) -> None:
        self.prove(puller_mac(SECRET, challenge=self.challenge, nonce=self.nonce, node_id="visitor"))
        assert isinstance(decode_hello(self.frame() or b""), Welcome)

    def is_thrown_out(self) -> bool:
        """Whether the port ends the connection without another word."""
        return self.frame() is None

    def _receive(self, num_bytes: int) -> bytes | None:
        data = b""
        while len(data) < num_bytes:
            with contextlib.suppress(ConnectionResetError):
                if part := self.sock.recv(num_bytes - len(data)):
                    data += part
                    continue
            assert not data, "cut in the middle of a frame"
            return None
        return data


@pytest.fixture
def visitor(node: NodeStore) -> Iterator[Visitor]:
    visitor = Visitor(node)
    yield visitor
    visitor.sock.close()


STRANGERS: dict[str, Callable[[Visitor], None]] = {
    "says nothing": lambda v: None,
    "babbles": lambda v: v.sock.sendall(b"\xff" * 5000),
    "announces a huge frame": lambda v: v.sock.sendall((1 << 30).to_bytes(4, "little")),
    "guesses": lambda v: v.prove(bytes(32)),
    "knows another secret": lambda v: v.prove(
        puller_mac(b"another cluster's secret", challenge=v.challenge, nonce=v.nonce, node_id="visitor")
    ),
    "shows the proof of the unix socket": lambda v: v.prove(
        client_mac(SECRET, challenge=v.challenge, nonce=v.nonce, client_name="visitor")
    ),
    "replays another connection's proof": lambda v: v.prove(
        puller_mac(SECRET, challenge=bytes(NONCE_BYTES), nonce=v.nonce, node_id="visitor")
    ),
    "asks before it has proven anything": lambda v: v.sock.sendall(encode(Lend(1, sample_key(1), "tcp", 1.0))),
}


@pytest.mark.parametrize("how", STRANGERS.values(), ids=STRANGERS.keys())
def test_stranger_gets_nothing(visitor: Visitor, how: Callable[[Visitor], None]) -> None:
    how(visitor)
    assert visitor.is_thrown_out()


FORBIDDEN = {
    "list": Lookup(1, [sample_key(1)]),
    "drop": Drop(1, [sample_key(1)]),
    "stat": Stat(1),
    "a hello": Challenge(1, bytes(NONCE_BYTES)),
}


@pytest.mark.parametrize("message", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_peer_may_only_borrow(visitor: Visitor, message: object) -> None:
    visitor.prove_well()
    visitor.sock.sendall(encode(message))
    assert visitor.is_thrown_out()


def test_silent_peer_loses_its_loan_and_a_talking_one_keeps_it(node: NodeStore, visitor: Visitor) -> None:
    client = NodeStoreClient(node._parts.endpoint.socket_path, secret=SECRET, client_name="test")
    visitor.prove_well()
    visitor.sock.sendall(encode(Lend(7, sample_key(1), "tcp", 1.0)))
    lent = decode_peer_reply(visitor.frame() or b"")
    assert isinstance(lent, Lent)
    assert lent.offer is not None
    start_s = time.monotonic()
    beats = 0

    def beat() -> bool:
        nonlocal beats
        beats += 1
        visitor.sock.sendall(encode(Heartbeat(beats)))
        assert visitor.frame() is not None
        assert client.stat(deadline_s=SOON_S).read_leases == 1
        return time.monotonic() - start_s > 1.5 * LEASE_S

    wait_until(beat, what="more than a lease's time to pass with signs of life")
    assert visitor.is_thrown_out()
    wait_until(lambda: client.stat(deadline_s=SOON_S).read_leases == 0, what="the loan to end")
    client.close()


def test_memory_of_an_offer_that_cannot_be_revoked_is_never_reused(
    node: NodeStore, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows whether the peer still reads it: not its release ends the pin, nor the end of its session."""

    def fail(server: TcpServer, handle: bytes) -> None:
        raise InvariantError("the send goes on")

    revoke = TcpServer.revoke
    monkeypatch.setattr(TcpServer, "revoke", fail)
    visitor.prove_well()
    visitor.sock.sendall(encode(Lend(1, sample_key(1), "tcp", 1.0)))
    lent = decode_peer_reply(visitor.frame() or b"")
    assert isinstance(lent, Lent)
    visitor.sock.sendall(encode(Release([lent.lease])))
    client = NodeStoreClient(node._parts.endpoint.socket_path, secret=SECRET, client_name="test")
    wait_until(lambda: client.stat(deadline_s=SOON_S).read_leases == 0, what="the lease to end")
    monkeypatch.setattr(TcpServer, "revoke", revoke)
    visitor.sock.close()
    wait_until(lambda: client.stat(deadline_s=SOON_S).sessions == 2, what="the visitor's session to end")
    assert node._parts.host.find(sample_key(1)).pins == 1
    client.close()


def test_loan_of_an_unknown_chunk_or_path_is_a_miss(visitor: Visitor) -> None:
    visitor.prove_well()
    for number, (index, path) in enumerate([(2, "tcp"), (1, "shm"), (1, "smoke")]):
        visitor.sock.sendall(encode(Lend(number, sample_key(index), path, 0.1)))
        assert decode_peer_reply(visitor.frame() or b"") == Lent(number, 0, None)
    visitor.sock.sendall(encode(Describe(9)))
    assert visitor.frame() is not None


def test_tls_between_nodes(tmp_path: Path) -> None:
    authority, stranger = SampleAuthority("cluster"), SampleAuthority("somebody else")
    files = [authority.issue(tmp_path, name) for name in ("a", "b")]
    with Pair(tmp_path, *(settings("tcp").model_copy(update={"tls": tls}) for tls in files)) as pair:
        writer, reader = pair.observers
        write_all(writer)
        wait_known(reader, held=True)
        for index in range(CHUNKS):
            assert read_bytes(reader, [sample_key(index)], SOON_S) == [sample_payload(index, CHUNK_BYTES)]
        wait_until(lambda: pair.leftovers() == [], what="leases to end")
        # Without TLS, and with a certificate of another authority: not even a challenge, though the secret is known.
        for tls in (None, stranger.issue(tmp_path, "c")):
            alone = settings("tcp").model_copy(update={"tls": tls})
            with StoreProcess(alone, secret=SECRET, socket_path=str(tmp_path / "c"), node_id="node-c") as third:
                third.set_peers([store.endpoint for store in pair.stores])
                client = NodeStoreClient(third.socket_path, secret=SECRET, client_name="test")
                keys = [sample_key(index) for index in range(CHUNKS)]
                wait_until(
                    lambda c=client: all(p.reason != "connecting" for p in peers_of(c).values()) and peers_of(c),
                    what="the third store to have tried",
                )
                assert not any(peer.is_up for peer in peers_of(client).values())
                assert client.lookup(keys, deadline_s=1.0) == [False] * CHUNKS
                client.close()


def test_path_that_fails_again_and_again_is_left_for_the_next(tmp_path: Path) -> None:
    """The data port is unreachable, as behind a firewall, while the control plane works."""
    both = settings("tcp", "shm")
    stores = [
        NodeStore(both, secret=SECRET, node_id=f"node-{name}", socket_path=str(tmp_path / name), bind_host="127.0.0.1")
        for name in "ab"
    ]
    endpoints = [store.start() for store in stores]
    closed = socket.create_server(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    closed.close()
    stores[0]._parts.peers._paths.servers["tcp"]._address = f"127.0.0.1:{port}".encode()
    stores[1].set_peers(endpoints)
    writer, reader = (NodeStoreClient(e.socket_path, secret=SECRET, client_name="test") for e in endpoints)
    for index in range(3):
        write_chunk(writer, index, 100_000)
    wait_until(lambda: reader.lookup([sample_key(i) for i in range(3)], deadline_s=1.0) == [True] * 3, what="chunks")
    assert _only(reader).transport == "tcp"

    def is_read() -> bool:
        return read_bytes(reader, [sample_key(1)], SOON_S) == [sample_payload(1, 100_000)]

    wait_until(is_read, what="the chunk to come by the other path")
    peer = _only(reader)
    assert peer.transport == "shm"
    assert "tcp: left for a while, it failed 2 times" in peer.reason
    for client in (reader, writer):
        assert client.stat(deadline_s=SOON_S).read_leases == 0
        client.close()
    for store in stores:
        store.stop()
    assert [t.name for t in threading.enumerate() if t.name.startswith("kvstore")] == []


def _only(client: NodeStoreClient):
    (peer,) = peers_of(client).values()
    return peer


def _reason(client: NodeStoreClient, node_id: str) -> str:
    peer = peers_of(client).get(node_id)
    return peer.reason if peer else ""
