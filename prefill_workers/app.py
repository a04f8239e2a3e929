"""The HTTP side of a prefill replica: `POST /internal/prefill`, `/health`, `/metrics`.

Covers: checking plans, the bounded queue, single flight, waiting until chunks can be read, disconnects.
Does not cover: running a prompt (`prefill_workers.engine`, `kvstore.engine.noop`).
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kvstore.engine.exposition import metrics_endpoint
from kvstore.engine.serving import Exchange, Gate, exchange
from kvstore.engine.worker import ENGINE_DEAD, WorkerEngine
from kvstore.interfaces import StoreClient
from kvstore.keys import ChunkKey
from kvstore.wire import (
    NODE_HEADER,
    PLAN_HEADER,
    Plan,
    PlanExpiredError,
    PlanRejectedError,
    PrefillAnswer,
    Refusal,
    Span,
    key_of,
    open_plan,
)
from prefill_workers.flights import Flights
from prefill_workers.metrics import NOT_STORED, QUEUED_TOKENS, REQUESTS, SECONDS, SHARED, TOKENS
from prefill_workers.plan import PrefillWork, admit, answer, budget_s, handoff_of, plan_work
from prefill_workers.settings import PrefillSettings

logger = logging.getLogger(__name__)

_WAIT_THREADS: Final = 16
_MAX_BODY_BYTES: Final = 1 << 10
_LATE: Final = Refusal(status=504, error_type="DeadlineExceededError", message="the prefill's deadline passed")
_BODY: Final = Refusal(status=413, error_type="RequestTooLargeError", message="a prefill request has no body")
_FAILED: Final = Refusal(status=500, error_type="InternalServerError", message="the prefill failed")


class PrefillEngine(WorkerEngine, Protocol):
    """An engine that can fill the store."""

    async def prefill(self, work: PrefillWork) -> int:
        """Load, compute, and start to save; the first token is thrown away. Cancelling it aborts the engine's work.

        Returns:
            Prompt tokens that were not computed.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Done:
    reused_tokens: int
    held: tuple[bool, ...]


class PrefillService:
    """Requests in, chunks in the store, answers out."""

    def __init__(
        self,
        engine: PrefillEngine,
        *,
        store: StoreClient,
        settings: PrefillSettings,
        secret: bytes,
        gate: Gate,
        node_id: str = "",
        now_unix_s: Callable[[], float] = time.time,
    ) -> None:
        self._engine, self._store, self._settings, self._gate = engine, store, settings, gate
        self._secret, self._now_unix_s, self._node_id = secret, now_unix_s, node_id
        self._flights: Flights[_Done] = Flights()
        self._queued_tokens = 0
        self._threads = ThreadPoolExecutor(_WAIT_THREADS, thread_name_prefix="prefill-wait")

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens accepted and not yet computed."""
        return self._queued_tokens

    def close(self) -> None:
        """Stop the threads; call it when no request is inside."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve `POST /internal/prefill`."""
        async with exchange(scope, receive, send, gate=self._gate) as request:
            if request is not None:
                await self._serve(request)

    async def _serve(self, request: Exchange) -> None:
        started_s = time.monotonic()
        plan = self._open(request.header(PLAN_HEADER))
        if isinstance(plan, Refusal):
            await self._reject(request, plan)
            return
        work = plan_work(plan, handoff=handoff_of(request.header(NODE_HEADER), node_id=self._node_id))
        if isinstance(work, Refusal):
            await self._reject(request, work)
            return
        timer = request.end_in(budget_s(plan, now_unix_s=self._now_unix_s()), _LATE)
        try:
            fits = await request.unless_gone(request.read_body(max_bytes=_MAX_BODY_BYTES))
            if fits is False:
                await self._reject(request, _BODY)
                return
            outcome = await request.unless_gone(self._prefill(plan, work, started_s)) if fits else None
        except Exception:
            logger.exception("prefill failed request=%s", plan.request_id)
            outcome = ENGINE_DEAD if self._engine.dead else _FAILED
        finally:
            timer.cancel()
        await self._reply(request, outcome)

    @staticmethod
    async def _reject(request: Exchange, refusal: Refusal) -> None:
        REQUESTS.labels(outcome="rejected").inc()
        await request.answer(refusal)

    async def _reply(self, request: Exchange, outcome: PrefillAnswer | Refusal | None) -> None:
        if outcome is None:
            REQUESTS.labels(outcome="late" if request.ending is _LATE else "left").inc()
            await request.finish()
        elif isinstance(outcome, Refusal):
            REQUESTS.labels(outcome="failed" if outcome in (ENGINE_DEAD, _FAILED) else "full").inc()
            await request.answer(outcome)
        else:
            REQUESTS.labels(outcome="ok").inc()
            await request.answer_json(msgspec.json.encode(outcome))

    def _open(self, header: str | None) -> Plan | Refusal:
        try:
            return open_plan(header or "", secret=self._secret, now_unix_s=self._now_unix_s())
        except PlanExpiredError as error:
            return Refusal(status=409, error_type="PlanExpiredError", message=str(error))
        except PlanRejectedError as error:
            return Refusal(status=400, error_type="PlanRejectedError", message=str(error))

    async def _prefill(self, plan: Plan, work: PrefillWork, started_s: float) -> PrefillAnswer | Refusal:
        if work.key not in self._flights and not admit(
            work, queued_tokens=self._queued_tokens, max_queued_tokens=self._settings.max_queued_prompt_tokens
        ):
            return Refusal(
                status=503,
                error_type="ServiceUnavailableError",
                message=f"{self._queued_tokens} prompt tokens are queued here",
                retry_after_s=self._settings.retry_after_s,
            )
        done, shared = await self._flights.join(work.key, lambda: self._run(work))
        if shared:
            SHARED.inc()
        seconds = time.monotonic() - started_s
        return answer(plan, work, reused_tokens=done.reused_tokens, held=done.held, seconds=seconds, shared=shared)

    async def _run(self, work: PrefillWork) -> _Done:
        started_s = time.monotonic()
        self._queue(work.tokens_to_compute)
        try:
            reused = await self._engine.prefill(work)
        finally:
            self._queue(-work.tokens_to_compute)
        held = await self._wait_held(work.spans)
        TOKENS.labels(source="reused").inc(reused)
        TOKENS.labels(source="computed").inc(len(work.prompt_token_ids) - reused)
        NOT_STORED.inc(sum(_is_awaited(span) and not is_held for span, is_held in zip(work.spans, held, strict=True)))
        SECONDS.observe(time.monotonic() - started_s)
        return _Done(reused, held)

    def _queue(self, tokens: int) -> None:
        self._queued_tokens += tokens
        QUEUED_TOKENS.set(self._queued_tokens)

    async def _wait_held(self, spans: Sequence[Span]) -> tuple[bool, ...]:
        keys = [key_of(span) for span in spans if _is_awaited(span)]
        loop = asyncio.get_running_loop()
        waiting = loop.run_in_executor(self._threads, self._wait, keys)
        held = dict(zip(keys, await waiting, strict=True))
        return tuple(held.get(key_of(span), False) for span in spans)

    def _wait(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return self._store.wait(keys, deadline_s=self._settings.save_wait_s)


def _is_awaited(span: Span) -> bool:
    """Whether its chunk should be readable afterwards; a short last span, for one, is never saved."""
    return span.save or span.held


def build_app(
    service: PrefillService, engine: PrefillEngine, *, registry: Callable[[], CollectorRegistry] | None = None
) -> Starlette:
    """The replica's ASGI app.

    Args:
        service: Answers `/internal/prefill`.
        engine: Asked for its health.
        registry: The engine's own metrics, if it has any in this process.
    """

    def health(_: Request) -> Response:
        return Response(status_code=503 if engine.dead else 200)

    return Starlette(
        routes=[
            Route("/internal/prefill", service, methods=["POST"]),
            Route("/health", health),
            Route("/metrics", metrics_endpoint(registry)),
        ]
    )
