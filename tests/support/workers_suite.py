"""What every pair of workers promises, whatever engine is inside. Inherit it and provide the fixture `pair`."""

import asyncio
import contextlib
import json
import time
import uuid

import aiohttp
import pytest
from aiohttp import web
from support.workers import CHAT, SECRET, TEXT, eventually, make_passages, make_plan, remote, stand_in, unsaved

from kvstore.wire import PLAN_HEADER, JoinPlan, Refusal, sign_plan

FALLBACKS = "learnonce_decode_fallbacks_total"


@pytest.fixture
def salt():
    """Chunks that no other test knows."""
    return uuid.uuid4().hex


class PlanSuite:
    """The plan is obeyed, and nothing else is."""

    async def test_the_plans_tokens_are_the_prompt_and_its_chunks_are_saved(self, pair, salt):
        prompt = pair.prompt(salt)
        answer = await pair.ask(make_plan(prompt, cache_salt=salt))
        assert answer.status == 200
        assert answer.usage["prompt_tokens"] == len(prompt.ids)
        assert answer.usage["completion_tokens"] == 8
        assert (answer.mode, answer.cached_tokens) == ("local", 0)
        held = await asyncio.to_thread(pair.store.wait, prompt.keys[:-1], deadline_s=10.0)
        assert held == [True, True]
        assert pair.store.lookup(prompt.keys[-1:], deadline_s=1.0) == [False]

    async def test_what_is_held_is_loaded_and_the_answer_stays_the_same(self, pair, salt):
        prompt = pair.prompt(salt)
        cold = await pair.ask(make_plan(prompt, cache_salt=salt + "cold"))
        await asyncio.to_thread(pair.store.wait, prompt.keys[:-1], deadline_s=10.0)
        warm = await pair.ask(make_plan(prompt.held(2), cache_salt=salt + "warm"))
        assert warm.text == cold.text
        assert warm.cached_tokens == prompt.spans[1].stop
        assert warm.headers["x-learnonce-load-tokens"] == str(prompt.spans[1].stop)

    async def test_a_chunk_that_is_gone_is_computed(self, pair, salt):
        prompt = pair.prompt(salt)
        known = await pair.ask(make_plan(prompt, cache_salt=salt + "a"))
        await asyncio.to_thread(pair.store.wait, prompt.keys[:-1], deadline_s=10.0)
        other = pair.prompt(salt + "never saved")
        answer = await pair.ask(make_plan(other.held(2), cache_salt=salt + "b"))
        assert answer.text == known.text
        assert answer.cached_tokens == 0

    async def test_streams_are_the_same_tokens_with_usage(self, pair, salt):
        prompt = pair.prompt(salt)
        whole = await pair.ask(make_plan(prompt, cache_salt=salt + "a"))
        streamed = await pair.stream(make_plan(prompt, cache_salt=salt + "b"))
        assert streamed.events[-1] == "[DONE]"
        events = [json.loads(event) for event in streamed.events[:-1]]
        text = "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"])
        assert text == whole.text
        assert events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert events[-1]["usage"]["completion_tokens"] == 8

    async def test_completions_obey_too(self, pair, salt):
        prompt = pair.prompt(salt)
        answer = await pair.ask(make_plan(prompt, cache_salt=salt), path=TEXT, prompt="something else", messages=None)
        assert answer.status == 200
        assert answer.usage["prompt_tokens"] == len(prompt.ids)

    async def test_without_a_prompt_the_request_is_rendered_here(self, pair):
        answer = await pair.ask(make_plan())
        assert (answer.status, answer.mode) == (200, "rendered")
        assert answer.cached_tokens == 0
        assert 0 < answer.usage["prompt_tokens"] < 100

    async def test_clients_cannot_name_chunks(self, pair, salt):
        prompt = pair.prompt(salt)
        await pair.ask(make_plan(prompt, cache_salt=salt))
        await asyncio.to_thread(pair.store.wait, prompt.keys[:-1], deadline_s=10.0)
        stolen = {"learnonce": {"v": 1, "load": [[prompt.keys[0].hex(), 0, 10]], "save": [], "load_deadline_s": 5.0}}
        for forged in (
            {"kv_transfer_params": stolen},
            {"kv_transfer_params": {"do_remote_prefill": True, "prompt_token_ids": [5, 6, 7]}},
            {"vllm_xargs": {"kv_transfer_params": "x"}},
        ):
            text = uuid.uuid4().hex + " hello" * 30
            answer = await pair.ask(make_plan(), messages=[{"role": "user", "content": text}], **forged)
            assert answer.status == 200
            assert answer.cached_tokens == 0
            assert answer.usage["prompt_tokens"] > 20

    @pytest.mark.parametrize(("kind", "status"), [("forged", 400), ("expired", 409), ("missing", 403)])
    async def test_what_is_not_a_valid_plan_is_refused(self, pair, kind, status):
        plan = make_plan(pair.prompt("x"))
        header = {
            "forged": sign_plan(plan, secret=b"another secret"),
            "expired": sign_plan(make_plan(pair.prompt("x"), expires_unix_s=time.time() - 5), secret=SECRET),
            "missing": None,
        }[kind]
        reason = {"forged": "rejected"}.get(kind, kind)
        before = await pair.metric(pair.decode_url, "learnonce_decode_plans_rejected_total", reason=reason)
        answer = await pair.ask(None, header=header)
        assert answer.status == status
        assert answer.body["error"]["code"] == status
        assert answer.body["error"]["message"]
        after = await pair.metric(pair.decode_url, "learnonce_decode_plans_rejected_total", reason=reason)
        assert after == before + 1

    async def test_a_refusal_is_answered_for_the_router(self, pair):
        refusal = Refusal(status=429, error_type="RateLimitError", message="too many requests", retry_after_s=7.0)
        answer = await pair.ask(make_plan(refusal=refusal))
        assert (answer.status, answer.headers["retry-after"]) == (429, "7")
        assert answer.body["error"] == {
            "message": "too many requests", "type": "RateLimitError", "param": None, "code": 429,
        }  # fmt: skip

    async def test_nothing_goes_around_the_plan(self, pair):
        async with aiohttp.ClientSession() as session:
            for path in ("/v1/responses", "/v1/messages", "/invocations", "/v1/chat/completions/batch"):
                async with session.post(pair.decode_url + path, json={}) as response:
                    assert response.status == 404
            for path in ("/tokenize", "/detokenize"):
                async with session.post(pair.decode_url + path, json={"prompt": "x"}) as response:
                    assert response.status == 403
            for path in ("/health", "/metrics", "/v1/models", "/version"):
                async with session.get(pair.decode_url + path) as response:
                    assert response.status == 200

    async def test_bad_requests_are_the_clients_fault(self, pair):
        wrong_model = await pair.ask(make_plan(), model="nobody")
        assert wrong_model.status == 404
        assert "nobody" in wrong_model.body["error"]["message"]
        headers = {PLAN_HEADER: sign_plan(make_plan(), secret=SECRET), "content-type": "application/json"}
        async with (
            aiohttp.ClientSession() as session,
            session.post(pair.decode_url + CHAT, data=b"{not json", headers=headers) as response,
        ):
            assert response.status == 400
            assert (await response.json())["error"]["message"]


class RemoteSuite:
    """Prefill replicas help, or cost at most their deadline."""

    async def test_remote_is_local_token_for_token(self, pair, salt):
        prompt = pair.prompt(salt)
        local = await pair.ask(make_plan(pair.prompt(salt + "local"), cache_salt=salt + "a"))
        answer = await pair.ask(remote(prompt, pair.prefill_url, cache_salt=salt + "b"))
        assert answer.mode == "remote"
        assert answer.text == local.text
        assert answer.headers["x-learnonce-load-tokens"] == str(prompt.spans[1].stop)
        assert answer.headers["x-learnonce-prefill"] == "p0"
        # Computed for this very request, although the decode replica did not compute it.
        assert answer.cached_tokens == 0

    async def test_only_what_the_prefill_replica_reused_counts_as_reused(self, pair, salt):
        prompt = pair.prompt(salt)
        first = await pair.ask(make_plan(prompt, cache_salt=salt + "a"))
        await asyncio.to_thread(pair.store.wait, prompt.keys[:1], deadline_s=10.0)
        fresh = pair.prompt(salt, prompt.spans[0].num_tokens, 240, 20)
        assert fresh.keys[0] == prompt.keys[0]
        assert fresh.keys[1] != prompt.keys[1]
        answer = await pair.ask(remote(fresh.held(1), pair.prefill_url, cache_salt=salt + "b"))
        assert first.status == 200
        assert answer.mode == "remote"
        assert answer.headers["x-learnonce-load-tokens"] == str(fresh.spans[1].stop)
        assert answer.cached_tokens == fresh.spans[0].stop

    @pytest.mark.parametrize("fault", ["absent", "dead", "refused", "late", "broken"])
    async def test_a_prefill_replica_that_fails_changes_no_token(self, pair, salt, fault):
        local = await pair.ask(make_plan(pair.prompt(salt + "local"), cache_salt=salt + "a"))
        before = await pair.metric(pair.decode_url, FALLBACKS, reason=fault)

        async def answer(_):
            if fault == "refused":
                return web.Response(status=503, headers={"retry-after": "1"})
            if fault == "late":
                await asyncio.Event().wait()
            return web.json_response({"not": "an answer"})

        async with stand_in(answer) as url:
            peers = {"absent": [], "dead": ["http://127.0.0.1:9"]}.get(fault, [url])
            plan = remote(pair.prompt(salt), *peers, deadline_s=1.0, cache_salt=salt + "b")
            started_s = time.monotonic()
            got = await pair.ask(plan)
            took_s = time.monotonic() - started_s
        assert got.text == local.text
        assert (got.mode, got.headers["x-learnonce-fallback"]) == ("fallback", fault)
        assert got.cached_tokens == 0
        assert await pair.metric(pair.decode_url, FALLBACKS, reason=fault) == before + 1
        assert took_s < 15.0

    async def test_the_next_candidate_is_asked(self, pair, salt):
        plan = remote(pair.prompt(salt), "http://127.0.0.1:9", pair.prefill_url, cache_salt=salt)
        answer = await pair.ask(plan)
        assert (answer.mode, answer.headers["x-learnonce-prefill"]) == ("remote", "p1")

    async def test_a_prefill_replica_that_breaks_in_the_middle_changes_no_token(self, pair, salt):
        local = await pair.ask(make_plan(pair.prompt(salt + "local"), cache_salt=salt + "a"))

        async def die(request):
            request.transport.abort()
            return web.Response()

        async with stand_in(die) as url:
            got = await pair.ask(remote(pair.prompt(salt), url, cache_salt=salt + "b"))
        assert got.text == local.text
        assert got.headers["x-learnonce-fallback"] == "dead"

    async def test_the_prefill_worker_says_what_is_held(self, pair, salt):
        plan = remote(pair.prompt(salt), pair.prefill_url, cache_salt=salt)
        status, answer = await pair.prefill(plan)
        assert status == 200
        assert answer["request_id"] == plan.request_id
        assert answer["held"] == [True, True, False]
        assert answer["reused_tokens"] == 0
        assert answer["computed_tokens"] == plan.num_prompt_tokens

    async def test_identical_prompts_are_computed_once(self, pair, salt):
        name = "learnonce_prefill_shared_total"
        before = await pair.metric(pair.prefill_url, name)
        prompt = pair.prompt(salt, *pair.long_lengths)
        plans = [remote(prompt, pair.prefill_url, cache_salt=salt) for _ in range(4)]
        answers = await asyncio.gather(*(pair.prefill(plan) for plan in plans))
        assert [status for status, _ in answers] == [200] * 4
        assert sum(answer["computed_tokens"] for _, answer in answers) == len(prompt.ids)
        assert await pair.metric(pair.prefill_url, name) == before + 3

    async def test_the_prefill_worker_obeys_signed_plans_only(self, pair):
        async with aiohttp.ClientSession() as session:
            for header, status in (
                ({}, 400),
                ({PLAN_HEADER: sign_plan(make_plan(pair.prompt("x")), secret=b"another")}, 400),
                ({PLAN_HEADER: sign_plan(make_plan(), secret=SECRET)}, 400),
                ({PLAN_HEADER: sign_plan(make_plan(expires_unix_s=time.time() - 5), secret=SECRET)}, 409),
            ):
                async with session.post(pair.prefill_url + "/internal/prefill", headers=header) as response:
                    assert response.status == status
                    assert (await response.json())["error"]["code"] == status


JOIN = JoinPlan("first_k", 0.25)


class JoinSuite:
    """Passages that were learned one by one are moved and joined."""

    lengths = (60, 70, 50)

    async def learned(self, pair, salt, *indexes, lengths=None):
        passages = make_passages(pair.scope, salt, *(lengths or self.lengths))
        for index in indexes:
            prompt = passages.alone(index)
            status, answer = await pair.prefill(remote(prompt, pair.prefill_url, cache_salt=salt))
            assert (status, answer["held"]) == (200, [True, True])
        return passages

    async def test_learned_passages_are_joined_and_said_to_be(self, pair, salt):
        passages = await self.learned(pair, salt, 0, 1, 2)
        answer = await pair.ask(make_plan(passages.joined(), join=JOIN, cache_salt=salt))
        assert (answer.status, answer.mode) == (200, "local")
        assert answer.headers["x-learnonce-join"] == "first_k;share=0.25"
        assert answer.headers["x-learnonce-load-tokens"] == str(40 + sum(self.lengths))
        assert answer.cached_tokens == passages.cached_tokens(0.25)
        # Behind a moved passage nothing is what an exact key says.
        exact_keys = passages.whole.keys[2:]
        assert not any(await asyncio.to_thread(pair.store.lookup, exact_keys, deadline_s=1.0))

    async def test_all_of_it_computed_again_is_a_full_prefill(self, pair, salt):
        passages = await self.learned(pair, salt, 0, 1, 2)
        full = await pair.ask(make_plan(unsaved(passages.whole), cache_salt=salt + "full"))
        joined = await pair.ask(make_plan(passages.joined(), join=JoinPlan("first_k", 1.0), cache_salt=salt))
        assert joined.text == full.text
        assert joined.cached_tokens == 40 + self.lengths[0]

    @pytest.mark.parametrize("hole", [0, 1, 2])
    async def test_what_nobody_holds_is_computed_in_place(self, pair, salt, hole):
        passages = await self.learned(pair, salt, *(i for i in range(3) if i != hole))
        answer = await pair.ask(make_plan(passages.joined(holes=(hole,)), join=JOIN, cache_salt=salt))
        assert answer.status == 200
        assert answer.cached_tokens == passages.cached_tokens(0.25, holes=(hole,))

    async def test_a_passage_that_is_gone_is_a_hole(self, pair, salt):
        passages = await self.learned(pair, salt, 0, 2)
        full = await pair.ask(make_plan(unsaved(passages.whole), cache_salt=salt + "full"))
        plan = make_plan(passages.joined(), join=JoinPlan("first_k", 1.0), cache_salt=salt)
        answer = await pair.ask(plan)
        assert (answer.status, answer.text) == (200, full.text)
        assert answer.cached_tokens == 40 + self.lengths[0]

    async def test_an_exact_request_finds_nothing_of_a_join(self, pair, salt):
        passages = await self.learned(pair, salt, 0, 1, 2)
        await pair.ask(make_plan(passages.joined(), join=JOIN, cache_salt=salt))
        exact = await pair.ask(make_plan(unsaved(passages.whole), cache_salt=salt))
        assert "x-learnonce-join" not in exact.headers
        assert exact.cached_tokens == 0

    async def test_prefill_replicas_do_not_join(self, pair, salt):
        passages = make_passages(pair.scope, salt, *self.lengths)
        status, answer = await pair.prefill(make_plan(passages.joined(), join=JOIN, cache_salt=salt))
        assert (status, answer["error"]["code"]) == (400, 400)


class EndingSuite:
    """Clients, deadlines and engines end requests, and nothing stays behind."""

    async def test_a_client_that_leaves_stops_the_decode_engine(self, pair, salt):
        headers = {PLAN_HEADER: sign_plan(make_plan(pair.prompt(salt), cache_salt=salt), secret=SECRET)}
        body = pair.body(stream=True, max_tokens=1000)
        async with (
            aiohttp.ClientSession() as session,
            session.post(pair.decode_url + CHAT, json=body, headers=headers) as response,
        ):
            await response.content.readline()
            await eventually(lambda: pair.running("decode"), what="the request runs")
        await eventually(lambda: self._idle(pair, "decode"), what="the request is gone")

    async def test_a_client_that_leaves_while_prefill_runs_stops_the_prefill_engine(self, pair, salt):
        prompt = pair.prompt(salt, *pair.long_lengths)
        ended = await pair.metric(pair.decode_url, "learnonce_decode_ended_total", by="client")
        served = await pair.metric(pair.decode_url, "learnonce_decode_requests_total")
        asking = asyncio.create_task(pair.ask(remote(prompt, pair.prefill_url, cache_salt=salt)))
        await eventually(lambda: pair.running("prefill"), what="the prefill runs")
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        await eventually(lambda: self._idle(pair, "prefill"), what="the prefill is gone")

        async def has_ended():
            return await pair.metric(pair.decode_url, "learnonce_decode_ended_total", by="client") == ended + 1

        await eventually(has_ended, what="the request is gone")
        served_now = await pair.metric(pair.decode_url, "learnonce_decode_requests_total")
        assert served_now == served, "the decode replica generated for nobody"

    async def test_a_deadline_before_the_first_byte_is_a_504(self, pair, salt):
        plan = make_plan(pair.prompt(salt), cache_salt=salt, deadline_unix_s=time.time() + 0.5)
        started_s = time.monotonic()
        answer = await pair.ask(plan, max_tokens=1000)
        assert time.monotonic() - started_s < 5.0
        assert answer.status == 504
        assert answer.body["error"]["code"] == 504
        await eventually(lambda: self._idle(pair, "decode"), what="the request is gone")

    async def test_a_deadline_within_a_stream_is_its_last_event(self, pair, salt):
        plan = make_plan(pair.prompt(salt), cache_salt=salt, deadline_unix_s=time.time() + pair.stream_deadline_s)
        answer = await pair.stream(plan, max_tokens=100_000 if pair.model == "noop" else 1200)
        assert answer.status == 200
        assert len(answer.events) >= 2, answer.events
        assert json.loads(answer.events[-1])["error"]["code"] == 504
        await eventually(lambda: self._idle(pair, "decode"), what="the request is gone")

    async def _idle(self, pair, role):
        return await pair.running(role) == 0
