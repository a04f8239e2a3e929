"""The store's listeners: who may connect, and the handshake that proves it.

Covers: sockets, accepting, the mutual proof. Does not cover: requests and their replies (`kvstore.requests`).
"""

import asyncio
import logging
import os
import secrets
import socket
from contextlib import suppress
from typing import Final

from cluster.errors import CallerError
from kvstore import metrics
from kvstore.protocol import (
    LENGTH_BYTES,
    MAX_HANDSHAKE_BYTES,
    NONCE_BYTES,
    PROTOCOL_VERSION,
    Challenge,
    Proof,
    ProtocolError,
    Welcome,
    client_mac,
    decode_hello,
    encode,
    store_mac,
)
from kvstore.requests import ServedConnection, StoreService

log = logging.getLogger(__name__)

MAX_SOCKET_PATH_BYTES: Final = 107
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
    """Accepts the node's own clients on one unix socket, on the running event loop.

    Args:
        service: Serves their requests.
        listener: From `listen_on`; closed by `stop`.
        secret: The cluster's.
        epoch: This life of the store.
        arena_fd: Descriptor that clients get.
        arena_bytes: Its size.
    """

    def __init__(
        self,
        service: StoreService,
        listener: socket.socket,
        *,
        secret: bytes,
        epoch: str,
        arena_fd: int,
        arena_bytes: int,
    ) -> None:
        self._service = service
        self._settings = service.settings
        self._listener = listener
        self._secret = secret
        self._epoch = epoch
        self._arena_fd = arena_fd
        self._arena_bytes = arena_bytes
        self._greetings: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    async def stop(self) -> None:
        """Close every connection and end every session."""
        tasks = [self._accepting, *self._greetings]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()
        connections = list(self._service.connections)
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
            if len(self._service.connections) + len(self._greetings) >= self._settings.max_sessions:
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
            async with asyncio.timeout(self._settings.handshake_s):
                client_name = await self._shake_hands(sock)
            connection = ServedConnection(self._service, client_name)
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
            max_keys=self._settings.max_keys_per_request,
        )
        # A fresh socket takes these few bytes at once, or the client is not worth waiting for.
        socket.send_fds(sock, [encode(welcome)], [self._arena_fd])
        return proof.client_name


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
