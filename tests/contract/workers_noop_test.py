"""The workers' promises, on the no-op engine; and what only a no-op engine shows in milliseconds."""

import asyncio
import io
import time
from contextlib import AsyncExitStack

import aiohttp
import msgspec
import numpy as np
import pytest
from support.workers import CHAT, SECRET, eventually, make_plan, noop_pair, place, remote
from support.workers_suite import EndingSuite, JoinSuite, PlanSuite, RemoteSuite, salt

from cluster.clock import ManualClock
from kvstore.engine.serving import Gate
from kvstore.engine.worker import EngineGoneError, LifeSettings, Worker
from kvstore.wire import PLAN_HEADER, Role, StoreEndpoint, pack_tokens, sign_plan
from prefill_workers.settings import PrefillSettings

__all__ = ["salt"]


@pytest.fixture
async def pair():
    async with noop_pair() as made:
        yield made


class TestPlan(PlanSuite):
    pass


class TestRemote(RemoteSuite):
    pass


class TestJoin(JoinSuite):
    pass


class TestEnding(EndingSuite):
    pass


class TestLife:
    """Reports, draining, death."""

    async def test_a_report_says_what_routers_need(self, pair):
        for worker, role in ((pair.decode, "decode"), (pair.prefiller, "prefill")):
            report = await worker.report()
            assert report.role == role
            assert report.peer.url == worker.url
            assert report.scope == pair.scope
            assert (report.model, report.draining, report.running_requests) == ("noop", False, 0)
            assert report.joins
            worker.check_health()

    async def test_a_report_counts_what_is_inside(self, pair, salt):
        prompt = pair.prompt(salt, *pair.long_lengths)
        asking = asyncio.create_task(pair.ask(remote(prompt, pair.prefill_url)))
        await eventually(lambda: pair.prefill_engine.running_requests)
        assert (await pair.prefiller.report()).queued_prompt_tokens == len(prompt.ids)
        assert (await pair.decode.report()).running_requests == 1
        assert (await asking).status == 200
        assert (await pair.prefiller.report()).queued_prompt_tokens == 0

    async def test_draining_finishes_what_is_inside_and_refuses_the_rest(self, pair, salt):
        asking = asyncio.create_task(pair.ask(make_plan(pair.prompt(salt)), max_tokens=300))
        await eventually(lambda: pair.decode_engine.running_requests)
        stopping = asyncio.create_task(pair.decode.stop())
        await eventually(lambda: _draining(pair.decode))
        refused = await pair.ask(make_plan(pair.prompt(salt)))
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        answer = await asking
        assert (answer.status, answer.usage["completion_tokens"]) == (200, 300)
        assert await stopping is True
        with pytest.raises(aiohttp.ClientError):
            await pair.ask(make_plan())

    async def test_draining_ends_what_takes_too_long(self, salt):
        life = LifeSettings(drain_s=0.2, engine_check_s=0.01, death_grace_s=1.0)
        async with noop_pair(life=life) as pair:
            asking = asyncio.create_task(pair.ask(make_plan(pair.prompt(salt)), max_tokens=100_000))
            await eventually(lambda: pair.decode_engine.running_requests)
            assert await pair.decode.stop() is False
            assert (await asking).status == 503
            assert pair.decode_engine.running_requests == 0

    async def test_a_dead_engine_tells_its_clients_and_leaves(self, pair, salt):
        whole = asyncio.create_task(pair.ask(make_plan(pair.prompt(salt)), max_tokens=100_000))
        stream = asyncio.create_task(pair.stream(make_plan(pair.prompt(salt)), max_tokens=100_000))
        await eventually(lambda: pair.decode_engine.running_requests == 2)
        await eventually(lambda: pair.decode_engine.queued_prompt_tokens == 0, what="both generate")
        pair.decode_engine.kill()
        await eventually(lambda: pair.left == ["decode"])
        assert (await whole).status == 503
        assert '"code": 503' in (await stream).events[-1]
        with pytest.raises(EngineGoneError):
            pair.decode.check_health()
        refused = await pair.ask(make_plan())
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert (await pair.decode.report()).draining

    async def test_a_prefill_engine_that_dies_is_a_fallback(self, pair, salt):
        prompt = pair.prompt(salt, *pair.long_lengths)
        asking = asyncio.create_task(pair.ask(remote(prompt, pair.prefill_url)))
        await eventually(lambda: pair.prefill_engine.running_requests)
        pair.prefill_engine.kill()
        answer = await asking
        assert (answer.status, answer.mode) == (200, "fallback")
        assert answer.headers["x-learnonce-fallback"] in ("refused", "broken")
        await eventually(lambda: pair.left == ["prefill"])

    async def test_the_stores_address_follows_the_store(self, pair):
        answers = [endpoint("a"), RuntimeError("away"), endpoint("b")]

        async def find():
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        clock = ManualClock()
        worker = Worker(
            None,
            role=Role.DECODE,
            place=place("d1", find_store=find),
            engine=pair.decode_engine,
            gate=Gate(),
            life=LifeSettings(store_refresh_s=2.0),
            resources=AsyncExitStack(),
            clock=clock,
        )
        assert (await worker.report()).store.epoch == "a"
        assert (await worker.report()).store.epoch == "a"
        clock.advance_s(2.0)
        assert (await worker.report()).store is None
        clock.advance_s(2.0)
        assert (await worker.report()).store.epoch == "b"
        assert answers == []


def endpoint(epoch):
    return StoreEndpoint(node_id="n0", epoch=epoch, socket_path="s", events_address="e", snapshot_address="s")


async def _draining(worker):
    return (await worker.report()).draining


class TestQueue:
    """A prefill worker takes what it can compute in time."""

    async def test_a_full_queue_refuses_and_the_decode_worker_computes(self, salt):
        settings = PrefillSettings(max_queued_prompt_tokens=1000, retry_after_s=3.0)
        async with noop_pair(prefill_settings=settings) as pair:
            long = remote(pair.prompt(salt + "long", *pair.long_lengths), pair.prefill_url)
            running = asyncio.create_task(pair.prefill(long))
            await eventually(lambda: pair.prefill_engine.running_requests)
            plan = remote(pair.prompt(salt), pair.prefill_url)
            headers = {PLAN_HEADER: sign_plan(plan, secret=SECRET)}
            async with (
                aiohttp.ClientSession() as session,
                session.post(pair.prefill_url + "/internal/prefill", headers=headers) as response,
            ):
                assert (response.status, response.headers["retry-after"]) == (503, "3")
            answer = await pair.ask(plan)
            assert (answer.status, answer.headers["x-learnonce-fallback"]) == (200, "refused")
            # The same prompt is no new work.
            assert (await pair.prefill(long))[0] == 200
            assert (await running)[0] == 200

    async def test_a_prefill_past_its_deadline_is_stopped(self, pair, salt):
        plan = remote(pair.prompt(salt, *pair.long_lengths), pair.prefill_url, deadline_s=0.1)
        status, answer = await pair.prefill(plan)
        assert (status, answer["error"]["code"]) == (504, 504)
        assert pair.prefill_engine.running_requests == 0

    async def test_chunks_that_do_not_fit_the_store_are_not_held(self, salt):
        async with noop_pair(capacity_bytes=64 * 400) as pair:
            status, answer = await pair.prefill(remote(pair.prompt(salt, 300, 200, 20), pair.prefill_url))
            assert status == 200
            assert answer["held"].count(True) == 1
            whole = pair.prompt(salt + "b", 450, 20)
            got = await pair.ask(remote(whole, pair.prefill_url))
            assert (got.status, got.headers["x-learnonce-fallback"]) == (200, "not_stored")


class TestCounts:
    """What is counted says what happened."""

    async def test_nobody_left_a_request_that_was_answered(self, pair, salt):
        before = await pair.metric(pair.decode_url, "learnonce_decode_ended_total")
        assert (await pair.ask(make_plan(pair.prompt(salt)))).status == 200
        assert (await pair.stream(make_plan(pair.prompt(salt)))).events[-1] == "[DONE]"
        assert await pair.metric(pair.decode_url, "learnonce_decode_ended_total") == before

    async def test_a_span_that_is_not_to_be_saved_is_not_missed(self, pair, salt):
        name = "learnonce_prefill_chunks_not_stored_total"
        before = await pair.metric(pair.prefill_url, name)
        prompt = pair.prompt(salt)
        assert not prompt.spans[-1].save
        assert (await pair.prefill(remote(prompt, pair.prefill_url)))[0] == 200
        assert await pair.metric(pair.prefill_url, name) == before

    async def test_a_dead_engine_is_a_failure_and_no_full_queue(self, salt):
        # Nobody looks after the engine: its own error is what ends the request.
        async with noop_pair(life=LifeSettings(engine_check_s=3600.0)) as pair:
            name = "learnonce_prefill_requests_total"
            full, failed = [await pair.metric(pair.prefill_url, name, outcome=o) for o in ("full", "failed")]
            asking = asyncio.create_task(pair.prefill(remote(pair.prompt(salt, *pair.long_lengths), pair.prefill_url)))
            await eventually(lambda: pair.prefill_engine.queued_prompt_tokens)
            pair.prefill_engine.kill()
            assert (await asking)[0] == 503
            assert await pair.metric(pair.prefill_url, name, outcome="full") == full
            assert await pair.metric(pair.prefill_url, name, outcome="failed") == failed + 1


async def test_a_body_that_never_ends_does_not_outlive_the_plan(pair):
    plan = sign_plan(make_plan(deadline_unix_s=time.time() + 0.2), secret=SECRET)
    for url, path in ((pair.decode_url, CHAT), (pair.prefill_url, "/internal/prefill")):
        header = (
            plan
            if path == CHAT
            else sign_plan(remote(pair.prompt("slow"), pair.prefill_url, deadline_s=0.2), secret=SECRET)
        )
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\n{PLAN_HEADER}: {header}\r\ncontent-length: 100\r\n\r\n{{"
        writer.write(head.encode())
        assert b" 504 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()
        await writer.wait_closed()
    assert pair.decode_engine.running_requests == 0


async def test_large_plans_and_bodies_pass(salt):
    async with noop_pair(prefill_s_per_token=0.0) as pair:
        prompt = pair.prompt(salt, 60_000, 10)
        ids = list(np.random.default_rng(0).integers(0, 100_000, size=60_010))
        plan = msgspec.structs.replace(make_plan(prompt, cache_salt=salt), prompt=pack_tokens(ids))
        assert len(sign_plan(plan, secret=SECRET)) > 150_000
        answer = await pair.ask(plan, documents=[{"text": "x" * 10_000_000}])
    assert (answer.status, answer.usage["prompt_tokens"]) == (200, 60_010)


async def test_a_body_without_end_is_cut_off(pair):
    headers = {PLAN_HEADER: sign_plan(make_plan(), secret=SECRET), "content-type": "application/json"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(pair.decode_url + CHAT, data=io.BytesIO(b"x" * (65 << 20)), headers=headers) as response,
    ):
        assert response.status == 413
