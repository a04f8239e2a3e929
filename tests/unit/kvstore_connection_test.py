"""One connection of a client, against a store that answers when the test says so: who receives, and who is woken.

Covers: several callers at once, handing over, ends of the connection in every place, replies that come too late.
Does not cover: a real store (`tests/contract`, `tests/fault`), the handshake (`tests/fault`).
"""

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, cast

import pytest

from kvstore import connection as connection_module
from kvstore.client import NodeStoreClient
from kvstore.connection import StoreConnection
from kvstore.container import stored_bytes
from kvstore.handshake import StoreRefusedError, StoreUnreachableError
from kvstore.protocol import (
    MAX_FRAME_BYTES,
    MAX_TIMEOUT_S,
    NONCE_BYTES,
    PROTOCOL_VERSION,
    Abort,
    Challenge,
    Commit,
    Done,
    FrameReader,
    Grant,
    Granted,
    Held,
    Lookup,
    Proof,
    ProtocolError,
    Read,
    Release,
    Request,
    Reserve,
    Reserved,
    Wait,
    Welcome,
    decode_hello,
    decode_request,
    encode,
    store_mac,
)
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_key, sample_meta

SECRET = b"a secret of a test cluster"
ARENA_BYTES = 1 << 20
LONG_S = 60.0
"""Nothing here may take as long."""
SOON_S = 10.0


class FakeStore:
    """Welcomes one client; keeps its requests, and answers what it is told to."""

    def __init__(self, path: str, *, arena_bytes: int = ARENA_BYTES) -> None:
        self._arena_bytes = arena_bytes
        self.requests: list[Request] = []
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._client: socket.socket | None = None
        self.may_read = threading.Event()
        self.may_read.set()
        self._welcomed = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def say(self, *messages: Any) -> None:
        """In one packet; bytes go as they are."""
        frames = [message if isinstance(message, bytes) else encode(message) for message in messages]
        assert self._client is not None
        self._client.sendall(b"".join(frames))

    def wait_for(self, count: int) -> list[Request]:
        wait_until(lambda: len(self.requests) >= count, what=f"{count} requests", deadline_s=SOON_S)
        return list(self.requests)

    def hang_up(self) -> None:
        assert self._welcomed.wait(SOON_S)
        assert self._client is not None
        with suppress(OSError):  # the client was first
            self._client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.may_read.set()
        self._listener.close()
        self.hang_up()
        self._thread.join(SOON_S)
        assert self._client is not None
        self._client.close()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        self._client = client
        challenge = bytes(NONCE_BYTES)
        client.sendall(encode(Challenge(PROTOCOL_VERSION, challenge)))
        hello = FrameReader()
        (body,) = hello.feed(client.recv(4096))
        proof = decode_hello(body)
        assert isinstance(proof, Proof)
        arena = os.memfd_create("test-arena")
        os.ftruncate(arena, ARENA_BYTES)
        mac = store_mac(SECRET, challenge=challenge, nonce=proof.nonce, epoch="e")
        socket.send_fds(client, [encode(Welcome(mac, "e", self._arena_bytes, 8192))], [arena])
        os.close(arena)
        self._welcomed.set()
        reader = FrameReader()
        while True:
            self.may_read.wait()
            data = client.recv(1 << 16)
            if not data:
                return
            self.requests += [decode_request(body) for body in reader.feed(data)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FakeStore]:
    store = FakeStore(str(tmp_path / "s"))
    yield store
    store.close()


@pytest.fixture
def connection(store: FakeStore) -> Iterator[StoreConnection]:
    before = len(os.listdir("/proc/self/fd"))
    connection = StoreConnection(store._path, secret=SECRET, client_name="t", stop_s=time.monotonic() + SOON_S)
    yield connection
    connection.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "kvstore-client"]
    assert connection._is_closed
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 1, what="descriptors to be closed")


class Refusing:
    """A module of which one function fails at its nth call, in one place of the program only."""

    def __init__(self, module: Any, name: str, *, nth: int, error: Exception) -> None:
        self._module, self._name, self._nth, self._error = module, name, nth, error

    def __getattr__(self, name: str) -> Any:
        if name != self._name:
            return getattr(self._module, name)
        self._nth -= 1
        if self._nth == 0:
            raise self._error
        return getattr(self._module, name)


class FullTable:
    """An epoll whose table takes nothing any more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exit_reason: object) -> None:
        pass

    def register(self, fd: object, events: int) -> None:
        raise OSError(errno.ENOSPC, "no watches left")


@pytest.mark.parametrize(
    ("module", "name", "nth"),
    [("mmap", "mmap", 1), ("mmap", "mmap", 2), ("os", "eventfd", 1), ("select", "epoll", 1), ("select", "epoll", 2),
     ("select", "register", 1), ("threading", "Thread", 1)],
)  # fmt: skip
def test_connection_that_cannot_be_opened_leaves_nothing_open(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch, module: str, name: str, nth: int
) -> None:
    """No descriptors left, no room in a table of the kernel, no threads: the store counts as away."""

    def polls() -> list[str]:
        links = (Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
        return sorted(str(link.readlink()) for link in links if link.is_symlink() and "[event" in str(link.readlink()))

    before = polls()
    if name == "register":
        monkeypatch.setattr(select, "epoll", FullTable)
    else:
        error = RuntimeError("no more threads") if name == "Thread" else OSError(errno.EMFILE, "too many open files")
        refusing = Refusing(getattr(connection_module, module), name, nth=nth, error=error)
        monkeypatch.setattr(connection_module, module, refusing)
    with pytest.raises(StoreUnreachableError, match=r"no (watches left|more threads)|too many open files") as caught:
        StoreConnection(store._path, secret=SECRET, client_name="t", stop_s=time.monotonic() + SOON_S)
    # The error is alive, and with it the frames of the call: nothing is closed for being forgotten.
    assert caught.value.__traceback__ is not None
    store._thread.join(SOON_S)
    assert not store._thread.is_alive(), "the socket is still open"
    assert polls() == before
    assert "test-arena" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("arena_bytes", [-1, 1 << 62, (1 << 64) - 1])
def test_arena_of_an_absurd_size_is_refused(tmp_path: Path, arena_bytes: int) -> None:
    store = FakeStore(str(tmp_path / "s"), arena_bytes=arena_bytes)
    with pytest.raises(StoreRefusedError, match=r"handshake failed: .*\$\[3\]"):
        StoreConnection(store._path, secret=SECRET, client_name="t", stop_s=time.monotonic() + SOON_S)
    store.close()


class Caller(threading.Thread):
    """One call on a thread of its own."""

    def __init__(
        self, connection: StoreConnection, *, deadline_s: float = LONG_S, make: Callable[[int], Request] | None = None
    ) -> None:
        super().__init__()
        self.number = connection.number()
        self.reply: Any = "none yet"
        self.error: BaseException | None = None
        self._connection = connection
        self._request = (make or (lambda number: Lookup(number, [])))(self.number)
        self._deadline_s = deadline_s
        self.start()

    def run(self) -> None:
        try:
            self.reply = self._connection.call(
                self._request, number=self.number, stop_s=time.monotonic() + self._deadline_s
            )
        except BaseException as error:
            self.error = error

    def result(self) -> Any:
        self.join(SOON_S)
        assert not self.is_alive(), "the call does not end"
        return self.reply


def leading(connection: StoreConnection) -> bool:
    return connection._leader is not None


def start_two(store: FakeStore, connection: StoreConnection, **first: Any) -> tuple[Caller, Caller]:
    """One who receives, and one who waits for them."""
    leader = Caller(connection, **first)
    store.wait_for(1)
    wait_until(lambda: leading(connection), what="the first caller to receive")
    follower = Caller(connection)
    store.wait_for(2)
    return leader, follower


def test_replies_in_any_order_reach_their_callers(store: FakeStore, connection: StoreConnection) -> None:
    callers = [Caller(connection) for _ in range(8)]
    store.wait_for(8)
    for caller in reversed(callers):
        store.say(Held(caller.number, bytes([caller.number])))
    assert [caller.result() for caller in callers] == [Held(c.number, bytes([c.number])) for c in callers]


def test_many_threads_and_many_calls(store: FakeStore, connection: StoreConnection) -> None:
    """Callers become the one who receives, and cease to be, all the time; every reply comes, and to its caller."""
    wrong: list[object] = []
    over = threading.Event()

    def answer() -> None:
        done = 0
        while not over.is_set():
            new = store.requests[done:]
            done += len(new)
            store.say(*[Done(cast("Lookup", request).number, True) for request in reversed(new)])

    def work() -> None:
        for _ in range(150):
            number = connection.number()
            reply = connection.call(Lookup(number, []), number=number, stop_s=time.monotonic() + LONG_S)
            if reply != Done(number, True):
                wrong.append(reply)

    threads = [threading.Thread(target=work) for _ in range(4)]
    answering = threading.Thread(target=answer)
    for thread in (answering, *threads):
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    over.set()
    answering.join(SOON_S)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert not leading(connection)


def test_caller_whose_time_is_over_hands_over(store: FakeStore, connection: StoreConnection) -> None:
    """The thread receives for those who still wait; what comes too late is given back."""
    leader, follower = start_two(store, connection, deadline_s=0.2, make=lambda number: Read(number, [], 0.1))
    assert leader.result() is None
    assert not leading(connection)
    late = Grant(7, 0, 8192)
    store.say(Granted(leader.number, [late]), Held(follower.number, b""))
    assert follower.result() == Held(follower.number, b"")
    assert store.wait_for(3)[2] == Release([late.lease])
    assert connection.num_leases == 0


def test_caller_with_its_reply_hands_over(store: FakeStore, connection: StoreConnection) -> None:
    """Also what came in the same packet is delivered."""
    leader, follower = start_two(store, connection)
    third = Caller(connection)
    store.wait_for(3)
    store.say(Held(leader.number, b"\1"), Held(follower.number, b"\0"))
    assert leader.result() == Held(leader.number, b"\1")
    assert follower.result() == Held(follower.number, b"\0")
    store.say(Held(third.number, b""))
    assert third.result() == Held(third.number, b"")


def test_close_while_a_caller_receives(store: FakeStore, connection: StoreConnection) -> None:
    leader, follower = start_two(store, connection)
    connection.close()
    assert (leader.result(), follower.result()) == (None, None)


def test_store_ends_while_a_caller_receives(store: FakeStore, connection: StoreConnection) -> None:
    leader, follower = start_two(store, connection)
    store.hang_up()
    assert (leader.result(), follower.result()) == (None, None)
    assert connection.is_dead


def test_nonsense_while_a_caller_receives(store: FakeStore, connection: StoreConnection) -> None:
    """All calls end. What was delivered counts once, and the store still sees a client that holds its leases."""
    leader, follower = start_two(store, connection, make=lambda number: Read(number, [], 1.0))
    grant = Grant(3, 0, 8192)
    nonsense = (MAX_FRAME_BYTES + 1).to_bytes(4, "little")
    store.say(Granted(follower.number, [grant]), nonsense)
    assert leader.result() is None
    assert follower.result() == Granted(follower.number, [grant])
    wait_until(lambda: not connection._is_receiving, what="the thread to end")
    assert connection.is_dead
    assert connection.holds_lease(grant.lease)
    assert not connection._is_closed, "the store would give the memory to others"
    assert Release([grant.lease]) not in store.requests
    number = connection.number()
    assert connection.call(Lookup(number, []), number=number, stop_s=time.monotonic() + LONG_S) is None


def test_thread_that_ends_wakes_who_just_began_to_receive(
    store: FakeStore, connection: StoreConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread reads nonsense while a caller takes over from it: there is nothing more to wait for."""
    is_reading, may_fail, polls = threading.Event(), threading.Event(), threading.Event()
    stop_receiving, leader_events = connection._stop_receiving, connection._leader_events

    def decode(body: bytes) -> Any:
        is_reading.set()
        assert may_fail.wait(SOON_S)
        raise ProtocolError("nonsense")

    class Polled:
        def poll(self, timeout: float) -> Any:
            polls.set()
            return leader_events.poll(timeout)

        def close(self) -> None:
            leader_events.close()

    def stop_late() -> None:
        assert polls.wait(SOON_S)
        stop_receiving()

    monkeypatch.setattr(connection_module, "decode_reply", decode)
    monkeypatch.setattr(connection, "_leader_events", Polled())
    monkeypatch.setattr(connection, "_stop_receiving", stop_late)
    wait_until(lambda: store._welcomed.is_set(), what="the welcome")
    store.say(Held(99, b""))
    assert is_reading.wait(SOON_S)
    caller = Caller(connection)
    wait_until(lambda: leading(connection), what="the caller to take over")
    may_fail.set()
    assert caller.result() is None


def test_interrupted_caller_leaves_the_lead(
    store: FakeStore, connection: StoreConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of a call: the next one is answered, and what the first would have got is given back."""

    class Interrupted:
        def poll(self, timeout: float) -> Any:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(connection, "_leader_events", Interrupted())
        interrupted = Caller(connection, make=lambda number: Read(number, [], 1.0))
        interrupted.join(SOON_S)
        assert isinstance(interrupted.error, KeyboardInterrupt)
    assert not leading(connection)
    caller = Caller(connection)
    store.wait_for(2)
    store.say(Granted(interrupted.number, [Grant(3, 0, 8192)]), Held(caller.number, b""))
    assert caller.result() == Held(caller.number, b"")
    assert store.wait_for(3)[2] == Release([3])
    assert connection.num_leases == 0


def test_what_the_socket_did_not_take_is_sent_while_a_caller_receives(
    store: FakeStore, connection: StoreConnection
) -> None:
    store.wait_for(0)
    wait_until(lambda: store._welcomed.is_set(), what="the welcome")
    leader = Caller(connection)
    store.wait_for(1)
    store.may_read.clear()
    keys: list[bytes] = [sample_key(n % 7) for n in range(8192)]
    for _ in range(6):
        connection.post(Lookup(connection.number(), keys))
    assert connection._unsent, "the case is about a full socket"
    store.may_read.set()
    store.wait_for(7)
    store.say(Held(leader.number, b""))
    assert leader.result() == Held(leader.number, b"")


def test_deadline_of_weeks(store: FakeStore, connection: StoreConnection) -> None:
    caller = Caller(connection, deadline_s=1e8)
    store.wait_for(1)
    store.say(Held(caller.number, b""))
    assert caller.result() == Held(caller.number, b"")
    assert caller.error is None


def test_wait_of_weeks_asks_for_what_the_store_allows(store: FakeStore) -> None:
    """Else the store would take the client for one that breaks the protocol, and expel it."""
    client = NodeStoreClient(store._path, secret=SECRET, client_name="t")
    thread = threading.Thread(target=client.wait, args=([sample_key(1)],), kwargs={"deadline_s": 1e8})
    thread.start()
    (request,) = store.wait_for(1)
    assert isinstance(request, Wait)
    assert request.timeout_s == MAX_TIMEOUT_S
    store.say(Held(request.number, b"\0"))
    thread.join(SOON_S)
    assert not thread.is_alive()
    client.close()


def test_commit_to_a_stuck_store_gives_the_room_back(store: FakeStore) -> None:
    """The commit is not even sent, because others wait in vain; the store must not keep the reservation for it."""
    client = NodeStoreClient(store._path, secret=SECRET, client_name="t")
    reserved: list[Any] = []

    def reserve() -> None:
        reserved.append(client.reserve(sample_key(1), sample_meta(), 100, deadline_s=LONG_S))

    thread = threading.Thread(target=reserve)
    thread.start()
    (request,) = store.wait_for(1)
    assert isinstance(request, Reserve)
    grant = Grant(5, 0, stored_bytes(100))
    store.say(Reserved(request.number, grant))
    thread.join(SOON_S)
    assert client.lookup([sample_key(2)], deadline_s=0.05) == [False]
    connection = client._connection
    assert connection is not None
    wait_until(lambda: connection.is_stuck, what="the store to be taken for frozen")
    assert not reserved[0].commit()
    assert Abort(grant.lease) in store.wait_for(3)
    assert not any(isinstance(request, Commit) for request in store.requests)
    assert connection.num_leases == 0
    client.close()
