"""Learning ahead, explanations, and what the router keeps believing, over real sockets.

Covers: `/v1/documents`, `/v1/plan`, rounds of reports, feeds of stores. Does not cover: relaying
(`router_ingress_test.py`), the fold itself (`router_knowledge_test.py`).
"""

import asyncio
import json
from pathlib import Path
from typing import Any

from aiohttp import web
from support.router_fakes import (
    CHAT,
    DOCUMENTED,
    HELLO,
    SECRET,
    Box,
    added,
    box,
    decode,
    default_answer,
    die_silently,
    never,
    prefill,
    quiet,
    wait_until,
)

from cluster.clock import SystemClock
from kvstore.events import ChunkChange, EventPublisher, HeldChunk
from kvstore.keys import ChunkKey
from kvstore.wire import Plan, Role, StoreEndpoint
from router.directory import Directory
from router.feeds import Feeds, store_feeds
from router.settings import DeadlineSettings, LimitSettings, RuleSettings

LONG = "fox " * 2000


async def test_explain_shows_the_plan_without_running_it(tmp_path: Path) -> None:
    d0, p0 = decode(), prefill()
    settings = quiet(rule=RuleSettings(remote_min_tokens=20, min_save_tokens=4))
    async with box(tmp_path, [d0, p0], settings=settings) as b:
        status, plan, _ = await b.post("/v1/plan", DOCUMENTED)
        assert (status, plan["mode"], plan["decode"], plan["prefill"]) == (200, "remote", "d0", ["p0"])
        assert sum(plan["segments"].values()) == plan["prompt_tokens"]
        assert [(d["title"], d["state"]) for d in plan["documents"]] == [("Fox", "unknown"), (None, "unknown")]
        assert (d0.plans, p0.plans) == ([], [])
        assert b.service.planner.ledger.total(Role.PREFILL) == 0
        await b.post(CHAT, DOCUMENTED)
        sent = d0.plans[0]
        for span in sent.spans[:2]:  # prefix and the first passage
            b.service.directory.apply(added(span.key))
        _, plan, _ = await b.post("/v1/plan", DOCUMENTED)
        assert [d["state"] for d in plan["documents"]] == ["held", "unknown"]
        assert plan["held_tokens"] == sent.spans[1].stop
        assert any("uncached" in reason for reason in plan["reasons"])
        assert "prompt" not in json.dumps(plan).replace("prompt_tokens", "")
        assert (await b.post("/v1/plan", {"prompt": "the fox"}))[1]["segments"]["tail"] > 0
        assert (await b.post("/v1/plan", {"messages": []}))[0] == 400


async def _learn(b: Box, body: dict[str, Any]) -> list[dict[str, Any]]:
    status, answer, _ = await b.post("/v1/documents", body)
    assert status == 200, answer
    data: list[dict[str, Any]] = answer["data"]
    return data


async def test_learning_ahead_prefills_prefix_and_passage_as_later_requests_have_them(tmp_path: Path) -> None:
    d0, p0 = decode(), prefill()
    async with box(tmp_path, [d0, p0]) as b:
        documents = DOCUMENTED["documents"]
        first = await _learn(b, {"documents": documents, "system": "Be brief."})
        assert [(r["state"], r["title"]) for r in first] == [("learned", "Fox"), ("learned", None)]
        assert all(r["tokens"] > 0 and r["error"] is None for r in first)
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}]
        await b.post(CHAT, {"messages": messages, "documents": documents[:1]})
        asked, learned = d0.plans[0], p0.plans[0]
        assert [s.key for s in learned.spans] == [s.key for s in asked.spans[:2]]
        assert learned.prompt_token_ids == asked.prompt_token_ids[: learned.num_prompt_tokens]
        b.hold(learned)
        again = await _learn(b, {"documents": documents[:1], "messages": messages})
        assert again[0]["state"] == "already_held"
        assert len(p0.plans) == 2
        assert b.service.planner.ledger.total(Role.PREFILL) == 0


async def test_the_same_passage_is_learned_once_at_a_time(tmp_path: Path) -> None:
    gate = asyncio.Event()
    p0 = prefill()

    async def slow(request: web.Request, plan: Plan) -> web.StreamResponse:
        await gate.wait()
        p0.answer = None
        return default_answer(request, plan, "p0")

    p0.answer = slow
    async with box(tmp_path, [decode(), p0]) as b:
        body = {"documents": [{"text": "passages are learned once"}] * 3}
        asking = [asyncio.create_task(_learn(b, body)) for _ in range(5)]
        await p0.entered.wait()
        asking[0].cancel()  # who goes away does not take the others' work along
        gate.set()
        for task in asking[1:]:
            assert [r["state"] for r in await task] == ["learned"] * 3
        await asyncio.gather(asking[0], return_exceptions=True)
    assert len(p0.plans) == 1


async def test_learning_fails_per_passage(tmp_path: Path) -> None:
    async def refuse(_request: web.Request, _plan: Plan) -> web.StreamResponse:
        return web.Response(status=503)

    d0, p0 = decode(), prefill("p0", answer=refuse)
    async with box(tmp_path, [d0, p0]) as b:
        results = await _learn(b, {"documents": [{"text": LONG}, {"text": "short"}]})
        assert [r["state"] for r in results] == ["failed", "failed"]
        assert "512 tokens" in results[0]["error"]
        assert "no prefill replica" in results[1]["error"]
        for body in ({}, {"documents": []}, {"documents": [{"text": "x"}], "system": 3}):
            assert (await b.post("/v1/documents", body))[0] == 400


async def test_a_batch_longer_than_the_tokenizer_queue_is_learned(tmp_path: Path) -> None:
    limits = LimitSettings(max_tokenizing=3, inline_body_bytes=0, max_learning=64)
    async with box(tmp_path, [decode(), prefill()], settings=quiet(limits=limits)) as b:
        results = await _learn(b, {"documents": [{"text": f"passage {i}"} for i in range(20)]})
    assert [r["state"] for r in results] == ["learned"] * 20


async def test_learning_answers_by_the_requests_deadline(tmp_path: Path) -> None:
    settings = quiet(deadlines=DeadlineSettings(request_s=0.3), limits=LimitSettings(max_learning=1))
    async with box(tmp_path, [decode(), prefill(answer=never)], settings=settings) as b:
        results = await asyncio.wait_for(_learn(b, {"documents": [{"text": "a"}, {"text": "b"}]}), 5)
    assert [r["state"] for r in results] == ["failed", "failed"]
    assert all("deadline" in r["error"] for r in results)


async def test_learning_moves_on_from_a_dead_prefill_replica(tmp_path: Path) -> None:
    p0, p1 = prefill("p0", answer=die_silently), prefill("p1")
    async with box(tmp_path, [decode(), p0, p1]) as b:
        assert (await _learn(b, {"documents": [{"text": "x"}]}))[0]["state"] == "learned"
    assert (len(p0.plans), len(p1.plans)) == (1, 1)


async def test_reports_that_fail_leave_the_last_ones_in_force(tmp_path: Path) -> None:
    async with box(tmp_path, [decode()]) as b:
        b.source.failing = True
        await b.service.refresh()
        assert (await b.post(CHAT, HELLO))[0] == 200


async def test_a_stores_entries_vanish_with_the_store(tmp_path: Path) -> None:
    d0 = decode()
    async with box(tmp_path, [d0]) as b:
        b.feeds.queues["n1"].put_nowait(added(b"k" * 32))
        await wait_until(lambda: len(b.service.directory) == 1)
        d0.has_store = False
        await b.service.refresh()
        assert len(b.service.directory) == 0
        assert [e.node_id for e in b.feeds.closed] == ["n1"]


async def test_a_feed_that_breaks_is_opened_again_with_nothing_believed(tmp_path: Path) -> None:
    async with box(tmp_path, [decode()]) as b:
        b.feeds.queues["n1"].put_nowait(added(b"k" * 32))
        await wait_until(lambda: len(b.service.directory) == 1)
        b.feeds.queues["n1"].put_nowait(RuntimeError("broken"))  # type: ignore[arg-type]
        await wait_until(lambda: len(b.service.directory) == 0)
        await wait_until(lambda: len(b.feeds.opened) == 2)


async def test_a_real_stores_events_reach_the_directory() -> None:
    held = [HeldChunk(b"a" * 32, "host", 640, 10, "raw")]
    store = EventPublisher(
        node_id="n1",
        epoch="e1",
        secret=SECRET,
        bind_host="127.0.0.1",
        events_port=None,
        snapshot_port=None,
        ring_events=16,
        heartbeat_s=0.1,
        snapshot=lambda: tuple(held),
    )
    endpoint = StoreEndpoint(
        node_id="n1",
        epoch="e1",
        socket_path="",
        events_address=store.events_address,
        snapshot_address=store.snapshot_address,
    )
    directory = Directory(max_entries=100)
    feeds = Feeds(directory, open_feed=store_feeds(SECRET), clock=SystemClock())
    try:
        await feeds.follow({"n1": endpoint})
        await wait_until(lambda: len(directory) == 1)
        chunk = HeldChunk(b"b" * 32, "host", 640, 10, "raw")
        held.append(chunk)
        store.publish(ChunkChange.ADDED, chunk)
        await wait_until(lambda: len(directory) == 2)
        assert directory.locations(ChunkKey(b"b" * 32))["n1"].num_tokens == 10
        await feeds.follow({})
        assert len(directory) == 0
    finally:
        await feeds.close()
        await store.stop()
