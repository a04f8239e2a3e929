"""One peer as this node's store sees it: its link, its event feed, its data path, and one transfer from it.

Covers: everything about one life of one peer. Does not cover: which peer is asked for a chunk (`kvstore.peers`).

Link and feed are tasks on the peers' event loop; `pull` runs on any thread. Link and feed watch each other's blind
spots: a peer that dies closes both at once, one that is cut off or frozen stops answering heartbeats and falls silent.
While the link is down, or the peer has failed a moment ago, its chunks count as missing.
"""

import asyncio
import logging
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Final

from cluster.errors import DataError, LearnonceError
from kvstore import metrics
from kvstore.breaker import Breaker
from kvstore.container import ALIGN, ChunkCorruptError, Header, parse_header
from kvstore.events import DirectoryFeed, StoreLost
from kvstore.interfaces import OnBytes
from kvstore.keys import ChunkKey
from kvstore.peer_directory import PeerDirectory
from kvstore.peer_link import PeerLink, open_link
from kvstore.peer_paths import Paths
from kvstore.peer_protocol import Described, Lent
from kvstore.protocol import PeerStat
from kvstore.settings import PeerSettings
from kvstore.transport import OfferRefusedError, PeerGoneError, Transport
from kvstore.transport.negotiation import MAX_ADDRESS_BYTES, Choice, Reach, negotiate
from kvstore.transport.shm import socket_problem
from kvstore.wire import StoreEndpoint

log = logging.getLogger(__name__)

_MAX_PAUSE_RATIO: Final = 12.0
_STEADY_S: Final = 10.0
"""A link that held for this long is opened again at once when it breaks."""
_PATH_FAILURES: Final = 2
"""Failures in a row after which the pair takes its next path; transfers that ran side by side fail once."""
_PATH_PAUSE_S: Final = 30.0
_MAX_PATH_PAUSE_S: Final = 600.0
_DESCRIBE_S: Final = 10.0
"""Between two looks at a peer's paths: NIXL comes and goes."""
_PROBE_S: Final = 1.0
"""For a sign of life after a transfer failed: it tells whether to blame the path or the peer."""
_FOLDED_ITEMS: Final = 512
"""Events folded before other tasks get a turn."""
_FAIR_RATIO: Final = 0.5
_LOOP_GRACE_S: Final = 0.5
"""A loop that is this late with an answer is overloaded: the caller goes on without it."""


class _NotLentError(PeerGoneError):
    """The transfer had not come to its data path yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerContext:
    """What all peers of a store share."""

    settings: PeerSettings
    node_id: str
    secret: bytes
    paths: Paths
    directory: PeerDirectory
    loop: asyncio.AbstractEventLoop
    """Of links and feeds."""
    tls: ssl.SSLContext | None
    """For links; None for plain ones."""
    on_readable: Callable[[Sequence[ChunkKey]], None]
    """Told on the loop of chunks that may have become readable."""


@dataclass(frozen=True, slots=True)
class _Connected:
    """A link, and what the peer said on it."""

    link: PeerLink
    reach: Reach
    lease_s: float
    unusable: dict[str, str]
    """Paths that cannot lead to the peer from here, and why."""


class PeerNode:
    """One life of one peer.

    Args:
        endpoint: Where it is.
        context: What all peers share.
    """

    def __init__(self, endpoint: StoreEndpoint, context: PeerContext) -> None:
        self.endpoint = endpoint
        self.node_id = endpoint.node_id
        self._context = context
        self._settings = context.settings
        pause_s = self._settings.breaker_pause_s
        self._breaker = Breaker(failures=1, first_pause_s=pause_s, max_pause_s=_MAX_PAUSE_RATIO * pause_s)
        self._lock = threading.Lock()
        self._connected: _Connected | None = None
        self._transports: dict[str, Transport] = {}
        self._path_breakers: dict[str, Breaker] = {}
        self._path_errors: dict[str, str] = {}
        self._path_blamed_s: dict[str, float] = {}
        """When a path's last failure was counted, in monotonic time."""
        self._choice = Choice(None, "not connected yet")
        self._transfers = 0
        self._problem = "connecting"

    @property
    def is_usable(self) -> bool:
        """Whether a transfer from it would probably work. Cheap; on any thread."""
        connected = self._connected
        return (
            connected is not None
            and connected.link.is_alive
            and self._choice.transport is not None
            and self._breaker.allows(now_s=time.monotonic())
        )

    @property
    def is_connected(self) -> bool:
        """Whether its control plane answers."""
        connected = self._connected
        return connected is not None and connected.link.is_alive

    @property
    def same_machine(self) -> bool:
        """Whether memory can be shared with it."""
        return self._choice.transport == "shm"

    @property
    def transfers(self) -> int:
        """Transfers from it that are under way."""
        return self._transfers

    def stat(self) -> PeerStat:
        """For people."""
        return PeerStat(
            is_up=self.is_usable,
            transport=self._choice.transport or "",
            reason=self._choice.reason if self.is_connected else self._problem,
            chunks=self._context.directory.num_chunks(self.node_id),
            transfers=self._transfers,
        )

    async def run(self) -> None:
        """Keep link and feed until cancelled; afterwards nothing of the peer is left."""
        try:
            # A group cancels each of them once: cancelled again, the link would leave its data paths open.
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_link())
                tasks.create_task(self._keep_feed())
        finally:
            self._context.directory.drop_node(self.node_id)

    # The link.

    async def _keep_link(self) -> None:
        pause_s = first_pause_s = self._settings.breaker_pause_s
        while True:
            closed = asyncio.Event()
            link: PeerLink | None = None
            started_s = time.monotonic()
            try:
                link = await self._open_link(closed)
                await self._follow(link, closed)
                self._problem = "the connection broke"
            except LearnonceError as error:
                if str(error) != self._problem:
                    log.warning("peer_unreachable peer=%s error=%s", self.node_id, error)
                self._problem = str(error)
            except Exception:
                log.exception("peer_link_failed peer=%s", self.node_id)
                self._problem = "see the log"
            finally:
                await self._part(link)
            if time.monotonic() - started_s >= _STEADY_S:
                pause_s = first_pause_s
                continue
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_RATIO * first_pause_s)

    async def _open_link(self, closed: asyncio.Event) -> PeerLink:
        return await open_link(
            self.endpoint.peer_address,
            peer=self.node_id,
            epoch=self.endpoint.epoch,
            node_id=self._context.node_id,
            secret=self._context.secret,
            tls=self._context.tls,
            connect_timeout_s=self._settings.connect_timeout_s,
            heartbeat_s=self._settings.heartbeat_s,
            on_closed=closed.set,
        )

    async def _follow(self, link: PeerLink, closed: asyncio.Event) -> None:
        """Use the peer while the link lasts, and ask again and again which paths it has."""
        described = await link.describe(timeout_s=self._settings.connect_timeout_s)
        while not closed.is_set():
            is_new = self._connected is None
            self._connected = _connected(link, described)
            if is_new:
                self._breaker.record_success()
                log.info("peer_up peer=%s epoch=%s", self.node_id, self.endpoint.epoch)
            self._choose()
            if is_new:
                self._context.on_readable(self._context.directory.keys_of(self.node_id))
            with suppress(TimeoutError):
                async with asyncio.timeout(_DESCRIBE_S):
                    await closed.wait()
            # Heartbeats say whether it lives; this only asks what it has.
            with suppress(PeerGoneError):
                described = await link.describe(timeout_s=_DESCRIBE_S)

    async def _part(self, link: PeerLink | None) -> None:
        """The link has ended: so have all transfers over it."""
        connected, self._connected = self._connected, None
        with self._lock:
            transports, self._transports = list(self._transports.values()), {}
        if connected is not None:
            log.warning("peer_down peer=%s reason=%s", self.node_id, self._problem)
        if link is not None:
            await link.close()
        for transport in transports:
            await asyncio.shield(asyncio.to_thread(transport.close))

    # The feed.

    async def _keep_feed(self) -> None:
        pause_s = first_pause_s = self._settings.breaker_pause_s
        while True:
            started_s = time.monotonic()
            try:
                await self._fold()
            except Exception:
                log.exception("peer_feed_failed peer=%s", self.node_id)
            # Without its feed a peer's entries go stale: better to know nothing.
            self._context.directory.drop_node(self.node_id)
            pause_s = first_pause_s if time.monotonic() - started_s >= _STEADY_S else pause_s
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_RATIO * first_pause_s)

    async def _fold(self) -> None:
        num_items = 0
        feed = DirectoryFeed(self.endpoint, secret=self._context.secret)
        async with feed, aclosing(feed.items()) as items:
            async for item in items:
                if isinstance(item, StoreLost):
                    log.warning("peer_lost peer=%s epoch=%s", self.node_id, item.epoch)
                elif item.epoch != self.endpoint.epoch:
                    # Its next life on the same ports; this object is about the former one.
                    self._context.directory.drop_node(self.node_id)
                    continue
                news = self._context.directory.apply(item)
                if news:
                    self._context.on_readable(news)
                num_items += 1
                if num_items % _FOLDED_ITEMS == 0:
                    await asyncio.sleep(0)

    # Transfers.

    def pull(
        self, key: ChunkKey, view: memoryview, *, stop_s: float, answer_s: float, on_bytes: OnBytes
    ) -> Header | None:
        """Copy a record from the peer. Blocks; on any thread.

        Args:
            key: The chunk.
            view: Exactly as long as the record.
            stop_s: Monotonic time by which it is to be there.
            answer_s: Seconds in which the peer is to say whether it has the chunk.
            on_bytes: See `OnBytes`.

        Returns:
            None: a miss, or a failure that is counted here.
        """
        connected, choice = self._connected, self._choose()
        if connected is None or choice.transport is None:
            return None
        now_s = time.monotonic()
        limit_s = self._settings.transfer_s + len(view) / self._settings.min_bytes_per_s
        # A caller who is in a greater hurry than that proves nothing about the peer.
        is_fair = stop_s - now_s > _FAIR_RATIO * limit_s
        with self._lock:
            self._transfers += 1
        try:
            stop_s = min(stop_s, now_s + limit_s)
            return self._pull(connected, choice.transport, key, view, stop_s, answer_s, on_bytes)
        except (PeerGoneError, DataError) as error:
            outcome = _outcome_of(error)
            log.warning(
                "peer_read_failed peer=%s path=%s outcome=%s error=%s",
                self.node_id,
                choice.transport,
                outcome,
                str(error),
            )
            metrics.PEER_READS.labels(choice.transport, outcome).inc()
            if is_fair or outcome != "gone":
                name = None if isinstance(error, _NotLentError) else choice.transport
                blame = self._blame(connected, name, str(error), began_s=now_s)
                try:
                    asyncio.run_coroutine_threadsafe(blame, self._context.loop)
                except RuntimeError:
                    blame.close()
        finally:
            with self._lock:
                self._transfers -= 1
        return None

    def _pull(
        self,
        connected: _Connected,
        name: str,
        key: ChunkKey,
        view: memoryview,
        stop_s: float,
        answer_s: float,
        on_bytes: OnBytes,
    ) -> Header | None:
        started_s = time.monotonic()
        try:
            transport = self._transport(connected, name)
            lent = self._lend(connected.link, key, name, min(stop_s - started_s, answer_s))
        except PeerGoneError as error:
            raise _NotLentError(str(error)) from error
        if lent.offer is None:
            metrics.PEER_READS.labels(name, "miss").inc()
            return None
        try:
            if lent.offer.stored_bytes != len(view):
                # Replaced by another record since it was announced.
                metrics.PEER_READS.labels(name, "miss").inc()
                return None
            transport.pull(lent.offer, view, stop_s=stop_s, on_bytes=on_bytes)
            if time.monotonic() - started_s >= connected.lease_s:
                raise PeerGoneError(f"the lease of {connected.lease_s:g} s was over before the copy")
            header = parse_header(view[:ALIGN], expected_key=key)
            if header.stored_bytes != len(view):
                raise ChunkCorruptError(f"a record of {header.stored_bytes} bytes came as {len(view)}")
        finally:
            with suppress(RuntimeError):  # the loop has ended, and every lease with it
                self._context.loop.call_soon_threadsafe(connected.link.release, lent.lease)
        self._note_success(name, len(view), time.monotonic() - started_s)
        return header

    def _lend(self, link: PeerLink, key: ChunkKey, name: str, timeout_s: float) -> Lent:
        if timeout_s <= 0:
            raise PeerGoneError("the deadline passed before the peer was asked")
        work = link.lend(key, transport=name, timeout_s=timeout_s)
        try:
            answer = asyncio.run_coroutine_threadsafe(work, self._context.loop)
        except RuntimeError as error:
            work.close()
            raise PeerGoneError("the store is stopping") from error
        try:
            return answer.result(timeout_s + _LOOP_GRACE_S)
        except FutureTimeoutError as error:
            # Whatever it brings later is released by the link.
            if answer.cancel():
                raise PeerGoneError("this store's peer loop did not answer in time") from error
            return answer.result()

    def _transport(self, connected: _Connected, name: str) -> Transport:
        with self._lock:
            if self._connected is None or self._connected.link is not connected.link:
                raise PeerGoneError("the connection broke")
            transport = self._transports.get(name)
            if transport is None:
                transport = self._transports[name] = self._context.paths.connect(
                    name, connected.reach.addresses[name], peer=self.node_id, epoch=self.endpoint.epoch
                )
            return transport

    def _choose(self) -> Choice:
        """The path for now; a change is logged."""
        connected = self._connected
        if connected is None:
            return Choice(None, self._problem)
        now_s = time.monotonic()
        failing = {
            name: f"left for a while, it failed {_PATH_FAILURES} times: {self._path_errors[name]}"
            for name, breaker in list(self._path_breakers.items())
            if not breaker.allows(now_s=now_s)
        }
        ours = self._context.paths.reach
        choice = negotiate(ours, connected.reach, self._settings.transports, failing=failing | connected.unusable)
        if choice.transport != self._choice.transport or self._choice.reason == "not connected yet":
            log.info("peer_path peer=%s transport=%s reason=%s", self.node_id, choice.transport, choice.reason)
            metrics.PEER_PATH_CHANGES.labels(choice.transport or "none").inc()
        self._choice = choice
        return choice

    def _note_success(self, name: str, num_bytes: int, seconds: float) -> None:
        metrics.PEER_READS.labels(name, "hit").inc()
        metrics.PEER_READ_BYTES.labels(name).inc(num_bytes)
        metrics.PEER_READ_SECONDS.observe(seconds)
        self._breaker.record_success()
        if name in self._path_breakers:
            self._path_breakers[name].record_success()

    async def _blame(self, connected: _Connected, name: str | None, error: str, *, began_s: float) -> None:
        """After a failed transfer: the peer if it does not answer now; else the path, if the transfer had come to it.

        A peer that answers again may have stood still before. All transfers that it held up fail then, and that says
        no more about the path than one of them.
        """
        try:
            await connected.link.describe(timeout_s=_PROBE_S)
        except PeerGoneError:
            self._breaker.record_failure(now_s=time.monotonic())
            return
        if name is None or began_s < self._path_blamed_s.get(name, began_s):
            return
        self._path_blamed_s[name] = time.monotonic()
        self._path_errors[name] = error
        breaker = self._path_breakers.setdefault(
            name, Breaker(failures=_PATH_FAILURES, first_pause_s=_PATH_PAUSE_S, max_pause_s=_MAX_PATH_PAUSE_S)
        )
        breaker.record_failure(now_s=time.monotonic())
        self._choose()


def _connected(link: PeerLink, described: Described) -> _Connected:
    reach = described.reach
    unusable = {name: "its address is too long" for name, a in reach.addresses.items() if len(a) > MAX_ADDRESS_BYTES}
    problem = socket_problem(reach.addresses["shm"]) if "shm" in reach.addresses else None
    if problem is not None:
        unusable["shm"] = problem
    return _Connected(link, reach, described.lease_s, unusable)


def _outcome_of(error: Exception) -> str:
    if isinstance(error, PeerGoneError):
        return "gone"
    return "refused" if isinstance(error, OfferRefusedError) else "corrupt"
