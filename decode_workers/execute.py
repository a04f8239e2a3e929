"""Carry out the router's plan around the engine's own OpenAI app.

Covers: checking the plan, refusing, waiting for prefill replicas, deadlines, saying in headers what happened.
Does not cover: what to load and save (`decode_workers.plan`), or generating (the app inside: vLLM's, or no-op's).

The way of a request: gate -> plan checked -> body read -> prefill awaited (mode remote) -> `CURRENT` set -> the
app inside reads it, runs the plan's prompt and streams. Bytes of the answer pass through unbuffered.
"""

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from decode_workers.metrics import (
    ENDED,
    FALLBACKS,
    KEPT_TOKENS,
    PLANS_REJECTED,
    PROMISED_TOKENS,
    PROMPT_TOKENS,
    REQUESTS,
    REUSED_TOKENS,
)
from decode_workers.plan import Execution, PrefillOutcome, plan_execution, prefill_budget_s
from decode_workers.prefill import PrefillClient
from decode_workers.settings import DecodeSettings
from kvstore.engine.serving import Exchange, Gate, exchange
from kvstore.engine.worker import ENGINE_DEAD
from kvstore.wire import PLAN_HEADER, Plan, PlanExpiredError, PlanRejectedError, Refusal, open_plan

CURRENT: ContextVar[Execution | None] = ContextVar("CURRENT", default=None)
"""What the request being served shall load, save and prompt; None outside of a planned request."""

GENERATE_PATHS: Final = frozenset({"/v1/chat/completions", "/v1/completions"})
PLANNED_PATHS: Final = GENERATE_PATHS | {"/tokenize", "/detokenize"}
"""Served only with a signed plan, which may be empty: API keys and body bounds are the ingress's."""
OPEN_PATHS: Final = frozenset({"/health", "/metrics", "/version", "/v1/models"})
"""Everything else of vLLM's app would go around the plan, so it is not there."""

_MAX_DEADLINE_S: Final = 24 * 3600.0
_NOT_FOUND: Final = Refusal(status=404, error_type="NotFoundError", message="no such path on a decode replica")
_DEADLINE: Final = Refusal(status=504, error_type="DeadlineExceededError", message="the request's deadline passed")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCheck:
    """How plans are checked."""

    secret: bytes
    required: bool
    now_unix_s: Callable[[], float] = time.time


class PlanMiddleware:
    """The outermost ASGI layer of a decode replica."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        check: PlanCheck,
        settings: DecodeSettings,
        prefill: PrefillClient,
        gate: Gate,
        engine_dead: Callable[[], bool],
    ) -> None:
        self._app, self._check, self._settings = app, check, settings
        self._prefill, self._gate, self._engine_dead = prefill, gate, engine_dead

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI event."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN_PATHS):
            await self._app(scope, receive, send)
        elif scope["type"] != "http" or scope["path"] not in PLANNED_PATHS:
            await Exchange(scope, receive, send).answer(_NOT_FOUND)
        else:
            async with exchange(scope, receive, send, gate=self._gate) as opened:
                if opened is not None:
                    await self._serve(opened)

    async def _serve(self, request: Exchange) -> None:
        header = request.header(PLAN_HEADER)
        plan = self._open(header)
        if isinstance(plan, Refusal):
            await request.answer(plan)
            return
        request.on_server_error = lambda: ENGINE_DEAD if self._engine_dead() else None
        timer = request.end_in(_bounded_s(plan.deadline_unix_s - self._check.now_unix_s()), _DEADLINE)
        try:
            await self._carry_out(request, plan, header or "")
        finally:
            timer.cancel()
        if request.gone.is_set():
            ENDED.labels(by=_ended_by(request.ending)).inc()

    async def _carry_out(self, request: Exchange, plan: Plan, header: str) -> None:
        max_bytes = self._settings.max_body_bytes
        fits = await request.unless_gone(request.read_body(max_bytes=max_bytes))
        if fits is False:
            await request.answer(_too_large(max_bytes))
            return
        execution = None if request.gone.is_set() else await self._execution(request, plan, header)
        if execution is None or request.gone.is_set():
            await request.finish()
        elif request.scope["path"] in GENERATE_PATHS:
            await self._generate(request, execution)
        else:
            await request.run(self._app)

    async def _generate(self, request: Exchange, execution: Execution) -> None:
        REQUESTS.labels(served_as=execution.served_as).inc()
        if execution.fallback is not None:
            FALLBACKS.labels(reason=execution.fallback).inc()
        request.response_headers["x-learnonce-mode"] = execution.served_as
        request.response_headers["x-learnonce-load-tokens"] = str(execution.load_tokens)
        if execution.fallback is not None:
            request.response_headers["x-learnonce-fallback"] = execution.fallback
        if execution.join is not None:
            request.response_headers["x-learnonce-join"] = str(execution.join)
        token = CURRENT.set(execution)
        try:
            await request.run(self._app)
        finally:
            CURRENT.reset(token)

    def _open(self, header: str | None) -> Plan | Refusal:
        if header is None and not self._check.required:
            return Plan(request_id="", expires_unix_s=float("inf"), deadline_unix_s=float("inf"))
        if header is None:
            PLANS_REJECTED.labels(reason="missing").inc()
            return Refusal(
                status=403, error_type="PermissionDeniedError", message="decode replicas obey signed plans only"
            )
        try:
            plan = open_plan(header, secret=self._check.secret, now_unix_s=self._check.now_unix_s())
        except PlanExpiredError as error:
            PLANS_REJECTED.labels(reason="expired").inc()
            return Refusal(status=409, error_type="PlanExpiredError", message=str(error))
        except PlanRejectedError as error:
            PLANS_REJECTED.labels(reason="rejected").inc()
            return Refusal(status=400, error_type="PlanRejectedError", message=str(error))
        return plan.refusal or plan

    async def _execution(self, request: Exchange, plan: Plan, header: str) -> Execution:
        outcome: PrefillOutcome | None = None
        budget_s = prefill_budget_s(plan, now_unix_s=self._check.now_unix_s())
        if budget_s > 0:
            outcome = await request.unless_gone(self._prefill.prefill(plan, header, budget_s=budget_s))
        execution = plan_execution(plan, outcome)
        if outcome is not None and execution.fallback is None:
            request.response_headers["x-learnonce-prefill"] = outcome.replica_id
            request.response_headers["x-learnonce-prefill-seconds"] = f"{outcome.seconds:.3f}"
        return execution


def _too_large(max_bytes: int) -> Refusal:
    return Refusal(
        status=413, error_type="RequestTooLargeError", message=f"the request body is longer than {max_bytes} bytes"
    )


def _bounded_s(seconds: float) -> float:
    # Event loops refuse timers that are too far away.
    return min(seconds, _MAX_DEADLINE_S)


def _ended_by(ending: Refusal | None) -> str:
    if ending is None:
        return "client"
    return "deadline" if ending is _DEADLINE else "worker"


def count_reuse(execution: Execution | None, *, prompt_tokens: int, cached_tokens: int) -> int:
    """The tokens of a prompt that nobody computed for this request, counted once per request.

    Args:
        execution: What was to be loaded; None outside of a planned request.
        prompt_tokens: Length of the prompt.
        cached_tokens: Prompt tokens that the decode engine did not compute.
    """
    bound = prompt_tokens if execution is None or execution.max_reused_tokens is None else execution.max_reused_tokens
    reused = min(cached_tokens, bound)
    PROMPT_TOKENS.inc(prompt_tokens)
    REUSED_TOKENS.inc(reused)
    # The last token of a prompt is always computed, so nobody can promise it.
    promised = min(execution.promised_tokens, max(0, prompt_tokens - 1)) if execution else 0
    PROMISED_TOKENS.inc(promised)
    KEPT_TOKENS.inc(min(promised, reused))
    return reused
