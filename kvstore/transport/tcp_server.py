"""The holder's end of the TCP data path: records go from the arena to the socket without a copy of ours.

Covers: offers, connections, who may read what, bounds. Does not cover: frames (`kvstore.transport.tcp_wire`), the
puller (`kvstore.transport.tcp`).

One thread per connection, blocking. A connection begins as a *stranger*: it has `handshake_s` seconds to show a good
handle. The first one makes it a connection of that offer's peer, and from then on it may show handles of that peer
only. A stranger costs one thread and 48 bytes; when there are too many, the oldest goes.
"""

import hmac
import itertools
import logging
import secrets
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from cluster.errors import InvariantError, SettingsError
from kvstore import metrics
from kvstore.transport import Offer
from kvstore.transport.tcp_wire import (
    HANDLE_BYTES,
    ID_BYTES,
    REQUEST_BYTES,
    TOKEN_BYTES,
    PlainStream,
    PullRequest,
    Status,
    Stream,
    TlsStream,
    WireError,
    encode_address,
    encode_response,
    parse_request,
    shut_down,
    tune,
)

log = logging.getLogger(__name__)

_OUTCOMES: Final = ("sent", "refused", "busy", "malformed", "late", "gone")
_BACKLOG: Final = 64
_MAX_STRANGERS: Final = 32
_ACCEPT_PAUSE_S: Final = 0.2
_REPLY_S: Final = 2.0
"""For answers without a body: they fit every socket buffer, unless the peer reads nothing at all."""
_REVOKE_GRACE_S: Final = 0.02
"""A send that has handed over its last byte may still have to get the interpreter lock to say so."""
_ABORT_S: Final = 10.0
"""By then an aborted send has returned, or something is broken that we cannot mend."""


@dataclass(slots=True, eq=False)
class _Offered:
    """One offer."""

    token: bytes
    record: memoryview
    peer: str
    expires_s: float
    bytes_left: int
    """What may still be read under it, over all pulls."""
    senders: "set[_Connection]" = field(default_factory=set)
    """Connections that read the record now."""


@dataclass(slots=True, eq=False)
class _Connection:
    """One accepted socket."""

    number: int
    """Counts up: the smallest is the oldest."""
    sock: socket.socket
    opened_s: float
    peer: str | None = None
    """None: a stranger."""
    is_busy: bool = False
    """Whether it is being answered."""
    is_leaving: bool = False
    """Whether it was told to end."""
    stream: Stream | None = None

    def abort(self) -> None:
        """Make its thread end; the lock is held, so that it is not closed meanwhile."""
        self.is_leaving = True
        shut_down(self.sock)


class TcpServer:
    """Serves offers of one life of a store on one port.

    Args:
        bind_host: Address of the interface to listen on, and only there.
        port: To listen on; None or 0 takes a free one.
        max_connections_per_peer: More are answered with "busy"; idle ones of the same peer go first.
        tls: Context for mutual TLS; None sends records as they are.
        advertise_host: Numeric address that peers connect to, where it is not `bind_host`.
        max_connections: Connections in all; twice as many threads, for as long as some are being ended.
        max_offered_bytes_per_peer: Bytes of records that one peer may hold offers for.
        max_pulls_per_offer: How often one offer's bytes may be read.
        handshake_s: Seconds in which a stranger must have shown a good handle.
        idle_s: Seconds after which a connection without requests is closed.
        transfer_s: Seconds for one transfer, beside the time that its bytes take at `min_bytes_per_s`.
        min_bytes_per_s: A peer that reads slower is cut off.

    Raises:
        SettingsError: Nobody could connect to the address.
        OSError: The address or the port cannot be bound.
    """

    def __init__(
        self,
        *,
        bind_host: str,
        port: int | None = None,
        max_connections_per_peer: int = 4,
        tls: ssl.SSLContext | None = None,
        advertise_host: str | None = None,
        max_connections: int = 256,
        max_offered_bytes_per_peer: int = 4 << 30,
        max_pulls_per_offer: int = 4,
        handshake_s: float = 2.0,
        idle_s: float = 60.0,
        transfer_s: float = 5.0,
        min_bytes_per_s: float = 20e6,
    ) -> None:
        self._tls = tls
        self._max_connections_per_peer = max_connections_per_peer
        self._max_connections = max_connections
        self._max_offered_bytes_per_peer = max_offered_bytes_per_peer
        self._max_pulls_per_offer = max_pulls_per_offer
        self._handshake_s = handshake_s
        self._idle_s = idle_s
        self._transfer_s = transfer_s
        self._min_bytes_per_s = min_bytes_per_s
        # Waiting is rare and a plain lock is cheap: whoever waits is counted, so that nobody is woken for nothing.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._num_waiting = 0
        self._offers: dict[bytes, _Offered] = {}
        self._offered_bytes: Counter[str] = Counter()
        self._connections: dict[_Connection, threading.Thread] = {}
        self._numbers = itertools.count()
        self._is_closed = False
        self._sends = {outcome: metrics.TRANSPORT_SENDS.labels(self.name, outcome) for outcome in _OUTCOMES}
        self._sent_bytes = metrics.TRANSPORT_SENT_BYTES.labels(self.name)
        self._listener = _listen(bind_host, port or 0)
        try:
            self._address = _advertised(self._listener, advertise_host)
        except BaseException:
            self._listener.close()
            raise
        self._acceptor = threading.Thread(target=self._accept, name="kvstore-tcp-accept", daemon=True)
        self._acceptor.start()

    @property
    def name(self) -> str:
        """The data path's name."""
        return "tcp"

    @property
    def address(self) -> bytes:
        """`host:port`; no secret by itself."""
        return self._address

    @property
    def num_connections(self) -> int:
        """Open now."""
        with self._lock:
            return len(self._connections)

    def offer(self, record: memoryview, *, peer: str, lifetime_s: float) -> Offer | None:
        """See `TransportServer.offer`. None: the peer holds offers for too many bytes, or the server is closed."""
        view = record.toreadonly().cast("B")
        size = len(view)
        number, token = secrets.token_bytes(ID_BYTES), secrets.token_bytes(TOKEN_BYTES)
        with self._lock:
            too_many = self._offered_bytes[peer] + size > self._max_offered_bytes_per_peer
            if self._is_closed or too_many or number in self._offers:
                return None
            self._offered_bytes[peer] += size
            self._offers[number] = _Offered(
                token=token,
                record=view,
                peer=peer,
                expires_s=time.monotonic() + lifetime_s,
                bytes_left=self._max_pulls_per_offer * size,
            )
        return Offer(transport=self.name, handle=number + token, stored_bytes=size)

    def revoke(self, handle: bytes) -> None:
        """See `TransportServer.revoke`. Sends of the record that do not end by themselves at once are cut off."""
        with self._lock:
            offered = self._find(handle)
            if offered is not None:
                del self._offers[handle[:ID_BYTES]]
                self._retire(offered)

    def close(self) -> None:
        """See `TransportServer.close`."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
            threads = list(self._connections.values())
            for connection in self._connections:
                connection.abort()
            for number in list(self._offers):
                self._retire(self._offers.pop(number))
        if not was_closed:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._acceptor.join()
            self._listener.close()
        for thread in threads:
            thread.join(_ABORT_S)

    def _find(self, handle: bytes) -> _Offered | None:
        """The offer of a handle; takes as long for a wrong token as for a right one."""
        offered = self._offers.get(handle[:ID_BYTES])
        expected = offered.token if offered else bytes(TOKEN_BYTES)
        is_same = hmac.compare_digest(handle[ID_BYTES:], expected)
        return offered if is_same and len(handle) == HANDLE_BYTES else None

    def _retire(self, offered: _Offered) -> None:
        """Wait until nobody reads the record; the lock is held on entry and exit."""
        if not self._wait(lambda: not offered.senders, _REVOKE_GRACE_S):
            for connection in offered.senders:
                connection.abort()
            if not self._wait(lambda: not offered.senders, _ABORT_S):
                raise InvariantError(f"a send to {offered.peer} goes on {_ABORT_S} s after its socket was shut down")
        self._offered_bytes[offered.peer] -= len(offered.record)
        if not self._offered_bytes[offered.peer]:
            del self._offered_bytes[offered.peer]
        offered.record.release()

    def _wait(self, is_true: Callable[[], bool], timeout_s: float) -> bool:
        """Whether it became true in time; the lock is held on entry and exit."""
        self._num_waiting += 1
        try:
            return self._changed.wait_for(is_true, timeout_s)
        finally:
            self._num_waiting -= 1

    # Connections.

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                with self._lock:
                    # Out of descriptors, mostly: those of others may come back.
                    if self._wait(lambda: self._is_closed, _ACCEPT_PAUSE_S):
                        return
                log.warning("tcp_accept_failed error=%s", error)
                continue
            if not self._admit(sock):
                sock.close()

    def _admit(self, sock: socket.socket) -> bool:
        """Give a new connection its thread; the oldest stranger makes way for it when there are too many."""
        connection = _Connection(next(self._numbers), sock, time.monotonic())
        thread = threading.Thread(target=self._serve, args=(connection,), name="kvstore-tcp", daemon=True)
        with self._lock:
            if self._is_closed:
                return False
            staying = [each for each in self._connections if not each.is_leaving]
            strangers = [each for each in staying if each.peer is None]
            if len(staying) >= self._max_connections or len(strangers) >= _MAX_STRANGERS:
                self._sends["busy"].inc()
                # Those that leave have their thread until it notices: it counts here, and here only.
                if not strangers or len(self._connections) >= 2 * self._max_connections:
                    return False
                min(strangers, key=lambda each: each.number).abort()
            self._connections[connection] = thread
            try:
                thread.start()
            except RuntimeError:
                # Out of threads; the peer may try again.
                del self._connections[connection]
                return False
        return True

    def _serve(self, connection: _Connection) -> None:
        """One connection's life."""
        try:
            connection.stream = self._open(connection)
            frame = bytearray(REQUEST_BYTES)
            while self._answer(connection, connection.stream, memoryview(frame)):
                pass
        except OSError as error:
            # Closed, cut off, or too slow: the peer's affair, and it may come again.
            log.debug("tcp_connection_ended peer=%s error=%s", connection.peer, error)
        finally:
            with self._lock:
                self._connections.pop(connection, None)
            # After that nobody aborts it any more, so the descriptor is ours to close.
            (connection.stream or connection.sock).close()

    def _open(self, connection: _Connection) -> Stream:
        tune(connection.sock)
        if self._tls is None:
            return PlainStream(connection.sock)
        wrapped = self._tls.wrap_socket(connection.sock, server_side=True, do_handshake_on_connect=False)
        connection.sock = wrapped
        return TlsStream(wrapped, stop_s=connection.opened_s + self._handshake_s)

    def _answer(self, connection: _Connection, stream: Stream, frame: memoryview) -> bool:
        """Read one request and answer it; whether there may be another one."""
        is_stranger = connection.peer is None
        stop_s = connection.opened_s + self._handshake_s if is_stranger else time.monotonic() + self._idle_s
        stream.receive(frame, stop_s=stop_s)
        try:
            request = parse_request(frame)
        except WireError as error:
            log.debug("tcp_malformed_request peer=%s error=%s", connection.peer, error)
            return self._refuse(stream, Status.MALFORMED)
        claim = self._claim(connection, request)
        if isinstance(claim, Status):
            self._refuse(stream, claim)
            return connection.peer is not None
        offered, body = claim
        outcome = "gone"
        try:
            stop_s = time.monotonic() + self._transfer_s + request.length / self._min_bytes_per_s
            stream.send(encode_response(Status.OK, request.length), body, stop_s=min(stop_s, offered.expires_s))
            outcome = "sent"
            self._sent_bytes.inc(request.length)
        except TimeoutError:
            outcome = "late"
            raise
        finally:
            body.release()
            with self._lock:
                connection.is_busy = False
                offered.senders.discard(connection)
                if self._num_waiting:
                    self._changed.notify_all()
            self._sends[outcome].inc()
        return True

    def _refuse(self, stream: Stream, status: Status) -> bool:
        self._sends[status.name.lower()].inc()
        stream.send(encode_response(status), stop_s=time.monotonic() + _REPLY_S)
        return False

    def _claim(self, connection: _Connection, request: PullRequest) -> Status | tuple[_Offered, memoryview]:
        """The bytes asked for, now being read by this connection; or why not."""
        with self._lock:
            offered = self._find(request.handle)
            if (
                offered is None
                or self._is_closed
                or connection.peer not in (None, offered.peer)
                or offered.expires_s <= time.monotonic()
                or request.offset + request.length != len(offered.record)
                or request.length > offered.bytes_left
            ):
                return Status.REFUSED
            if connection.peer is None and not self._make_room_for(offered.peer):
                return Status.BUSY
            connection.peer = offered.peer
            connection.is_busy = True
            offered.bytes_left -= request.length
            offered.senders.add(connection)
            return offered, offered.record[request.offset : request.offset + request.length]

    def _make_room_for(self, peer: str) -> bool:
        """Whether the peer may have one more connection; its longest-lived idle one makes way."""
        its = [each for each in self._connections if each.peer == peer and not each.is_leaving]
        if len(its) < self._max_connections_per_peer:
            return True
        idle = [each for each in its if not each.is_busy]
        if not idle:
            return False
        min(idle, key=lambda each: each.number).abort()
        return True


def _listen(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _advertised(listener: socket.socket, host: str | None) -> bytes:
    """Numeric address of the listener, so that no puller ever waits for a name to be resolved."""
    bound, port = listener.getsockname()[:2]
    if host is None and bound in ("0.0.0.0", "::"):
        raise SettingsError(
            f"peers cannot connect to {bound}: bind to one interface, or say which address to advertise"
        )
    if host is None:
        return encode_address(bound, port)
    resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
    return encode_address(str(resolved), port)
