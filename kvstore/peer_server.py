"""The holder's side of the control plane between nodes: who may ask, what is lent, and when it ends.

Covers: the TCP listener, the mutual proof, loans and their expiry. Does not cover: the messages
(`kvstore.peer_protocol`), the puller (`kvstore.peer_link`), the bytes (`kvstore.transport`).

Every peer is a session on the desk. A loan is a read lease of that session and an offer of a data path; it ends by the
peer's release, by the end of its connection, or after `lease_s` of silence. An offer is revoked before its lease ends,
so no data path reads memory that is no longer pinned. Offers and revocations may take their time: they run on threads.

A connection begins as a *stranger*, from its acceptance to its proof, TLS included. When there are too many connections
the oldest stranger goes: whoever opens many must open all of them anew within the round trip that a proof takes.
"""

import asyncio
import logging
import secrets
import socket
import ssl
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol, cast

from kvstore import metrics
from kvstore.desk import Session, Waiting
from kvstore.events_socket import PortTakenError
from kvstore.keys import ChunkKey
from kvstore.peer_protocol import (
    MAX_REQUEST_BYTES,
    Alive,
    Describe,
    Described,
    Heartbeat,
    Lend,
    Lent,
    PeerReply,
    PeerRequest,
    decode_peer_request,
    holder_mac,
    puller_mac,
)
from kvstore.protocol import (
    NONCE_BYTES,
    PROTOCOL_VERSION,
    Challenge,
    FrameReader,
    Grant,
    Proof,
    ProtocolError,
    Release,
    Welcome,
    decode_hello,
    encode,
)
from kvstore.settings import PeerSettings, StoreSettings
from kvstore.transport import Offer, TransportServer
from kvstore.transport.negotiation import Reach

log = logging.getLogger(__name__)

_BACKLOG: Final = 64
_ACCEPT_PAUSE_S: Final = 0.2
_OFFER_THREADS: Final = 4
_TOO_MANY: Final = "too many connections (store.max_sessions)"
_TELL_S: Final = 10.0
"""Between two log lines about strangers."""
_MAX_UNREAD_BYTES: Final = 1 << 20
"""Replies that a peer may leave unread before its session ends."""


class LendingDesk(Protocol):
    """What the desk does for peers; reads of peers never go on to other peers."""

    def open_session(self, session: Session) -> None:
        """A peer has proven itself."""
        ...

    def end_session(self, session: Session) -> None:
        """It is gone."""
        ...

    def grant_read(self, session: Session, key: ChunkKey) -> Grant | None:
        """Pin a chunk that is in memory."""
        ...

    def fetch_here(self, key: ChunkKey) -> bool:
        """Start to bring a chunk into memory from this node's own tiers; whether to wait for it."""
        ...

    def release(self, session: Session, leases: list[int]) -> None:
        """End read leases."""
        ...

    def keep_pinned(self, session: Session, lease: int) -> None:
        """End a read lease without its pin."""
        ...

    def record(self, session: Session, lease: int) -> memoryview | None:
        """The bytes under a read lease."""
        ...

    def is_being_written(self, key: ChunkKey) -> bool:
        """Whether a write of the key is under way."""
        ...

    def add_waiting(self, waiting: Waiting) -> None:
        """Be told when something happens to keys."""
        ...

    def remove_waiting(self, waiting: Waiting, keys: set[ChunkKey]) -> None:
        """No more."""
        ...


class PeerServer:
    """Lends chunks to the stores of other nodes, on the running event loop.

    Args:
        desk: Pins and fetches; asked for when the first peer comes.
        listener: From `listen_for_peers`; closed by `stop`.
        settings: Bounds.
        peers: Times.
        secret: The cluster's.
        epoch: This life of the store.
        reach: What to tell about our data paths.
        paths: The holder's end of every data path, by name. The caller closes them, after `stop`.
        tls: Context for mutual TLS; None for none.
    """

    def __init__(
        self,
        desk: Callable[[], LendingDesk],
        listener: socket.socket,
        *,
        settings: StoreSettings,
        peers: PeerSettings,
        secret: bytes,
        epoch: str,
        reach: Callable[[], Reach],
        paths: Mapping[str, TransportServer],
        tls: ssl.SSLContext | None,
    ) -> None:
        self._desk = desk
        self.settings = settings
        self.peers = peers
        self.secret = secret
        self.epoch = epoch
        self.reach = reach
        self.paths = dict(paths)
        self.threads = ThreadPoolExecutor(_OFFER_THREADS, thread_name_prefix="kvstore-offers")
        self._listener = listener
        self._tls = tls
        self._refusals = 0
        self._told_s = float("-inf")
        self._connections: dict[PeerConnection, None] = {}
        """In the order in which they were accepted."""
        self._ending: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    @property
    def desk(self) -> LendingDesk:
        """Where leases are."""
        return self._desk()

    async def stop(self) -> None:
        """End every session, every offer revoked."""
        self._accepting.cancel()
        await asyncio.gather(self._accepting, return_exceptions=True)
        self._listener.close()
        for connection in list(self._connections):
            connection.close()
        while self._ending or self._connections:
            await asyncio.gather(*self._ending)
            await asyncio.sleep(0)
        await asyncio.to_thread(self.threads.shutdown)

    def note_refusal(self, reason: str) -> None:
        """Count a stranger, and tell of it now and then: whoever tries again and again must not fill the log."""
        metrics.PEER_SESSIONS.labels("refused").inc()
        self._refusals += 1
        now_s = asyncio.get_running_loop().time()
        if now_s - self._told_s >= _TELL_S:
            log.warning("peer_refused reason=%s refusals=%d", reason, self._refusals)
            self._told_s, self._refusals = now_s, 0

    def end(self, connection: "PeerConnection") -> None:
        """A connection is closed: wind up what it holds."""
        task = asyncio.get_running_loop().create_task(self._end(connection))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end(self, connection: "PeerConnection") -> None:
        try:
            await connection.wind_up()
        finally:
            self._connections.pop(connection, None)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                # Out of descriptors, mostly: those of others may come back.
                log.warning("peer_accept_failed error=%s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            if self._make_room():
                connection = PeerConnection(self)
                self._connections[connection] = None
                connection.open(sock, tls=self._tls)
            else:
                self.note_refusal(_TOO_MANY)
                sock.close()
            # While others wait in the queue, accepting them takes no turn: without this nobody could prove anything.
            await asyncio.sleep(0)

    def _make_room(self) -> bool:
        """Whether one more connection may come; the oldest stranger makes way for it."""
        if len(self._connections) < self.settings.max_sessions:
            return True
        oldest = next((each for each in self._connections if each.is_stranger), None)
        if oldest is not None:
            oldest.abort(_TOO_MANY)
        return oldest is not None


@dataclass(slots=True, eq=False)
class _Loan:
    """One chunk that a peer may copy."""

    path: TransportServer
    offer: Offer


class PeerConnection(asyncio.Protocol):
    """One peer: a stranger until it has proven the secret."""

    def __init__(self, server: PeerServer) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader(max_bytes=MAX_REQUEST_BYTES)
        self._transport: asyncio.Transport | None = None
        self._challenge = secrets.token_bytes(NONCE_BYTES)
        self._session: Session | None = None
        self._loans: dict[int, _Loan] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._heard_s = self._loop.time()
        self._opening: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(server.settings.handshake_s, self._check_proof)

    @property
    def is_stranger(self) -> bool:
        """Whether it has proven nothing and is not being ended."""
        return self._session is None and not self._lost.done()

    def open(self, sock: socket.socket, *, tls: ssl.SSLContext | None) -> None:
        """Begin with an accepted socket, which is closed with the connection."""

        def note_end(_: "asyncio.Task[None]") -> None:
            if self._transport is None:
                # Nobody else tells of the end of what was never made.
                self._finish()
                sock.close()
                self._server.end(self)

        self._opening = self._loop.create_task(self._open(sock, tls))
        self._opening.add_done_callback(note_end)

    async def _open(self, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(lambda: self, sock, ssl=tls)
        except OSError as error:
            self.abort(str(error) or type(error).__name__)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A stranger has come."""
        self._transport = cast("asyncio.Transport", transport)
        self._write(encode(Challenge(PROTOCOL_VERSION, self._challenge)))

    def data_received(self, data: bytes) -> None:
        """Serve the messages that `data` completes."""
        self._heard_s = self._loop.time()
        try:
            for body in self._reader.feed(data):
                if self._lost.done():
                    return
                if self._session is None:
                    self._session = self._prove(body)
                else:
                    self._serve(self._session, decode_peer_request(body))
        except ProtocolError as error:
            self.abort(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer closed or died: nothing of it stays."""
        self._finish()
        self._server.end(self)

    def abort(self, reason: str) -> None:
        """Close at once: a peer maps no memory of ours, so it has nothing to give back first."""
        if self._session is None:
            self._server.note_refusal(reason)
        else:
            metrics.PEER_SESSIONS.labels("expelled").inc()
            log.warning("peer_expelled peer=%s reason=%s", self._session.client_name, reason)
        self.close()

    def close(self) -> None:
        """End the connection, with all that it holds."""
        self._finish()
        if self._transport is not None:
            self._transport.abort()
        elif self._opening is not None:
            self._opening.cancel()

    async def wind_up(self) -> None:
        """Revoke every offer, then end the session with its pins."""
        if self._session is None:
            return
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._give_back(list(self._loans))
        self._server.desk.end_session(self._session)
        metrics.PEER_SESSIONS.labels("closed").inc()

    def _finish(self) -> None:
        self._timer.cancel()
        if not self._lost.done():
            self._lost.set_result(None)

    def _prove(self, body: bytes) -> Session:
        proof = decode_hello(body)
        if not isinstance(proof, Proof):
            raise ProtocolError(f"expected a proof, got {type(proof).__name__}")
        server = self._server
        expected = puller_mac(server.secret, challenge=self._challenge, nonce=proof.nonce, node_id=proof.client_name)
        if not secrets.compare_digest(expected, proof.mac):
            raise ProtocolError(f"peer {proof.client_name!r} does not know the cluster's secret")
        session = Session(proof.client_name)
        server.desk.open_session(session)
        metrics.PEER_SESSIONS.labels("opened").inc()
        mac = holder_mac(server.secret, challenge=self._challenge, nonce=proof.nonce, epoch=server.epoch)
        self._write(encode(Welcome(mac=mac, epoch=server.epoch, arena_bytes=0, max_keys=1)))
        self._timer.cancel()
        self._timer = self._loop.call_later(server.peers.lease_s, self._check_silence)
        return session

    def _check_proof(self) -> None:
        self.abort("no proof in time")

    def _check_silence(self) -> None:
        left_s = self._heard_s + self._server.peers.lease_s - self._loop.time()
        if left_s <= 0:
            self.abort(f"silent for {self._server.peers.lease_s:g} s: its leases end")
        else:
            self._timer = self._loop.call_later(left_s, self._check_silence)

    def _serve(self, session: Session, request: PeerRequest) -> None:
        match request:
            case Describe(number):
                self._reply(Described(number, self._server.reach(), self._server.peers.lease_s))
            case Heartbeat(number):
                self._reply(Alive(number))
            case Release(leases):
                self._start(self._give_back(leases))
            case Lend():
                if len(self._tasks) >= self._server.settings.max_waiting_per_session:
                    raise ProtocolError(f"more than {self._server.settings.max_waiting_per_session} requests at a time")
                self._start(self._lend(session, request))

    def _start(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _lend(self, session: Session, request: Lend) -> None:
        desk, path = self._server.desk, self._server.paths.get(request.transport)
        lease = await self._pin(session, ChunkKey(request.key), request.timeout_s) if path else None
        record = desk.record(session, lease) if lease is not None else None
        if lease is None or record is None or path is None:
            metrics.PEER_LOANS.labels(request.transport if path else "none", "miss").inc()
            self._reply(Lent(request.number, 0, None))
            return
        offer: Offer | None = None
        try:
            offer = await self._run(
                lambda: path.offer(record, peer=session.client_name, lifetime_s=self._server.peers.lease_s)
            )
        except Exception:
            # Answered below like an offer that there is no room for: the peer takes another path, or another holder.
            log.exception("offer_failed transport=%s", path.name)
        record.release()
        metrics.PEER_LOANS.labels(path.name, "lent" if offer else "full").inc()
        if offer is None:
            desk.release(session, [lease])
            self._reply(Lent(request.number, 0, None))
            return
        self._loans[lease] = _Loan(path, offer)
        self._reply(Lent(request.number, lease, offer))

    async def _pin(self, session: Session, key: ChunkKey, timeout_s: float) -> int | None:
        """A read lease, waited for while the chunk is written or read from a file; None: not here."""
        desk = self._server.desk
        grant = desk.grant_read(session, key)
        if grant is None and desk.fetch_here(key):
            settled: asyncio.Future[None] = self._loop.create_future()
            found: list[Grant] = []

            def settle(_: ChunkKey) -> bool:
                # Pinned here and now: the next promotion may evict what has just arrived.
                new = desk.grant_read(session, key)
                found.extend([new] if new else [])
                return bool(new) or not desk.is_being_written(key)

            waiting = Waiting({key}, settle=settle, on_done=lambda: settled.set_result(None))
            desk.add_waiting(waiting)
            await asyncio.wait({settled, self._lost}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            desk.remove_waiting(waiting, {key})
            grant = found[0] if found else None
        return grant.lease if grant else None

    async def _give_back(self, leases: list[int]) -> None:
        """Revoke offers, then end their leases; numbers that are none are ignored."""
        session = self._session
        assert session is not None
        ended = {lease: loan for lease in leases if (loan := self._loans.pop(lease, None)) is not None}
        for lease, loan in ended.items():
            try:
                await self._run(_revocation(loan))
            except Exception:
                # Its memory is pinned for the rest of our life: better lost than reused under a reader.
                log.exception("revoke_failed peer=%s path=%s", session.client_name, loan.path.name)
                self._server.desk.keep_pinned(session, lease)
                continue
            self._server.desk.release(session, [lease])

    async def _run(self, function: Callable[[], Offer | None]) -> Offer | None:
        return await self._loop.run_in_executor(self._server.threads, function)

    def _reply(self, reply: PeerReply) -> None:
        self._write(encode(reply))

    def _write(self, frame: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(frame)
        if self._transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            self.abort("replies are not read")


def _revocation(loan: _Loan) -> Callable[[], None]:
    return lambda: loan.path.revoke(loan.offer.handle)


def listen_for_peers(host: str, port: int | None) -> socket.socket:
    """A listening TCP socket on one interface.

    Raises:
        PortTakenError: Somebody else listens there.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port or 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        with suppress(OSError):
            listener.close()
        raise PortTakenError(f"cannot listen on {host}:{port or 'a free port'}: {error}") from error
    return listener
