"""The store's side of the unix socket: connections, the handshake, and one reply per request.

Covers: sockets and frames. Does not cover: what requests do (`kvstore.desk`).

A client that breaks the protocol, or that does not read its replies, is *expelled*: the store stops listening to it and
ends its own direction, but the client's leases stay until the client closes too, because it may still be reading
memory under them.
"""

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final, cast

from cluster.errors import CallerError
from kvstore import metrics
from kvstore.desk import Desk, Session, Waiting
from kvstore.interfaces import TierStat
from kvstore.keys import ChunkKey
from kvstore.protocol import (
    LENGTH_BYTES,
    MAX_HANDSHAKE_BYTES,
    NONCE_BYTES,
    PROTOCOL_VERSION,
    Abort,
    Challenge,
    Commit,
    Done,
    Drop,
    FrameReader,
    Grant,
    Granted,
    Held,
    Lookup,
    Proof,
    ProtocolError,
    Read,
    Release,
    Reply,
    ReportCorrupt,
    Request,
    Reserve,
    Reserved,
    Stat,
    Stats,
    Wait,
    Welcome,
    client_mac,
    decode_hello,
    decode_request,
    encode,
    store_mac,
)
from kvstore.settings import StoreSettings

log = logging.getLogger(__name__)

MAX_SOCKET_PATH_BYTES: Final = 107
_MAX_UNREAD_REPLY_BYTES: Final = 8 << 20
"""Replies that a client may leave unread before it is expelled."""
_BACKLOG: Final = 64
_ACCEPT_PAUSE_S: Final = 0.2


class SocketPathError(CallerError):
    """A path that no unix socket can have."""


def check_socket_path(path: str) -> str:
    """The path itself, if the system can bind it.

    Raises:
        SocketPathError: Too long.
    """
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH_BYTES:
        raise SocketPathError(
            f"socket path {path} has {length} bytes, the system allows {MAX_SOCKET_PATH_BYTES}: "
            "choose a shorter runtime folder"
        )
    return path


def listen_on(path: str) -> socket.socket:
    """A listening unix socket for this user only, in place of whatever was at `path`.

    Raises:
        SocketPathError: Too long.
        OSError: The folder is missing or not writable.
    """
    check_socket_path(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        with suppress(FileNotFoundError):
            os.unlink(path)
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class StoreServer:
    """Serves one desk on one socket, on the running event loop.

    Args:
        desk: Does the work.
        listener: From `listen_on`; closed by `stop`.
        settings: Bounds.
        secret: The cluster's.
        epoch: This life of the store.
        arena_fd: Descriptor that clients get.
        arena_bytes: Its size.
        tiers: Counts per tier, for `stat`.
        queued_chunks: Chunks that wait for the file tier, for `stat`.
    """

    def __init__(
        self,
        desk: Desk,
        listener: socket.socket,
        *,
        settings: StoreSettings,
        secret: bytes,
        epoch: str,
        arena_fd: int,
        arena_bytes: int,
        tiers: Callable[[], dict[str, TierStat]],
        queued_chunks: Callable[[], int],
    ) -> None:
        self.desk = desk
        self.settings = settings
        self.tiers = tiers
        self.queued_chunks = queued_chunks
        self._listener = listener
        self._secret = secret
        self._epoch = epoch
        self._arena_fd = arena_fd
        self._arena_bytes = arena_bytes
        self._connections: set[StoreConnection] = set()
        self._greetings: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    async def stop(self) -> None:
        """Close every connection and end every session."""
        tasks = [self._accepting, *self._greetings]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()
        connections = list(self._connections)
        for connection in connections:
            connection.abort()
        await asyncio.gather(*(connection.wait_closed() for connection in connections))

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                # Out of descriptors, mostly: those of others may come back.
                log.warning("store_accept_failed error=%s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            if len(self._connections) + len(self._greetings) >= self.settings.max_sessions:
                metrics.SESSIONS.labels("refused").inc()
                sock.close()
                continue
            greeting = loop.create_task(self._greet(sock))
            self._greetings.add(greeting)
            greeting.add_done_callback(self._greetings.discard)

    async def _greet(self, sock: socket.socket) -> None:
        """The handshake; then the connection serves itself."""
        try:
            sock.setblocking(False)
            async with asyncio.timeout(self.settings.handshake_s):
                client_name = await self._shake_hands(sock)
            connection = StoreConnection(self, client_name)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, sock)
        except (OSError, ProtocolError, TimeoutError) as error:
            metrics.SESSIONS.labels("refused").inc()
            log.warning("store_session_refused error=%s", error or type(error).__name__)
            sock.close()
        except asyncio.CancelledError:
            sock.close()
            raise

    async def _shake_hands(self, sock: socket.socket) -> str:
        loop = asyncio.get_running_loop()
        challenge = secrets.token_bytes(NONCE_BYTES)
        await loop.sock_sendall(sock, encode(Challenge(PROTOCOL_VERSION, challenge)))
        proof = decode_hello(await _receive_hello(sock))
        if not isinstance(proof, Proof):
            raise ProtocolError(f"expected a proof, got {type(proof).__name__}")
        expected = client_mac(self._secret, challenge=challenge, nonce=proof.nonce, client_name=proof.client_name)
        if not secrets.compare_digest(expected, proof.mac):
            raise ProtocolError(f"client {proof.client_name!r} does not know the cluster's secret")
        welcome = Welcome(
            mac=store_mac(self._secret, challenge=challenge, nonce=proof.nonce, epoch=self._epoch),
            epoch=self._epoch,
            arena_bytes=self._arena_bytes,
            max_keys=self.settings.max_keys_per_request,
        )
        # A fresh socket takes these few bytes at once, or the client is not worth waiting for.
        socket.send_fds(sock, [encode(welcome)], [self._arena_fd])
        return proof.client_name

    def add(self, connection: "StoreConnection") -> None:
        """A connection begins."""
        metrics.SESSIONS.labels("opened").inc()
        self._connections.add(connection)

    def remove(self, connection: "StoreConnection") -> None:
        """A connection has ended."""
        metrics.SESSIONS.labels("closed").inc()
        self._connections.discard(connection)


class StoreConnection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: StoreServer, client_name: str) -> None:
        self._server = server
        self.desk = server.desk
        self._session = Session(client_name)
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._is_expelled = False
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending: set[_Pending] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The handshake is over."""
        self._transport = cast("asyncio.Transport", transport)
        self.desk.open_session(self._session)
        self._server.add(self)

    def data_received(self, data: bytes) -> None:
        """Serve the requests that `data` completes."""
        if self._is_expelled:
            return
        try:
            for body in self._reader.feed(data):
                self._serve(decode_request(body))
        except ProtocolError as error:
            self._expel(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        """The client closed or died: nothing of it stays."""
        for pending in list(self._pending):
            pending.cancel()
        self.desk.end_session(self._session)
        self._server.remove(self)
        self._closed.set_result(None)

    def abort(self) -> None:
        """Close without waiting for the client."""
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        """Return when `connection_lost` has run."""
        await self._closed

    def _serve(self, request: Request) -> None:
        metrics.REQUESTS.labels(type(request).__name__.lower()).inc()
        desk, session = self.desk, self._session
        match request:
            case Lookup(number, keys):
                self._check_keys(keys)
                self.reply(Held(number, self._flags(keys)))
            case Wait(number, keys, timeout_s):
                self._check_keys(keys)
                self._wait(number, keys, timeout_s)
            case Read(number, keys, timeout_s):
                self._check_keys(keys)
                self._read(number, keys, timeout_s)
            case Reserve(number, key, meta, payload_bytes):
                now_s = asyncio.get_running_loop().time()
                answer = desk.reserve(session, ChunkKey(key), meta, payload_bytes, now_s=now_s)
                if isinstance(answer, Grant):
                    self.reply(Reserved(number, answer))
                else:
                    self.reply(Reserved(number, None, answer))
            case Commit(number, lease, payload_checksum):
                self.reply(Done(number, desk.commit(session, lease, payload_checksum)))
            case Drop(number, keys):
                self._check_keys(keys)
                self.reply(Done(number, desk.drop([ChunkKey(k) for k in keys])))
            case Stat(number):
                self.reply(self._stats(number))
            case Release(leases):
                desk.release(session, leases)
            case Abort(lease):
                desk.abort(session, lease)
            case ReportCorrupt(lease):
                desk.report_corrupt(session, lease)

    def _read(self, number: int, keys: list[bytes], timeout_s: float) -> None:
        grants: list[Grant | None] = [self.desk.grant_read(self._session, ChunkKey(key)) for key in keys]
        places: dict[ChunkKey, list[int]] = {}
        for place, key in enumerate(keys):
            if grants[place] is None and self.desk.fetch(ChunkKey(key)):
                places.setdefault(ChunkKey(key), []).append(place)

        def settle(key: ChunkKey) -> bool:
            # Pinned here and now: the next promotion may evict what has just arrived.
            for place in places[key]:
                grants[place] = self.desk.grant_read(self._session, key)
            return grants[places[key][0]] is not None or not self.desk.is_being_written(key)

        self._reply_when_settled(set(places), settle, timeout_s, lambda: Granted(number, grants))

    def _wait(self, number: int, keys: list[bytes], timeout_s: float) -> None:
        can_read = self.desk.can_read
        missing = {ChunkKey(key) for key in keys if not can_read(ChunkKey(key))}
        self._reply_when_settled(missing, can_read, timeout_s, lambda: Held(number, self._flags(keys)))

    def _reply_when_settled(
        self, keys: set[ChunkKey], settle: Callable[[ChunkKey], bool], timeout_s: float, reply: Callable[[], Reply]
    ) -> None:
        """Answer once every key is settled, or after `timeout_s`; at once if there is nothing to wait for."""
        if not keys:
            self.reply(reply())
            return
        if len(self._pending) >= self._server.settings.max_waiting_per_session:
            raise ProtocolError(f"more than {self._server.settings.max_waiting_per_session} requests wait")
        waiting = Waiting(set(keys), settle=settle, on_done=lambda: pending.finish())
        pending = _Pending(self, waiting, keys, reply, timeout_s)
        self._pending.add(pending)

    def forget(self, pending: "_Pending") -> None:
        """A request waits no more."""
        self._pending.discard(pending)

    def reply(self, reply: Reply) -> None:
        """Send one reply."""
        if self._transport is None or self._transport.is_closing() or self._is_expelled:
            return
        self._transport.write(encode(reply))
        if self._transport.get_write_buffer_size() > _MAX_UNREAD_REPLY_BYTES:
            self._expel("replies are not read")

    def _expel(self, reason: str) -> None:
        metrics.SESSIONS.labels("expelled").inc()
        log.warning("store_session_expelled client=%s reason=%s", self._session.client_name, reason)
        self._is_expelled = True
        if self._transport is not None:
            self._transport.write_eof()

    def _check_keys(self, keys: list[bytes]) -> None:
        limit = self._server.settings.max_keys_per_request
        if len(keys) > limit:
            raise ProtocolError(f"{len(keys)} keys in one request, {limit} are allowed")

    def _flags(self, keys: list[bytes]) -> bytes:
        can_read = self.desk.can_read
        return bytes([can_read(ChunkKey(key)) for key in keys])

    def _stats(self, number: int) -> Stats:
        return Stats(
            number=number,
            tiers=self._server.tiers(),
            sessions=len(self.desk.sessions),
            read_leases=self.desk.num_reads,
            reservations=self.desk.num_writes,
            write_behind_chunks=self._server.queued_chunks(),
        )


class _Pending:
    """A request that waits; registered from the moment that it is made, so that no change is missed."""

    def __init__(
        self,
        connection: StoreConnection,
        waiting: Waiting,
        keys: set[ChunkKey],
        reply: Callable[[], Reply],
        timeout_s: float,
    ) -> None:
        self._connection = connection
        self._waiting = waiting
        self._keys = keys
        self._reply = reply
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self.finish)
        connection.desk.add_waiting(waiting)

    def finish(self) -> None:
        """Reply with what there is."""
        self.cancel()
        self._connection.reply(self._reply())

    def cancel(self) -> None:
        """Stop waiting."""
        self._timer.cancel()
        self._connection.desk.remove_waiting(self._waiting, self._keys)
        self._connection.forget(self)


async def _receive_hello(sock: socket.socket) -> bytes:
    """One handshake frame, and not a byte more."""
    loop = asyncio.get_running_loop()
    data = b""
    wanted = LENGTH_BYTES
    while len(data) < wanted:
        part = await loop.sock_recv(sock, wanted - len(data))
        if not part:
            raise ProtocolError("closed during the handshake")
        data += part
        if len(data) == LENGTH_BYTES:
            length = int.from_bytes(data, "little")
            if length > MAX_HANDSHAKE_BYTES:
                raise ProtocolError(f"handshake message of {length} bytes")
            wanted += length
    return data[LENGTH_BYTES:]
