"""The OpenAI endpoints of a decode replica over the no-op engine: same paths and shapes as vLLM's, no model.

Covers: chat and text completions, streaming, usage, models, health, metrics. Does not cover: tools, logprobs, stop
words, tokenising. Tokens are the words "t<id>"; without a plan's prompt a token is a byte of the request's text.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from decode_workers.execute import CURRENT, count_reuse
from kvstore.engine.exposition import metrics_endpoint
from kvstore.engine.noop import NoopEngine, NoopEngineDeadError, NoopRequest
from kvstore.engine.serving import error_body
from kvstore.engine.worker import ENGINE_DEAD
from kvstore.keys import tenant_of
from kvstore.wire import Refusal

_DEFAULT_MAX_TOKENS: Final = 16


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Body(msgspec.Struct):
    """What the no-op engine reads of a request; everything else is ignored."""

    model: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


def build_noop_app(engine: NoopEngine) -> Starlette:
    """The ASGI app inside `PlanMiddleware`."""

    async def serve(request: Request) -> Response:
        return await _generate(engine, request)

    def health(_: Request) -> Response:
        return Response(status_code=503 if engine.dead else 200)

    def models(_: Request) -> Response:
        card = {"id": engine.model, "object": "model", "owned_by": "learnonce", "max_model_len": engine.max_model_len}
        return JSONResponse({"object": "list", "data": [card]})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", serve, methods=["POST"]),
            Route("/v1/completions", serve, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/version", lambda _: JSONResponse({"version": "noop"})),
            Route("/metrics", metrics_endpoint()),
        ]
    )


async def _generate(engine: NoopEngine, request: Request) -> Response:
    try:
        body = msgspec.json.decode(await request.body(), type=_Body)
    except msgspec.MsgspecError as error:
        return _refused(400, "BadRequestError", str(error))
    if body.model not in (None, engine.model):
        return _refused(404, "NotFoundError", f"the model `{body.model}` does not exist")
    work = _work(body)
    if len(work.prompt) + work.max_tokens > engine.max_model_len:
        return _refused(400, "BadRequestError", f"prompt and answer exceed {engine.max_model_len} tokens")
    form = _CHAT if request.url.path == "/v1/chat/completions" else _TEXT
    answer = _Answer(engine, work, form=form)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(answer.events(include_usage=usage), media_type="text/event-stream")
    try:
        return JSONResponse(await _unless_disconnected(request, answer.whole()))
    except NoopEngineDeadError as error:
        return _refused(500, "InternalServerError", str(error))


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """Do what vLLM's handlers do: stop working for a client that has left; nobody reads the answer then."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else {}
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _refused(status: int, error_type: str, message: str) -> Response:
    body = error_body(Refusal(status=status, error_type=error_type, message=message))
    return Response(body, status_code=status, media_type="application/json")


def _work(body: _Body) -> NoopRequest:
    max_tokens = body.max_completion_tokens or body.max_tokens or _DEFAULT_MAX_TOKENS
    execution = CURRENT.get()
    if execution is not None and execution.prompt_token_ids:
        return NoopRequest(
            prompt=execution.prompt_token_ids,
            load=execution.load,
            save=execution.save,
            load_deadline_s=execution.load_deadline_s,
            tenant=tenant_of(execution.cache_salt),
            join=execution.join,
            max_tokens=max_tokens,
        )
    if isinstance(body.prompt, list):
        return NoopRequest(prompt=tuple(body.prompt) or (0,), max_tokens=max_tokens)
    text = body.prompt or "".join(str(message.get("content")) for message in body.messages or [])
    return NoopRequest(prompt=tuple(text.encode()) or (0,), max_tokens=max_tokens)


class _Form(msgspec.Struct, frozen=True):
    """How chat and text completions differ on the wire."""

    id_prefix: str
    whole: str
    chunk: str
    choice: Callable[[str], dict[str, Any]]
    delta: Callable[[str], dict[str, Any]]


_CHAT: Final = _Form(
    id_prefix="chatcmpl-",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    choice=lambda text: {"message": {"role": "assistant", "content": text}},
    delta=lambda text: {"delta": {"role": "assistant", "content": text}},
)
_TEXT: Final = _Form(
    id_prefix="cmpl-",
    whole="text_completion",
    chunk="text_completion",
    choice=lambda text: {"text": text},
    delta=lambda text: {"text": text},
)


class _Answer:
    """One answer, whole or as events."""

    def __init__(self, engine: NoopEngine, work: NoopRequest, *, form: _Form) -> None:
        self._engine, self._work, self._form = engine, work, form
        self._cached_tokens = 0
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        text = "".join([word async for word in self._words()])
        choice = {"index": 0, **self._form.choice(text), "logprobs": None, "finish_reason": "length"}
        return {**self._head(self._form.whole), "choices": [choice], "usage": self._usage()}

    async def events(self, *, include_usage: bool) -> AsyncIterator[bytes]:
        head, sent = self._head(self._form.chunk), 0
        try:
            async for word in self._words():
                sent += 1
                reason = "length" if sent == self._work.max_tokens else None
                choice = {"index": 0, **self._form.delta(word), "logprobs": None, "finish_reason": reason}
                yield _event({**head, "choices": [choice]})
            if include_usage:
                yield _event({**head, "choices": [], "usage": self._usage()})
        except NoopEngineDeadError:
            yield b"data: " + error_body(ENGINE_DEAD) + b"\n\n"
            return
        yield b"data: [DONE]\n\n"

    async def _words(self) -> AsyncIterator[str]:
        first = True
        async for token in self._engine.generate(self._work):
            if first:
                prompt_tokens = len(self._work.prompt)
                self._cached_tokens = count_reuse(
                    CURRENT.get(), prompt_tokens=prompt_tokens, cached_tokens=token.cached_tokens
                )
            yield f"t{token.token_id}" if first else f" t{token.token_id}"
            first = False

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"{self._form.id_prefix}{id(self):x}"
        return {"id": name, "object": kind, "created": self._created, "model": self._engine.model}

    def _usage(self) -> dict[str, Any]:
        prompt_tokens, completion_tokens = len(self._work.prompt), self._work.max_tokens
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"
