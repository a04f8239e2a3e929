"""The TCP data path: plain sockets on threads, from one arena straight into another.

Covers: the puller's end, with its pool of connections. The holder's end: `kvstore.transport.tcp_server`.
Does not cover: frames and deadlines of single calls (`kvstore.transport.tcp_wire`).

A socket that is closed cannot write late: whatever happened, the landing buffer is the caller's again when `pull`
returns. That, and the lowest CPU cost per byte without RDMA, is why this path is the default between nodes.
"""

import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Final, NoReturn

from cluster.errors import InvariantError
from kvstore.interfaces import OnBytes
from kvstore.transport import LandingError, Offer, OfferRefusedError, PeerGoneError, TransferCorruptError
from kvstore.transport.tcp_server import TcpServer
from kvstore.transport.tcp_wire import (
    HANDLE_BYTES,
    RESPONSE_BYTES,
    PlainStream,
    Status,
    Stream,
    TlsStream,
    WireError,
    encode_request,
    encode_response,
    parse_address,
    parse_response,
    shut_down,
    tune,
)

__all__ = ["TcpServer", "TcpTransport"]

_PIECES: Final = 16
_MIN_PIECE_BYTES: Final = 64 << 10
_MAX_PIECE_BYTES: Final = 1 << 20
_CLOSE_S: Final = 5.0


class _Connection:
    """One socket of the pool."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.stream: Stream | None = None
        self.is_at_rest = False
        """Whether its position in the stream is known: between an answer's last byte and the next request."""
        self.is_used = False
        """Whether a transfer has ended well on it, so that the peer may have closed it since."""

    def close(self) -> None:
        (self.stream or self.sock).close()


class TcpTransport:
    """Pulls from one life of one peer.

    Args:
        address: The peer's `TcpServer.address`.
        peer: Its name, for messages.
        connect_timeout_s: Seconds for a connection, TLS included.
        max_connections: Transfers at the same time; more wait. At most what the peer allows.
        tls: Context for mutual TLS, as on the other side; None for plain sockets.
        tls_host: Name or address that the peer's certificate must carry; by default the address connected to.

    Raises:
        AddressError: Not an address.
    """

    def __init__(
        self,
        address: bytes,
        *,
        peer: str,
        connect_timeout_s: float = 1.0,
        max_connections: int = 4,
        tls: ssl.SSLContext | None = None,
        tls_host: str | None = None,
    ) -> None:
        self._host, self._port = parse_address(address)
        self._family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        self._peer = peer
        self._connect_timeout_s = connect_timeout_s
        self._max_connections = max_connections
        self._tls = tls
        self._tls_host = tls_host or self._host
        # Waiting is rare and a plain lock is cheap: whoever waits is counted, so that nobody is woken for nothing.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._num_waiting = 0
        self._idle: list[_Connection] = []
        self._active: set[_Connection] = set()
        self._is_closed = False

    @property
    def name(self) -> str:
        """The data path's name."""
        return "tcp"

    def pull(self, offer: Offer, into: memoryview, *, stop_s: float, on_bytes: OnBytes | None = None) -> None:
        """See `Transport.pull`.

        Raises:
            LandingError: `into` is not as long as the offer says.
        """
        if len(into) != offer.stored_bytes or not offer.stored_bytes:
            raise LandingError(f"the record has {offer.stored_bytes} bytes, the landing buffer {len(into)}")
        if len(offer.handle) != HANDLE_BYTES:
            raise OfferRefusedError(f"a handle of {len(offer.handle)} bytes is none of {self._peer}'s")
        connection = self._borrow(stop_s)
        try:
            while not self._ask(connection, offer, stop_s):
                # The peer had closed it while it was idle, so it has not seen the request: a new one may do.
                connection = self._replace(connection)
            self._land(connection, into, stop_s, on_bytes)
        finally:
            self._give_back(connection)

    def close(self) -> None:
        """See `Transport.close`."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            for connection in self._active:
                shut_down(connection.sock)
            self._changed.notify_all()
            for connection in idle:
                connection.close()
            self._wait(lambda: not self._active, _CLOSE_S)

    def _ask(self, connection: _Connection, offer: Offer, stop_s: float) -> bool:
        """Send the request and read the answer's head; False if the connection had been closed before."""
        head = bytearray(RESPONSE_BYTES)
        try:
            stream = connection.stream or self._connect(connection, stop_s)
            connection.is_at_rest = False
            stream.send(encode_request(offer.handle, offset=0, length=offer.stored_bytes), stop_s=stop_s)
            stream.receive(memoryview(head), stop_s=stop_s)
        except (ConnectionError, ssl.SSLEOFError) as error:
            if connection.is_used and not self._is_closed:
                return False
            raise self._gone(error) from error
        except OSError as error:
            raise self._gone(error) from error
        if head != encode_response(Status.OK, offer.stored_bytes):
            self._raise_for(connection, head, offer.stored_bytes)
        return True

    def _raise_for(self, connection: _Connection, head: bytearray, size: int) -> NoReturn:
        """What an answer other than the good one means."""
        try:
            status, length = parse_response(head)
        except WireError as error:
            raise TransferCorruptError(f"peer {self._peer}: {error}") from error
        if status is Status.REFUSED:
            connection.is_at_rest = True
            raise OfferRefusedError(f"peer {self._peer} does not honour the handle for {size} bytes")
        if status is Status.BUSY:
            raise PeerGoneError(f"peer {self._peer} has too many connections from here")
        raise TransferCorruptError(f"peer {self._peer}: asked for {size} bytes, was told {status.name} and {length}")

    def _land(self, connection: _Connection, into: memoryview, stop_s: float, on_bytes: OnBytes | None) -> None:
        """Read the body, in pieces if somebody wants to know."""
        size = len(into)
        piece = min(max(size // _PIECES, _MIN_PIECE_BYTES), _MAX_PIECE_BYTES) if on_bytes else size
        for start in range(0, size, piece):
            with into[start : start + piece] as part:
                self._receive(connection, part, stop_s)
            # Only now, as the consumer may raise: the stream is at rest after the last byte, and not before.
            connection.is_at_rest = start + piece >= size
            if on_bytes is not None:
                on_bytes(min(start + piece, size))

    def _receive(self, connection: _Connection, part: memoryview, stop_s: float) -> None:
        if connection.stream is None:
            raise InvariantError("a body is read from a connection that was never opened")
        try:
            connection.stream.receive(part, stop_s=stop_s)
        except OSError as error:
            raise self._gone(error) from error

    # The pool.

    def _borrow(self, stop_s: float) -> _Connection:
        """A connection, the one used last first; perhaps a new one that `_transfer` is to connect."""
        with self._lock:
            if not self._is_free() and not self._wait(self._is_free, stop_s - time.monotonic()):
                raise PeerGoneError(f"peer {self._peer}: all {self._max_connections} connections are in use")
            if self._is_closed:
                raise PeerGoneError(f"the path to peer {self._peer} is closed")
            if time.monotonic() >= stop_s:
                raise PeerGoneError(f"peer {self._peer}: no time left for the transfer")
            connection = self._idle.pop() if self._idle else self._new()
            while connection.stream is not None and not connection.stream.is_quiet:
                # Closed by the peer, or it has something to say that nobody asked for.
                connection.close()
                connection = self._idle.pop() if self._idle else self._new()
            self._active.add(connection)
            return connection

    def _wait(self, is_true: Callable[[], bool], timeout_s: float) -> bool:
        """Whether it became true in time; the lock is held on entry and exit."""
        self._num_waiting += 1
        try:
            return self._changed.wait_for(is_true, max(0.0, timeout_s))
        finally:
            self._num_waiting -= 1

    def _is_free(self) -> bool:
        return self._is_closed or len(self._active) < self._max_connections

    def _new(self) -> _Connection:
        try:
            return _Connection(socket.socket(self._family, socket.SOCK_STREAM))
        except OSError as error:
            raise self._gone(error) from error

    def _replace(self, connection: _Connection) -> _Connection:
        """A new connection in the place of a stale one."""
        with self._lock:
            new = self._new()
            self._active.discard(connection)
            self._active.add(new)
            connection.close()
        return new

    def _give_back(self, connection: _Connection) -> None:
        with self._lock:
            self._active.discard(connection)
            if connection.is_at_rest and not self._is_closed:
                connection.is_used = True
                self._idle.append(connection)
            else:
                connection.close()
            if self._num_waiting:
                self._changed.notify_all()

    def _connect(self, connection: _Connection, stop_s: float) -> Stream:
        now_s = time.monotonic()
        stop_s = min(stop_s, now_s + self._connect_timeout_s)
        sock = connection.sock
        tune(sock)
        sock.settimeout(max(0.001, stop_s - now_s))
        sock.connect((self._host, self._port))
        if self._tls is None:
            connection.stream = PlainStream(sock)
        else:
            wrapped = self._tls.wrap_socket(sock, server_hostname=self._tls_host, do_handshake_on_connect=False)
            connection.sock = wrapped
            connection.stream = TlsStream(wrapped, stop_s=stop_s)
        if self._is_closed:
            # `close` came while there was nothing yet that it could have cut off.
            raise ConnectionError("the path was closed")
        return connection.stream

    def _gone(self, error: OSError) -> PeerGoneError:
        where = f"{self._host}:{self._port}"
        return PeerGoneError(f"peer {self._peer} at {where}: {type(error).__name__}: {error}")
