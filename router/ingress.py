"""The HTTP API as a FastAPI application around a `RouterService`.

Covers: routes, body limits, API keys, request ids, errors in OpenAI's format.
Does not cover: deciding and relaying (`router.service`), running under Serve (`router.actor`).
"""

import asyncio
import hashlib
import hmac
import json
import logging
import os
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import LearnonceError
from kvstore.wire import REQUEST_ID_HEADER, Role
from router.body import Endpoint, ParsedRequest, decode_json, parse_request
from router.errors import ErrorAnswer, RequestError, answer_for, error_body
from router.learn import LearnResult, parse_learning
from router.metrics import REQUESTS_TOTAL
from router.relay import StreamEnd, cancelled_by_disconnect, outcome_of
from router.service import ClientRequest, RouterService

log = logging.getLogger(__name__)

API_KEYS_VARIABLE: Final = "LEARNONCE_API_KEYS"
"""Comma-separated keys; unset or empty: no authentication."""
_OPEN_PATHS: Final = frozenset({"/health", "/ready", "/metrics"})
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
Answering = Callable[[Send], Awaitable[StreamEnd]]


def build_app(service: RouterService, *, api_keys: frozenset[str] | None = None, name_answers: bool = True) -> FastAPI:
    """The application; its ASGI lifespan starts and stops the service.

    Args:
        service: The router behind the routes.
        api_keys: Accepted bearer keys; None reads them from the environment, empty lets everyone in.
        name_answers: Whether answers get an `x-request-id` here; False behind a proxy that adds it.
    """
    keys = _keys_from_environment() if api_keys is None else api_keys

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(title="learnonce", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _add_generation(app, service)
    _add_information(app, service)
    _add_learning(app, service)
    app.add_exception_handler(LearnonceError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_error)
    app.add_middleware(_EdgeMiddleware, api_keys=keys, name_answers=name_answers)
    return app


def _add_generation(app: FastAPI, service: RouterService) -> None:
    async def generate(request: Request, endpoint: Endpoint) -> Response:
        client, parsed = await _generation_request(request, endpoint, service)
        return _RelayResponse(lambda send: service.answer(client, parsed, send))

    @app.post(Endpoint.CHAT.value)
    async def chat(request: Request) -> Response:
        return await generate(request, Endpoint.CHAT)

    @app.post(Endpoint.COMPLETION.value)
    async def completions(request: Request) -> Response:
        return await generate(request, Endpoint.COMPLETION)

    async def forward(request: Request) -> Response:
        client = await _client_request(request, service)
        decode_json(client.body)
        return _RelayResponse(lambda send: service.forward(client, send))

    for path in ("/tokenize", "/detokenize"):
        app.post(path)(forward)


def _add_information(app: FastAPI, service: RouterService) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        facts = service.membership.facts()
        model = {
            "id": service.served_model,
            "object": "model",
            "created": int(service.started_unix_s),
            "owned_by": "learnonce",
            "root": service.served_model,
            "parent": None,
            "max_model_len": facts.max_model_len if facts else None,
        }
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        waiting_for = service.waiting_for()
        state = {
            "ready": not waiting_for,
            "waiting_for": waiting_for,
            "replicas": {role.value: len(service.membership.ready(role)) for role in Role},
            "workers": service.membership.listing(),
            "chunks_known": len(service.directory),
        }
        return _json(state, status=503 if waiting_for else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await service.metrics_page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_learning(app: FastAPI, service: RouterService) -> None:
    @app.post("/v1/plan")
    async def plan(request: Request) -> Response:
        client = await _client_request(request, service)
        body = decode_json(client.body)
        endpoint = Endpoint.CHAT if "messages" in body else Endpoint.COMPLETION
        parsed = _parse(body, endpoint, service)
        return _json(await service.explain(parsed, body_bytes=len(client.body)))

    @app.post("/v1/documents")
    async def documents(request: Request) -> Response:
        client = await _client_request(request, service)
        requests = parse_learning(
            decode_json(client.body),
            served_model=service.served_model,
            max_documents=service.settings.limits.max_documents,
        )
        budget_s = client.received_s + service.settings.deadlines.request_s - service.clock.now_s()
        results = await service.learner.learn(requests, request_id=client.request_id, budget_s=budget_s)
        data = [
            _learned(index, request.documents[0].title, result)
            for index, (request, result) in enumerate(zip(requests, results, strict=True))
        ]
        return _json({"object": "list", "data": data})


def _learned(index: int, title: str | None, result: LearnResult) -> dict[str, Any]:
    return {
        "index": index,
        "title": title,
        "tokens": result.tokens,
        "state": result.state.value,
        "seconds": round(result.seconds, 4),
        "error": result.error,
    }


async def _generation_request(
    request: Request, endpoint: Endpoint, service: RouterService
) -> tuple[ClientRequest, ParsedRequest]:
    try:
        client = await _client_request(request, service)
        return client, _parse(decode_json(client.body), endpoint, service)
    except RequestError:
        REQUESTS_TOTAL.labels("rejected").inc()
        raise
    except ClientDisconnect:
        REQUESTS_TOTAL.labels("cancelled").inc()
        raise


def _parse(body: dict[str, Any], endpoint: Endpoint, service: RouterService) -> ParsedRequest:
    return parse_request(
        body,
        endpoint=endpoint,
        served_model=service.served_model,
        max_documents=service.settings.limits.max_documents,
    )


async def _client_request(request: Request, service: RouterService) -> ClientRequest:
    received_s = service.clock.now_s()
    try:
        async with asyncio.timeout(service.settings.deadlines.request_s):
            body = await _read_body(request, max_bytes=service.settings.limits.max_body_bytes)
    except TimeoutError as error:
        raise RequestError("the body did not arrive in time", None, "request_timeout", 408) from error
    return ClientRequest(
        path=request.url.path,
        body=body,
        headers=dict(request.headers),
        request_id=request.scope["state"]["request_id"],
        received_s=received_s,
    )


async def _read_body(request: Request, *, max_bytes: int) -> bytes:
    """The body, refused as soon as it is known to be too large.

    Raises:
        RequestError: 413.
    """
    too_large = RequestError(f"the body is larger than {max_bytes} bytes", None, "body_too_large", 413)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    parts: list[bytes] = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise too_large
        parts.append(part)
    return b"".join(parts)


class _RelayResponse(Response):
    """An answer that is written while it is produced, and cancelled when the client goes away."""

    def __init__(self, answering: Answering) -> None:
        super().__init__()
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def tracked(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        outcome = "cancelled"
        try:
            end = await cancelled_by_disconnect(self._answering(tracked), receive)
            outcome = end.outcome
        except Exception as error:
            answer = answer_for(error)
            outcome = outcome_of(answer.status)
            if not isinstance(error, LearnonceError):
                log.exception("request_failed request=%s", scope["state"]["request_id"])
            if started:
                raise
            await _response(answer)(scope, receive, send)
        finally:
            REQUESTS_TOTAL.labels(outcome).inc()


class _EdgeMiddleware:
    """A request id for every request, and API keys on everything but health, readiness and metrics."""

    def __init__(self, app: ASGIApp, *, api_keys: frozenset[str], name_answers: bool) -> None:
        self._app, self._name_answers = app, name_answers
        self._digests = [hashlib.sha256(key.encode()).digest() for key in sorted(api_keys)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value for name, value in scope["headers"]}
        given = headers.get(REQUEST_ID_HEADER.encode(), b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def named(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and self._name_answers:
                own = (REQUEST_ID_HEADER.encode(), request_id.encode())
                message["headers"] = [*message["headers"], own]
            await send(message)

        if scope["path"] not in _OPEN_PATHS and not self._is_allowed(headers.get(b"authorization", b"")):
            refused = RequestError("missing or wrong API key", None, "invalid_api_key", 401)
            await _response(answer_for(refused))(scope, receive, named)
            return
        await self._app(scope, receive, named)

    def _is_allowed(self, authorization: bytes) -> bool:
        if not self._digests:
            return True
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


async def _on_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, LearnonceError):
        log.error("request_failed request=%s", request.scope["state"]["request_id"], exc_info=error)
    return _response(answer_for(error))


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    """Nobody reads it: the client left while it sent its body, which is no error of ours."""
    return Response(status_code=499)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is no {request.url.path} here",
        405: f"{request.url.path} does not know the method {request.method}",
    }
    message = messages.get(error.status_code, str(error.detail))
    body = error_body(
        message, error_type="invalid_request_error", code="unknown_url" if error.status_code == 404 else None
    )
    return _response(ErrorAnswer(error.status_code, body, dict(error.headers or {})))


def _response(answer: ErrorAnswer) -> Response:
    return Response(answer.body, answer.status, headers=answer.headers, media_type="application/json")


def _json(value: Any, *, status: int = 200) -> Response:
    return Response(json.dumps(value, ensure_ascii=False), status, media_type="application/json")


def _keys_from_environment() -> frozenset[str]:
    return frozenset(key.strip() for key in os.environ.get(API_KEYS_VARIABLE, "").split(",") if key.strip())
