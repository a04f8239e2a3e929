"""The data path between stores of one machine: the puller maps the holder's arena and copies.

Covers: both ends. Does not cover: mapping (`kvstore.connection`), who is lent what (`kvstore.peers`).

The address is the holder's unix socket. The puller connects to it as a worker does, proves the secret, and gets the
arena's descriptor. It asks there for the place of its handle's record before the copy, and again after it: if the
answers are the same, the record was pinned all the time, and what was copied is right. A holder that is killed in the
middle leaves the mapped arena as it was, and one that is frozen leaves it unchanged.
"""

import os
import secrets
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from cluster.errors import LearnonceError
from kvstore.connection import StoreConnection
from kvstore.handshake import StoreRefusedError, StoreUnreachableError
from kvstore.interfaces import OnBytes
from kvstore.protocol import Place, Redeem, Redeemed
from kvstore.transport import LandingError, Offer, OfferRefusedError, PeerGoneError, TransferCorruptError

_HANDLE_BYTES: Final = 16
_PIECE_BYTES: Final = 1 << 20
"""Copied between two looks at the clock."""


@dataclass(frozen=True, slots=True)
class _Offered:
    place: Place
    expires_s: float


class ShmServer:
    """The holder's end: tells on the unix socket where a handle's record lies, as long as its offer lives.

    Args:
        socket_path: The store's unix socket.
        arena: What the descriptor on that socket maps; records outside of it are not offered.
        now_s: Monotonic seconds.
    """

    def __init__(self, socket_path: str, *, arena: memoryview, now_s: Callable[[], float] = time.monotonic) -> None:
        self._address = os.fsencode(os.path.abspath(socket_path))
        self._arena_start, self._arena_bytes = _start_of(arena), len(arena)
        self._now_s = now_s
        self._lock = threading.Lock()
        self._offers: dict[bytes, _Offered] = {}
        self._is_closed = False

    @property
    def name(self) -> str:
        """The path's name."""
        return "shm"

    @property
    def address(self) -> bytes:
        """The unix socket."""
        return self._address

    def offer(self, record: memoryview, *, peer: str, lifetime_s: float) -> Offer | None:
        """Let a peer copy a record of the arena; None if it lies elsewhere, or the server is closed."""
        offset = _start_of(record) - self._arena_start
        if not 0 <= offset <= self._arena_bytes - len(record):
            return None
        handle = secrets.token_bytes(_HANDLE_BYTES)
        with self._lock:
            if self._is_closed:
                return None
            self._offers[handle] = _Offered(Place(offset, len(record)), self._now_s() + lifetime_s)
        return Offer(self.name, handle, len(record))

    def revoke(self, handle: bytes) -> None:
        """End an offer: a copy that is under way is not believed."""
        with self._lock:
            self._offers.pop(handle, None)

    def redeem(self, handle: bytes) -> Place | None:
        """Where a handle's record lies; None if it is none now."""
        with self._lock:
            offered = self._offers.get(handle)
            return offered.place if offered and self._now_s() < offered.expires_s else None

    def close(self) -> None:
        """End every offer."""
        with self._lock:
            self._is_closed = True
            self._offers.clear()


class ShmTransport:
    """The puller's end. Connects at the first pull, and again after the connection broke.

    Args:
        address: From `ShmServer.address`.
        secret: The cluster's.
        node_id: Ours, for the peer's log.
        epoch: The life of the peer that is meant; None: whichever answers.
        connect_timeout_s: Seconds for a connection.
    """

    def __init__(
        self, address: bytes, *, secret: bytes, node_id: str, epoch: str | None, connect_timeout_s: float
    ) -> None:
        self._path = os.fsdecode(address)
        self._secret = secret
        self._node_id = node_id
        self._epoch = epoch
        self._connect_timeout_s = connect_timeout_s
        self._lock = threading.Lock()
        self._connection: StoreConnection | None = None
        self._is_closed = False

    @property
    def name(self) -> str:
        """The path's name."""
        return "shm"

    def pull(self, offer: Offer, into: memoryview, *, stop_s: float, on_bytes: OnBytes | None = None) -> None:
        """Copy one record out of the peer's arena.

        Raises:
            PeerGoneError: The socket does not answer in time, the transport was closed, or the copy is late.
            OfferRefusedError: The handle is none, or its offer ended in the middle.
            TransferCorruptError: The peer told a place that its arena does not have.
            LandingError: `into` is not as long as the offer says.
        """
        if len(into) != offer.stored_bytes:
            raise LandingError(f"the record has {offer.stored_bytes} bytes, the landing buffer {len(into)}")
        # Raised here, because the traceback of an error keeps what it passed through, and so the arena mapped.
        error = self._pull(offer, into, stop_s, on_bytes)
        if error is not None:
            raise error

    def close(self) -> None:
        """Disconnect. Repeating it is harmless."""
        with self._lock:
            self._is_closed = True
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _pull(self, offer: Offer, into: memoryview, stop_s: float, on_bytes: OnBytes | None) -> LearnonceError | None:
        """Copy between two looks at the offer; what is wrong, if something is."""
        connection = self._connected(stop_s)
        if isinstance(connection, LearnonceError):
            return connection
        first = _redeem(connection, offer.handle, stop_s)
        if first is None:
            return PeerGoneError("the peer's socket did not answer in time")
        place = first.place
        if place is None or place.stored_bytes != offer.stored_bytes:
            return OfferRefusedError("the peer does not know the handle")
        problem = self._copy(connection, place.offset, into, stop_s, on_bytes)
        if problem is not None:
            return problem
        second = _redeem(connection, offer.handle, stop_s)
        if second is None:
            return PeerGoneError("the peer's socket did not answer after the copy")
        return None if second.place == place else OfferRefusedError("the offer ended before the copy did")

    def _copy(
        self, connection: StoreConnection, offset: int, into: memoryview, stop_s: float, on_bytes: OnBytes | None
    ) -> LearnonceError | None:
        """Copy piece by piece; why it ended early, if it did."""
        try:
            view = connection.read_only(offset, offset + len(into))
        except ValueError:
            return PeerGoneError("the transport was closed")
        # Through numpy, because it lets other threads run meanwhile.
        source: np.ndarray | None = np.frombuffer(view, dtype=np.uint8)
        target = np.frombuffer(into, dtype=np.uint8)
        try:
            assert source is not None
            if len(source) != len(target):
                return TransferCorruptError(f"the peer's arena ends in the middle of a record at {offset}")
            for start in range(0, len(target), _PIECE_BYTES):
                if self._is_closed or time.monotonic() > stop_s:
                    return PeerGoneError(f"copied {start} of {len(target)} bytes in time")
                stop = min(start + _PIECE_BYTES, len(target))
                np.copyto(target[start:stop], source[start:stop])
                if on_bytes is not None:
                    on_bytes(stop)
        finally:
            source = None
            view.release()
        return None

    def _connected(self, stop_s: float) -> StoreConnection | PeerGoneError:
        if not self._lock.acquire(timeout=max(0.0, stop_s - time.monotonic())):
            return PeerGoneError("another transfer was still connecting when the deadline passed")
        try:
            if self._is_closed:
                return PeerGoneError("the transport is closed")
            if self._connection is not None and not self._connection.is_dead:
                return self._connection
            dead, self._connection = self._connection, None
            if dead is not None:
                dead.close()
            limit_s = min(stop_s, time.monotonic() + self._connect_timeout_s)
            name = f"peer {self._node_id}"
            try:
                connection = StoreConnection(self._path, secret=self._secret, client_name=name, stop_s=limit_s)
            except (StoreUnreachableError, StoreRefusedError) as error:
                return PeerGoneError(str(error))
            if self._epoch not in (None, connection.epoch):
                connection.close()
                return PeerGoneError(f"{self._path} is the socket of another store, or of another life of the peer")
            self._connection = connection
            return connection
        finally:
            self._lock.release()


def _redeem(connection: StoreConnection, handle: bytes, stop_s: float) -> Redeemed | None:
    """The holder's answer; None if there is none in time."""
    number = connection.number()
    reply = connection.call(Redeem(number, handle), number=number, stop_s=stop_s)
    return reply if isinstance(reply, Redeemed) else None


def _start_of(memory: memoryview) -> int:
    return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data) if len(memory) else 0


def socket_problem(address: bytes) -> str | None:
    """Why a unix socket cannot be the way to a peer, in words; None if it can.

    A path that a peer names may lead elsewhere here: in another container, or to another user's socket.
    """
    path = os.fsdecode(address)
    try:
        status = os.stat(path)
    except OSError as error:
        return f"its socket {path} is not visible here: {error.strerror}"
    if not stat.S_ISSOCK(status.st_mode):
        return f"{path} is no socket here"
    if status.st_uid != os.geteuid():
        return f"{path} belongs to user {status.st_uid}, not to ours ({os.geteuid()})"
    return None
