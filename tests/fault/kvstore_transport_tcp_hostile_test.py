"""Hostile and broken peers of the TCP data path: refused, cut off in time, within bounds, and nothing left."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import SettingsError
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_payload
from kvstore.testing.transport import LATE_S, MIB, open_things, soon
from kvstore.transport import Offer, OfferRefusedError, PeerGoneError, TransferCorruptError
from kvstore.transport.tcp import TcpServer, TcpTransport
from kvstore.transport.tcp_wire import (
    HANDLE_BYTES,
    REQUEST_BYTES,
    RESPONSE_BYTES,
    Status,
    encode_request,
    encode_response,
    parse_address,
    parse_response,
)

HANDSHAKE_S = 0.5
BIG_BYTES = 64 * MIB


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = open_things()
    yield
    wait_until(lambda: open_things().is_within(before), what=f"no more than {before} to be open")


@pytest.fixture
def server(nothing_is_left: None) -> Iterator[TcpServer]:
    with closing(
        TcpServer(
            bind_host="127.0.0.1",
            max_connections_per_peer=2,
            max_offered_bytes_per_peer=2 * BIG_BYTES,
            handshake_s=HANDSHAKE_S,
            transfer_s=0.3,
            min_bytes_per_s=1e9,
        )
    ) as server:
        yield server


@pytest.fixture
def client(server: TcpServer) -> Iterator[TcpTransport]:
    with closing(TcpTransport(server.address, peer="holder", max_connections=2)) as client:
        yield client


def dial(server: TcpServer) -> socket.socket:
    return socket.create_connection(parse_address(server.address), timeout=soon() - time.monotonic())


@cache
def payload(num_bytes: int) -> bytes:
    return sample_payload(1, num_bytes)


def offered(server: TcpServer, num_bytes: int = MIB, *, peer: str = "puller") -> Offer:
    offer = server.offer(memoryview(payload(num_bytes)), peer=peer, lifetime_s=60.0)
    assert offer is not None
    return offer


def request_of(offer: Offer, *, offset: int = 0, length: int | None = None) -> bytes:
    return encode_request(offer.handle, offset=offset, length=offer.stored_bytes if length is None else length)


def read_bytes(sock: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes and (part := sock.recv(num_bytes - len(data))):
        data += part
    return data


def read_status(sock: socket.socket) -> Status:
    return parse_response(read_bytes(sock, RESPONSE_BYTES))[0]


def is_closed(sock: socket.socket) -> bool:
    """Whether the other side has ended the connection, read to its end."""
    try:
        while sock.recv(MIB):
            pass
    except ConnectionError:
        pass
    return True


def assert_works(server: TcpServer, client: TcpTransport) -> None:
    offer = offered(server, 68 << 10)
    into = memoryview(bytearray(offer.stored_bytes))
    client.pull(offer, into, stop_s=soon())
    assert into == sample_payload(1, offer.stored_bytes)
    server.revoke(offer.handle)


# Pullers that want too much.


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (1, MIB), (0, MIB + 1), (MIB, 1), (1 << 40, 1 << 40)])
def test_bytes_beside_the_record_are_refused(server: TcpServer, offset: int, length: int) -> None:
    with dial(server) as sock:
        sock.sendall(request_of(offered(server), offset=offset, length=length))
        assert read_status(sock) is Status.REFUSED


def test_rest_of_a_record_is_served(server: TcpServer) -> None:
    with dial(server) as sock:
        sock.sendall(request_of(offered(server), offset=MIB - 10, length=10))
        assert read_status(sock) is Status.OK
        assert read_bytes(sock, 10) == sample_payload(1, MIB)[-10:]


def test_connection_of_one_peer_may_not_show_handles_of_another(server: TcpServer) -> None:
    mine, others = offered(server, peer="a"), offered(server, peer="b")
    with dial(server) as sock:
        sock.sendall(request_of(mine))
        assert read_status(sock) is Status.OK
        read_bytes(sock, MIB)
        sock.sendall(request_of(others))
        assert read_status(sock) is Status.REFUSED
        sock.sendall(request_of(mine))
        assert read_status(sock) is Status.OK


def test_stranger_with_a_wrong_handle_is_sent_away(server: TcpServer) -> None:
    with dial(server) as sock:
        sock.sendall(encode_request(bytes(HANDLE_BYTES), offset=0, length=1))
        assert read_status(sock) is Status.REFUSED
        assert is_closed(sock)


def test_handle_is_used_up(server: TcpServer, client: TcpTransport) -> None:
    offer = offered(server)
    into = memoryview(bytearray(MIB))
    for _ in range(4):
        client.pull(offer, into, stop_s=soon())
    with pytest.raises(OfferRefusedError):
        client.pull(offer, into, stop_s=soon())


def test_peer_that_holds_too_much_is_offered_nothing(server: TcpServer) -> None:
    kept = [offered(server, BIG_BYTES) for _ in range(2)]
    record = memoryview(bytes(8192))
    assert server.offer(record, peer="puller", lifetime_s=60.0) is None
    assert server.offer(record, peer="another", lifetime_s=60.0) is not None
    server.revoke(kept[0].handle)
    assert server.offer(record, peer="puller", lifetime_s=60.0) is not None


def test_busy_connections_of_a_peer_are_bounded(server: TcpServer) -> None:
    """Two pull and do not read; the third is told so, and another peer is served."""
    big = offered(server, BIG_BYTES)
    with dial(server) as first, dial(server) as second, dial(server) as third, dial(server) as other:
        for sock in (first, second):
            sock.sendall(request_of(big))
            assert read_status(sock) is Status.OK
        third.sendall(request_of(big))
        assert read_status(third) is Status.BUSY
        other.sendall(request_of(offered(server, peer="another")))
        assert read_status(other) is Status.OK


def test_idle_connection_makes_way_for_a_new_one(server: TcpServer, client: TcpTransport) -> None:
    """A puller that restarted, and left its connections behind, is not locked out."""
    with dial(server) as first, dial(server) as second:
        for sock in (first, second):
            sock.sendall(request_of(offered(server, 8192)))
            assert read_status(sock) is Status.OK
            read_bytes(sock, 8192)
        assert_works(server, client)
        assert is_closed(first)
        assert server.num_connections <= 3


# Pullers that are too slow.


def test_puller_that_does_not_read_is_cut_off(server: TcpServer, client: TcpTransport) -> None:
    """By the server's own clock: nobody has to revoke anything."""
    offer = offered(server, BIG_BYTES)
    with dial(server) as sock:
        sock.sendall(request_of(offer))
        assert read_status(sock) is Status.OK
        wait_until(lambda: server.num_connections == 0, what="the frozen puller to be cut off", deadline_s=0.4 + LATE_S)
    assert_works(server, client)


def test_offer_that_expires_ends_its_sends() -> None:
    record = memoryview(bytes(BIG_BYTES))
    with closing(TcpServer(bind_host="127.0.0.1", transfer_s=60.0)) as server, dial(server) as sock:
        offer = server.offer(record, peer="puller", lifetime_s=0.5)
        assert offer is not None
        sock.sendall(request_of(offer))
        assert read_status(sock) is Status.OK
        wait_until(lambda: server.num_connections == 0, what="the send to end", deadline_s=0.5 + LATE_S)


def test_revoke_gives_the_memory_back(server: TcpServer) -> None:
    """Of a record that a frozen puller is reading: at once, with no view of it left."""
    memory = bytearray(BIG_BYTES)
    offer = server.offer(memoryview(memory), peer="puller", lifetime_s=60.0)
    assert offer is not None
    with dial(server) as sock:
        sock.sendall(request_of(offer))
        assert read_status(sock) is Status.OK
        start_s = time.monotonic()
        server.revoke(offer.handle)
        assert time.monotonic() - start_s < LATE_S
        memory.clear()  # raises BufferError while anybody still has a view


def test_slow_stranger_is_sent_away(server: TcpServer) -> None:
    """Half a request, then a byte now and then: the deadline is for the whole of it."""
    frame = request_of(offered(server))
    rest = [bytes([byte]) for byte in reversed(frame[REQUEST_BYTES // 2 :])]
    looks: list[int] = []
    with dial(server) as sock:
        sock.sendall(frame[: REQUEST_BYTES // 2])
        wait_until(lambda: server.num_connections == 1, what="the stranger to be let in")

        def is_sent_away() -> bool:
            looks.append(1)
            if len(looks) % 20 == 0 and len(rest) > 1:
                with suppress(OSError):
                    sock.send(rest.pop())
            return server.num_connections == 0

        wait_until(is_sent_away, what="the slow stranger to be sent away", deadline_s=HANDSHAKE_S + LATE_S)


def test_strangers_do_not_lock_others_out() -> None:
    """More silent connections than the server keeps: the oldest go, and a puller is served among them."""
    with closing(TcpServer(bind_host="127.0.0.1", handshake_s=60.0)) as server, ExitStack() as stack:
        for _ in range(80):
            stack.enter_context(dial(server))
        wait_until(lambda: 0 < server.num_connections <= 32, what="the oldest strangers to go")
        client = stack.enter_context(closing(TcpTransport(server.address, peer="holder")))
        assert_works(server, client)
        wait_until(lambda: 0 < server.num_connections <= 33, what="the oldest strangers to go")


def test_connections_are_bounded_in_all() -> None:
    """Newcomers take the place of silent strangers, but of nobody that has shown a handle."""
    with closing(TcpServer(bind_host="127.0.0.1", max_connections=4, handshake_s=30.0)) as server, ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(dial(server))
        wait_until(lambda: 0 < server.num_connections <= 4, what="the strangers to be four")
        for _ in range(4):
            sock = stack.enter_context(dial(server))
            sock.sendall(request_of(offered(server, 8192)))
            assert read_status(sock) is Status.OK
            read_bytes(sock, 8192)
        assert is_closed(stack.enter_context(dial(server)))
        wait_until(lambda: server.num_connections == 4, what="the strangers to go")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=4 * REQUEST_BYTES), has_magic=st.booleans())
def test_any_bytes_are_refused_or_cut_off(server: TcpServer, data: bytes, has_magic: bool) -> None:
    """The server answers garbage with one small frame at most, and goes on."""
    if has_magic:
        data = encode_request(bytes(HANDLE_BYTES), offset=0, length=1)[:8] + data
    with dial(server) as sock:
        answer = b""
        with suppress(ConnectionError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while part := sock.recv(MIB):
                answer += part
        assert len(answer) in (0, RESPONSE_BYTES)
        assert not answer or parse_response(answer)[0] in (Status.REFUSED, Status.MALFORMED)


# Holders that are hostile.


class FakeHolder:
    """Accepts connections and does to each what it is told, on threads of its own."""

    def __init__(self, serve: Callable[[socket.socket], object]) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}".encode()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="kvstore-fake")]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._sockets.append(sock)
                self._threads.append(threading.Thread(target=self._run, args=(sock,), name="kvstore-fake"))
                self._threads[-1].start()

    def _run(self, sock: socket.socket) -> None:
        with suppress(OSError), sock:
            sock.recv(REQUEST_BYTES, socket.MSG_WAITALL)
            self._serve(sock)

    def close(self) -> None:
        for sock in (self._listener, *self._sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()


def pull_from(serve: Callable[[socket.socket], object], *, num_bytes: int = MIB, deadline_s: float = 0.3) -> bytes:
    """Pull from a holder that answers with `serve`; what arrived."""
    with closing(FakeHolder(serve)) as holder, closing(TcpTransport(holder.address, peer="fake")) as client:
        into = memoryview(bytearray(num_bytes))
        offer = Offer(transport="tcp", handle=bytes(HANDLE_BYTES), stored_bytes=num_bytes)
        stop_s = time.monotonic() + deadline_s
        try:
            client.pull(offer, into, stop_s=stop_s)
        finally:
            assert time.monotonic() - stop_s < LATE_S
        return bytes(into)


@pytest.mark.parametrize(
    "head",
    [
        bytes(RESPONSE_BYTES),
        b"HTTP/1.1 200 OK\r\n\r\n",
        encode_response(Status.OK, MIB - 1),
        encode_response(Status.OK, MIB + 1),
        encode_response(Status.OK, 2**64 - 1),
        encode_response(Status.MALFORMED),
        encode_response(Status.OK, MIB)[:6] + b"\xff\xff" + MIB.to_bytes(8, "little"),
    ],
)
def test_wrong_response_is_corrupt(head: bytes) -> None:
    """And no byte of its body is read into the buffer."""
    with pytest.raises(TransferCorruptError):
        pull_from(lambda sock: sock.sendall(head + b"\xff" * 1000))


@pytest.mark.parametrize("num_bytes", [0, RESPONSE_BYTES - 1, RESPONSE_BYTES, RESPONSE_BYTES + MIB - 1])
def test_cut_response_is_a_peer_that_went(num_bytes: int) -> None:
    whole = encode_response(Status.OK, MIB) + bytes(MIB)
    with pytest.raises(PeerGoneError):
        pull_from(lambda sock: sock.sendall(whole[:num_bytes]), deadline_s=20.0)


@pytest.mark.parametrize("head", [b"", encode_response(Status.OK, MIB)])
def test_response_that_trickles_ends_at_the_deadline(head: bytes) -> None:
    """The deadline is for the whole: bytes that keep coming do not extend it."""
    is_over = threading.Event()

    def trickle(sock: socket.socket) -> None:
        sock.sendall(head)
        while not is_over.wait(0.02):
            sock.sendall(b"L" if not head else b"x")

    with pytest.raises((PeerGoneError, TransferCorruptError)) as caught:
        pull_from(trickle)
    is_over.set()
    assert not head or isinstance(caught.value, PeerGoneError)


def test_busy_holder_is_left_alone() -> None:
    with pytest.raises(PeerGoneError, match="too many connections"):
        pull_from(lambda sock: sock.sendall(encode_response(Status.BUSY)))


def test_bytes_that_nobody_asked_for_end_a_connection() -> None:
    """What comes after a body is not the head of the next answer."""
    asked: list[int] = []
    body = encode_response(Status.OK, 8192) + b"\x01" * 8192

    def serve(sock: socket.socket) -> None:
        asked.append(1)
        sock.sendall(body + encode_response(Status.OK, 8192) + b"\x02" * 8192)
        sock.recv(1)

    with closing(FakeHolder(serve)) as holder, closing(TcpTransport(holder.address, peer="fake")) as client:
        for _ in range(2):
            into = memoryview(bytearray(8192))
            offer = Offer(transport="tcp", handle=bytes(HANDLE_BYTES), stored_bytes=8192)
            client.pull(offer, into, stop_s=soon())
            assert into == b"\x01" * 8192
        assert len(asked) == 2


def test_late_answer_is_not_that_to_the_next_request() -> None:
    """A connection whose answer did not come in time is never used again, however quiet it is."""
    opened: list[int] = []

    def serve(sock: socket.socket) -> None:
        opened.append(1)
        if len(opened) == 1:
            sock.recv(REQUEST_BYTES, socket.MSG_WAITALL)
        sock.sendall(encode_response(Status.OK, 8192) + bytes([len(opened)]) * 8192)
        sock.recv(1)

    with closing(FakeHolder(serve)) as holder, closing(TcpTransport(holder.address, peer="fake")) as client:
        into = memoryview(bytearray(8192))
        offer = Offer(transport="tcp", handle=bytes(HANDLE_BYTES), stored_bytes=8192)
        with pytest.raises(PeerGoneError):
            client.pull(offer, into, stop_s=time.monotonic() + 0.2)
        client.pull(offer, into, stop_s=soon())
        assert into == b"\x02" * 8192


def test_consumer_s_own_error_is_no_error_of_the_peer(server: TcpServer, client: TcpTransport) -> None:
    """An `on_bytes` that fails as sockets do is told from a socket that fails."""

    def on_bytes(in_place: int) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        client.pull(offered(server), memoryview(bytearray(MIB)), stop_s=soon(), on_bytes=on_bytes)
    assert_works(server, client)


@settings(max_examples=100, deadline=None)
@given(answer=st.binary(max_size=3 * RESPONSE_BYTES), has_magic=st.booleans())
def test_any_response_is_an_error(answer: bytes, has_magic: bool) -> None:
    """None is believed, none is waited for beyond the deadline."""
    if has_magic:
        answer = encode_response(Status.OK)[:6] + answer
    with pytest.raises((TransferCorruptError, OfferRefusedError, PeerGoneError)):
        pull_from(lambda sock: sock.sendall(answer), deadline_s=5.0)


# Links that swallow everything, and addresses.


def test_black_hole_ends_at_the_connect_timeout() -> None:
    """A listener whose queue is full: the system drops connection requests, as a dead link does."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        fill = []
        for _ in range(4):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(address)
            fill.append(sock)
        with closing(TcpTransport(f"127.0.0.1:{address[1]}".encode(), peer="hole", connect_timeout_s=0.2)) as client:
            offer = Offer(transport="tcp", handle=bytes(HANDLE_BYTES), stored_bytes=8192)
            start_s = time.monotonic()
            with pytest.raises(PeerGoneError, match="hole"):
                client.pull(offer, memoryview(bytearray(8192)), stop_s=soon())
            assert time.monotonic() - start_s < 0.2 + LATE_S
        for sock in fill:
            sock.close()


def test_server_listens_on_its_interface_only(server: TcpServer) -> None:
    with (
        pytest.raises(ConnectionRefusedError),
        socket.create_connection(("127.0.0.2", parse_address(server.address)[1])),
    ):
        pass


def test_address_that_nobody_can_dial_is_refused() -> None:
    """All interfaces have no address of their own: say which one peers are to use."""
    with pytest.raises(SettingsError, match="advertise"):
        TcpServer(bind_host="0.0.0.0")
    with closing(TcpServer(bind_host="0.0.0.0", advertise_host="127.0.0.1")) as server:
        assert server.address.startswith(b"127.0.0.1:")


def test_taken_port_is_an_error(server: TcpServer) -> None:
    with pytest.raises(OSError):
        TcpServer(bind_host="127.0.0.1", port=parse_address(server.address)[1])


def test_flipped_request_bytes_are_never_served(server: TcpServer) -> None:
    """Every byte of a good request matters."""
    good = request_of(offered(server, 8192))
    for at_byte in range(REQUEST_BYTES):
        frame = bytearray(good)
        frame[at_byte] ^= 0x11
        with dial(server) as sock:
            sock.sendall(frame)
            assert read_status(sock) in (Status.REFUSED, Status.MALFORMED), at_byte
