"""Serving HTTP beside an engine: requests that either side may end, counting, draining, the server itself.

Covers: what the prefill and the decode worker do alike with an HTTP request, whatever engine answers it.
Does not cover: what a request means (`*_workers`), or the life of the worker process (`kvstore.engine.worker`).

Why a request can be *ended* from our side: a deadline and a dead engine must stop the engine's work exactly like a
client that hangs up, through the one path that every ASGI framework already tests. So `Exchange` shows the app a
disconnect, drops what the app still sends, and then tells the client why.
"""

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Final, TypeVar

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import UnavailableError
from kvstore.wire import Refusal

logger = logging.getLogger(__name__)
T = TypeVar("T")

_ACCEPT_BACKLOG: Final = 2048
_LEAVE_APP_S: Final = 5.0
"""How long an app may take to notice that its request was ended, before it is cancelled."""


class ServerStartError(UnavailableError):
    """The worker's HTTP server did not start."""


def error_body(refusal: Refusal) -> bytes:
    """The JSON body of an error in OpenAI's format."""
    error = {"message": refusal.message, "type": refusal.error_type, "param": None, "code": refusal.status}
    return json.dumps({"error": error}).encode()


class Exchange:
    """One HTTP request and its answer, which the client, the app, or we may end.

    Guarantees:
        The client gets exactly one answer: the app's, or the first refusal given to `end` or `answer`.
        After `end` or a disconnect, the app reads `http.disconnect` and whatever it sends is dropped.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # 2.3: from 2.4 on, Starlette notices a disconnect only when it sends, and a silent engine never does.
        self.scope: Scope = {**scope, "asgi": {**scope.get("asgi", {}), "spec_version": "2.3"}}
        self.response_headers: dict[str, str] = {}
        """Added to the answer, whoever gives it."""
        self.on_server_error: Callable[[], Refusal | None] = lambda: None
        """Asked when the app answers 5xx: a refusal to give instead, or None."""
        self.body = b""
        self.gone = asyncio.Event()
        """Set once the client has left or we have ended the request."""
        self._receive, self._send = receive, send
        self._ending: Refusal | None = None
        self._body_taken = self._started = self._finished = self._streams_events = False
        self._listener: asyncio.Task[None] | None = None

    def header(self, name: str) -> str | None:
        """One request header, by its lower-case name."""
        wanted = name.encode("latin-1")
        return next((value.decode("latin-1") for key, value in self.scope["headers"] if key == wanted), None)

    async def read_body(self, *, max_bytes: int) -> bool:
        """Read the whole body, then listen for the client's disconnect.

        Returns:
            False if the body is longer than `max_bytes`; nothing more of it is kept.
        """
        parts: list[bytes] = []
        left_bytes = max_bytes
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone.set()
                return True
            parts.append(message.get("body", b""))
            left_bytes -= len(parts[-1])
            if left_bytes < 0:
                return False
            if not message.get("more_body", False):
                break
        self.body = b"".join(parts)
        self._listener = asyncio.create_task(self._listen())
        return True

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        # Servers say "disconnect" after a complete answer as well: nobody has left then.
        if not self._finished:
            self.gone.set()

    def end(self, refusal: Refusal) -> None:
        """End the request from our side; the client is told why once the app has stopped."""
        if not self.gone.is_set():
            self._ending = refusal
            self.gone.set()

    def end_in(self, seconds: float, refusal: Refusal) -> asyncio.TimerHandle:
        """End the request in `seconds`, unless the returned timer is cancelled."""
        return asyncio.get_running_loop().call_later(max(0.0, seconds), self.end, refusal)

    @property
    def ending(self) -> Refusal | None:
        """Why we ended the request; None if we did not."""
        return self._ending

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Wait for `work`, or cancel it and return None once the request is gone."""
        task = asyncio.ensure_future(work)
        watch = asyncio.create_task(self.gone.wait())
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            return None if self.gone.is_set() else task.result()
        finally:
            for each in (task, watch):
                each.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)

    async def run(self, app: ASGIApp) -> None:
        """Let `app` answer; if the request is ended meanwhile, finish the answer ourselves."""
        task = asyncio.ensure_future(app(self.scope, self._app_receive, self._app_send))
        watch = asyncio.create_task(self.gone.wait())
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await self.finish()
                # Not cancelled at once: frameworks pass a disconnect on to tasks that a cancellation would orphan.
                await asyncio.wait({task}, timeout=_LEAVE_APP_S)
        finally:
            for each in (task, watch):
                each.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)
        await self.finish()
        if not self.gone.is_set() and not task.cancelled() and (error := task.exception()) is not None:
            raise error

    async def finish(self) -> None:
        """Tell the client why the request was ended, if we ended it."""
        if self._ending is not None:
            await self.answer(self._ending)

    async def answer(self, refusal: Refusal) -> None:
        """Answer with an error: as the response, or as the last event of a stream that has begun."""
        if self._finished:
            return
        self._finished = True
        body = error_body(refusal)
        if self._started:
            last = b"data: " + body + b"\n\n" if self._streams_events else b""
            await self._send({"type": "http.response.body", "body": last, "more_body": False})
            return
        headers = {"content-type": "application/json", "content-length": str(len(body)), **self.response_headers}
        if refusal.retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(refusal.retry_after_s)))
        await self._send({"type": "http.response.start", "status": refusal.status, "headers": _raw(headers)})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def answer_json(self, body: bytes) -> None:
        """Answer with success and a JSON body, unless the request is gone."""
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        await self._app_send({"type": "http.response.start", "status": 200, "headers": _raw(headers)})
        await self._app_send({"type": "http.response.body", "body": body, "more_body": False})

    async def close(self) -> None:
        """Stop listening to the client."""
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)

    async def _app_receive(self) -> Message:
        if not self._body_taken:
            self._body_taken = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _app_send(self, message: Message) -> None:
        if self.gone.is_set() or self._finished:
            return
        if message["type"] == "http.response.start":
            if message["status"] >= 500 and (refusal := self.on_server_error()) is not None:
                self.end(refusal)
                return
            self._started = True
            headers = [*message.get("headers", []), *_raw(self.response_headers)]
            self._streams_events = any(v.startswith(b"text/event-stream") for k, v in headers if k == b"content-type")
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            self._finished = not message.get("more_body", False)
        await self._send(message)


def _raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


class Gate:
    """Counts the requests inside a worker, and closes for draining or death."""

    def __init__(self) -> None:
        self.closed: Refusal | None = None
        """What new requests are answered while the gate is closed."""
        self._inside: set[Exchange] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def running_requests(self) -> int:
        """Requests inside."""
        return len(self._inside)

    @contextlib.contextmanager
    def admit(self, exchange: Exchange) -> Iterator[None]:
        """Hold a place while one request is served."""
        self._inside.add(exchange)
        self._empty.clear()
        try:
            yield
        finally:
            self._inside.discard(exchange)
            if not self._inside:
                self._empty.set()

    def close(self, refusal: Refusal) -> None:
        """Refuse new requests; those inside go on."""
        self.closed = refusal

    def end_all(self, refusal: Refusal) -> None:
        """Refuse new requests and end those inside."""
        self.close(refusal)
        for exchange in tuple(self._inside):
            exchange.end(refusal)

    async def wait_empty(self, *, timeout_s: float) -> bool:
        """Wait until nothing is inside; whether that came to pass in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True


@contextlib.asynccontextmanager
async def exchange(scope: Scope, receive: Receive, send: Send, *, gate: Gate) -> AsyncIterator[Exchange | None]:
    """Open one request inside the gate; None if the gate is closed and the request was refused."""
    opened = Exchange(scope, receive, send)
    if gate.closed is not None:
        await opened.answer(gate.closed)
        yield None
        return
    with gate.admit(opened):
        try:
            yield opened
        finally:
            await opened.close()


class _QuietServer(uvicorn.Server):
    """Leaves the process' signal handlers alone: they belong to Ray, or to whoever runs the worker."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """An ASGI app on a port of its own, in the running event loop."""

    def __init__(self, app: ASGIApp, *, host: str) -> None:
        self._host = host
        config = uvicorn.Config(
            app,
            http="httptools",  # the plan travels in a header, and h11 bounds headers to what it buffers
            log_config=None,
            access_log=False,
            lifespan="on",
            server_header=False,
            date_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=2,
        )
        self._server = _QuietServer(config)
        self._task: asyncio.Task[None] | None = None
        self.url = ""

    async def start(self) -> None:
        """Bind an ephemeral port and serve.

        Raises:
            ServerStartError: The address cannot be bound, or the app's start-up failed.
        """
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        # With the protocol named, or asyncio leaves Nagle's algorithm on: 40 ms per answer (measured).
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.bind((self._host, 0))
            listener.listen(_ACCEPT_BACKLOG)
        except OSError as error:
            listener.close()
            raise ServerStartError(f"cannot listen on {self._host}: {error}") from error
        host = f"[{self._host}]" if family == socket.AF_INET6 else self._host
        self.url = f"http://{host}:{listener.getsockname()[1]}"
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            if self._task.done():
                listener.close()
                raise ServerStartError("the HTTP app failed to start") from self._task.exception()
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Close the port; connections get two seconds to finish."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
