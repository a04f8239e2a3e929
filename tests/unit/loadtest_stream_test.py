"""Timing a stream: what counts as the first token, and what is no stream at all."""

import json

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from cluster.errors import UnavailableError
from loadtest.stream import stream_chat

USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}


def event(delta=None, usage=None):
    choices = [] if delta is None else [{"index": 0, "delta": delta}]
    return b"data: " + json.dumps({"choices": choices, "usage": usage}, separators=(",", ":")).encode() + b"\n\n"


async def serve(*pieces, status=200):
    async def answer(request):
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    server = TestServer(app)
    await server.start_server()
    return server


async def ask(server):
    async with aiohttp.ClientSession() as session:
        try:
            return await stream_chat(session, str(server.make_url("/")).rstrip("/"), {"model": "m"})
        finally:
            await server.close()


async def test_role_and_usage_events_are_no_tokens():
    whole = [event({"role": "assistant", "content": ""}), event({"content": "a"}), event({"content": "b"})]
    streamed = await ask(await serve(*whole, event(usage=USAGE), b"data: [DONE]\n\n"))
    assert (streamed.events, streamed.prompt_tokens, streamed.cached_tokens, streamed.completion_tokens) == (2, 9, 4, 2)
    assert 0 < streamed.ttft_s <= streamed.total_s


async def test_events_cut_in_the_middle_are_put_together():
    text = event({"content": "a"}) + event(usage=USAGE) + b"data: [DONE]\n\n"
    streamed = await ask(await serve(text[:13], text[13:40], text[40:]))
    assert streamed.events == 1


@pytest.mark.parametrize(
    ("pieces", "status", "message"),
    [
        ([event({"content": "a"})], 200, "ended early"),
        ([b'data: {"error": {"message": "engine died"}}\n\n'], 200, "engine died"),
        ([b'{"error": {"message": "no replica"}}'], 503, "HTTP 503.*no replica"),
    ],
)
async def test_a_stream_that_is_none(pieces, status, message):
    with pytest.raises(UnavailableError, match=message):
        await ask(await serve(*pieces, status=status))
