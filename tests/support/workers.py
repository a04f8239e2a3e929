"""A prefill and a decode worker for tests, without Ray: how to ask them, plan for them, and stand in for them."""

import asyncio
import contextlib
import io
import json
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import aiohttp
import msgspec
from aiohttp import web

from decode_workers import worker as decode_worker
from decode_workers.settings import DecodeSettings
from kvstore.engine.noop import NoopSettings
from kvstore.engine.settings import EngineSettings
from kvstore.engine.worker import LifeSettings, WorkerPlace
from kvstore.keys import chain_keys, root_key
from kvstore.testing import MemoryStore, MemoryStoreClient
from kvstore.wire import PLAN_HEADER, Mode, Peer, Plan, Span, SpanKind, pack_tokens, sign_plan
from prefill_workers import worker as prefill_worker
from prefill_workers.noop import NoopPrefillEngine
from prefill_workers.settings import PrefillSettings

SECRET = bytes(range(32))
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


async def eventually(condition, *, within_s=20.0, what="condition"):
    """Poll `condition` (plain or async) until it is true; its value."""
    stop_s = time.monotonic() + within_s
    while True:
        value = condition()
        value = await value if asyncio.iscoroutine(value) else value
        if value:
            return value
        assert time.monotonic() < stop_s, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.02)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids in spans, with their keys."""

    ids: list
    spans: tuple

    @property
    def keys(self):
        return [span.key for span in self.spans]

    def held(self, num_spans):
        """The same prompt; the router believes that the first `num_spans` are held."""
        spans = tuple(msgspec.structs.replace(s, held=i < num_spans) for i, s in enumerate(self.spans))
        return Prompt(ids=self.ids, spans=spans)


def make_prompt(scope, *lengths, salt="", first=300):
    """A prompt of as many spans as lengths; the last is the tail, which is not saved."""
    total = sum(lengths)
    ids = [first + (i * 37) % 2000 for i in range(total)]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    parts = [ids[start : start + n] for start, n in zip(starts, lengths, strict=True)]
    keys = chain_keys(root_key(scope, salt=salt), parts)
    spans = tuple(
        Span(
            key=key,
            start=start,
            stop=start + n,
            kind=SpanKind.PASSAGE if i < len(lengths) - 1 else SpanKind.TAIL,
            held=False,
            save=i < len(lengths) - 1,
        )
        for i, (key, start, n) in enumerate(zip(keys, starts, lengths, strict=True))
    )
    return Prompt(ids=ids, spans=spans)


@dataclass(frozen=True, kw_only=True)
class Passages:
    """A prompt of an anchor, passages and a tail, whose passages can be learned one by one."""

    scope: object
    salt: str
    anchor: list
    passages: tuple
    tail: list

    @property
    def whole(self):
        """As an exact prompt: every key behind everything before it."""
        return self._chained([self.anchor, *self.passages, self.tail], [SpanKind.PREFIX, *self._kinds, SpanKind.TAIL])

    def alone(self, index):
        """The anchor and one passage behind it: what learning it computes."""
        return self._chained([self.anchor, self.passages[index]], [SpanKind.PREFIX, SpanKind.PASSAGE])

    def joined(self, *, holes=()):
        """The whole prompt with its passages as they were learned; those in `holes` nobody holds."""
        anchor, *passages, tail = (msgspec.structs.replace(span, save=False) for span in self.whole.spans)
        spans = [msgspec.structs.replace(anchor, held=True)]
        for index, span in enumerate(passages):
            learned = self.alone(index).spans[1]
            # Directly behind the anchor a passage is exact.
            base = learned.start if index else None
            moved = msgspec.structs.replace(span, key=learned.key, held=True, base=base)
            spans.append(span if index in holes else moved)
        return Prompt(ids=self.whole.ids, spans=(*spans, tail))

    def cached_tokens(self, share, *, holes=()):
        """What need not be computed of the joined prompt."""
        exact = 0 if 0 in holes else len(self.passages[0])
        moved = sum(len(ids) for index, ids in enumerate(self.passages) if index and index not in holes)
        return len(self.anchor) + exact + moved - round(share * moved)

    @property
    def _kinds(self):
        return [SpanKind.PASSAGE] * len(self.passages)

    def _chained(self, parts, kinds):
        keys = chain_keys(root_key(self.scope, salt=self.salt), parts)
        spans, start = [], 0
        for key, part, kind in zip(keys, parts, kinds, strict=True):
            stop = start + len(part)
            spans.append(Span(key=key, start=start, stop=stop, kind=kind, held=False, save=kind is not SpanKind.TAIL))
            start = stop
        return Prompt(ids=[i for part in parts for i in part], spans=tuple(spans))


def unsaved(prompt):
    """The same prompt, of which nothing is kept."""
    return Prompt(ids=prompt.ids, spans=tuple(msgspec.structs.replace(span, save=False) for span in prompt.spans))


def make_passages(scope, salt, *lengths, anchor=40, tail=20):
    """Passages of these lengths; none begins like another."""
    parts = [
        [300 + (i * 37 + n * 101) % 2000 for i in range(length)] for n, length in enumerate((anchor, *lengths, tail))
    ]
    return Passages(scope=scope, salt=salt, anchor=parts[0], passages=tuple(parts[1:-1]), tail=parts[-1])


def make_plan(prompt=None, **values):
    """A plan that is valid for a minute."""
    now = time.time()
    defaults = {
        "request_id": f"test-{time.monotonic_ns()}",
        "expires_unix_s": now + 60,
        "deadline_unix_s": now + 60,
        "load_deadline_s": 10.0,
    }
    if prompt is not None:
        defaults |= {"prompt": pack_tokens(prompt.ids), "spans": prompt.spans}
    return Plan(**(defaults | values))


def remote(prompt, *urls, deadline_s=20.0, **values):
    """A plan that sends the prompt to prefill replicas."""
    peers = tuple(Peer(replica_id=f"p{i}", url=url) for i, url in enumerate(urls))
    return make_plan(prompt, mode=Mode.REMOTE, prefill=peers, prefill_deadline_s=deadline_s, **values)


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict
    body: dict | None
    events: list = field(default_factory=list)

    @property
    def text(self):
        choice = self.body["choices"][0]
        return choice["message"]["content"] if "message" in choice else choice["text"]

    @property
    def usage(self):
        return self.body["usage"]

    @property
    def cached_tokens(self):
        return self.usage["prompt_tokens_details"]["cached_tokens"]

    @property
    def mode(self):
        return self.headers.get("x-learnonce-mode")


@dataclass
class Pair:
    """One prefill and one decode worker that share a store, whatever engine is inside."""

    decode_url: str
    prefill_url: str
    scope: object
    model: str
    store: object
    running: object
    """async (role) -> requests inside that worker's engine."""
    lengths: tuple = (300, 200, 20)
    long_lengths: tuple = (1500, 20)
    """A prompt that takes long enough to compute to be caught at it."""
    stream_deadline_s: float = 0.8
    """Enough for some tokens of an answer."""

    def prompt(self, salt, *lengths, first=300):
        return make_prompt(self.scope, *(lengths or self.lengths), salt=salt, first=first)

    def body(self, **values):
        defaults = {
            "model": self.model,
            "messages": [{"role": "user", "content": "not what the plan says"}],
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
        }
        return defaults | values

    async def ask(self, plan, *, path=CHAT, header=None, **values):
        """One request, not streamed."""
        headers = {"content-type": "application/json"}
        if plan or header:
            headers[PLAN_HEADER] = header or sign_plan(plan, secret=SECRET)
        body = io.BytesIO(json.dumps(self.body(**values)).encode())
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.decode_url + path, data=body, headers=headers) as response,
        ):
            text = await response.text()
            return Answer(response.status, response.headers.copy(), json.loads(text) if text else None)

    async def stream(self, plan, *, path=CHAT, **values):
        """One streamed request, with all of its events."""
        headers = {PLAN_HEADER: sign_plan(plan, secret=SECRET)}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.decode_url + path, json=self.body(**options, **values), headers=headers) as response,
        ):
            events = [line[6:] async for line in lines_of(response) if line.startswith("data: ")]
            return Answer(response.status, response.headers.copy(), None, events)

    async def prefill(self, plan):
        """Ask the prefill worker directly."""
        headers = {PLAN_HEADER: sign_plan(plan, secret=SECRET)}
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.prefill_url + "/internal/prefill", headers=headers) as response,
        ):
            return response.status, await response.json()

    async def metric(self, url, name, **labels):
        """The sum of a metric's samples."""
        async with aiohttp.ClientSession() as session, session.get(url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        hits = [line for line in lines if line.startswith((name + "{", name + " ")) and all(w in line for w in wanted)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in hits)


async def lines_of(response):
    async for raw in response.content:
        if line := raw.decode().strip():
            yield line


@contextlib.asynccontextmanager
async def stand_in(handler):
    """An HTTP server that answers `/internal/prefill` in place of a prefill worker; its URL."""
    app = web.Application()
    app.router.add_post("/internal/prefill", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def place(replica_id, *, find_store=None):
    async def no_store():
        return None

    return WorkerPlace(
        replica_id=replica_id, node_id="n0", host="127.0.0.1", secret=SECRET, find_store=find_store or no_store
    )


def noop_settings(**speeds):
    defaults = {"prefill_s_per_token": 0.0003, "decode_s_per_token": 0.002, "kv_bytes_per_token": 64}
    return EngineSettings(kind="noop", noop=NoopSettings(**(defaults | speeds)))


@dataclass
class NoopPair(Pair):
    """Both workers in this process and event loop."""

    decode: object = None
    prefiller: object = None
    decode_engine: object = None
    prefill_engine: object = None
    left: list = field(default_factory=list)
    """Roles whose process would have ended."""


@contextlib.asynccontextmanager
async def noop_pair(*, prefill_settings=None, life=None, capacity_bytes=None, **speeds):
    """Two no-op workers over one in-memory store."""
    memory, engine = MemoryStore(capacity_bytes=capacity_bytes), noop_settings(**speeds)
    life = life or LifeSettings(drain_s=5.0, engine_check_s=0.01, death_grace_s=1.0)
    left = []
    async with AsyncExitStack() as stack:
        clients = [MemoryStoreClient(memory) for _ in range(3)]
        parts = decode_worker.noop_parts(engine, store=clients[0])
        prefill_engine = NoopPrefillEngine(engine.noop, store=clients[1])
        decode = decode_worker.assemble(
            parts,
            settings=DecodeSettings(life=life),
            place=place("d0"),
            resources=closing(parts.engine, clients[0]),
            leave=lambda: left.append("decode"),
        )
        prefiller = prefill_worker.assemble(
            prefill_engine,
            settings=prefill_settings or PrefillSettings(life=life, save_wait_s=1.0),
            place=place("p0"),
            store=clients[1],
            resources=closing(prefill_engine, clients[1]),
            leave=lambda: left.append("prefill"),
        )
        for each in (decode, prefiller):
            await each.start()
            stack.push_async_callback(each.stop)
        engines = {"decode": parts.engine, "prefill": prefill_engine}

        async def running(role):
            return engines[role].running_requests

        yield NoopPair(
            decode_url=decode.url,
            prefill_url=prefiller.url,
            scope=prefill_engine.scope,
            model=prefill_engine.model,
            store=clients[2],
            running=running,
            decode=decode,
            prefiller=prefiller,
            decode_engine=parts.engine,
            prefill_engine=prefill_engine,
            left=left,
        )
    assert memory.leftovers() == []


def closing(engine, client):
    resources = AsyncExitStack()
    resources.callback(client.close)
    resources.push_async_callback(engine.close)
    return resources
