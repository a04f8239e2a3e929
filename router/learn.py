"""Learn passages ahead of any question (`POST /v1/documents`), or before a request that would join them.

Covers: one prefill per passage, single flight by key in this router, bounded concurrency, an answer per passage.
Does not cover: how a prefill replica computes and stores (`prefill_workers`).
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

import msgspec

from cluster.clock import Clock
from cluster.errors import LearnonceError
from kvstore.keys import ChunkKey
from kvstore.wire import PLAN_HEADER, REQUEST_ID_HEADER, PrefillAnswer
from router.body import Document, Endpoint, ParsedRequest, check_model, parse_documents, parse_salt, parse_tools
from router.errors import NoReplicaError, ReplicaAnswerError, ReplicaFailedError, RequestError, RouterBusyError
from router.membership import Membership
from router.metrics import FALLBACKS_TOTAL, LEARNED_FIRST_TOTAL, LEARNED_TOTAL
from router.planner import LearningPlan, Planner, PreparedRequest, passage_alone
from router.policy import LearnFirst
from router.relay import ReplicaClient
from router.settings import LimitSettings

log = logging.getLogger(__name__)

PREFILL_PATH: Final = "/internal/prefill"
_ANSWER: Final = msgspec.json.Decoder(PrefillAnswer)


class LearnState(StrEnum):
    """What became of one passage."""

    LEARNED = "learned"
    ALREADY_HELD = "already_held"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnResult:
    """The answer for one passage."""

    state: LearnState
    tokens: int = 0
    seconds: float = 0.0
    error: str | None = None


def parse_learning(body: Mapping[str, Any], *, served_model: str, max_documents: int) -> list[ParsedRequest]:
    """One request per document, with the prefix that later chat requests will have.

    Raises:
        RequestError: No documents, wrong types, both `messages` and `system`.
        UnknownModelError: Another model.
    """
    check_model(body, served_model=served_model)
    documents = parse_documents(body, max_documents=max_documents)
    if not documents:
        raise RequestError("`documents` is missing: send a list of {title?, text}", "documents")
    messages = _prefix_messages(body)
    tools, opaque = parse_tools(body)
    if opaque is not None:
        raise RequestError("`tools` must be a list of functions", "tools")
    base = ParsedRequest(
        endpoint=Endpoint.CHAT, messages=messages, documents=documents, tools=tools, cache_salt=parse_salt(body)
    )
    return [replace(base, documents=(document,)) for document in documents]


def _prefix_messages(body: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    messages, system = body.get("messages"), body.get("system")
    if messages is not None and system is not None:
        raise RequestError("send `messages` or `system`, not both", "system")
    if system is not None and not isinstance(system, str):
        raise RequestError("`system` must be a string", "system")
    if messages is not None and not isinstance(messages, list):
        raise RequestError("`messages` must be a list of messages", "messages")
    for index, message in enumerate(messages or ()):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise RequestError(f"`messages[{index}]` must have a role and text content", f"messages[{index}]")
        if not isinstance(message.get("role"), str):
            raise RequestError(f"`messages[{index}]` must have a role", f"messages[{index}]")
    given = list(messages or ())
    if system is not None:
        given = [{"role": "system", "content": system}]
    # Templates want a question; it stands behind the passages and is cut off again.
    return (*given, {"role": "user", "content": "?"}) if all(m["role"] != "user" for m in given) else tuple(given)


class Learner:
    """Runs learning requests; the same passage is learned once at a time."""

    def __init__(
        self,
        *,
        planner: Planner,
        client: ReplicaClient,
        membership: Membership,
        limits: LimitSettings,
        clock: Clock,
    ) -> None:
        self._planner = planner
        self._client = client
        self._membership = membership
        self._limits = limits
        self._clock = clock
        self._flights: dict[ChunkKey, asyncio.Task[LearnResult]] = {}
        self._slots = asyncio.Semaphore(limits.max_learning)
        # Their own, so that a large batch learned ahead does not hold up requests that wait.
        self._request_slots = asyncio.Semaphore(limits.max_learning)
        # As many as there are threads: a large batch waits here, not in the queue that refuses when it is full.
        self._preparing = asyncio.Semaphore(limits.tokenizer_threads)

    async def learn(self, requests: list[ParsedRequest], *, request_id: str, budget_s: float) -> list[LearnResult]:
        """Learn one passage per request; failures are results, in the order of the requests.

        Args:
            requests: See `parse_learning`.
            request_id: Goes into the plans, with a number behind it.
            budget_s: Seconds after which passages that are not learned yet are reported as failed; those under way
                go on, for the next who asks.

        Raises:
            NoReplicaError: Nobody is ready at all.
            RouterBusyError: More passages wait than `limits.max_documents`.
        """
        self._planner.facts()
        self._check_room(len(requests))
        end_s = asyncio.get_running_loop().time() + budget_s
        numbered = (self._learn_until(end_s, r, request_id=f"{request_id}-{i}") for i, r in enumerate(requests))
        results = await asyncio.gather(*numbered)
        for result in results:
            LEARNED_TOTAL.labels(result.state.value).inc()
        return results

    async def learn_first(
        self, prepared: PreparedRequest, first: LearnFirst, *, request_id: str, budget_s: float
    ) -> int:
        """Learn passages of a request that waits for them; what fails, or takes too long, it goes without.

        Passages that others are learning are waited for, not learned again.

        Args:
            prepared: The request.
            first: Which passages.
            request_id: Goes into the plans, with a number behind it.
            budget_s: Seconds that the request can wait. What is under way then goes on, for the next who asks.

        Returns:
            Tokens that were computed for this request, and not for another one.
        """
        flights: list[asyncio.Task[LearnResult]] = []
        own: list[asyncio.Task[LearnResult]] = []

        def begin(part: PreparedRequest, name: str) -> "asyncio.Task[LearnResult]":
            is_own = part.spans[-1].key not in self._flights
            flight = self._flight(part, f"{request_id}-{name}", for_node=first.node_id)
            own.extend([flight] if is_own else [])
            return flight

        try:
            self._check_room(len(first.documents))
            async with asyncio.timeout(budget_s):
                anchor = self._planner.anchor_to_learn(prepared, first)
                if anchor is not None:
                    await asyncio.shield(begin(anchor, "anchor"))
                flights = [begin(passage_alone(prepared, index), str(index)) for index in first.documents]
                await asyncio.gather(*(asyncio.shield(flight) for flight in flights))
        except (TimeoutError, RouterBusyError) as error:
            log.warning("learn_first_failed request=%s error=%s", request_id, str(error) or "late")
        states = [result.state for result in _landed(flights)]
        for state in states + [LearnState.FAILED] * (len(first.documents) - len(states)):
            LEARNED_FIRST_TOTAL.labels(state.value).inc()
        return sum(result.tokens for result in _landed(own) if result.state is LearnState.LEARNED)

    def _check_room(self, num_passages: int) -> None:
        if len(self._flights) + num_passages > 2 * self._limits.max_documents:
            raise RouterBusyError("too many passages are being learned")

    async def close(self) -> None:
        """Stop what is under way."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    async def _learn_until(self, end_s: float, request: ParsedRequest, *, request_id: str) -> LearnResult:
        try:
            async with asyncio.timeout_at(end_s):
                return await self._learn_one(request, request_id=request_id)
        except TimeoutError:
            return LearnResult(state=LearnState.FAILED, error="not learned before the request's deadline")

    async def _learn_one(self, request: ParsedRequest, *, request_id: str) -> LearnResult:
        try:
            async with self._preparing:
                prepared = await self._planner.prepare(request, body_bytes=_num_bytes(request.documents))
        except LearnonceError as error:
            return LearnResult(state=LearnState.FAILED, error=str(error))
        if not prepared.spans:
            return LearnResult(state=LearnState.FAILED, error="the engine keeps no KV")
        # Shielded: others may wait for the same passage when this caller goes away.
        return await asyncio.shield(self._flight(passage_alone(prepared, 0), request_id))

    def _flight(
        self, prepared: PreparedRequest, request_id: str, *, for_node: str | None = None
    ) -> "asyncio.Task[LearnResult]":
        """The learning of a prompt's last span, begun now if nobody has."""
        key = prepared.spans[-1].key
        flight = self._flights.get(key)
        if flight is None:
            flight = asyncio.create_task(self._fly(prepared, request_id, for_node))
            self._flights[key] = flight
            flight.add_done_callback(lambda _: self._flights.pop(key, None))
        return flight

    async def _fly(self, prepared: PreparedRequest, request_id: str, for_node: str | None) -> LearnResult:
        tokens = len(prepared.prompt.segments[-1].ids)
        async with self._slots if for_node is None else self._request_slots:
            started_s = self._clock.now_s()
            try:
                state, error = await self._try_learners(prepared, request_id, for_node)
            except LearnonceError as failure:
                state, error = LearnState.FAILED, str(failure)
            if state is LearnState.FAILED:
                log.warning("learn_failed request=%s error=%s", request_id, error)
            seconds = self._clock.now_s() - started_s
        return LearnResult(state=state, tokens=tokens, seconds=seconds, error=error)

    async def _try_learners(
        self, prepared: PreparedRequest, request_id: str, for_node: str | None
    ) -> tuple[LearnState, str | None]:
        last: LearnonceError = NoReplicaError("no prefill replica can learn passages now")
        for _ in range(self._limits.max_relay_attempts):
            plan = self._planner.plan_learning(prepared, request_id=request_id, for_node=for_node)
            try:
                if plan.held:
                    return LearnState.ALREADY_HELD, None
                answer = await self._ask(plan, request_id)
            except ReplicaFailedError as error:
                FALLBACKS_TOTAL.labels("connect").inc()
                self._membership.suspect(plan.learner.replica_id, now_s=self._clock.now_s())
                last = error
                continue
            finally:
                plan.booking.end()
            if len(answer.held) == len(plan.spans) and all(answer.held):
                self._planner.note_learned(plan)
                return LearnState.LEARNED, None
            return LearnState.FAILED, "the prefill replica computed the passage, but its store did not keep it"
        raise last

    async def _ask(self, plan: LearningPlan, request_id: str) -> PrefillAnswer:
        headers = {PLAN_HEADER: plan.header, REQUEST_ID_HEADER: request_id, "content-type": "application/json"}
        budget_s = plan.plan.prefill_deadline_s
        upstream = await self._client.open(plan.learner, PREFILL_PATH, body=b"", headers=headers, budget_s=budget_s)
        try:
            if upstream.status == 503:
                raise ReplicaFailedError(f"replica {plan.learner.replica_id} is full or draining")
            if upstream.status != 200:
                raise ReplicaAnswerError(f"the prefill replica answered {upstream.status}")
            return _ANSWER.decode(upstream.first)
        except msgspec.MsgspecError as error:
            raise ReplicaAnswerError("the prefill replica's answer is not understood") from error
        finally:
            upstream.close()


def _landed(flights: Iterable["asyncio.Task[LearnResult]"]) -> list[LearnResult]:
    return [flight.result() for flight in flights if flight.done() and not flight.cancelled()]


def _num_bytes(documents: tuple[Document, ...]) -> int:
    return sum(len(document.text) for document in documents)
