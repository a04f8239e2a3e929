"""The router's HTTP API over real sockets, in front of replicas that do as they are told.

Covers: relaying, failures of replicas, deadlines, disconnects, bad input, keys, plans as replicas get them.
Does not cover: engines (`tests/engine`), Ray (`tests/ray`), the rule itself (`router_policy_test.py`), learning ahead
and explanations (`router_learning_test.py`).
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from support.router_fakes import (
    CHAT,
    DOCUMENTED,
    HELLO,
    MODEL,
    box,
    decode,
    die_silently,
    never,
    prefill,
    quiet,
    sse,
    wait_until,
)

from kvstore.wire import Mode, Plan, Role
from router.metrics import FALLBACKS_TOTAL, REQUESTS_TOTAL
from router.settings import DeadlineSettings, LimitSettings, RuleSettings


def requests_total(outcome: str) -> float:
    return float(REQUESTS_TOTAL.labels(outcome)._value.get())


def fallbacks(cause: str) -> float:
    return float(FALLBACKS_TOTAL.labels(cause)._value.get())


async def test_a_large_body_reaches_the_replica_whole(tmp_path: Path) -> None:
    d0 = decode(max_model_len=1 << 24)
    body = json.dumps({"messages": [{"role": "user", "content": "fox " * 500_000}]}).encode()
    async with box(tmp_path, [d0]) as b:
        assert (await b.post(CHAT, body))[0] == 200
    assert d0.bodies == [body]


async def test_a_request_reaches_a_decode_replica_unchanged(tmp_path: Path) -> None:
    d0 = decode()
    async with box(tmp_path, [d0]) as b:
        raw = b'{ "model":"tiny",   "messages":[{"role":"user","content":"hello"}] , "seed": 7}'
        headers = {
            "x-request-id": "abc-1",
            "authorization": "Bearer secret",
            "x-serve-router-plan": "forged",
            "traceparent": "00-1",
        }
        status, answer, returned = await b.post(CHAT, raw, headers=headers)
    assert (status, answer["replica"]) == (200, "d0")
    assert returned["x-request-id"] == "abc-1"
    assert d0.bodies == [raw]
    assert d0.plans[0].request_id == "abc-1"
    assert d0.headers[0]["x-request-id"] == "abc-1"
    assert d0.headers[0]["traceparent"] == "00-1"
    assert "authorization" not in d0.headers[0]


async def test_bytes_are_streamed_as_they_come(tmp_path: Path) -> None:
    gate = asyncio.Event()
    d0 = decode(answer=sse("one", "two", "[DONE]", gate=gate))
    async with box(tmp_path, [d0]) as b, b.http.post(b.url + CHAT, json=HELLO) as response:
        assert response.content_type == "text/event-stream"
        first = await response.content.readany()
        assert first == b"data: one\n\n"  # before the replica may send the rest
        gate.set()
        assert await response.content.read() == b"data: two\n\ndata: [DONE]\n\n"


async def test_a_client_that_goes_away_stops_the_replica_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    gate = asyncio.Event()
    d0 = decode(answer=sse("one", "two", gate=gate))
    before = requests_total("cancelled")
    async with box(tmp_path, [d0]) as b:
        async with b.http.post(b.url + CHAT, json=HELLO) as response:
            await response.content.readany()
            response.close()
        await asyncio.wait_for(d0.cancelled.wait(), 5)
        await wait_until(lambda: requests_total("cancelled") == before + 1)
        assert b.service.planner.ledger.total(Role.DECODE) == 0


async def test_a_client_that_goes_away_stops_the_replica_before_the_first_byte(tmp_path: Path) -> None:
    d0 = decode(answer=never)
    async with box(tmp_path, [d0]) as b:
        asking = asyncio.create_task(b.post(CHAT, HELLO))
        await d0.entered.wait()
        asking.cancel()
        await asyncio.wait_for(d0.cancelled.wait(), 5)
        await wait_until(lambda: b.service.planner.ledger.total(Role.DECODE) == 0)


@pytest.mark.parametrize("dead", ["port", "silent", "headers_only"])
async def test_a_replica_that_fails_before_the_first_byte_is_replaced(tmp_path: Path, dead: str) -> None:
    answers = {"silent": die_silently, "headers_only": sse(die=True)}
    d0, d1 = decode("d0", answer=answers.get(dead)), decode("d1")
    before = fallbacks("connect")
    async with box(tmp_path, [d0, d1]) as b:
        if dead == "port":
            await d0.stop()
        status, answer, _ = await b.post(CHAT, HELLO)
        assert (status, answer["replica"]) == (200, "d1")
        assert fallbacks("connect") == before + 1
        # Nobody asks it again before a fresh report.
        status, answer, _ = await b.post(CHAT, HELLO)
        assert answer["replica"] == "d1"
        assert len(d0.plans) == (0 if dead == "port" else 1)
        await b.service.refresh()
        assert len(b.service.membership.ready(Role.DECODE)) == 2


async def test_a_draining_replica_that_still_gets_a_request_is_replaced(tmp_path: Path) -> None:
    async def refuse(_request: web.Request, _plan: Plan) -> web.StreamResponse:
        return web.json_response({"error": {"message": "draining"}}, status=503)

    async with box(tmp_path, [decode("d0", answer=refuse), decode("d1")]) as b:
        status, answer, _ = await b.post(CHAT, HELLO)
    assert (status, answer["replica"]) == (200, "d1")


async def test_an_expired_plan_is_made_anew_for_the_same_replica(tmp_path: Path) -> None:
    d0 = decode()

    async def expired(_request: web.Request, _plan: Plan) -> web.StreamResponse:
        d0.answer = None
        return web.json_response({"error": {"type": "PlanExpiredError"}}, status=409)

    d0.answer = expired
    async with box(tmp_path, [d0]) as b:
        status, answer, _ = await b.post(CHAT, HELLO)
    assert (status, answer["replica"], len(d0.plans)) == (200, "d0", 2)


async def test_no_replica_left_is_a_503_that_says_when_to_come_back(tmp_path: Path) -> None:
    async with box(tmp_path, [decode("d0", answer=die_silently), decode("d1", answer=die_silently)]) as b:
        status, answer, headers = await b.post(CHAT, HELLO)
        assert status == 503
        assert headers["retry-after"] == "2"
        assert answer["error"]["type"] == "service_unavailable_error"
        assert b.service.planner.ledger.total(Role.DECODE) == 0


async def test_a_replica_that_dies_in_the_middle_ends_the_stream_with_an_error_event(tmp_path: Path) -> None:
    before = requests_total("broken")
    async with box(tmp_path, [decode(answer=sse("one", die=True)), decode("d1")]) as b:
        async with b.http.post(b.url + CHAT, json=HELLO) as response:
            text = (await response.read()).decode()
        assert text.startswith("data: one\n\n")
        error = json.loads(text.split("data: ")[-1])["error"]
        assert error["code"] == "replica_failed"
        assert "[DONE]" not in text
        assert [r.peer.replica_id for r in b.service.membership.ready(Role.DECODE)] == ["d1"]
        await wait_until(lambda: requests_total("broken") == before + 1)


async def test_a_whole_answer_that_breaks_is_asked_for_again(tmp_path: Path) -> None:
    async def half(request: web.Request, _: Plan) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json", "content-length": "100"})
        await response.prepare(request)
        await response.write(b'{"half":')
        assert request.transport is not None
        request.transport.abort()
        return response

    async with box(tmp_path, [decode("d0", answer=half), decode("d1")]) as b:
        status, answer, _ = await b.post(CHAT, HELLO)
    assert (status, answer["replica"]) == (200, "d1")


@pytest.mark.parametrize("streaming", [False, True])
async def test_no_request_outlives_its_deadline(tmp_path: Path, streaming: bool) -> None:
    answer = sse("one", "two", gate=asyncio.Event()) if streaming else never
    d0 = decode(answer=answer)
    settings = quiet(deadlines=DeadlineSettings(request_s=0.3))
    async with box(tmp_path, [d0], settings=settings) as b:
        async with b.http.post(b.url + CHAT, json=HELLO) as response:
            text = (await asyncio.wait_for(response.read(), 5)).decode()
        assert response.status == (200 if streaming else 504)
        assert json.loads(text.removeprefix("data: one\n\n\n\ndata: "))["error"]["code"] == "deadline_exceeded"
        await asyncio.wait_for(d0.cancelled.wait(), 5)


async def test_errors_of_the_replica_are_the_clients(tmp_path: Path) -> None:
    async def bad(_request: web.Request, _plan: Plan) -> web.StreamResponse:
        return web.json_response({"error": {"message": "temperature must be >= 0"}}, status=400)

    before = requests_total("rejected")
    async with box(tmp_path, [decode(answer=bad)]) as b:
        status, answer, _ = await b.post(CHAT, HELLO)
        await wait_until(lambda: requests_total("rejected") == before + 1)
    assert (status, answer["error"]["message"]) == (400, "temperature must be >= 0")


async def test_a_hundred_requests_at_once_are_spread_and_leave_nothing(tmp_path: Path) -> None:
    replicas = [decode(f"d{i}") for i in range(4)]
    async with box(tmp_path, replicas) as b:
        texts = [f"question {i} " * (i % 7 + 1) for i in range(100)]
        bodies = [{"messages": [{"role": "user", "content": text}]} for text in texts]
        results = await asyncio.gather(*(b.post(CHAT, body) for body in bodies))
        assert [status for status, _, _ in results] == [200] * 100
        ids = {headers["x-request-id"] for _, _, headers in results}
        assert len(ids) == 100
        assert b.service.planner.ledger.total(Role.DECODE) == 0
    assert sorted(plan.request_id for replica in replicas for plan in replica.plans) == sorted(ids)
    assert min(len(replica.plans) for replica in replicas) >= 10  # booked load spreads them


LONG = "fox " * 2000
BAD: list[tuple[str, Any, int, str, str | None]] = [
    ("malformed", b'{"messages": [', 400, "not valid JSON", None),
    ("not an object", b"[1]", 400, "JSON object", None),
    ("invalid utf-8", b'{"a": "\xff"}', 400, "not valid JSON", None),
    ("lone surrogate", b'{"messages":[{"role":"user","content":"\\ud800"}]}', 400, "not valid JSON", None),
    ("deep", b'{"a":' * 20_000, 400, "not valid JSON", None),
    ("no messages", {}, 400, "messages", "messages"),
    ("empty messages", {"messages": []}, 400, "at least one", "messages"),
    ("messages wrong", {"messages": "hi"}, 400, "list", "messages"),
    ("message wrong", {"messages": ["hi"]}, 400, "messages[0]", "messages[0]"),
    ("content wrong", {"messages": [{"role": "user", "content": 3}]}, 400, "content", "messages[0].content"),
    ("unknown model", {**HELLO, "model": "gpt"}, 404, "`gpt` does not exist", "model"),
    ("model wrong", {**HELLO, "model": 3}, 400, "string", "model"),
    ("documents wrong", {**HELLO, "documents": "x"}, 400, "list", "documents"),
    ("documents empty", {**HELLO, "documents": []}, 400, "empty", "documents"),
    ("document wrong", {**HELLO, "documents": ["x"]}, 400, "object", "documents[0]"),
    ("document empty", {**HELLO, "documents": [{"text": " \n"}]}, 400, "text", "documents[0].text"),
    ("document text", {**HELLO, "documents": [{"text": 3}]}, 400, "text", "documents[0].text"),
    ("document title", {**HELLO, "documents": [{"text": "x", "title": 3}]}, 400, "title", "documents[0].title"),
    ("document field", {**HELLO, "documents": [{"text": "x", "id": "3"}]}, 400, "unknown field `id`", "documents[0]"),
    ("stream wrong", {**HELLO, "stream": "yes"}, 400, "true or false", "stream"),
    ("max_tokens wrong", {**HELLO, "max_tokens": "9"}, 400, "whole number", "max_tokens"),
    ("salt wrong", {**HELLO, "cache_salt": 3}, 400, "string", "cache_salt"),
    ("salt empty", {**HELLO, "cache_salt": ""}, 400, "characters", "cache_salt"),
    ("tools wrong", {**HELLO, "tools": "x"}, 400, "list", "tools"),
    ("forged transfer", {**HELLO, "kv_transfer_params": {"a": 1}}, 400, "cluster", "kv_transfer_params"),
    ("too long", {"messages": [{"role": "user", "content": LONG}]}, 400, "512 tokens", "messages"),
    ("answer too long", {**HELLO, "max_tokens": 512}, 400, "512 tokens", "messages"),
    ("10 MB document", {**HELLO, "documents": [{"text": "x" * 10_000_000}]}, 400, "at least", "messages"),
    ("opaque with documents", {**DOCUMENTED, "echo": True}, 400, "echo", "documents"),
    ("template with documents", {**DOCUMENTED, "chat_template_kwargs": {"tokenize": 1}}, 400, "kwargs", "documents"),
]


@pytest.mark.parametrize(("body", "status", "part", "param"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
async def test_bad_input_gets_a_clear_error_and_the_router_goes_on(
    tmp_path: Path, body: Any, status: int, part: str, param: str | None
) -> None:
    d0 = decode()
    async with box(tmp_path, [d0]) as b:
        got, answer, headers = await b.post(CHAT, body)
        assert got == status
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert part in answer["error"]["message"]
        assert answer["error"]["param"] == param
        assert headers["x-request-id"]
        assert d0.bodies == []
        assert (await b.post(CHAT, HELLO))[0] == 200


async def test_too_large_a_body_is_refused_with_and_without_a_declared_length(tmp_path: Path) -> None:
    async def parts() -> Any:
        for _ in range(64):
            yield b"x" * 1024

    settings = quiet(limits=LimitSettings(max_body_bytes=16_384))
    async with box(tmp_path, [decode()], settings=settings) as b:
        assert (await b.post(CHAT, b"x" * 20_000))[0] == 413
        async with b.http.post(b.url + CHAT, data=parts()) as response:
            assert response.status == 413
            assert (await response.json())["error"]["code"] == "body_too_large"


async def test_a_body_that_never_ends_does_not_outlive_the_deadline(tmp_path: Path) -> None:
    settings = quiet(deadlines=DeadlineSettings(request_s=0.3))
    async with box(tmp_path, [decode()], settings=settings) as b:
        host, port = b.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{".encode())
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()
        await writer.wait_closed()


async def test_a_client_that_goes_away_while_it_sends_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = requests_total("cancelled")
    async with box(tmp_path, [decode()]) as b:
        host, port = b.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{".encode())
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        await wait_until(lambda: requests_total("cancelled") == before + 1)
    assert "ClientDisconnect" not in caplog.text


@pytest.mark.parametrize("name_answers", [True, False])
async def test_an_answer_carries_its_request_id_once_or_leaves_it_to_the_proxy(
    tmp_path: Path, name_answers: bool
) -> None:
    d0 = decode()
    async with box(tmp_path, [d0], name_answers=name_answers) as b:
        for path in (CHAT, "/v1/nothing"):
            async with b.http.post(b.url + path, json=HELLO, headers={"x-request-id": "abc"}) as response:
                assert response.headers.getall("x-request-id", []) == ["abc"] * name_answers
    assert d0.plans[0].request_id == "abc"


async def test_unknown_paths_and_methods_are_openai_errors(tmp_path: Path) -> None:
    async with box(tmp_path, [decode()]) as b:
        status, answer = await b.get("/v1/nothing")
        assert (status, answer["error"]["code"]) == (404, "unknown_url")
        status, answer = await b.get(CHAT)
        assert status == 405
        assert "GET" in answer["error"]["message"]


async def test_api_keys(tmp_path: Path) -> None:
    async with box(tmp_path, [decode()], api_keys=frozenset({"k1", "k2"})) as b:
        for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic k1"}, {"authorization": "k1"}):
            status, answer, _ = await b.post(CHAT, HELLO, headers=headers)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert (await b.post(CHAT, HELLO, headers={"authorization": "Bearer k2"}))[0] == 200
        assert (await b.get("/health"))[0] == 200
        assert (await b.get("/v1/models"))[0] == 401


async def test_readiness_says_what_is_awaited(tmp_path: Path) -> None:
    d0 = decode()
    async with box(tmp_path, [d0]) as b:
        assert (await b.get("/ready"))[0] == 200
        d0.draining = True
        await b.service.refresh()
        status, state = await b.get("/ready")
        assert (status, state["ready"]) == (503, False)
        assert "decode replica" in state["waiting_for"][0]
        assert (await b.get("/health"))[0] == 200
        status, answer, headers = await b.post(CHAT, HELLO)
        assert (status, headers["retry-after"]) == (503, "2")
        assert "no decode replica" in answer["error"]["message"]


async def test_models_and_tokenize(tmp_path: Path) -> None:
    d0 = decode()
    async with box(tmp_path, [d0]) as b:
        _, models = await b.get("/v1/models")
        assert [(m["id"], m["max_model_len"]) for m in models["data"]] == [(MODEL, 512)]
        status, answer, _ = await b.post("/tokenize", {"prompt": "hello"})
        assert (status, answer["replica"]) == (200, "d0")
        assert d0.plans[0].prompt == b""
        assert (await b.post("/detokenize", b"{"))[0] == 400
        await d0.stop()
        assert (await b.post("/tokenize", {"prompt": "hello"}))[0] == 503


async def test_metrics_of_all_replicas_on_one_page(tmp_path: Path) -> None:
    slow = prefill("p1")
    async with box(tmp_path, [decode("d0"), prefill("p0"), slow]) as b:
        await slow.stop()
        await b.post(CHAT, HELLO)
        async with b.http.get(b.url + "/metrics") as response:
            page = await response.text()
    assert 'vllm_running{replica="d0",role="decode",engine="0"} 1.0' in page
    assert 'bare{replica="p0",role="prefill"} 2' in page
    assert page.count("# TYPE vllm_running gauge") == 1
    assert 'learnonce_router_ttft_seconds_count{mode="local"}' in page
    assert 'replica="p1"' not in page


async def test_a_metrics_page_of_many_reads_is_whole_and_one_over_the_bound_is_left_out(tmp_path: Path) -> None:
    long, longer = decode("d0", num_metrics=50_000), decode("d1", num_metrics=200_000)
    settings = quiet(limits=LimitSettings(max_metrics_bytes=1 << 20))
    async with box(tmp_path, [long, longer], settings=settings) as b, b.http.get(b.url + "/metrics") as response:
        page = await response.text()
    assert page.count('bare{replica="d0",role="decode"} 2') == 50_000
    assert 'replica="d1"' not in page


async def test_a_long_unknown_prompt_goes_remote_and_a_held_one_stays_local(tmp_path: Path) -> None:
    d0, p0 = decode(), prefill()
    settings = quiet(rule=RuleSettings(remote_min_tokens=20, min_save_tokens=4))
    async with box(tmp_path, [d0, p0], settings=settings) as b:
        await b.post(CHAT, DOCUMENTED)
        remote = d0.plans[0]
        assert remote.mode is Mode.REMOTE
        assert [peer.replica_id for peer in remote.prefill] == ["p0"]
        assert remote.prefill_deadline_s > 5
        assert all(span.save and not span.held for span in remote.spans)
        b.hold(remote)
        await b.post(CHAT, DOCUMENTED)
        local = d0.plans[1]
        assert local.mode is Mode.LOCAL
        assert local.held_tokens == local.num_prompt_tokens == remote.num_prompt_tokens
        salted = {**DOCUMENTED, "cache_salt": "tenant"}
        await b.post(CHAT, salted)
        assert (d0.plans[2].held_tokens, d0.plans[2].cache_salt) == (0, "tenant")


async def test_opaque_requests_are_left_to_the_replica(tmp_path: Path) -> None:
    d0 = decode()
    parts = [{"type": "image_url", "image_url": {"url": "http://x"}}]
    async with box(tmp_path, [d0]) as b:
        for body in ({"messages": [{"role": "user", "content": parts}]}, {**HELLO, "truncate_prompt_tokens": 3}):
            assert (await b.post(CHAT, body))[0] == 200
        assert (await b.post("/v1/completions", {"prompt": [1, 2, 3]}))[0] == 200
    assert [(plan.prompt, plan.spans) for plan in d0.plans] == [(b"", ())] * 3


async def test_the_client_session_keeps_working_after_refused_uploads(tmp_path: Path) -> None:
    settings = quiet(limits=LimitSettings(max_body_bytes=1024))
    async with box(tmp_path, [decode()], settings=settings) as b, aiohttp.ClientSession() as http:
        for _ in range(3):
            async with http.post(b.url + CHAT, data=b"x" * 5000) as response:
                assert response.status == 413
        async with http.post(b.url + CHAT, json=HELLO) as response:
            assert response.status == 200
