"""The puller's side of the control plane between nodes: one connection to one life of one peer.

Covers: connecting, the mutual proof, requests and their replies, heartbeats, noticing that the peer is gone or silent.
Does not cover: when to connect, and which peer to ask (`kvstore.peers`).

Runs on one event loop. A reply that comes too late is undone here: what nobody waits for any more is released.
"""

import asyncio
import itertools
import logging
import secrets
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeVar

from cluster.errors import CallerError
from kvstore.keys import ChunkKey
from kvstore.peer_protocol import (
    Alive,
    Describe,
    Described,
    Heartbeat,
    Lend,
    Lent,
    PeerReply,
    PeerRequest,
    decode_peer_reply,
    holder_mac,
    puller_mac,
)
from kvstore.protocol import (
    LENGTH_BYTES,
    MAX_FRAME_BYTES,
    MAX_HANDSHAKE_BYTES,
    NONCE_BYTES,
    PROTOCOL_VERSION,
    Challenge,
    Proof,
    ProtocolError,
    Release,
    Welcome,
    decode_hello,
    encode,
)
from kvstore.transport import PeerGoneError

log = logging.getLogger(__name__)

_MAX_UNSENT_BYTES: Final = 1 << 20
"""Requests that a peer may leave unread before it is given up."""
R = TypeVar("R", Described, Lent, Alive)


class PeerRefusedError(PeerGoneError):
    """Somebody answers, but not this life of this peer: another secret, version or epoch."""


class PeerAddressError(CallerError):
    """An address that is not `host:port`."""


class PeerLink:
    """A proven connection; made by `open_link`.

    Args:
        reader: From the connection.
        writer: From the connection.
        peer: The peer's node, for messages.
        heartbeat_s: Seconds between two signs of life.
        on_closed: Called once, on the event loop, when the peer is gone.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        peer: str,
        heartbeat_s: float,
        on_closed: Callable[[], None],
    ) -> None:
        self.peer = peer
        self._reader = reader
        self._writer = writer
        self._heartbeat_s = heartbeat_s
        self._on_closed = on_closed
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[PeerReply]] = {}
        self._is_closed = False
        self._silent = False
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._receive()), loop.create_task(self._beat())]

    @property
    def is_alive(self) -> bool:
        """Whether the peer is connected and answered its last heartbeat."""
        return not (self._is_closed or self._silent)

    async def describe(self, *, timeout_s: float) -> Described:
        """The peer's data paths.

        Raises:
            PeerGoneError: No answer in time.
        """
        return await self._call(lambda number: Describe(number), Described, timeout_s)

    async def lend(self, key: ChunkKey, *, transport: str, timeout_s: float) -> Lent:
        """A lease and an offer for a chunk, or a miss. Cancelling it releases what comes later.

        Raises:
            PeerGoneError: No answer in time.
        """
        # The peer answers before we stop waiting, with what it has then.
        patience_s = 0.9 * timeout_s
        return await self._call(lambda number: Lend(number, key, transport, patience_s), Lent, timeout_s)

    def release(self, lease: int) -> None:
        """Give a lease back."""
        self._send(Release([lease]))

    async def close(self) -> None:
        """End the connection; the peer ends all of its leases. Repeating it is harmless."""
        self._end()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(OSError, ssl.SSLError):
            await self._writer.wait_closed()

    async def _call(self, request: Callable[[int], PeerRequest], kind: type[R], timeout_s: float) -> R:
        if self._is_closed:
            raise PeerGoneError(f"the connection to peer {self.peer} is closed")
        number = next(self._numbers)
        answer: asyncio.Future[PeerReply] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        self._send(request(number))
        try:
            async with asyncio.timeout(timeout_s):
                reply = await answer
        except TimeoutError as error:
            raise PeerGoneError(f"peer {self.peer} did not answer within {timeout_s:.2f} s") from error
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self._undo(answer.result())
            raise
        finally:
            self._calls.pop(number, None)
        if not isinstance(reply, kind):
            self._undo(reply)
            raise PeerGoneError(f"peer {self.peer} answered {type(reply).__name__} instead of {kind.__name__}")
        return reply

    def _undo(self, reply: PeerReply) -> None:
        """Release what a reply brings that nobody waits for."""
        if isinstance(reply, Lent) and reply.offer is not None:
            self.release(reply.lease)

    async def _receive(self) -> None:
        try:
            while True:
                reply = decode_peer_reply(await _read_frame(self._reader, max_bytes=MAX_FRAME_BYTES))
                call = self._calls.pop(reply.number, None)
                if call is not None and not call.done():
                    call.set_result(reply)
                else:
                    self._undo(reply)
        except (OSError, ProtocolError) as error:
            log.info("peer_link_broken peer=%s error=%s", self.peer, error or type(error).__name__)
        except EOFError:
            # The usual end: the peer stops, dies, or has had enough of us; `PeerNode` tells.
            pass
        finally:
            self._end()

    async def _beat(self) -> None:
        while not self._is_closed:
            await asyncio.sleep(self._heartbeat_s)
            try:
                await self._call(lambda number: Heartbeat(number), Alive, self._heartbeat_s)
                if self._silent:
                    log.info("peer_answers_again peer=%s", self.peer)
                self._silent = False
            except PeerGoneError:
                if not self._silent and not self._is_closed:
                    log.warning("peer_silent peer=%s seconds=%.1f", self.peer, self._heartbeat_s)
                self._silent = True

    def _send(self, message: PeerRequest) -> None:
        if self._is_closed or self._writer.is_closing():
            return
        self._writer.write(encode(message))
        transport: asyncio.WriteTransport = self._writer.transport
        if transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            self._end()

    def _end(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._writer.transport.abort()
        calls, self._calls = list(self._calls.values()), {}
        for call in calls:
            if not call.done():
                call.set_exception(PeerGoneError(f"peer {self.peer} has gone away"))
        self._on_closed()


async def open_link(
    address: str,
    *,
    peer: str,
    epoch: str,
    node_id: str,
    secret: bytes,
    tls: ssl.SSLContext | None,
    connect_timeout_s: float,
    heartbeat_s: float,
    on_closed: Callable[[], None],
) -> PeerLink:
    """Connect to a peer, and prove the secret to each other.

    Args:
        address: `host:port` of the peer's control plane.
        peer: Its node.
        epoch: The life of it that is meant.
        node_id: Our node.
        secret: The cluster's.
        tls: Context for mutual TLS; None for none.
        connect_timeout_s: Seconds for all of it.
        heartbeat_s: See `PeerLink`.
        on_closed: See `PeerLink`.

    Raises:
        PeerGoneError: Nobody answers in time.
        PeerRefusedError: Another secret, version or life.
        PeerAddressError: Not an address.
    """
    host, port = split_address(address)
    try:
        async with asyncio.timeout(connect_timeout_s):
            reader, writer = await asyncio.open_connection(host, port, ssl=tls)
            try:
                await _prove(reader, writer, peer=peer, epoch=epoch, node_id=node_id, secret=secret)
            except BaseException:
                writer.transport.abort()
                raise
    except EOFError as error:
        raise PeerRefusedError(
            f"peer {peer} at {address} ended the handshake: another secret, no TLS on one side, or too many peers"
        ) from error
    except OSError as error:
        raise PeerGoneError(f"peer {peer} at {address}: {error or type(error).__name__}") from error
    except ProtocolError as error:
        raise PeerRefusedError(f"peer {peer} at {address}: {error}") from error
    return PeerLink(reader, writer, peer=peer, heartbeat_s=heartbeat_s, on_closed=on_closed)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`, where the host may be an IPv6 address in brackets.

    Raises:
        PeerAddressError: Something else.

    Example:
        >>> split_address("10.0.0.1:80"), split_address("[::1]:80")
        (('10.0.0.1', 80), ('::1', 80))
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise PeerAddressError(f"expected host:port, got {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


async def _prove(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, peer: str, epoch: str, node_id: str, secret: bytes
) -> None:
    """The handshake.

    Raises:
        ProtocolError: The other side is not this life of this peer.
    """
    challenge = decode_hello(await _read_frame(reader, max_bytes=MAX_HANDSHAKE_BYTES))
    if not isinstance(challenge, Challenge) or challenge.version != PROTOCOL_VERSION:
        raise ProtocolError(f"does not speak version {PROTOCOL_VERSION}")
    nonce = secrets.token_bytes(NONCE_BYTES)
    mac = puller_mac(secret, challenge=challenge.nonce, nonce=nonce, node_id=node_id)
    writer.write(encode(Proof(node_id, nonce, mac)))
    welcome = decode_hello(await _read_frame(reader, max_bytes=MAX_HANDSHAKE_BYTES))
    if not isinstance(welcome, Welcome):
        raise ProtocolError("did not welcome this store")
    expected = holder_mac(secret, challenge=challenge.nonce, nonce=nonce, epoch=welcome.epoch)
    if not secrets.compare_digest(expected, welcome.mac):
        raise ProtocolError("does not know the cluster's secret")
    if welcome.epoch != epoch:
        raise ProtocolError(f"lives in epoch {welcome.epoch}, not {epoch} as {peer} did")


async def _read_frame(reader: asyncio.StreamReader, *, max_bytes: int) -> bytes:
    length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "little")
    if length > max_bytes:
        raise ProtocolError(f"frame of {length} bytes, at most {max_bytes} are allowed")
    return await reader.readexactly(length)
