"""From a parsed request to a signed plan: segment, key, look up, choose, book.

Covers: the thread pool, the frozen view, bookings, plans for requests and for learning ahead, explanations.
Does not cover: HTTP (`router.ingress`), sending (`router.service`), the rule itself (`router.policy`).
"""

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

from cluster.clock import Clock
from kvstore.wire import Mode, Peer, Plan, Role, Span, SpanKind, WorkerReport, key_of, pack_tokens, sign_plan
from router.body import ParsedRequest
from router.bookings import Booking, Ledger
from router.directory import Directory, FreshChunks
from router.errors import NoReplicaError, RouterBusyError
from router.membership import Membership, ServingFacts
from router.metrics import (
    FALLBACKS_TOTAL,
    HIT_TOKENS_TOTAL,
    HOLE_TOKENS_TOTAL,
    OPAQUE_TOTAL,
    PLAN_SECONDS,
    PLANS_TOTAL,
    PROMPT_TOKENS_TOTAL,
)
from router.policy import (
    BookedTokens,
    Decision,
    LearnFirst,
    choose,
    choose_learner,
    choose_learning,
    plan_learning,
)
from router.reuse import PlacementRequest, with_learned
from router.segments import Prompt, Segment, Segmenter, cut_spans
from router.settings import RouterSettings
from router.tokenizer import PromptTokenizer
from router.view import KeyedSpan, ReplicaView, View

_FRESH_S: Final = 5.0
"""A store's event about a chunk is here long before."""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that is ready to be placed, and placed again if a replica fails."""

    request: ParsedRequest
    prompt: Prompt
    placement: PlacementRequest
    """What the policy sees."""
    learned_tokens: int = 0
    """Computed for this request just now, before it is placed."""

    @property
    def spans(self) -> tuple[KeyedSpan, ...]:
        """Empty for opaque prompts and engines without KV."""
        return self.placement.spans


@dataclass(frozen=True, slots=True)
class Placed:
    """One decision, signed and booked."""

    decision: Decision
    plan: Plan
    header: str
    booking: Booking


@dataclass(frozen=True, slots=True)
class LearningPlan:
    """One passage to be learned ahead on one prefill replica."""

    learner: Peer
    node_id: str
    """The learner's."""
    plan: Plan
    header: str
    spans: tuple[Span, ...]
    booking: Booking

    @property
    def held(self) -> bool:
        """Nothing is left to learn."""
        return all(span.held for span in self.spans)


class Planner:
    """Makes plans from what the directory and the membership know now."""

    def __init__(
        self,
        settings: RouterSettings,
        *,
        tokenizer: PromptTokenizer,
        directory: Directory,
        membership: Membership,
        secret: bytes,
        clock: Clock,
        unix_now_s: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._segmenter = Segmenter(tokenizer, template=settings.template)
        self._directory = directory
        self._membership = membership
        self._secret = secret
        self._clock = clock
        self._unix_now_s = unix_now_s
        self._fresh = FreshChunks(ttl_s=_FRESH_S)
        self.ledger = Ledger()
        self._threads = ThreadPoolExecutor(settings.limits.tokenizer_threads, thread_name_prefix="tokenizer")
        self._num_tokenizing = 0

    def close(self) -> None:
        """Stop the tokenizer threads; work that has not begun is dropped."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def prepare(self, request: ParsedRequest, *, body_bytes: int) -> PreparedRequest:
        """Segment, tokenise and key a request.

        Raises:
            NoReplicaError: Nobody is ready, so even the model's length is unknown.
            RouterBusyError: Too many requests wait for a tokenizer thread.
            RequestError: See `Segmenter.segment`.
        """
        facts = self.facts()
        started_s = self._clock.now_s()
        work = functools.partial(self._prepare, request, facts)
        if body_bytes <= self._settings.limits.inline_body_bytes:
            prepared = work()
        else:
            prepared = await self._on_thread(work)
        PLAN_SECONDS.observe(self._clock.now_s() - started_s)
        return prepared

    def facts(self) -> ServingFacts:
        """What the ready decode replicas agree on.

        Raises:
            NoReplicaError: There is none.
        """
        facts = self._membership.facts()
        if facts is None:
            raise NoReplicaError("no decode replica is ready", self._settings.retry_after_s)
        return facts

    def decide(self, prepared: PreparedRequest, *, learned: LearnFirst | None = None) -> Decision:
        """Choose for a prepared request on the present view; changes nothing.

        Args:
            prepared: The request.
            learned: What to take for learned already.

        Raises:
            NoReplicaError: No decode replica is ready.
        """
        view = self.view(prepared.spans)
        if learned is not None:
            view = with_learned(prepared.placement, learned.documents, view=view, node_id=learned.node_id)
        try:
            return choose(prepared.placement, view=view, rule=self._settings.rule, deadlines=self._settings.deadlines)
        except NoReplicaError as error:
            raise NoReplicaError(str(error), self._settings.retry_after_s) from error

    def learn_first(self, prepared: PreparedRequest) -> LearnFirst | None:
        """Which of a request's passages should be learned before it is placed; None for none."""
        return choose_learning(
            prepared.placement,
            view=self.view(prepared.spans),
            rule=self._settings.rule,
            deadlines=self._settings.deadlines,
            min_tokens=self._settings.join.learn_min_tokens,
        )

    def place(self, prepared: PreparedRequest, *, request_id: str, budget_s: float) -> Placed:
        """Choose, sign and book. The caller ends the booking.

        Args:
            prepared: The request.
            request_id: Goes into the plan, and through every process.
            budget_s: Seconds that are left for the request.

        Raises:
            NoReplicaError: No decode replica is ready.
        """
        decision = self.decide(prepared)
        now_unix_s = self._unix_now_s()
        plan = Plan(
            request_id=request_id,
            # The last prefill candidate may get the plan as late as the prefill deadline.
            expires_unix_s=now_unix_s + self._settings.deadlines.plan_expires_s + decision.prefill_deadline_s,
            deadline_unix_s=now_unix_s + budget_s,
            mode=decision.mode,
            prompt=pack_tokens(prepared.prompt.ids),
            spans=decision.spans,
            join=decision.join,
            learned_tokens=prepared.learned_tokens if decision.join is not None else 0,
            cache_salt=prepared.request.cache_salt,
            prefill=decision.prefill,
            prefill_deadline_s=decision.prefill_deadline_s,
            load_deadline_s=decision.load_deadline_s,
            reasons=decision.reasons,
        )
        booking = self._book(decision.bookings, budget_s=budget_s)
        _count_plan(prepared, decision)
        return Placed(decision, plan, sign_plan(plan, secret=self._secret), booking)

    def sign_empty(self, *, request_id: str, budget_s: float) -> str:
        """A signed plan that plans nothing: shows a replica that the request came through the ingress."""
        now_unix_s = self._unix_now_s()
        plan = Plan(
            request_id=request_id,
            expires_unix_s=now_unix_s + self._settings.deadlines.plan_expires_s,
            deadline_unix_s=now_unix_s + budget_s,
        )
        return sign_plan(plan, secret=self._secret)

    def anchor_to_learn(self, prepared: PreparedRequest, first: LearnFirst) -> PreparedRequest | None:
        """A request's anchor, if learning it before its passages saves computing it before each of them."""
        anchor = anchor_of(prepared)
        view = self.view(anchor.spans)
        missing_tokens = anchor.prompt.num_tokens - view.held_prefix_tokens(anchor.spans, node_id=first.node_id)
        repeated = len(first.documents) > 1 and missing_tokens >= self._settings.join.learn_min_tokens
        return anchor if repeated and anchor.spans else None

    def plan_learning(self, prepared: PreparedRequest, *, request_id: str, for_node: str | None = None) -> LearningPlan:
        """Plan one passage (with the prefix before it) for a prefill replica. The caller ends the booking.

        Args:
            prepared: The passage (`passage_alone`).
            request_id: Goes into the plan.
            for_node: Where the passage must be readable, if somebody waits for it.

        Raises:
            NoReplicaError: No prefill replica can take work.
        """
        view = self.view(prepared.spans)
        learner = choose_learner(view, rule=self._settings.rule, for_node=for_node)
        spans, budget_s = plan_learning(prepared.spans, view=view, learner=learner, deadlines=self._settings.deadlines)
        now_unix_s = self._unix_now_s()
        plan = Plan(
            request_id=request_id,
            expires_unix_s=now_unix_s + self._settings.deadlines.plan_expires_s,
            deadline_unix_s=now_unix_s + budget_s,
            mode=Mode.REMOTE,
            prompt=pack_tokens(prepared.prompt.ids),
            spans=spans,
            cache_salt=prepared.request.cache_salt,
            prefill=(learner.peer,),
            prefill_deadline_s=budget_s,
            load_deadline_s=min(budget_s, self._settings.deadlines.load_max_s),
            reasons=("learn ahead",),
        )
        tokens = sum(span.num_tokens for span in spans if not span.held)
        promise = BookedTokens(Role.PREFILL, learner.peer.replica_id, tokens, until_first_byte=True)
        booking = self._book((promise,), budget_s=budget_s)
        return LearningPlan(learner.peer, learner.node_id, plan, sign_plan(plan, secret=self._secret), spans, booking)

    def note_learned(self, plan: LearningPlan) -> None:
        """Believe at once that a plan's chunks can be read where they were computed."""
        keys = (key_of(span) for span in plan.spans)
        self._fresh.add(keys, node_id=plan.node_id, now_s=self._clock.now_s())

    def view(self, spans: Sequence[KeyedSpan]) -> View:
        """The frozen view for one request."""
        now_s = self._clock.now_s()
        self.ledger.expire(now_s)
        keys = {key for span in spans for key in (span.key, span.passage_key) if key is not None}
        nodes_by_key = self._directory.nodes_by_key(keys)
        for key in keys:
            if nodes := self._fresh.node_of(key, now_s=now_s):
                nodes_by_key[key] = nodes_by_key.get(key, frozenset()) | nodes
        return View(
            decode=tuple(self._replica_view(report) for report in self._membership.ready(Role.DECODE)),
            prefill=tuple(self._replica_view(report) for report in self._ready_prefill()),
            nodes_by_key=nodes_by_key,
            sharing_nodes=self._membership.sharing_nodes(),
        )

    def _ready_prefill(self) -> list[WorkerReport]:
        facts = self._membership.facts()
        scope = facts.scope if facts else None
        # Another scope's chunks would have other keys: nobody could load them.
        return [report for report in self._membership.ready(Role.PREFILL) if report.scope == scope]

    def _replica_view(self, report: WorkerReport) -> ReplicaView:
        booked = self.ledger.tokens(report.role, report.peer.replica_id)
        return ReplicaView(
            peer=report.peer,
            node_id=report.node_id,
            booked_tokens=max(booked, report.queued_prompt_tokens),
            has_store=report.store is not None,
        )

    def _prepare(self, request: ParsedRequest, facts: ServingFacts) -> PreparedRequest:
        prompt = self._segmenter.segment(request, max_model_len=facts.max_model_len)
        placement = PlacementRequest(num_tokens=prompt.num_tokens)
        if prompt.opaque is not None or facts.scope is None:
            return PreparedRequest(request, prompt, placement)
        spans = cut_spans(prompt, scope=facts.scope, salt=request.cache_salt, settings=self._settings.spans)
        join = self._settings.join.plan_for(request.quality) if request.documents else None
        refused = join is not None and not facts.joins
        placement = replace(
            placement,
            spans=spans,
            join=None if refused else join,
            exact_because="not every decode replica's engine can join" if refused else "",
        )
        return PreparedRequest(request, prompt, placement)

    async def _on_thread(self, work: Callable[[], PreparedRequest]) -> PreparedRequest:
        if self._num_tokenizing >= self._settings.limits.max_tokenizing:
            raise RouterBusyError("too many requests are waiting to be tokenised", self._settings.retry_after_s)
        self._num_tokenizing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._num_tokenizing -= 1

    def _book(self, promises: Sequence[BookedTokens], *, budget_s: float) -> Booking:
        return self.ledger.book(promises, expires_s=self._clock.now_s() + budget_s)


def passage_alone(prepared: PreparedRequest, document: int) -> PreparedRequest:
    """The anchor and one passage directly behind it: what learning that passage computes."""
    prefix = anchor_of(prepared)
    segments = tuple(segment for segment in prepared.prompt.segments if segment.document == document)
    spans = tuple(
        KeyedSpan(span.passage_key, span.base, span.base + span.num_tokens, span.kind, span.document)
        for span in prepared.spans
        if span.document == document and span.passage_key is not None
    )
    return _part(prepared, (*prefix.prompt.segments, *segments), (*prefix.spans, *spans))


def anchor_of(prepared: PreparedRequest) -> PreparedRequest:
    """Everything before a request's first passage."""
    segments = tuple(segment for segment in prepared.prompt.segments if segment.kind is SpanKind.PREFIX)
    return _part(prepared, segments, tuple(span for span in prepared.spans if span.kind is SpanKind.PREFIX))


def _part(prepared: PreparedRequest, segments: tuple[Segment, ...], spans: tuple[KeyedSpan, ...]) -> PreparedRequest:
    prompt = Prompt(segments=segments)
    return PreparedRequest(prepared.request, prompt, PlacementRequest(spans=spans, num_tokens=prompt.num_tokens))


def _count_plan(prepared: PreparedRequest, decision: Decision) -> None:
    opaque = prepared.prompt.opaque
    PLANS_TOTAL.labels("opaque" if opaque else decision.way).inc()
    if opaque:
        OPAQUE_TOTAL.labels(opaque.value).inc()
    PROMPT_TOKENS_TOTAL.inc(prepared.prompt.num_tokens)
    HIT_TOKENS_TOTAL.inc(decision.hit_tokens)
    HOLE_TOKENS_TOTAL.inc(decision.hole_tokens)
    if decision.wanted_remote and decision.mode is Mode.LOCAL:
        FALLBACKS_TOTAL.labels("no_prefill").inc()
