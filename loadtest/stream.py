"""One streamed request, timed as a client sees it.

Covers: server-sent events of the OpenAI API with as little client work as possible. Does not cover: load generation.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from cluster.errors import UnavailableError


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """What one stream took."""

    ttft_s: float
    """Request sent to first content event received."""
    total_s: float
    events: int
    """Content events; one token each unless the server coalesces."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


async def stream_chat(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any]) -> Streamed:
    """POST a chat completion with streaming and time it.

    Args:
        session: Reused between requests, so that connecting is not timed every time.
        url: The API without /v1.
        body: The request without `stream` and `stream_options`.

    Raises:
        UnavailableError: An error status, an error event, or a stream that ended without `[DONE]`.
    """
    payload = {**body, "stream": True, "stream_options": {"include_usage": True}}
    began_s = time.perf_counter()
    first_s = 0.0
    events = 0
    last_data = b""
    done = False
    async with session.post(f"{url}/v1/chat/completions", json=payload) as answer:
        if answer.status != 200:
            raise UnavailableError(f"HTTP {answer.status}: {(await answer.text())[:500]}")
        buffer = b""
        async for data in answer.content.iter_any():
            buffer += data
            *complete, buffer = buffer.split(b"\n\n")
            for event in complete:
                if event == b"data: [DONE]":
                    done = True
                elif event.startswith(b"data: "):
                    last_data = event[6:]
                    # The first event carries only the role; tokens come with a non-empty delta or a finish reason.
                    if b'"content":""' not in event and b'"choices":[]' not in event:
                        events += 1
                        first_s = first_s or time.perf_counter()
    end_s = time.perf_counter()
    if not done:
        raise UnavailableError(f"the stream ended early: {(last_data or buffer)[:300]!r}")
    usage = json.loads(last_data)["usage"]
    details = usage.get("prompt_tokens_details") or {}
    return Streamed(
        ttft_s=(first_s or end_s) - began_s,
        total_s=end_s - began_s,
        events=events,
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=details.get("cached_tokens") or 0,
        completion_tokens=usage["completion_tokens"],
    )
