"""The router without HTTP: keeps its knowledge fresh, and answers one request by asking replicas.

Covers: start and stop, rounds of reports, plan - ask - try the next - stream, metric pages.
Does not cover: routes and status codes (`router.ingress`), Ray (`router.actor`).
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

from cluster.clock import Clock, SystemClock
from kvstore.wire import PLAN_HEADER, REQUEST_ID_HEADER, Role
from router.body import ParsedRequest
from router.directory import Directory
from router.errors import NoReplicaError, ReplicaFailedError
from router.explain import explain
from router.feeds import FeedFactory, Feeds
from router.learn import Learner
from router.membership import Membership, ReportSource
from router.metrics import BOOKED_TOKENS, FALLBACKS_TOTAL, REPLICAS, TTFT_SECONDS, VIEW_AGE_SECONDS
from router.planner import Placed, Planner, PreparedRequest
from router.relay import ReplicaClient, Send, StreamEnd, Upstream, forwarded_headers, send_answer
from router.scrape import merged_metrics
from router.settings import RouterSettings
from router.tokenizer import PromptTokenizer

log = logging.getLogger(__name__)

_PLAN_EXPIRED: Final = 409
"""What a decode replica answers to a plan that was true once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRequest:
    """One HTTP request as the service needs it."""

    path: str
    body: bytes
    headers: Mapping[str, str]
    """Lower-case names."""
    request_id: str
    received_s: float
    """On the service's clock."""


class RouterService:
    """One router. All methods run on one event loop.

    Args of the constructor are what tests replace: where reports come from, how feeds open, time.
    """

    def __init__(
        self,
        settings: RouterSettings,
        *,
        tokenizer: PromptTokenizer,
        served_model: str,
        secret: bytes,
        source: ReportSource,
        open_feed: FeedFactory,
        clock: Clock | None = None,
        unix_now_s: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self.served_model = served_model
        self.clock: Clock = clock or SystemClock()
        self.started_unix_s = unix_now_s()
        self.directory = Directory(max_entries=settings.limits.directory_entries)
        self.membership = Membership(model=served_model, ttl_s=settings.report_ttl_s)
        self.planner = Planner(
            settings,
            tokenizer=tokenizer,
            directory=self.directory,
            membership=self.membership,
            secret=secret,
            clock=self.clock,
            unix_now_s=unix_now_s,
        )
        self._source = source
        self._feeds = Feeds(self.directory, open_feed=open_feed, clock=self.clock)
        self._client = ReplicaClient(
            connect_s=settings.deadlines.connect_s, max_answer_bytes=settings.limits.max_answer_bytes
        )
        self.learner = Learner(
            planner=self.planner,
            client=self._client,
            membership=self.membership,
            limits=settings.limits,
            clock=self.clock,
        )
        self._rounds: asyncio.Task[None] | None = None
        self._last_round_s: float | None = None

    async def start(self) -> None:
        """Ask for reports once, then keep asking. Does not wait for replicas to be ready."""
        if self._rounds is None:
            await self.refresh()
            self._rounds = asyncio.create_task(self._run_rounds(), name="report-rounds")

    async def stop(self) -> None:
        """Stop every task and close every connection."""
        if self._rounds is not None:
            self._rounds.cancel()
            with suppress(asyncio.CancelledError):
                await self._rounds
            self._rounds = None
        await self.learner.close()
        await self._feeds.close()
        await self._client.close()
        self.planner.close()

    async def refresh(self) -> None:
        """One round of reports from both roles, and what follows from it. Never raises for a failing worker."""
        await asyncio.gather(*(self._ask_role(role) for role in Role))
        now_s = self.clock.now_s()
        self.membership.expire(now_s)
        await self._feeds.follow(self.membership.stores())
        self._update_gauges(now_s)

    async def answer(self, client: ClientRequest, request: ParsedRequest, send: Send) -> StreamEnd:
        """Plan a generation request, have it answered by a decode replica, and pass the answer on.

        Another replica is tried as long as nothing was sent to the client.

        Raises:
            LearnonceError: Nothing was sent; `router.errors.answer_for` says what to send.
        """
        deadline_s = client.received_s + self.settings.deadlines.request_s
        prepared = await self.planner.prepare(request, body_bytes=len(client.body))
        prepared = await self._learn_first(client, prepared, deadline_s=deadline_s)
        failure = NoReplicaError("no decode replica is ready", self.settings.retry_after_s)
        for _ in range(self.settings.limits.max_relay_attempts):
            budget_s = deadline_s - self.clock.now_s()
            placed = self.planner.place(prepared, request_id=client.request_id, budget_s=budget_s)
            log.info("plan request=%s reasons=%s", client.request_id, "; ".join(placed.decision.reasons))
            try:
                upstream = await self._ask(client, placed, budget_s=budget_s)
                if upstream is None:
                    failure = NoReplicaError("no decode replica could be reached", self.settings.retry_after_s)
                    continue
                placed.booking.first_byte()
                TTFT_SECONDS.labels(placed.decision.way).observe(self.clock.now_s() - client.received_s)
                return await self._pass_on(upstream, send, deadline_s=deadline_s)
            finally:
                placed.booking.end()
        raise failure

    async def forward(self, client: ClientRequest, send: Send) -> StreamEnd:
        """Have a request answered by any decode replica as it is (`/tokenize`, `/detokenize`).

        Raises:
            NoReplicaError: Nobody could answer.
        """
        deadline_s = client.received_s + self.settings.deadlines.request_s
        for report in self.membership.ready(Role.DECODE)[: self.settings.limits.max_relay_attempts]:
            budget_s = deadline_s - self.clock.now_s()
            own = {
                PLAN_HEADER: self.planner.sign_empty(request_id=client.request_id, budget_s=budget_s),
                REQUEST_ID_HEADER: client.request_id,
            }
            headers = forwarded_headers(client.headers, own)
            try:
                upstream = await self._client.open(
                    report.peer, client.path, body=client.body, headers=headers, budget_s=budget_s
                )
            except ReplicaFailedError as error:
                self._suspect(report.peer.replica_id, "connect", error)
                continue
            return await self._pass_on(upstream, send, deadline_s=deadline_s)
        raise NoReplicaError("no decode replica is ready", self.settings.retry_after_s)

    async def explain(self, request: ParsedRequest, *, body_bytes: int) -> dict[str, Any]:
        """The plan that a request would get now, without running it.

        Raises:
            LearnonceError: As `answer`.
        """
        prepared = await self.planner.prepare(request, body_bytes=body_bytes)
        first = self.planner.learn_first(prepared)
        return explain(prepared, self.planner.decide(prepared, learned=first), first=first)

    def waiting_for(self) -> list[str]:
        """What is missing before requests can be answered; empty: ready."""
        if self.membership.ready(Role.DECODE):
            return []
        if self._last_round_s is None:
            return ["the first reports of the workers"]
        known = self.membership.known(Role.DECODE)
        return [f"a decode replica ({len(known)} known, none ready)"]

    async def metrics_page(self) -> bytes:
        """Our own metrics and those of all replicas, labelled; bounded in time and size."""
        self._update_gauges(self.clock.now_s())
        reports = [report for role in Role for report in self.membership.known(role)]
        return await merged_metrics(
            self._client,
            reports,
            budget_s=self.settings.deadlines.metrics_s,
            max_bytes=self.settings.limits.max_metrics_bytes,
        )

    async def _learn_first(
        self, client: ClientRequest, prepared: PreparedRequest, *, deadline_s: float
    ) -> PreparedRequest:
        """The request, once passages that it would join are learned, as far as there is time for it."""
        first = self.planner.learn_first(prepared)
        if first is None:
            return prepared
        log.info("plan request=%s reasons=%s", client.request_id, first.reason)
        # At most half of what is left: the answer takes its time as well.
        budget_s = min(first.budget_s, (deadline_s - self.clock.now_s()) / 2)
        tokens = await self.learner.learn_first(prepared, first, request_id=client.request_id, budget_s=budget_s)
        return replace(prepared, learned_tokens=tokens)

    async def _ask(self, client: ClientRequest, placed: Placed, *, budget_s: float) -> Upstream | None:
        """The replica's answer, or None if another replica should be asked."""
        own = {PLAN_HEADER: placed.header, REQUEST_ID_HEADER: client.request_id}
        headers = forwarded_headers(client.headers, own)
        peer = placed.decision.decode
        try:
            upstream = await self._client.open(peer, client.path, body=client.body, headers=headers, budget_s=budget_s)
        except ReplicaFailedError as error:
            self._suspect(peer.replica_id, "connect", error)
            return None
        if upstream.status == 503:
            upstream.close()
            self._suspect(peer.replica_id, "refused", None)
            return None
        if upstream.status == _PLAN_EXPIRED:
            # The plan waited too long on its way (a body that is slow to arrive): the next one is fresh.
            upstream.close()
            FALLBACKS_TOTAL.labels("expired").inc()
            return None
        return upstream

    async def _pass_on(self, upstream: Upstream, send: Send, *, deadline_s: float) -> StreamEnd:
        budget_s = max(0.0, deadline_s - self.clock.now_s())
        end = await send_answer(upstream, send, budget_s=budget_s)
        if end.outcome == "broken":
            self._suspect(upstream.replica_id, "died", None)
        return end

    def _suspect(self, replica_id: str, cause: str, error: Exception | None) -> None:
        FALLBACKS_TOTAL.labels(cause).inc()
        log.warning("replica_suspect replica=%s cause=%s error=%s", replica_id, cause, error)
        self.membership.suspect(replica_id, now_s=self.clock.now_s())

    async def _ask_role(self, role: Role) -> None:
        asked_s = self.clock.now_s()
        timeout_s = self.settings.deadlines.report_s
        try:
            async with asyncio.timeout(2 * timeout_s):
                reports = await self._source.reports(role, timeout_s=timeout_s)
        except Exception as error:  # the source is Ray: whatever it raises, what we know is still the best there is
            log.warning("reports_failed role=%s error=%s", role.value, error)
            return
        self.membership.apply_round(role, reports, asked_s=asked_s)
        self._last_round_s = asked_s

    async def _run_rounds(self) -> None:
        while True:
            await self.clock.sleep_s(self.settings.report_period_s)
            try:
                await self.refresh()
            except Exception:
                log.exception("refresh_failed")

    def _update_gauges(self, now_s: float) -> None:
        for role in Role:
            REPLICAS.labels(role.value).set(len(self.membership.ready(role)))
            BOOKED_TOKENS.labels(role.value).set(self.planner.ledger.total(role))
        if self._last_round_s is not None:
            VIEW_AGE_SECONDS.set(now_s - self._last_round_s)
