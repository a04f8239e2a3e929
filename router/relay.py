"""Bytes from a replica to the client as they come, and what happens when either side goes away.

Covers: forwarding one request to one replica, headers, reading the answer, streaming it, disconnects, deadlines.
Does not cover: which replica (`router.policy`), trying the next one (`router.service`), parsing of tokens (nobody).
"""

import asyncio
import io
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from kvstore.wire import Peer
from router.errors import DeadlineError, ReplicaAnswerError, ReplicaFailedError, stream_error_event

log = logging.getLogger(__name__)

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_FORWARDED: Final = ("accept", "accept-language", "content-type", "traceparent", "tracestate", "user-agent")
"""Request headers that a replica may see. The client's API key stays here."""
_RETURNED: Final = ("content-type", "retry-after", "cache-control")
"""Answer headers that the client sees, besides every `x-learnonce-*` one."""
_RETURNED_PREFIX: Final = "x-learnonce-"
_LARGE_BODY_BYTES: Final = 1 << 20


def forwarded_headers(client: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Headers for the replica: a few of the client's, and ours. Never hop-by-hop ones, keys, or forged plans."""
    headers = {name: client[name] for name in _FORWARDED if name in client}
    headers.setdefault("content-type", "application/json")
    return headers | dict(own)


def _returned_headers(replica: Mapping[str, str]) -> dict[str, str]:
    names = {name.lower(): value for name, value in replica.items()}
    return {n: v for n, v in names.items() if n in _RETURNED or n.startswith(_RETURNED_PREFIX)}


@dataclass(slots=True)
class Upstream:
    """A replica's answer whose first bytes have arrived."""

    response: aiohttp.ClientResponse
    first: bytes
    """All of the body, if it is not a stream."""
    is_stream: bool
    replica_id: str

    @property
    def status(self) -> int:
        """HTTP status."""
        return self.response.status

    @property
    def headers(self) -> dict[str, str]:
        """Headers for the client."""
        return _returned_headers(self.response.headers)

    async def rest(self) -> AsyncIterator[bytes]:
        """The chunks after the first, as they come."""
        if self.is_stream:
            async for chunk in self.response.content.iter_any():
                yield chunk

    def close(self) -> None:
        """Drop the connection at once, so that the replica notices and stops. Repeating it is harmless."""
        self.response.close()


class ReplicaClient:
    """HTTP connections to replicas."""

    def __init__(self, *, connect_s: float, max_answer_bytes: int) -> None:
        self._connect_s = connect_s
        self._max_answer_bytes = max_answer_bytes
        self._session: aiohttp.ClientSession | None = None

    async def open(
        self, peer: Peer, path: str, *, body: bytes, headers: Mapping[str, str], budget_s: float
    ) -> Upstream:
        """Send a request and wait for the first bytes of the answer (all of it, if it is not a stream).

        Cancelling this closes the connection.

        Raises:
            ReplicaFailedError: Not reachable, or gone before the first byte: another replica may be asked.
            ReplicaAnswerError: The answer is too large.
            DeadlineError: `budget_s` seconds have passed.
        """
        if budget_s <= 0:
            raise DeadlineError("the request's deadline passed before a replica was asked")
        try:
            async with asyncio.timeout(budget_s):
                return await self._open(peer, path, body, headers)
        except TimeoutError as error:
            raise DeadlineError(f"replica {peer.replica_id} did not answer within the deadline") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ReplicaFailedError(f"replica {peer.replica_id} failed: {type(error).__name__}") from error

    async def get(self, peer: Peer, path: str, *, budget_s: float, max_bytes: int) -> bytes:
        """A small page of a replica.

        Raises:
            ReplicaFailedError: Not reachable, not 200, too large, or too slow.
        """
        try:
            async with asyncio.timeout(budget_s), self._opened().get(peer.url + path) as response:
                if response.status == 200:
                    return await _read_all(response, max_bytes=max_bytes)
        except (aiohttp.ClientError, OSError, TimeoutError, ReplicaAnswerError) as error:
            raise ReplicaFailedError(f"replica {peer.replica_id} failed: {type(error).__name__}") from error
        raise ReplicaFailedError(f"replica {peer.replica_id}: no usable page at {path} (status {response.status})")

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    async def _open(self, peer: Peer, path: str, body: bytes, headers: Mapping[str, str]) -> Upstream:
        # A connect timeout of aiohttp is a ClientError, so the next replica is tried.
        # A file-like body is written piece by piece; large bytes at once would hold up the event loop.
        data = io.BytesIO(body) if len(body) > _LARGE_BODY_BYTES else body
        response = await self._opened().post(peer.url + path, data=data, headers=dict(headers))
        try:
            is_stream = response.content_type == "text/event-stream"
            first = await (
                response.content.readany() if is_stream else _read_all(response, max_bytes=self._max_answer_bytes)
            )
            return Upstream(response, first, is_stream, peer.replica_id)
        except BaseException:
            response.close()
            raise

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # Shorter than the replicas' own keep-alive, so that a request does not meet a closing connection.
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s),
                # Bytes go through as the replica sent them.
                auto_decompress=False,
            )
        return self._session


async def _read_all(response: aiohttp.ClientResponse, *, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        ReplicaAnswerError: It is longer than `max_bytes`.
    """
    parts: list[bytes] = []
    num_bytes = 0
    async for chunk in response.content.iter_any():
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise ReplicaAnswerError(f"the answer is larger than {max_bytes} bytes")
        parts.append(chunk)
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """How sending an answer ended."""

    outcome: str
    """ok, broken, deadline or cancelled; of a whole answer that is an error, `outcome_of` its status."""


def outcome_of(status: int) -> str:
    """What an answer of this status counts as: ok, rejected, unavailable, deadline or failed."""
    if status < 400:
        return "ok"
    if status < 500:
        return "rejected"
    return {503: "unavailable", 504: "deadline"}.get(status, "failed")


async def send_answer(upstream: Upstream, send: Send, *, budget_s: float) -> StreamEnd:
    """Pass an answer on to the client; the connection to the replica is closed afterwards.

    A stream that breaks ends with an error event and without `[DONE]`.
    """
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in upstream.headers.items()]
    if not upstream.is_stream:
        raw.append((b"content-length", str(len(upstream.first)).encode()))
    try:
        await send({"type": "http.response.start", "status": upstream.status, "headers": raw})
        await send({"type": "http.response.body", "body": upstream.first, "more_body": upstream.is_stream})
        if not upstream.is_stream:
            return StreamEnd(outcome_of(upstream.status))
        end, last = await _send_rest(upstream, send, budget_s=budget_s)
        await send({"type": "http.response.body", "body": last, "more_body": False})
        return end
    finally:
        upstream.close()


async def _send_rest(upstream: Upstream, send: Send, *, budget_s: float) -> tuple[StreamEnd, bytes]:
    try:
        async with asyncio.timeout(budget_s):
            async for chunk in upstream.rest():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
    except TimeoutError:
        return StreamEnd("deadline"), stream_error_event("the request's deadline passed", code="deadline_exceeded")
    except (aiohttp.ClientError, OSError) as error:
        log.warning("stream_broken replica=%s error=%s", upstream.replica_id, type(error).__name__)
        message = "the replica that generated this answer failed"
        return StreamEnd("broken"), stream_error_event(message, code="replica_failed")
    return StreamEnd("ok"), b""


async def until_disconnect(receive: Receive) -> None:
    """Return when the client has gone away. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancelled_by_disconnect(work: Awaitable[StreamEnd], receive: Receive) -> StreamEnd:
    """Run `work`, and cancel it as soon as the client goes away."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(until_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return StreamEnd("cancelled")
    finally:
        for pending in (task, watcher):
            pending.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await pending
