"""ZMQ sockets that only members of the cluster can connect.

Covers: one context per process for all subscribers, keys derived from the cluster's secret, binding. Does not cover:
messages (`kvstore.events`).

Publishers and subscribers speak CURVE: a stranger cannot complete its handshake, because the publisher's public key is
derived from the secret too and told to nobody. So nobody else learns which chunks exist, or for whom.
"""

import hashlib
import hmac
import threading
from typing import Any, Final

import zmq
import zmq.asyncio
from zmq.utils import z85

from cluster.errors import CallerError, InvariantError

_KEY_TAG: Final = b"learnonce event curve 1"
_MAX_SOCKETS: Final = 8192
"""Of all feeds of a process; ZMQ's own bound is about a thousand."""

_lock = threading.Lock()
_context: "zmq.Context[zmq.Socket[bytes]] | None" = None
_users = 0


class PortTakenError(CallerError):
    """A port that another process listens on."""


class SocketFactory:
    """Sockets on this process' one context, which ends with its last user.

    Args:
        secret: The cluster's.
        has_own_context: For listening sockets: only the end of its context waits until a socket's port is free.

    Raises:
        CallerError: This build of ZMQ has no CURVE.
    """

    def __init__(self, secret: bytes, *, has_own_context: bool = False) -> None:
        if not zmq.has("curve"):
            raise CallerError("this build of pyzmq has no CURVE encryption: install the wheel from PyPI")
        self._server_secret = z85.encode(hmac.new(secret, _KEY_TAG, hashlib.sha256).digest())
        self._server_public = zmq.curve_public(self._server_secret)
        self._has_own_context = has_own_context
        self._plain: zmq.Context[Any] = zmq.Context() if has_own_context else _enter_context()
        self._async: zmq.asyncio.Context | None = zmq.asyncio.Context(self._plain)
        self._sockets: list[Any] = []
        self._is_closed = False

    def bound(self, kind: int, *, host: str, port: int | None, max_message_bytes: int) -> Any:
        """A listening socket: a plain one for PUB, which never waits, else one for asyncio.

        Raises:
            PortTakenError: Somebody else listens there.
        """
        sock = self._open(kind, max_message_bytes)
        sock.setsockopt(zmq.CURVE_SERVER, 1)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self._server_secret)
        try:
            sock.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            self.close_socket(sock)
            raise PortTakenError(f"cannot listen on {host}:{port or 'a free port'}: {error}") from error
        return sock

    def connected(self, kind: int, address: str, *, max_message_bytes: int, queued_messages: int | None = None) -> Any:
        """A connecting socket; ZMQ connects in the background, again and again. Subscribers get everything."""
        sock = self._open(kind, max_message_bytes)
        public, own_secret = zmq.curve_keypair()
        sock.setsockopt(zmq.CURVE_SERVERKEY, self._server_public)
        sock.setsockopt(zmq.CURVE_PUBLICKEY, public)
        sock.setsockopt(zmq.CURVE_SECRETKEY, own_secret)
        if queued_messages is not None:
            sock.setsockopt(zmq.RCVHWM, queued_messages)
        if kind == zmq.SUB:
            sock.setsockopt(zmq.SUBSCRIBE, b"")
        sock.connect(address)
        return sock

    def breaks(self, sock: Any) -> Any:
        """A socket that tells when a connection of `sock` breaks."""
        monitor = sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        monitor.setsockopt(zmq.LINGER, 0)
        self._sockets.append(monitor)
        return monitor

    def close_socket(self, sock: Any) -> None:
        """Close one socket early; harmless after `close`."""
        if sock in self._sockets:
            self._sockets.remove(sock)
            sock.close(0)

    def close(self) -> None:
        """Close every socket. Repeating it is harmless."""
        if self._is_closed:
            return
        self._is_closed = True
        for sock in reversed(self._sockets):
            sock.close(0)
        self._sockets.clear()
        self._async = None
        if self._has_own_context:
            self._plain.term()
        else:
            _leave_context()

    def _open(self, kind: int, max_message_bytes: int) -> Any:
        if self._async is None:
            raise InvariantError("a socket was asked for after the end")
        context: zmq.Context[Any] = self._plain if kind == zmq.PUB else self._async
        sock = context.socket(kind)
        self._sockets.append(sock)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
        return sock


def _enter_context() -> "zmq.Context[zmq.Socket[bytes]]":
    global _context, _users
    with _lock:
        if _context is None:
            _context = zmq.Context()
            _context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)
        _users += 1
        return _context


def _leave_context() -> None:
    global _context, _users
    with _lock:
        _users -= 1
        if _users or _context is None:
            return
        context, _context = _context, None
    # Every socket is closed: this returns at once.
    context.term()
