"""What a node store tells the cluster: which chunks it holds, in order, without gaps that go unnoticed.

Covers: event values, the signed messages that carry them, publisher (in stores) and feed (in routers).
Does not cover: the router's directory itself (a fold over what the feed yields).

Events travel over ZMQ PUB; a store also answers snapshot requests on a ROUTER socket, with the events since a sequence
number when its bounded ring still has them, else with everything it holds. Every message carries an HMAC of the
cluster's secret. A store without news sends heartbeats, so that its silence means something.
"""

import asyncio
import hashlib
import hmac
import logging
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import Any, Final, Self, TypeVar

import msgspec
import zmq
import zmq.asyncio

from cluster.clock import Clock, SystemClock
from cluster.errors import CallerError, DataError
from kvstore import metrics
from kvstore.wire import StoreEndpoint

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES: Final = 256 << 20
"""Bound on one message: a snapshot of a million chunks needs about half of it."""
MAX_ASK_BYTES: Final = 1 << 10
_MAC_BYTES: Final = 32
_EVENT_TAG: Final = b"learnonce event 1"
_ASK_TAG: Final = b"learnonce snapshot request 1"
_ANSWER_TAG: Final = b"learnonce snapshot answer 1"


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


class HeldChunk(msgspec.Struct, frozen=True, array_like=True):
    """One chunk of a snapshot."""

    key: bytes
    tier: str
    """Fastest tier that holds it."""
    num_bytes: int
    num_tokens: int
    codec: str


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
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EventRejectedError(f"message is damaged: {error}") from error


class PortTakenError(CallerError):
    """A port that another process listens on."""


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
    ) -> None:
        self._node_id = node_id
        self._epoch = epoch
        self._secret = secret
        self._heartbeat_s = heartbeat_s
        self._snapshot = snapshot
        self._clock = clock or SystemClock()
        self._ring: deque[ChunkEvent] = deque(maxlen=ring_events)
        self._next_seq = 1
        self._context = zmq.Context()
        self._async_context: zmq.asyncio.Context = zmq.asyncio.Context(self._context)
        self._publisher = self._context.socket(zmq.PUB)
        self._router = self._async_context.socket(zmq.ROUTER)
        try:
            for socket in (self._publisher, self._router):
                socket.setsockopt(zmq.LINGER, 0)
            self._router.setsockopt(zmq.MAXMSGSIZE, MAX_ASK_BYTES)
            self.events_address = _bind(self._publisher, bind_host, events_port)
            self.snapshot_address = _bind(self._router, bind_host, snapshot_port)
        except BaseException:
            self._close_sockets()
            raise
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
        self._close_sockets()

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
            with suppress(zmq.ZMQError):
                await self._router.send_multipart([peer, seal(answer, secret=self._secret, tag=_ANSWER_TAG)])

    def _content(self, ask: _Ask) -> EventBatch | StoreSnapshot:
        first_kept = self._next_seq - len(self._ring)
        if ask.epoch == self._epoch and first_kept - 1 <= ask.after_seq < self._next_seq:
            events = tuple(event for event in self._ring if event.seq > ask.after_seq)
            return EventBatch(node_id=self._node_id, epoch=self._epoch, next_seq=self._next_seq, events=events)
        return StoreSnapshot(node_id=self._node_id, epoch=self._epoch, seq=self._next_seq - 1, chunks=self._snapshot())

    def _close_sockets(self) -> None:
        self._publisher.close(0)
        self._router.close(0)
        self._context.term()


def _bind(socket: "zmq.Socket[Any]", host: str, port: int | None) -> str:
    try:
        socket.bind(f"tcp://{host}:{port or '*'}")
    except zmq.ZMQError as error:
        raise PortTakenError(f"cannot listen on {host}:{port or 'a free port'}: {error}") from error
    address: str = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return address


class DirectoryFeed:
    """The subscriber's side for one store: a snapshot, then every change after it, for as long as it is iterated.

    Guarantees:
        Folding the items in order gives what the store held at some moment not long ago. Items of one epoch are
        applied once and without gaps: what was missed is asked for again, or replaced by a new snapshot.
        A silent or dead store yields one `StoreLost`; the feed goes on trying, and a snapshot follows if it returns.
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
        self._context: zmq.asyncio.Context = zmq.asyncio.Context()
        self._subscriber = self._context.socket(zmq.SUB)
        self._subscriber.setsockopt(zmq.LINGER, 0)
        self._subscriber.setsockopt(zmq.RCVHWM, queued_messages)
        self._subscriber.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        self._subscriber.connect(endpoint.events_address)
        self._epoch = ""
        """Epoch of what was yielded; "" while nothing is believed."""
        self._seq = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect. Repeating it is harmless."""
        # With every socket: one that a running `items` still asks on would block the loop for ever.
        self._context.destroy(linger=0)

    async def items(self) -> AsyncIterator[FeedItem]:
        """Snapshot, events, losses; never ends by itself."""
        reason = "start"
        while True:
            metrics.FEED_RESYNCS.labels(reason).inc()
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
                if batch is None:
                    reason = "silence"
                    for item in self._lose():
                        yield item
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
            return [content]
        fresh = [event for event in content.events if event.seq > self._seq]
        self._seq = max(self._seq, content.next_seq - 1)
        return fresh

    def _lose(self) -> list[FeedItem]:
        if not self._epoch:
            return []
        lost = StoreLost(node_id=self.endpoint.node_id, epoch=self._epoch)
        self._epoch, self._seq = "", 0
        return [lost]

    async def _next_batch(self) -> EventBatch | None:
        """The next authentic batch of this node; None after too long a silence."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._silence_s):
                while True:
                    data = await self._subscriber.recv()
                    try:
                        batch = unseal(data, EventBatch, secret=self._secret, tag=_EVENT_TAG)
                    except EventRejectedError:
                        metrics.FEED_REJECTED.inc()
                        continue
                    if batch.node_id == self.endpoint.node_id:
                        return batch
        return None

    async def _ask(self) -> EventBatch | StoreSnapshot | None:
        """What was missed, or everything; None if the store does not answer in time."""
        ask = _Ask(nonce=secrets.token_bytes(16), epoch=self._epoch, after_seq=self._seq)
        dealer = self._context.socket(zmq.DEALER)
        try:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            dealer.connect(self.endpoint.snapshot_address)
            async with asyncio.timeout(self._answer_s):
                await dealer.send(seal(ask, secret=self._secret, tag=_ASK_TAG))
                while True:
                    content = self._accept(await dealer.recv(), ask)
                    if content is not None:
                        return content
        except TimeoutError:
            return None
        finally:
            dealer.close(0)

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
