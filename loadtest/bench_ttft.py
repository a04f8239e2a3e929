"""What learning a passage once is worth at the client, and what the serving path itself costs.

Covers: `learnonce bench ttft`. Does not cover: load, many clients, other tiers.

Every cold request has a salt of its own, so that nothing computed before can serve it. "Other process" means: the
documents are prefilled by the prefill replica (`POST /v1/documents`); the decode replica, which has never seen them,
answers from the store. Each engine is bound to its own cores as in any cluster.
"""

import asyncio
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp

from cluster.cli import start_cluster, stop_cluster
from cluster.demo import load_documents
from cluster.errors import UnavailableError
from cluster.settings import Settings, settings_from_json, to_json
from loadtest.results import result, summary
from loadtest.stream import Streamed, stream_chat

_QUESTION: Final = "Name one fact from the text."
_MAX_TOKENS: Final = 4
_NOOP_REQUESTS: Final = 200
_NOOP_STREAM_TOKENS: Final = 2000
_TOKENS_PER_WORD: Final = 1.35
"""Of the demo documents with the embedded model's tokenizer; only sizes the prompt."""


async def measure(
    settings: Settings, *, repeats: int, tokens: int, port: int, log: Callable[[str], None]
) -> dict[str, Any]:
    """Start clusters, measure, stop them; the content of a result file."""
    with tempfile.TemporaryDirectory(prefix="learnonce-bench-") as scratch:
        real = _bench_settings(settings, scratch, port=port, kind="vllm")
        began_s = time.perf_counter()
        log("starting 1 prefill + 1 decode replica on vLLM")
        async with _cluster(real) as (url, session):
            startup_s = time.perf_counter() - began_s
            log(f"ready after {startup_s:.1f} s")
            prompts = await _measure_prompts(session, url, repeats=repeats, tokens=tokens, log=log)
        noop = _bench_settings(settings, scratch, port=port + 1, kind="noop")
        log("starting the same cluster with the no-op engine")
        async with _cluster(noop) as (url, session):
            path = await _measure_path(session, url)
    cold, same, other = (summary(prompts[name]) for name in ("cold", "same", "other"))
    figures = {
        "cold_ttft_s": cold["median"],
        "warm_same_process_ttft_s": same["median"],
        "warm_other_process_ttft_s": other["median"],
        "warm_speedup": cold["median"] / other["median"],
        "startup_s": startup_s,
        "noop_added_ttft_p50_ms": path["ttft_p50_ms"],
        "noop_stream_tokens_per_s": path["stream_tokens_per_s"],
    }
    return result(figures, runs={"cold": cold, "warm_same": same, "warm_other": other}, prompts=prompts, path=path)


async def _measure_prompts(
    session: aiohttp.ClientSession, url: str, *, repeats: int, tokens: int, log: Callable[[str], None]
) -> dict[str, Any]:
    model = await _model(session, url)
    document = {"title": "Station manual", "text": _text_of(tokens)}
    runs: dict[str, list[float]] = {"cold": [], "same": [], "other": []}
    prompt_tokens = 0

    async def ask(salt: str, *, least_cached: int, most_cached: int | None = None) -> Streamed:
        body = {
            "model": model,
            "documents": [document],
            "messages": [{"role": "user", "content": _QUESTION}],
            "max_completion_tokens": _MAX_TOKENS,
            "temperature": 0,
            "cache_salt": salt,
        }
        streamed = await stream_chat(session, url, body)
        # A figure for a request that did something else than its name says would be a lie.
        if not least_cached <= streamed.cached_tokens <= (most_cached or streamed.prompt_tokens):
            raise UnavailableError(f"expected another reuse than {streamed.cached_tokens} of {streamed.prompt_tokens}")
        return streamed

    for run in range(repeats):
        salt = secrets.token_hex(8)
        cold = await ask(salt, least_cached=0, most_cached=64)
        prompt_tokens = cold.prompt_tokens
        enough = int(0.95 * prompt_tokens)
        same = await ask(salt, least_cached=enough)
        salt = secrets.token_hex(8)
        await _learn(session, url, document, salt)
        other = await ask(salt, least_cached=enough)
        for name, streamed in (("cold", cold), ("same", same), ("other", other)):
            runs[name].append(streamed.ttft_s)
        log(
            f"run {run + 1}: cold {cold.ttft_s:.2f} s, same process {same.ttft_s:.3f} s, "
            f"other process {other.ttft_s:.3f} s ({other.cached_tokens} of {prompt_tokens} tokens reused)"
        )
    return {**runs, "prompt_tokens": prompt_tokens}


async def _measure_path(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """The serving path with an engine that takes no time."""
    model = await _model(session, url)
    body = {"model": model, "messages": [{"role": "user", "content": _QUESTION}], "max_completion_tokens": 1}
    for _ in range(20):
        await stream_chat(session, url, body)
    one = [(await stream_chat(session, url, body)).ttft_s for _ in range(_NOOP_REQUESTS)]
    long = {**body, "max_completion_tokens": _NOOP_STREAM_TOKENS, "ignore_eos": True}
    single = await stream_chat(session, url, long)
    began_s = time.perf_counter()
    eight = await asyncio.gather(*(stream_chat(session, url, long) for _ in range(8)))
    eight_s = time.perf_counter() - began_s
    return {
        "ttft_p50_ms": 1000 * summary(one)["median"],
        "ttft_p99_ms": 1000 * sorted(one)[int(0.99 * len(one))],
        "stream_tokens_per_s": single.completion_tokens / single.total_s,
        "eight_streams_tokens_per_s": sum(s.completion_tokens for s in eight) / eight_s,
    }


@asynccontextmanager
async def _cluster(settings: Settings) -> AsyncIterator[tuple[str, aiohttp.ClientSession]]:
    url = await asyncio.to_thread(start_cluster, settings)
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
            yield url, session
    finally:
        await asyncio.to_thread(stop_cluster, settings)


def _bench_settings(settings: Settings, scratch: str, *, port: int, kind: str) -> Settings:
    """The user's settings with a port, name and state folder of the benchmark's own."""
    cluster = settings.cluster.model_copy(update={"name": f"bench-{kind}", "port": port, "state_dir": scratch})
    engine = settings.engine.model_copy(update={"kind": kind})
    # In memory only: what a former run left in files or buckets must not answer this one.
    store = settings.store.model_copy(update={"nvme": None, "object": None})
    changed = settings.model_copy(update={"cluster": cluster, "engine": engine, "store": store})
    return settings_from_json(to_json(changed))


async def _model(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(f"{url}/v1/models") as answer:
        return str((await answer.json())["data"][0]["id"])


async def _learn(session: aiohttp.ClientSession, url: str, document: dict[str, str], salt: str) -> None:
    async with session.post(f"{url}/v1/documents", json={"documents": [document], "cache_salt": salt}) as answer:
        body = await answer.json()
    if answer.status != 200 or any(item["state"] != "learned" for item in body["data"]):
        raise UnavailableError(f"learning failed: {body}")


def _text_of(tokens: int) -> str:
    """Text of the demo documents, repeated with numbered headings until it has about `tokens` tokens."""
    words_wanted = int(tokens / _TOKENS_PER_WORD)
    pages = [document["text"] for document in load_documents().values()]
    words: list[str] = []
    edition = 0
    while len(words) < words_wanted:
        edition += 1
        for page in pages:
            words += [f"Edition {edition}.", *page.split(" ")]
    return " ".join(words[:words_wanted])
