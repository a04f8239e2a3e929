"""Strangers on the store's sockets: replays, reflections, wrong proofs and floods end, and the store goes on."""

import errno
import os
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvstore.client import NodeStoreClient
from kvstore.connection import StoreConnection
from kvstore.handshake import StoreRefusedError, StoreUnreachableError
from kvstore.node import NodeStore
from kvstore.peer_protocol import Alive, Heartbeat, Lend, decode_peer_reply, holder_mac, puller_mac
from kvstore.protocol import (
    LENGTH_BYTES,
    MAX_HANDSHAKE_BYTES,
    NONCE_BYTES,
    PROTOCOL_VERSION,
    Challenge,
    Lookup,
    Proof,
    ProtocolError,
    Welcome,
    client_mac,
    decode_hello,
    encode,
    store_mac,
)
from kvstore.settings import StoreSettings
from kvstore.testing.certificates import SampleAuthority
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_key
from kvstore.testing.store_client import SOON_S, read_bytes, write_chunk
from kvstore.tls import client_context
from kvstore.transport.tcp_wire import parse_address

SECRET = b"a secret of a test cluster"
HANDSHAKE_S = 5.0
NAME = "stranger"


@dataclass(frozen=True)
class Door:
    """One of the store's sockets on which strangers may knock."""

    family: int
    address: Any
    proof_of: Callable[..., bytes]
    """The client's MAC."""
    answer_of: Callable[..., bytes]
    """The store's MAC."""
    request: bytes
    """Something to ask for before one may."""


@pytest.fixture(params=["workers", "peers"])
def door(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Door]:
    """The two authenticated sockets of a running store, which is unharmed and has no sessions left at the end."""
    path = str(tmp_path / "s")
    settings = StoreSettings(host_bytes=1 << 20, nvme=None, handshake_s=HANDSHAKE_S)
    store = NodeStore(settings, secret=SECRET, node_id="n", socket_path=path, bind_host="127.0.0.1")
    endpoint = store.start()
    before = len(os.listdir("/proc/self/fd"))
    if request.param == "workers":
        lookup = encode(Lookup(1, [sample_key(1)]))
        yield Door(socket.AF_UNIX, path, worker_proof, store_mac, lookup)
    else:
        lend = encode(Lend(1, sample_key(1), "tcp", 1.0))
        yield Door(socket.AF_INET, parse_address(endpoint.peer_address.encode()), peer_proof, holder_mac, lend)
    client = NodeStoreClient(path, secret=SECRET, client_name="honest")
    payload = write_chunk(client, 1, 1000)
    assert read_bytes(client, [sample_key(1)], SOON_S) == [payload]

    def is_alone() -> bool:
        stats = client.stat(deadline_s=1.0)
        return stats is not None and stats.sessions == 1

    wait_until(is_alone, what="strangers to be gone")
    client.close()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, what="strangers' descriptors to be closed")
    store.stop()


def worker_proof(secret: bytes, *, challenge: bytes, nonce: bytes, name: str) -> bytes:
    return client_mac(secret, challenge=challenge, nonce=nonce, client_name=name)


def peer_proof(secret: bytes, *, challenge: bytes, nonce: bytes, name: str) -> bytes:
    return puller_mac(secret, challenge=challenge, nonce=nonce, node_id=name)


class Stranger:
    """A raw socket, and the handshake step by step."""

    def __init__(self, door: Door, *, tls: ssl.SSLContext | None = None) -> None:
        self.door = door
        self.sock = socket.socket(door.family, socket.SOCK_STREAM)
        self.sock.settimeout(SOON_S)
        try:
            self.sock.connect(door.address)
            if tls is not None:
                self.sock = tls.wrap_socket(self.sock)
            hello = decode_hello(self.receive())
        except (OSError, ProtocolError):
            self.sock.close()
            raise
        assert isinstance(hello, Challenge)
        self.challenge = hello.nonce

    def __enter__(self) -> "Stranger":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return  # refused already, which is what the test is about to see

    def receive(self) -> bytes:
        """One frame's body; b"" at the end of the connection."""
        head = self._exactly(LENGTH_BYTES)
        return self._exactly(int.from_bytes(head, "little")) if head else b""

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                part = self.sock.recv(count - len(data))
            except ConnectionResetError:
                return b""
            if not part:
                return b""
            data += part
        return data

    def proof(self, *, nonce: bytes | None = None, secret: bytes = SECRET, name: str = NAME) -> Proof:
        nonce = nonce or secrets.token_bytes(NONCE_BYTES)
        return Proof(name, nonce, self.door.proof_of(secret, challenge=self.challenge, nonce=nonce, name=name))

    def assert_welcome(self) -> None:
        """It proves itself, and is let in."""
        self.send(encode(self.proof()))
        assert isinstance(decode_hello(self.receive()), Welcome)

    def assert_refused(self) -> None:
        """The connection ends without another word, descriptor or delay beyond the handshake's time."""
        assert self.receive() == b""


def test_right_proof_is_welcomed(door: Door) -> None:
    """The stranger's own steps are right, so that the refusals below are not for another reason."""
    with Stranger(door) as stranger:
        proof = stranger.proof()
        stranger.send(encode(proof))
        welcome = decode_hello(stranger.receive())
        assert isinstance(welcome, Welcome)
        expected = door.answer_of(SECRET, challenge=stranger.challenge, nonce=proof.nonce, epoch=welcome.epoch)
        assert welcome.mac == expected


def test_replayed_proof_is_refused(door: Door) -> None:
    """Every connection has its own challenge: what was heard on one is worth nothing on the next."""
    with Stranger(door) as first, Stranger(door) as second:
        assert first.challenge != second.challenge
        heard = encode(first.proof())
        first.send(heard)
        assert isinstance(decode_hello(first.receive()), Welcome)
        second.send(heard)
        second.assert_refused()


def test_challenge_reflected_as_nonce_is_refused(door: Door) -> None:
    """Without the secret, with everything that the store has said so far as material."""
    with Stranger(door) as stranger:
        for_mac = [stranger.challenge * 2, bytes(32), stranger.challenge + bytes(16)]
        stranger.send(encode(Proof(NAME, stranger.challenge, for_mac[0])))
        stranger.assert_refused()
    for mac in for_mac[1:]:
        with Stranger(door) as stranger:
            stranger.send(encode(Proof(NAME, stranger.challenge, mac)))
            stranger.assert_refused()


def test_store_cannot_be_used_as_an_oracle(door: Door) -> None:
    """A stranger shows one connection's challenge as its nonce on another: a store's MAC is no client's MAC.

    And it gets no MAC at all before it has proven itself, so there is nothing to reflect.
    """
    with Stranger(door) as one, Stranger(door) as two:
        two.send(encode(two.proof(nonce=one.challenge)))  # as an honest client that was lured into this nonce
        welcome = decode_hello(two.receive())
        assert isinstance(welcome, Welcome)
        one.send(encode(Proof(NAME, two.challenge, welcome.mac)))
        one.assert_refused()


@pytest.mark.parametrize("mac", [b"", b"\0", bytes(31), bytes(33), bytes(32), bytes(900)], ids=len)
def test_wrong_mac_of_any_length_is_refused(door: Door, mac: bytes) -> None:
    with Stranger(door) as stranger:
        stranger.send(encode(Proof(NAME, bytes(NONCE_BYTES), mac)))
        stranger.assert_refused()


@pytest.mark.parametrize("cut", [1, 16, 31])
def test_beginning_of_the_right_mac_is_refused(door: Door, cut: int) -> None:
    with Stranger(door) as stranger:
        proof = stranger.proof()
        stranger.send(encode(Proof(NAME, proof.nonce, proof.mac[:cut])))
        stranger.assert_refused()


def test_proof_for_another_name_or_secret_is_refused(door: Door) -> None:
    for make in (
        lambda stranger: Proof("another name", (p := stranger.proof()).nonce, p.mac),
        lambda stranger: stranger.proof(secret=SECRET[:-1]),
        lambda stranger: stranger.proof(secret=b""),
    ):
        with Stranger(door) as stranger:
            stranger.send(encode(make(stranger)))
            stranger.assert_refused()


@pytest.mark.parametrize("length", [200, 201, 5000])
def test_name_has_a_bound(door: Door, length: int) -> None:
    with Stranger(door) as stranger:
        stranger.send(encode(stranger.proof(name="n" * length)))
        if length <= 200:
            assert isinstance(decode_hello(stranger.receive()), Welcome)
        else:
            stranger.assert_refused()


@pytest.mark.parametrize("name", ["\x1b[2J\nstore_started node=evil", "\ud7ff\U0010ffff"])
def test_strange_names_do_no_harm(door: Door, name: str, caplog: pytest.LogCaptureFixture) -> None:
    with Stranger(door) as stranger:
        proof = stranger.proof(name=name)
        stranger.send(encode(Proof(name, proof.nonce, bytes(32))))
        stranger.assert_refused()
    assert not any("\n" in record.getMessage() or "\x1b" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "message",
    [
        encode(Lookup(1, [sample_key(1)])),
        encode(Lend(1, sample_key(1), "tcp", 1.0)),
        encode(Challenge(PROTOCOL_VERSION, bytes(NONCE_BYTES))),
        encode(Welcome(bytes(32), "epoch", 1 << 20, 8192)),
        bytes(LENGTH_BYTES),
        (1).to_bytes(LENGTH_BYTES, "little") + b"\xc1",
        (MAX_HANDSHAKE_BYTES + 1).to_bytes(LENGTH_BYTES, "little") + bytes(MAX_HANDSHAKE_BYTES + 1),
        b"\xff" * 100,
        b"GET / HTTP/1.1\r\nHost: store\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    ],
    ids=[
        "request",
        "peer's request",
        "challenge",
        "welcome",
        "empty",
        "no msgpack",
        "too long",
        "huge length",
        "HTTP",
        "TLS",
    ],
)
def test_anything_but_a_proof_is_refused(door: Door, message: bytes) -> None:
    with Stranger(door) as stranger:
        stranger.send(message)
        stranger.assert_refused()


def test_proof_for_one_door_is_worth_nothing_at_the_other(door: Door) -> None:
    """Right secret, right nonces, but the words of the other protocol."""
    other = peer_proof if door.proof_of is worker_proof else worker_proof
    with Stranger(door) as stranger:
        nonce = secrets.token_bytes(NONCE_BYTES)
        stranger.send(encode(Proof(NAME, nonce, other(SECRET, challenge=stranger.challenge, nonce=nonce, name=NAME))))
        stranger.assert_refused()


def test_requests_behind_a_wrong_proof_are_not_served(door: Door) -> None:
    """In one packet, so that they are there before the refusal is."""
    with Stranger(door) as stranger:
        wrong = encode(Proof(NAME, bytes(NONCE_BYTES), bytes(32)))
        stranger.send(wrong + door.request * 20)
        stranger.assert_refused()


def test_proof_byte_by_byte_must_be_over_in_time(door: Door) -> None:
    """A stranger that trickles does not hold its place for longer than the handshake may take."""
    with Stranger(door) as stranger:
        data = encode(stranger.proof())
        stranger.send(data[:-1])
        stranger.assert_refused()


def flood(door: Door, count: int) -> list[socket.socket]:
    """Connections that say nothing."""
    sockets = [socket.socket(door.family, socket.SOCK_STREAM) for _ in range(count)]
    for sock in sockets:
        sock.setblocking(False)
        # The queue of the listener may be full for a moment.
        wait_until(lambda sock=sock: sock.connect_ex(door.address) in (0, errno.EISCONN), what="the store to accept")
    return sockets


def test_flood_of_strangers_leaves_room_for_clients_again(door: Door) -> None:
    """More connections than the store takes: the silent ones are gone after a while, at the latest."""
    sockets = flood(door, StoreSettings().max_sessions + 20)

    def is_welcome() -> bool:
        try:
            with Stranger(door) as client:
                client.send(encode(client.proof()))
                return bool(client.receive())
        except (OSError, ProtocolError):
            return False  # refused at the door

    wait_until(is_welcome, what="room for a client", deadline_s=3 * HANDSHAKE_S)
    for sock in sockets:
        sock.close()


@pytest.mark.parametrize("door", ["peers"], indirect=True)
def test_oldest_stranger_makes_way_and_who_has_proven_itself_stays(door: Door) -> None:
    """Hosts of the network may open as many connections as they like: peers come in at their first try."""
    with Stranger(door) as peer:
        peer.assert_welcome()
        sockets = flood(door, StoreSettings().max_sessions + 20)
        with Stranger(door) as newcomer:
            newcomer.assert_welcome()
        peer.send(encode(Heartbeat(7)))
        assert decode_peer_reply(peer.receive()) == Alive(7)
        for sock in sockets:
            sock.close()


def test_store_full_of_peers_takes_no_more(tmp_path: Path) -> None:
    with small_store(tmp_path) as door, Stranger(door) as one, Stranger(door) as two:
        one.assert_welcome()
        two.assert_welcome()
        with pytest.raises(ProtocolError):
            Stranger(door)
        two.send(encode(Heartbeat(7)))
        assert decode_peer_reply(two.receive()) == Alive(7)


def test_who_does_not_begin_tls_makes_way(tmp_path: Path) -> None:
    """Openings of TLS count as strangers too, in the order in which they came."""
    tls = SampleAuthority("cluster").issue(tmp_path, "a")
    with small_store(tmp_path, tls=tls) as door:
        sockets = flood(door, 20)
        with Stranger(door, tls=client_context(tls)) as newcomer:
            newcomer.assert_welcome()
        for sock in sockets:
            sock.close()


@contextmanager
def small_store(folder: Path, **changes: Any) -> Iterator[Door]:
    """The peers' door of a store that takes two connections."""
    settings = StoreSettings(host_bytes=1 << 20, nvme=None, handshake_s=HANDSHAKE_S, max_sessions=2, **changes)
    store = NodeStore(settings, secret=SECRET, node_id="n", socket_path=str(folder / "s"), bind_host="127.0.0.1")
    address = parse_address(store.start().peer_address.encode())
    before = len(os.listdir("/proc/self/fd"))
    yield Door(socket.AF_INET, address, peer_proof, holder_mac, encode(Lend(1, sample_key(1), "tcp", 1.0)))
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, what="strangers' descriptors to be closed")
    store.stop()


# The other side: a client must not be fooled by whoever sits on the socket's path.


def impostor(path: str, answer: Callable[[Challenge, Proof], bytes], *, first: bytes | None = None) -> threading.Thread:
    """Something that listens in the store's place and answers one client's proof."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()

    def serve() -> None:
        with listener:
            sock, _ = listener.accept()
        with sock:
            sock.settimeout(SOON_S)
            challenge = Challenge(PROTOCOL_VERSION, secrets.token_bytes(NONCE_BYTES))
            sock.sendall(first if first is not None else encode(challenge))
            received = b""
            while part := _receive(sock):
                received += part
                if len(received) >= LENGTH_BYTES + int.from_bytes(received[:LENGTH_BYTES], "little"):
                    proof = decode_hello(received[LENGTH_BYTES:])
                    assert isinstance(proof, Proof)
                    read_end, write_end = os.pipe()
                    # With a descriptor, as a real store does: it must be closed by who refuses.
                    socket.send_fds(sock, [answer(challenge, proof)], [read_end])
                    os.close(read_end)
                    os.close(write_end)
                    received = b""

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def _receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(4096)
    except (ConnectionResetError, TimeoutError):
        return b""


def _welcome(mac: bytes) -> bytes:
    return encode(Welcome(mac, "epoch", 4096, 8192))


@pytest.mark.parametrize(
    "answer",
    [
        lambda challenge, proof: _welcome(bytes(32)),
        lambda challenge, proof: _welcome(proof.mac),
        lambda challenge, proof: _welcome(b""),
        lambda challenge, proof: encode(proof),
        lambda challenge, proof: encode(Challenge(PROTOCOL_VERSION, proof.nonce)),
        lambda challenge, proof: b"\xff" * 64,
        lambda challenge, proof: (5).to_bytes(4, "little") + msgspec.msgpack.encode("what"),
    ],
    ids=["zeros", "client's own MAC", "empty", "proof back", "challenge again", "huge length", "no message"],
)
def test_client_refuses_an_impostor(tmp_path: Path, answer: Callable[[Challenge, Proof], bytes]) -> None:
    path = str(tmp_path / "s")
    before = len(os.listdir("/proc/self/fd"))
    thread = impostor(path, answer)
    with pytest.raises((StoreRefusedError, StoreUnreachableError)):
        StoreConnection(path, secret=SECRET, client_name=NAME, stop_s=_soon())
    thread.join(SOON_S)
    assert len(os.listdir("/proc/self/fd")) == before, "the impostor's descriptor was kept"


@pytest.mark.parametrize(
    "first",
    [
        encode(Challenge(PROTOCOL_VERSION + 1, bytes(NONCE_BYTES))),
        encode(Welcome(bytes(32), "epoch", 1 << 20, 8192)),
        b"\xff" * 64,
        bytes(4),
    ],
    ids=["another version", "welcome at once", "huge length", "empty"],
)
def test_client_refuses_what_is_no_challenge(tmp_path: Path, first: bytes) -> None:
    path = str(tmp_path / "s")
    thread = impostor(path, lambda challenge, proof: b"", first=first)
    with pytest.raises((StoreRefusedError, StoreUnreachableError)):
        StoreConnection(path, secret=SECRET, client_name=NAME, stop_s=_soon())
    thread.join(SOON_S)


def _soon() -> float:
    return time.monotonic() + SOON_S
