"""The store's side of one connection: its requests, one reply each, and its session.

Covers: which request does what, requests that wait, misbehaving clients.
Does not cover: listening and the handshake (`kvstore.server`), what leases mean (`kvstore.desk`).

A client that breaks the protocol, or that does not read its replies, is *expelled*: the store stops listening to it and
ends its own direction, but the client's leases stay until the client closes too, because it may still be reading
memory under them.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, cast

from kvstore import metrics
from kvstore.desk import Desk, Session, Waiting
from kvstore.interfaces import CatalogEntry
from kvstore.keys import ChunkKey
from kvstore.mover import Landing
from kvstore.protocol import (
    Abort,
    Catalog,
    CatalogPage,
    Collected,
    Commit,
    Done,
    Drop,
    FrameReader,
    Gc,
    Grant,
    Granted,
    Held,
    Lookup,
    Pin,
    Place,
    Progress,
    ProtocolError,
    Read,
    Redeem,
    Redeemed,
    Release,
    Reply,
    ReportCorrupt,
    Request,
    Reserve,
    Reserved,
    Stat,
    Stats,
    Stream,
    Streaming,
    Unpin,
    Verified,
    Verify,
    Wait,
    decode_request,
    encode,
)
from kvstore.settings import StoreSettings
from kvstore.upkeep import Upkeep

log = logging.getLogger(__name__)

_MAX_UNREAD_REPLY_BYTES: Final = 8 << 20
"""Replies that a client may leave unread before it is expelled."""


@dataclass(slots=True, kw_only=True)
class StoreService:
    """What the requests of all connections are served from, whichever listener accepted them."""

    desk: Desk
    settings: StoreSettings
    upkeep: Upkeep
    stats: Callable[[int], Stats]
    """Counts now, as the reply to the request of a number."""
    redeem: Callable[[bytes], Place | None] = lambda _: None
    """Where a record lies that a store of this machine was offered (`kvstore.transport.shm`)."""
    news_s: Callable[[], float] = lambda: 0.0
    """Seconds for which a read waits to hear that another node holds a chunk; 0 while there is no other node."""
    connections: "set[ServedConnection]" = field(default_factory=set)


class ServedConnection(asyncio.Protocol):
    """One client."""

    def __init__(self, service: StoreService, client_name: str) -> None:
        self._service = service
        self.desk = service.desk
        self._session = Session(client_name)
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._is_expelled = False
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending: set[_Pending] = set()
        self._work: set[asyncio.Task[None]] = set()
        """Requests that take their time: drops, verification, collection."""
        self._pages: Iterator[list[CatalogEntry]] = iter(())
        self._page: list[CatalogEntry] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The handshake is over."""
        self._transport = cast("asyncio.Transport", transport)
        self.desk.open_session(self._session)
        metrics.SESSIONS.labels("opened").inc()
        self._service.connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Serve the requests that `data` completes."""
        if self._is_expelled:
            return
        try:
            for body in self._reader.feed(data):
                self._serve(decode_request(body))
        except ProtocolError as error:
            self._expel(str(error))
        except Exception:
            # A bug of ours. The event loop would end the session, and with it leases that the client still reads under.
            log.exception("store_request_failed client=%s", self._session.client_name)
            self._expel("a request failed")

    def connection_lost(self, exc: Exception | None) -> None:
        """The client closed or died: nothing of it stays."""
        for pending in list(self._pending):
            pending.cancel()
        for work in self._work:
            work.cancel()
        self.desk.end_session(self._session)
        metrics.SESSIONS.labels("closed").inc()
        self._service.connections.discard(self)
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
            case Stream(number, key, timeout_s):
                self._stream(number, ChunkKey(key), timeout_s)
            case Commit(number, lease, payload_bytes, payload_checksum):
                ok = desk.commit(session, lease, payload_bytes=payload_bytes, payload_checksum=payload_checksum)
                self.reply(Done(number, ok))
            case Stat(number):
                self.reply(self._service.stats(number))
            case _:
                self._serve_rarer(request)

    def _serve_rarer(self, request: Request) -> None:
        desk, session = self.desk, self._session
        match request:
            case Drop(number, keys):
                self._check_keys(keys)
                # Already true for everybody who asks; the answer waits for the media.
                dropped = desk.drop([ChunkKey(key) for key in keys])
                self._start(self._answer_drop(number, dropped))
            case Pin(number, keys, seconds):
                self._check_keys(keys)
                pinned = [desk.pin(ChunkKey(key), seconds=seconds) for key in keys]
                for outcome in pinned:
                    metrics.PINS.labels("pinned" if outcome else "refused").inc()
                self.reply(Held(number, bytes(pinned)))
            case Unpin(number, keys):
                self._check_keys(keys)
                for key in keys:
                    desk.unpin(ChunkKey(key))
                self.reply(Done(number, True))
            case Catalog(number, page):
                self._send_page(number, is_first=page == 0)
            case Verify(number, keys):
                self._check_keys(keys)
                self._start(self._verify(number, [ChunkKey(key) for key in keys]))
            case Gc(number):
                self._start(self._collect(number))
            case Redeem(number, handle):
                self.reply(Redeemed(number, self._service.redeem(handle)))
            case Release(leases):
                desk.release(session, leases)
            case Abort(lease):
                desk.abort(session, lease)
            case ReportCorrupt(lease):
                desk.report_corrupt(session, lease)

    def _read(self, number: int, keys: list[bytes], timeout_s: float) -> None:
        grants: list[Grant | None] = [self.desk.grant_read(self._session, ChunkKey(key)) for key in keys]
        places: dict[ChunkKey, list[int]] = {}
        unheard: set[ChunkKey] = set()
        news_s = min(timeout_s, self._service.news_s())
        for place, key in enumerate(keys):
            if grants[place] is None:
                is_coming = self.desk.fetch(ChunkKey(key))
                if is_coming or news_s > 0:
                    places.setdefault(ChunkKey(key), []).append(place)
                if not is_coming and news_s > 0:
                    unheard.add(ChunkKey(key))

        def settle(key: ChunkKey) -> bool:
            # Pinned here and now: the next promotion may evict what has just arrived.
            for place in places[key]:
                grants[place] = self.desk.grant_read(self._session, key)
            if grants[places[key][0]] is not None:
                return True
            if key in unheard and self.desk.fetch(key):
                unheard.discard(key)
            return key not in unheard and not self.desk.is_being_written(key)

        def end_news() -> None:
            late = list(unheard)
            unheard.clear()
            for key in late:
                self.desk.note_settled(key)

        if unheard:
            # What another node has just learned is heard of here a moment later.
            asyncio.get_running_loop().call_later(news_s, end_news)
        self._reply_when_settled(set(places), settle, timeout_s, lambda: Granted(number, grants))

    def _stream(self, number: int, key: ChunkKey, timeout_s: float) -> None:
        """Lease what is there or arriving; wait only for a writer of this node."""
        desk = self.desk
        found: list[Streaming] = []

        def settle(_: ChunkKey) -> bool:
            streaming = self._streaming(number, key)
            found.extend([streaming] if streaming else [])
            return bool(found) or not desk.is_being_written(key)

        if settle(key) and not found and desk.fetch(key):
            settle(key)
        waits = not found and desk.is_being_written(key)

        def reply() -> Reply:
            streaming = found[0] if found else Streaming(number, None)
            outcome = "miss" if streaming.grant is None else "held" if streaming.is_over else "arriving"
            metrics.STREAMS.labels(outcome).inc()
            return streaming

        self._reply_when_settled({key} if waits else set(), settle, timeout_s, reply)

    def _streaming(self, number: int, key: ChunkKey) -> Streaming | None:
        grant = self.desk.grant_read(self._session, key)
        if grant is not None:
            payload_bytes = self.desk.payload_bytes(self._session, grant.lease)
            return Streaming(number, grant, payload_bytes, grant.stored_bytes, is_over=True)
        landing = self.desk.landing(key)
        grant = self.desk.follow(self._session, key, self._send_progress)
        if landing is None or grant is None:
            return None
        return Streaming(number, grant, landing.payload_bytes, landing.done_bytes)

    def _send_progress(self, lease: int, landing: Landing) -> None:
        self.reply(Progress(lease, landing.done_bytes, landing.is_over, landing.is_whole))

    def _send_page(self, number: int, *, is_first: bool) -> None:
        if is_first:
            self._pages = self._service.upkeep.pages(now_s=asyncio.get_running_loop().time())
            self._page = next(self._pages)
        page = self._page or []
        # One page ahead, to know which is the last.
        self._page = next(self._pages, None)
        self.reply(CatalogPage(number, page, is_last=self._page is None))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Answer later; bounded like requests that wait."""
        if len(self._work) >= self._service.settings.max_waiting_per_session:
            work.close()
            raise ProtocolError(f"more than {self._service.settings.max_waiting_per_session} requests under way")
        task = asyncio.get_running_loop().create_task(self._finish(work))
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _finish(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            # Without its answer the client would wait for its whole deadline.
            log.exception("store_request_failed client=%s", self._session.client_name)
            self._expel("a request failed")

    async def _answer_drop(self, number: int, dropped: Awaitable[bool]) -> None:
        self.reply(Done(number, await dropped))

    async def _verify(self, number: int, keys: list[ChunkKey]) -> None:
        outcomes = await self._service.upkeep.verify(keys)
        self.reply(Verified(number, good=outcomes["good"], bad=outcomes["bad"], unread=outcomes["unread"]))

    async def _collect(self, number: int) -> None:
        upkeep = self._service.upkeep
        expired, over_quota = await upkeep.sweep(), await upkeep.enforce_quotas()
        self.reply(Collected(number, expired, over_quota, leftovers=await upkeep.remove_leftovers()))

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
        if len(self._pending) >= self._service.settings.max_waiting_per_session:
            raise ProtocolError(f"more than {self._service.settings.max_waiting_per_session} requests wait")
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
        limit = self._service.settings.max_keys_per_request
        if len(keys) > limit:
            raise ProtocolError(f"{len(keys)} keys in one request, {limit} are allowed")

    def _flags(self, keys: list[bytes]) -> bytes:
        can_read = self.desk.can_read
        return bytes([can_read(ChunkKey(key)) for key in keys])


class _Pending:
    """A request that waits; registered from the moment that it is made, so that no change is missed."""

    def __init__(
        self,
        connection: ServedConnection,
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
