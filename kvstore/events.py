"""What a node store tells the cluster: which chunks it holds, in order, without gaps that go unnoticed.

Covers: event values, the signed messages that carry them, publisher (in stores) and feed (in routers and other stores).
Does not cover: directories (folds over what the feed yields), who may connect (`kvstore.events_socket`).

Events travel over ZMQ PUB; a store also answers snapshot requests on a ROUTER socket, with the events since a sequence
number when its bounded ring still has them, else with everything it holds. Only who knows the cluster's secret gets a
connection, and every message carries an HMAC besides. A store without news sends heartbeats, so that its silence means
something; a connection that breaks tells at once.
"""

import asyncio
import hashlib
import hmac
import logging
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import Any, Final, Literal, Self, TypeVar

import msgspec
import zmq

from cluster.clock import Clock, SystemClock
from cluster.errors import DataError
from kvstore import metrics
from kvstore.events_socket import PortTakenError, SocketFactory
from kvstore.untrusted import UNDECODABLE
from kvstore.wire import StoreEndpoint

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES: Final = 256 << 20
"""Bound on one message: a snapshot of a million chunks needs about half of it."""
MAX_ASK_BYTES: Final = 1 << 10
_MAC_BYTES: Final = 32
_EVENT_TAG: Final = b"learnonce event 1"
_ASK_TAG: Final = b"learnonce snapshot request 1"
_ANSWER_TAG: Final = b"learnonce snapshot answer 1"
_STEADY_S: Final = 10.0
"""A store that was there for this long is asked again at once when it is lost."""
_FIRST_PAUSE_S: Final = 0.05
_MAX_PAUSE_S: Final = 2.0

__all__ = [
    "ChunkChange",
    "ChunkEvent",
    "DirectoryFeed",
    "EventBatch",
    "EventPublisher",
    "EventRejectedError",
    "FeedItem",
    "HeldChunk",
    "PortTakenError",
    "StoreLost",
    "StoreSnapshot",
    "seal",
    "unseal",
]


class ChunkChange(StrEnum):
    """What became true of one chunk on one node."""

    ADDED = "added"
    """It was in no tier of the node; now it is in `tier`."""
    MOVED = "moved"
    """The fastest tier of the node that holds it is now `tier`."""
    DROPPED = "dropped"
    """No tier of the node holds it; `tier` is the last one that did."""


class ChunkEvent(msgspec.Struct, frozen=True, array_like=True):
    """One change. Events of one epoch have consecutive sequence numbers from 1."""

    change: ChunkChange
    key: bytes
    tier: str
    num_bytes: int
    """Payload bytes as stored."""
    num_tokens: int
    codec: str
    node_id: str
    epoch: str
    seq: int
    base_position: int = 0
    """Position of the first token when the KV was computed."""
    tenant: str = ""
    learned_unix_s: float = 0.0


class HeldChunk(msgspec.Struct, frozen=True, array_like=True):
    """One chunk of a snapshot."""

    key: bytes
    tier: str
    """Fastest tier that holds it."""
    num_bytes: int
    num_tokens: int
    codec: str
    base_position: int = 0
    tenant: str = ""
    learned_unix_s: float = 0.0


class StoreSnapshot(msgspec.Struct, frozen=True, kw_only=True, tag="snapshot"):
    """All that a node held after event `seq`: replaces everything known about the node."""

    node_id: str
    epoch: str
    seq: int
    chunks: tuple[HeldChunk, ...]


class StoreLost(msgspec.Struct, frozen=True, kw_only=True):
    """The store fell silent: forget its chunks until a snapshot comes."""

    node_id: str
    epoch: str


FeedItem = ChunkEvent | StoreSnapshot | StoreLost
"""What a feed yields, in the order in which it is to be folded."""


class EventBatch(msgspec.Struct, frozen=True, kw_only=True, tag="batch"):
    """What PUB carries: consecutive events, or none as a heartbeat."""

    node_id: str
    epoch: str
    next_seq: int
    """Sequence number after the last event published so far, these included."""
    events: tuple[ChunkEvent, ...] = ()


class _Ask(msgspec.Struct, frozen=True, kw_only=True):
    nonce: bytes
    epoch: str
    """Epoch that `after_seq` belongs to; "" asks for a snapshot."""
    after_seq: int


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    nonce: bytes
    content: EventBatch | StoreSnapshot


class EventRejectedError(DataError):
    """A message that is forged, damaged, or too large."""


M = TypeVar("M", bound=msgspec.Struct)


def seal(message: msgspec.Struct, *, secret: bytes, tag: bytes) -> bytes:
    """A message behind its HMAC."""
    body = msgspec.msgpack.encode(message)
    return hmac.new(secret, tag + body, hashlib.sha256).digest() + body


def unseal(data: bytes, kind: type[M], *, secret: bytes, tag: bytes) -> M:
    """The message, if whoever made it knew the secret.

    Raises:
        EventRejectedError: Forged, damaged or too large.
    """
    if not _MAC_BYTES <= len(data) <= MAX_MESSAGE_BYTES:
        raise EventRejectedError(f"message of {len(data)} bytes")
    mac, body = data[:_MAC_BYTES], data[_MAC_BYTES:]
    if not hmac.compare_digest(mac, hmac.new(secret, tag + body, hashlib.sha256).digest()):
        raise EventRejectedError("message has a wrong signature")
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except UNDECODABLE as error:
        raise EventRejectedError(f"message is damaged: {error}") from error


class EventPublisher:
    """The store's side, on the running event loop.

    Publishing never blocks: a subscriber that does not keep up loses messages, and notices by the sequence numbers.

    Args:
        node_id: Of this store.
        epoch: This life of the store.
        secret: The cluster's.
        bind_host: Interface to listen on.
        events_port: Port of the PUB socket; None takes a free one.
        snapshot_port: Port of the ROUTER socket; None takes a free one.
        ring_events: Events kept for replays.
        heartbeat_s: Longest silence.
        snapshot: What the store holds now.
        clock: For the heartbeats.
        advertise_host: What others connect to, where `bind_host` means every interface.

    Raises:
        PortTakenError: Somebody else listens there.
    """

    def __init__(
        self,
        *,
        node_id: str,
        epoch: str,
        secret: bytes,
        bind_host: str,
        events_port: int | None,
        snapshot_port: int | None,
        ring_events: int,
        heartbeat_s: float,
        snapshot: Callable[[], tuple[HeldChunk, ...]],
        clock: Clock | None = None,
        advertise_host: str | None = None,
    ) -> None:
        self._node_id = node_id
        self._epoch = epoch
        self._secret = secret
        self._heartbeat_s = heartbeat_s
        self._snapshot = snapshot
        self._clock = clock or SystemClock()
        self._ring: deque[ChunkEvent] = deque(maxlen=ring_events)
        self._next_seq = 1
        self._sockets = SocketFactory(secret, has_own_context=True)
        try:
            self._publisher = self._sockets.bound(
                zmq.PUB, host=bind_host, port=events_port, max_message_bytes=MAX_ASK_BYTES
            )
            self._router = self._sockets.bound(
                zmq.ROUTER, host=bind_host, port=snapshot_port, max_message_bytes=MAX_ASK_BYTES
            )
        except BaseException:
            self._sockets.close()
            raise
        self.events_address = _address(self._publisher, advertise_host)
        self.snapshot_address = _address(self._router, advertise_host)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._beat()), loop.create_task(self._answer())]

    def publish(self, change: ChunkChange, chunk: HeldChunk) -> None:
        """Announce one change."""
        event = ChunkEvent(
            change=change,
            key=chunk.key,
            tier=chunk.tier,
            num_bytes=chunk.num_bytes,
            num_tokens=chunk.num_tokens,
            codec=chunk.codec,
            node_id=self._node_id,
            epoch=self._epoch,
            seq=self._next_seq,
            base_position=chunk.base_position,
            tenant=chunk.tenant,
            learned_unix_s=chunk.learned_unix_s,
        )
        self._next_seq += 1
        self._ring.append(event)
        metrics.EVENTS.labels(change.value).inc()
        self._send((event,))

    async def stop(self) -> None:
        """Close the sockets."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._sockets.close()

    def _send(self, events: tuple[ChunkEvent, ...]) -> None:
        batch = EventBatch(node_id=self._node_id, epoch=self._epoch, next_seq=self._next_seq, events=events)
        with suppress(zmq.Again):
            self._publisher.send(seal(batch, secret=self._secret, tag=_EVENT_TAG), zmq.NOBLOCK)

    async def _beat(self) -> None:
        while True:
            self._send(())
            await self._clock.sleep_s(self._heartbeat_s)

    async def _answer(self) -> None:
        while True:
            peer, *parts = await self._router.recv_multipart()
            try:
                ask = unseal(b"".join(parts), _Ask, secret=self._secret, tag=_ASK_TAG)
            except EventRejectedError as error:
                metrics.FEED_REJECTED.inc()
                log.warning("snapshot_request_rejected error=%s", error)
                continue
            answer = _Answer(nonce=ask.nonce, content=self._content(ask))
            # On a thread: a snapshot of a million chunks takes a second to encode and sign.
            sealed = await asyncio.to_thread(seal, answer, secret=self._secret, tag=_ANSWER_TAG)
            with suppress(zmq.ZMQError):
                await self._router.send_multipart([peer, sealed])

    def _content(self, ask: _Ask) -> EventBatch | StoreSnapshot:
        first_kept = self._next_seq - len(self._ring)
        if ask.epoch == self._epoch and first_kept - 1 <= ask.after_seq < self._next_seq:
            events = tuple(event for event in self._ring if event.seq > ask.after_seq)
            return EventBatch(node_id=self._node_id, epoch=self._epoch, next_seq=self._next_seq, events=events)
        return StoreSnapshot(node_id=self._node_id, epoch=self._epoch, seq=self._next_seq - 1, chunks=self._snapshot())


def _address(socket: Any, advertise_host: str | None) -> str:
    address: str = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return f"tcp://{advertise_host}:{address.rsplit(':', 1)[1]}" if advertise_host else address


class DirectoryFeed:
    """The subscriber's side for one store: a snapshot, then every change after it, for as long as it is iterated.

    Guarantees:
        Folding the items in order gives what the store held at some moment not long ago. Items of one epoch are
        applied once and without gaps: what was missed is asked for again, or replaced by a new snapshot.
        A dead store yields `StoreLost` as soon as its connection breaks, a silent one after `silence_s`; the feed goes
        on trying, less and less often if the store comes and goes, and a snapshot follows if it returns.
        Nothing is buffered here but ZMQ's own bounded queue: a slow consumer causes gaps, not memory.

    Args:
        endpoint: The store. A restarted store has other addresses: open another feed for its new endpoint.
        secret: The cluster's.
        silence_s: Seconds without any message (heartbeats included) after which the store counts as lost.
        answer_s: Seconds to wait for a snapshot.
        queued_messages: Bound of the receive queue.

    Example:
        Iterate with `async with DirectoryFeed(...) as feed: async for item in feed.items(): ...`.
    """

    def __init__(
        self,
        endpoint: StoreEndpoint,
        *,
        secret: bytes,
        silence_s: float = 3.0,
        answer_s: float = 5.0,
        queued_messages: int = 4096,
    ) -> None:
        self.endpoint = endpoint
        self._secret = secret
        self._silence_s = silence_s
        self._answer_s = answer_s
        self._sockets = SocketFactory(secret)
        self._subscriber = self._sockets.connected(
            zmq.SUB, endpoint.events_address, max_message_bytes=MAX_MESSAGE_BYTES, queued_messages=queued_messages
        )
        self._breaks = self._sockets.breaks(self._subscriber)
        self._message: asyncio.Future[bytes] | None = None
        """What is being received; kept over time-outs, so that nothing is lost between two."""
        self._break: asyncio.Future[list[bytes]] | None = None
        self._epoch = ""
        """Epoch of what was yielded; "" while nothing is believed."""
        self._seq = 0
        self._believed_s = float("-inf")
        self._num_losses = 0
        """Losses of a store that did not stay."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect. Repeating it is harmless."""
        self._sockets.close()

    @property
    def pause_s(self) -> float:
        """Seconds before a store that was lost is asked again: longer if it never stays."""
        return min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(self._num_losses, 16))

    async def items(self) -> AsyncGenerator[FeedItem, None]:
        """Snapshot, events, losses; never ends by itself."""
        reason = "start"
        while True:
            metrics.FEED_RESYNCS.labels(reason).inc()
            self._forget_breaks()
            content = await self._ask()
            if content is None:
                for item in self._lose():
                    yield item
                reason = "silence"
                continue
            for item in self._fold(content):
                yield item
            # Events until something is wrong with them.
            while True:
                batch = await self._next_batch()
                if isinstance(batch, str):
                    reason = batch
                    for item in self._lose():
                        yield item
                    await asyncio.sleep(self.pause_s)
                    break
                if batch.epoch != self._epoch:
                    reason = "epoch"
                    break
                if self._first_seq(batch) > self._seq + 1:
                    reason = "gap"
                    break
                for item in self._fold(batch):
                    yield item

    @staticmethod
    def _first_seq(batch: EventBatch) -> int:
        return batch.next_seq - len(batch.events)

    def _fold(self, content: EventBatch | StoreSnapshot) -> Sequence[FeedItem]:
        """What is new in it."""
        if isinstance(content, StoreSnapshot):
            self._epoch, self._seq = content.epoch, content.seq
            self._believed_s = asyncio.get_running_loop().time()
            return [content]
        fresh = [event for event in content.events if event.seq > self._seq]
        self._seq = max(self._seq, content.next_seq - 1)
        return fresh

    def _lose(self) -> list[FeedItem]:
        if not self._epoch:
            return []
        stayed = asyncio.get_running_loop().time() - self._believed_s >= _STEADY_S
        self._num_losses = 0 if stayed else self._num_losses + 1
        lost = StoreLost(node_id=self.endpoint.node_id, epoch=self._epoch)
        self._epoch, self._seq = "", 0
        return [lost]

    def _forget_breaks(self) -> None:
        """Breaks from before this question say nothing about its answer."""
        while True:
            if self._break is None:
                self._break = self._breaks.recv_multipart()
            if not self._break.done():
                return
            self._break = None

    async def _next_batch(self) -> EventBatch | Literal["silence", "closed"]:
        """The next authentic batch of this node, or why there will be none."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._silence_s):
                while True:
                    data = await self._receive()
                    if data is None:
                        return "closed"
                    try:
                        batch = unseal(data, EventBatch, secret=self._secret, tag=_EVENT_TAG)
                    except EventRejectedError:
                        metrics.FEED_REJECTED.inc()
                        continue
                    if batch.node_id == self.endpoint.node_id:
                        return batch
        return "silence"

    async def _receive(self) -> bytes | None:
        """The next message; None if the connection broke, and everything before was received."""
        if self._message is None:
            self._message = self._subscriber.recv()
        if self._break is None:
            self._break = self._breaks.recv_multipart()
        if not self._message.done():
            await asyncio.wait({self._message, self._break}, return_when=asyncio.FIRST_COMPLETED)
        if self._message.done():
            message, self._message = self._message, None
            return message.result()
        self._break = None
        return None

    async def _ask(self) -> EventBatch | StoreSnapshot | None:
        """What was missed, or everything; None if the store does not answer in time."""
        ask = _Ask(nonce=secrets.token_bytes(16), epoch=self._epoch, after_seq=self._seq)
        address = self.endpoint.snapshot_address
        dealer = self._sockets.connected(zmq.DEALER, address, max_message_bytes=MAX_MESSAGE_BYTES)
        try:
            async with asyncio.timeout(self._answer_s):
                await dealer.send(seal(ask, secret=self._secret, tag=_ASK_TAG))
                while True:
                    content = self._accept(await dealer.recv(), ask)
                    if content is not None:
                        return content
        except TimeoutError:
            return None
        finally:
            self._sockets.close_socket(dealer)

    def _accept(self, data: bytes, ask: _Ask) -> EventBatch | StoreSnapshot | None:
        try:
            answer = unseal(data, _Answer, secret=self._secret, tag=_ANSWER_TAG)
        except EventRejectedError:
            metrics.FEED_REJECTED.inc()
            return None
        if answer.nonce != ask.nonce or answer.content.node_id != self.endpoint.node_id:
            metrics.FEED_REJECTED.inc()
            return None
        return answer.content
