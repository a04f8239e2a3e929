"""What goes over the wire of the TCP data path, and sockets whose calls end in time.

Covers: the two frames, plain and TLS streams with a deadline per call, addresses.
Does not cover: who may read what (`kvstore.transport.tcp_server`), pooling (`kvstore.transport.tcp`).

A puller sends one request of 48 bytes; the holder answers with 16 bytes and, if the status is OK, with the record from
`offset` to its end, which is where `offset + length` must be. All numbers are little-endian. Nothing else is ever sent,
so no length of the other side is ever believed.

    request   magic 4, version 2, zero 2, handle 24, offset 8, length 8
    response  magic 4, version 2, status 2, length 8
"""

import ipaddress
import select
import socket
import ssl
import struct
import time
from enum import IntEnum
from typing import Final, NamedTuple, Protocol

from cluster.errors import CallerError, DataError

MAGIC: Final = b"LOtc"
VERSION: Final = 1
ID_BYTES: Final = 8
TOKEN_BYTES: Final = 16
HANDLE_BYTES: Final = ID_BYTES + TOKEN_BYTES
MAX_LENGTH_BYTES: Final = 1 << 41
"""Above every record (`kvstore.container.MAX_PAYLOAD_BYTES`), far below what overflows."""

_REQUEST: Final = struct.Struct(f"<4sHH{HANDLE_BYTES}sQQ")
_RESPONSE: Final = struct.Struct("<4sHHQ")
REQUEST_BYTES: Final = _REQUEST.size
RESPONSE_BYTES: Final = _RESPONSE.size

_TIMEVAL: Final = struct.Struct("@ll")
_CLOCK_S: Final = 0.01
"""How far a socket's timeout may be from the time that is left: setting it costs a system call."""
_MIN_KEPT_S: Final = 0.1
"""With less time left it is set exactly."""
_KEEPALIVE_IDLE_S: Final = 10
_KEEPALIVE_PAUSE_S: Final = 5
_KEEPALIVE_TRIES: Final = 3
_MAX_ADDRESS_BYTES: Final = 128


class WireError(DataError):
    """Bytes that are no frame of this protocol."""


class AddressError(CallerError):
    """An address that nobody can connect to."""


class Status(IntEnum):
    """What the holder says to a request."""

    OK = 0
    """The bytes follow."""
    REFUSED = 1
    """No such offer for you."""
    BUSY = 2
    """Too many connections of yours."""
    MALFORMED = 3
    """Not a request; the connection is closed."""


class PullRequest(NamedTuple):
    """Which bytes of which offer: from an offset to the end."""

    handle: bytes
    offset: int
    length: int


def encode_request(handle: bytes, *, offset: int, length: int) -> bytes:
    """One request frame."""
    return _REQUEST.pack(MAGIC, VERSION, 0, handle, offset, length)


def parse_request(frame: bytes | bytearray | memoryview) -> PullRequest:
    """The request in a frame of `REQUEST_BYTES`.

    Raises:
        WireError: Anything else.

    Example:
        >>> parse_request(encode_request(bytes(24), offset=1, length=2)).length
        2
    """
    if len(frame) != REQUEST_BYTES:
        raise WireError(f"a request has {REQUEST_BYTES} bytes, got {len(frame)}")
    magic, version, zero, handle, offset, length = _REQUEST.unpack(frame)
    if magic != MAGIC or version != VERSION or zero:
        raise WireError(f"expected magic {MAGIC!r} and version {VERSION}, got {magic!r} and {version}")
    if not 0 < length <= MAX_LENGTH_BYTES or offset > MAX_LENGTH_BYTES:
        raise WireError(f"no record has {length} bytes at {offset}")
    return PullRequest(handle, offset, length)


def encode_response(status: Status, length: int = 0) -> bytes:
    """One response frame; the body follows it by itself."""
    return _RESPONSE.pack(MAGIC, VERSION, status, length)


def parse_response(frame: bytes | bytearray | memoryview) -> tuple[Status, int]:
    """Status and length of the body.

    Raises:
        WireError: No response of this protocol.

    Example:
        >>> parse_response(encode_response(Status.OK, 7))
        (<Status.OK: 0>, 7)
    """
    if len(frame) != RESPONSE_BYTES:
        raise WireError(f"a response has {RESPONSE_BYTES} bytes, got {len(frame)}")
    magic, version, status, length = _RESPONSE.unpack(frame)
    if magic != MAGIC or version != VERSION:
        raise WireError(f"expected magic {MAGIC!r} and version {VERSION}, got {magic!r} and {version}")
    try:
        return Status(status), length
    except ValueError as error:
        raise WireError(f"unknown status {status}") from error


def encode_address(host: str, port: int) -> bytes:
    """Host (a numeric IP address) and port as sent to pullers.

    Example:
        >>> encode_address("127.0.0.1", 80), encode_address("::1", 80)
        (b'127.0.0.1:80', b'[::1]:80')
    """
    return (f"[{host}]:{port}" if ":" in host else f"{host}:{port}").encode()


def parse_address(address: bytes) -> tuple[str, int]:
    """Host and port of `encode_address`. Names are refused: resolving one may take longer than any deadline.

    Raises:
        AddressError: Not a numeric IP address and a port.
    """
    shown = address[:_MAX_ADDRESS_BYTES]
    host, _, port = shown.decode("ascii", "replace").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
        number = int(port) if port.isascii() and port.isdigit() else 0
    except ValueError:
        number = 0
    if not 0 < number < 1 << 16:
        raise AddressError(f"expected an IP address and a port, as in 10.0.0.1:7000 or [::1]:7000; got {shown!r}")
    return host, number


class Stream(Protocol):
    """A connected socket. After any exception it is good for `close` only: its position is unknown."""

    def receive(self, view: memoryview, *, stop_s: float) -> None:
        """Fill `view` by monotonic time `stop_s`.

        Raises:
            TimeoutError: Late.
            ConnectionError: The other side closed.
            OSError: The system's reason.
        """
        ...

    def send(self, head: bytes, body: memoryview | None = None, *, stop_s: float) -> None:
        """Hand `head` and `body` to the system by `stop_s`; afterwards their memory is not read any more.

        Raises:
            TimeoutError, OSError: As `receive`.
        """
        ...

    @property
    def is_quiet(self) -> bool:
        """Whether nothing has arrived that nobody asked for, the end of the stream included."""
        ...

    def close(self) -> None:
        """Release the descriptor; only the thread that uses the stream may call this (others: `shut_down`)."""
        ...


class PlainStream:
    """A stream without encryption: one system call per request, however long.

    The kernel keeps the deadline (`SO_RCVTIMEO` with `MSG_WAITALL`, `SO_SNDTIMEO`), so a transfer needs neither
    polling nor the interpreter lock between its first and last byte.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)
        self._sock = sock
        self._poll = _poll_for(sock)
        self._set_s = {socket.SO_RCVTIMEO: 0.0, socket.SO_SNDTIMEO: 0.0}

    def receive(self, view: memoryview, *, stop_s: float) -> None:
        """See `Stream`."""
        size = len(view)
        got = self._receive_some(view, size, stop_s)
        while got < size:
            # A signal, or the deadline in the middle, which the next call notices.
            with view[got:] as rest:
                got += self._receive_some(rest, size - got, stop_s)

    def _receive_some(self, view: memoryview, size: int, stop_s: float) -> int:
        self._limit(socket.SO_RCVTIMEO, stop_s)
        try:
            count = self._sock.recv_into(view, size, socket.MSG_WAITALL)
        except BlockingIOError as error:
            raise TimeoutError(f"{size} bytes are late") from error
        if not count:
            raise ConnectionError(f"closed, {size} bytes are missing")
        return count

    def send(self, head: bytes, body: memoryview | None = None, *, stop_s: float) -> None:
        """See `Stream`."""
        missing = len(head) + (len(body) if body is not None else 0)
        missing -= self._send_some((head,) if body is None else (head, body), missing, stop_s)
        while missing:
            # As above. A head that is cut met a full buffer: the other side has stopped reading.
            if body is None or missing > len(body):
                raise ConnectionError("not even the head could be sent")
            with body[len(body) - missing :] as rest:
                missing -= self._send_some((rest,), missing, stop_s)

    def _send_some(self, parts: tuple[bytes | memoryview, ...], size: int, stop_s: float) -> int:
        self._limit(socket.SO_SNDTIMEO, stop_s)
        try:
            return self._sock.sendmsg(parts)
        except BlockingIOError as error:
            raise TimeoutError(f"{size} bytes are late") from error

    def _limit(self, option: int, stop_s: float) -> None:
        left_s = stop_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("no time left")
        if abs(left_s - self._set_s[option]) < _CLOCK_S and left_s > _MIN_KEPT_S:
            return
        seconds = int(left_s)
        # Zero would mean for ever.
        value = _TIMEVAL.pack(seconds, max(1, int((left_s - seconds) * 1_000_000)))
        self._sock.setsockopt(socket.SOL_SOCKET, option, value)
        self._set_s[option] = left_s

    @property
    def is_quiet(self) -> bool:
        """See `Stream`."""
        return not self._poll.poll(0)

    def close(self) -> None:
        """See `Stream`."""
        self._sock.close()


class TlsStream:
    """A stream inside TLS; the handshake is the first thing it does."""

    def __init__(self, sock: ssl.SSLSocket, *, stop_s: float) -> None:
        self._sock = sock
        self._poll = _poll_for(sock)
        self._stop_s = 0.0
        self._set_s = float("-inf")
        self._limit(stop_s)
        sock.do_handshake()

    def receive(self, view: memoryview, *, stop_s: float) -> None:
        """See `Stream`."""
        got, size = 0, len(view)
        while got < size:
            self._limit(stop_s)
            with view[got:] as rest:
                count = self._sock.recv_into(rest)
            if not count:
                raise ConnectionError(f"closed after {got} of {size} bytes")
            got += count

    def send(self, head: bytes, body: memoryview | None = None, *, stop_s: float) -> None:
        """See `Stream`."""
        for part in (memoryview(head), body):
            sent = 0
            while part is not None and sent < len(part):
                self._limit(stop_s)
                with part[sent:] as rest:
                    sent += self._sock.send(rest)

    def _limit(self, stop_s: float) -> None:
        now_s = time.monotonic()
        if now_s >= stop_s:
            raise TimeoutError("no time left")
        if stop_s != self._stop_s or now_s - self._set_s > _CLOCK_S:
            self._sock.settimeout(stop_s - now_s)
            self._stop_s, self._set_s = stop_s, now_s

    @property
    def is_quiet(self) -> bool:
        """See `Stream`."""
        return not self._sock.pending() and not self._poll.poll(0)

    def close(self) -> None:
        """See `Stream`."""
        self._sock.close()


def tune(sock: socket.socket) -> None:
    """What both ends set: no waiting for more to send, and an end for peers that vanished without a word.

    Buffers stay the system's: it grows them to what the link needs, and a fixed size is wrong on the next link.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_PAUSE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_TRIES)


def _poll_for(sock: socket.socket) -> select.poll:
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLRDHUP)
    return poll


def shut_down(sock: socket.socket) -> None:
    """Make calls of other threads on this socket fail now. It must not be closed meanwhile."""
    try:
        # Not `sock.shutdown`: that of a TLS socket takes the session from under the thread that uses it.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        # Not connected yet, or not any more: there is nothing to interrupt.
        return
