"""Requests whose passages may be joined, over real sockets: what is learned first, what the plan says then.

Covers: `quality`, learning before a join (once, in parallel, in time or not at all), explanations of joins.
Does not cover: the choice itself (`router_reuse_test.py`), what a decode replica does with it (`workers_suite.py`).
"""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from support.router_fakes import (
    CHAT,
    Box,
    FakeReplica,
    box,
    decode,
    default_answer,
    die_silently,
    never,
    prefill,
    quiet,
    wait_until,
)

from kvstore.wire import JoinPlan, Plan, Span, SpanKind
from router.directory import FreshChunks
from router.metrics import HOLE_TOKENS_TOTAL, LEARNED_FIRST_TOTAL, PLANS_TOTAL
from router.settings import DeadlineSettings, JoinSettings, LimitSettings, RouterSettings

FOX, DOG, TIDE = (
    {"title": title, "text": f"{title} " + "the quick brown fox jumps over the lazy dog " * 2}
    for title in ("Fox", "Dog", "Tide")
)
JOIN = JoinPlan("query_aware", 0.15)


def settings(**values: Any) -> RouterSettings:
    defaults = {"join": JoinSettings(learn_min_tokens=4)}
    return quiet(**(defaults | values))


def replicas(num_prefill: int = 2, **values: Any) -> tuple[FakeReplica, list[FakeReplica]]:
    return decode(joins=True, max_model_len=4096), [prefill(f"p{i}", **values) for i in range(num_prefill)]


def body(*documents: dict[str, str], quality: Any = "high", **values: Any) -> dict[str, Any]:
    question = [{"role": "user", "content": "what does the fox do?"}]
    return {"messages": question, "documents": list(documents), "quality": quality, **values}


async def ask(b: Box, *documents: dict[str, str], quality: Any = "high", **values: Any) -> None:
    status, answer, _ = await b.post(CHAT, body(*documents, quality=quality, **values))
    assert status == 200, answer


def passages(plan: Plan) -> list[Span]:
    return [span for span in plan.spans if span.kind is SpanKind.PASSAGE]


def learned(prefills: list[FakeReplica]) -> list[bytes]:
    """Last keys of all that was learned."""
    return [plan.spans[-1].key for replica in prefills for plan in replica.plans]


async def test_missing_passages_are_learned_in_parallel_and_then_joined(tmp_path: Path) -> None:
    d0, prefills = replicas()
    both = asyncio.Barrier(2)

    async def together(request: web.Request, plan: Plan) -> web.StreamResponse:
        # Ends only if two replicas work at the same time. The anchor comes first, alone.
        if plan.spans[-1].kind is SpanKind.PASSAGE:
            await both.wait()
        return default_answer(request, plan, "p")

    for replica in prefills:
        replica.answer = together
    async with box(tmp_path, [d0, *prefills], settings=settings()) as b:
        await asyncio.wait_for(ask(b, FOX, DOG), 10)
        plan = d0.plans[0]
        fox, dog = passages(plan)
        assert plan.join == JOIN
        assert (fox.held, fox.base, dog.held, dog.base) == (True, None, True, fox.start)
        assert not any(span.save for span in plan.spans)
        anchors = [key for key in learned(prefills) if key == plan.spans[plan.spans.index(fox) - 1].key]
        assert (len(anchors), sorted(learned(prefills))) == (1, sorted([*anchors, fox.key, dog.key]))
        # All of it was computed for this request; the anchor before each passage is loaded.
        assert plan.learned_tokens == dog.stop
        # Another order: nothing is learned again, although no store has said anything yet.
        await ask(b, DOG, FOX)
        assert len(learned(prefills)) == 3
        dog_first, fox_second = passages(d0.plans[1])
        assert d0.plans[1].learned_tokens == 0
        assert (dog_first.key, dog_first.base, fox_second.key, fox_second.base) == (dog.key, None, fox.key, fox.start)


async def test_many_requests_for_the_same_new_passages_have_each_learned_once(tmp_path: Path) -> None:
    d0, prefills = replicas()
    documents = [{"title": f"Page {i}", "text": "the quick brown fox " * (i + 3)} for i in range(8)]
    draw = random.Random(0)
    orders = [draw.sample(documents, len(documents)) for _ in range(32)]
    async with box(tmp_path, [d0, *prefills], settings=settings()) as b:
        await asyncio.gather(*(ask(b, *order) for order in orders))
        keys = learned(prefills)
    assert len(keys) == len(set(keys)) == 1 + len(documents)
    assert all(plan.join == JOIN for plan in d0.plans)
    assert all(span.held for plan in d0.plans for span in passages(plan))
    assert all(replica.plans for replica in prefills)


async def test_a_request_waits_for_passages_that_others_are_learning(tmp_path: Path) -> None:
    d0, (p0,) = replicas(1)
    gate = asyncio.Event()

    async def slow(request: web.Request, plan: Plan) -> web.StreamResponse:
        await gate.wait()
        return default_answer(request, plan, "p0")

    p0.answer = slow
    async with box(tmp_path, [d0, p0], settings=settings()) as b:
        ahead = asyncio.create_task(b.post("/v1/documents", {"documents": [FOX, DOG]}))
        await wait_until(lambda: len(p0.plans) == 2)
        asking = asyncio.create_task(ask(b, DOG, FOX))
        await wait_until(lambda: len(p0.plans) == 3)  # the anchor
        gate.set()
        await asyncio.gather(ahead, asking)
    assert len(p0.plans) == 3
    assert d0.plans[0].join == JOIN
    assert d0.plans[0].learned_tokens == passages(d0.plans[0])[0].start, "the anchor alone was computed for it"


LATE = DeadlineSettings(prefill_base_s=0.2, prefill_floor_tokens_per_s=1e9)


@pytest.mark.parametrize("fault", [die_silently, never], ids=["dead", "late"])
async def test_what_is_not_learned_in_time_is_a_hole(tmp_path: Path, fault: Any) -> None:
    d0, (p0,) = replicas(1)
    failed, holes = LEARNED_FIRST_TOTAL.labels("failed")._value.get(), HOLE_TOKENS_TOTAL._value.get()
    async with box(tmp_path, [d0, p0], settings=settings(deadlines=LATE)) as b:
        for document in (FOX, DOG):
            await ask(b, document, quality="exact")
            b.hold(d0.plans[-1])
        p0.answer = fault
        await asyncio.wait_for(ask(b, DOG, TIDE, FOX), 10)
    dog, tide, fox = passages(d0.plans[-1])
    assert d0.plans[-1].join == JOIN
    assert [span.held for span in (dog, tide, fox)] == [True, False, True]
    assert (fox.base, tide.base, tide.save) == (dog.start, None, False)
    assert LEARNED_FIRST_TOTAL.labels("failed")._value.get() == failed + 1
    assert HOLE_TOKENS_TOTAL._value.get() == holes + tide.num_tokens


async def test_a_batch_learned_ahead_does_not_hold_up_a_request(tmp_path: Path) -> None:
    d0, (p0,) = replicas(1)

    async def only_requests(request: web.Request, plan: Plan) -> web.StreamResponse:
        if plan.request_id.startswith("ahead"):
            return await never(request, plan)
        return default_answer(request, plan, "p0")

    p0.answer = only_requests
    async with box(tmp_path, [d0, p0], settings=settings(limits=LimitSettings(max_learning=1))) as b:
        batch = {"documents": [{"text": f"page {i}"} for i in range(5)]}
        ahead = asyncio.create_task(b.post("/v1/documents", batch, headers={"x-request-id": "ahead"}))
        await p0.entered.wait()
        await asyncio.wait_for(ask(b, FOX, DOG), 10)
        ahead.cancel()
        await asyncio.gather(ahead, return_exceptions=True)
    assert d0.plans[0].join == JOIN


QUALITIES: list[tuple[str, Any, JoinSettings, JoinPlan | None]] = [
    ("high", "high", JoinSettings(), JOIN),
    ("fast", "fast", JoinSettings(), JoinPlan("query_aware", 0.05)),
    ("a number", 0.5, JoinSettings(), JoinPlan("query_aware", 0.5)),
    ("a whole number", 0, JoinSettings(), JoinPlan("query_aware", 0.0)),
    ("exact", "exact", JoinSettings(default_quality="fast"), None),
    ("left open", None, JoinSettings(), None),
    ("left open, with a default", None, JoinSettings(default_quality="fast"), JoinPlan("query_aware", 0.05)),
]


@pytest.mark.parametrize(("quality", "join", "expected"), [r[1:] for r in QUALITIES], ids=[r[0] for r in QUALITIES])
async def test_quality_chooses_the_join(
    tmp_path: Path, quality: Any, join: JoinSettings, expected: JoinPlan | None
) -> None:
    d0, prefills = replicas()
    before = PLANS_TOTAL.labels("joined")._value.get()
    shorter = join.model_copy(update={"learn_min_tokens": 4})
    async with box(tmp_path, [d0, *prefills], settings=settings(join=shorter)) as b:
        await ask(b, FOX, DOG, quality=quality)
        assert d0.plans[0].join == expected
        assert PLANS_TOTAL.labels("joined")._value.get() == before + (expected is not None)
        assert bool(learned(prefills)) is (expected is not None)


@pytest.mark.parametrize("quality", ["best", -0.1, 1.1, True, [], {}])
async def test_an_unknown_quality_is_refused_with_what_is_allowed(tmp_path: Path, quality: Any) -> None:
    d0, _ = replicas(0)
    async with box(tmp_path, [d0]) as b:
        status, answer, _ = await b.post(CHAT, body(FOX, quality=quality))
    assert (status, answer["error"]["param"]) == (400, "quality")
    assert all(word in answer["error"]["message"] for word in ("exact", "high", "fast", "0 to 1"))
    assert d0.plans == []


async def test_an_engine_that_cannot_join_is_never_asked_to(tmp_path: Path) -> None:
    d0, (p0,) = replicas(1)
    d1 = decode("d1", max_model_len=4096)
    async with box(tmp_path, [d0, d1, p0], settings=settings()) as b:
        await ask(b, FOX, DOG)
        _, plan, _ = await b.post("/v1/plan", body(FOX, DOG))
    assert [made.join for made in (*d0.plans, *d1.plans)] == [None]
    assert (plan["join"], p0.plans) == (None, [])
    assert any("can join" in reason for reason in plan["reasons"])


async def test_salts_keep_learned_passages_apart(tmp_path: Path) -> None:
    d0, prefills = replicas()
    async with box(tmp_path, [d0, *prefills], settings=settings()) as b:
        await ask(b, FOX, DOG, cache_salt="mine")
        await ask(b, DOG, FOX, cache_salt="yours")
    mine, yours = d0.plans
    assert (mine.cache_salt, yours.cache_salt) == ("mine", "yours")
    assert not {s.key for s in passages(mine)} & {s.key for s in passages(yours)}
    assert {plan.cache_salt for replica in prefills for plan in replica.plans} == {"mine", "yours"}


async def test_explain_shows_what_would_be_learned_moved_and_joined(tmp_path: Path) -> None:
    d0, prefills = replicas()
    async with box(tmp_path, [d0, *prefills], settings=settings()) as b:
        _, plan, _ = await b.post("/v1/plan", body(FOX, DOG))
        assert plan["join"] == {"method": "query_aware", "share": 0.15}
        assert [d["state"] for d in plan["documents"]] == ["learn first", "learn first"]
        assert plan["reasons"][0].startswith("learn 2 passages first")
        assert (d0.plans, learned(prefills)) == ([], [])
        await ask(b, FOX, DOG)
        _, plan, _ = await b.post("/v1/plan", body(DOG, FOX, TIDE))
        assert [d["state"] for d in plan["documents"]] == ["held", "moved", "learn first"]
        moved = [chunk for chunk in plan["chunks"] if chunk["base"] is not None]
        assert [chunk["document"] for chunk in moved] == [1, 2]
        assert all(chunk["held"] and not chunk["save"] for chunk in moved)
        assert any("tokens moved" in reason for reason in plan["reasons"])
        _, plan, _ = await b.post("/v1/plan", body(DOG, FOX, quality="exact"))
        assert (plan["join"], [d["state"] for d in plan["documents"]]) == (None, ["held", "unknown"])


def test_what_was_just_learned_is_believed_for_a_while() -> None:
    fresh = FreshChunks(ttl_s=5.0)
    key, other = (bytes([i]) * 32 for i in (1, 2))
    fresh.add([key], node_id="n1", now_s=10.0)  # type: ignore[list-item]
    assert fresh.node_of(key, now_s=14.9) == {"n1"}  # type: ignore[arg-type]
    assert fresh.node_of(key, now_s=15.0) == frozenset()  # type: ignore[arg-type]
    assert fresh.node_of(other, now_s=10.0) == frozenset()  # type: ignore[arg-type]
    fresh.add([key], node_id="n2", now_s=12.0)  # type: ignore[list-item]
    fresh.add([other], node_id="n1", now_s=16.0)  # type: ignore[list-item]
    assert fresh.node_of(key, now_s=16.0) == {"n2"}  # type: ignore[arg-type]
    fresh.add([], node_id="n1", now_s=30.0)
    assert len(fresh._entries) == 0
