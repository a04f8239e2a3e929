"""A router in a box: a tiny tokenizer, replicas that do as they are told, and real HTTP between them.

Covers: what the router's tests share. Does not cover: engines, stores, Ray.
"""

import asyncio
import io
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvicorn
from aiohttp import web
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cluster.clock import SystemClock
from kvstore.events import ChunkChange, ChunkEvent, FeedItem
from kvstore.keys import KvScope
from kvstore.wire import PLAN_HEADER, Peer, Plan, PrefillAnswer, Role, StoreEndpoint, WorkerReport, open_plan
from router.ingress import build_app
from router.service import RouterService
from router.settings import RouterSettings
from router.tokenizer import ModelTokenizer

SECRET = b"s" * 32
MODEL = "tiny"
SCOPE = KvScope(
    model_digest="ab",
    compute_dtype="float32",
    kv_dtype="float32",
    num_layers=2,
    num_kv_heads=1,
    head_dim=8,
    rope="{}",
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "passages are learned once", "You are helpful 0123456789"]


CHAT = "/v1/chat/completions"
HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
DOCUMENTED = {
    "messages": [{"role": "user", "content": "what does the fox do?"}],
    "documents": [{"title": "Fox", "text": "the quick brown fox jumps"}, {"text": "passages are learned once"}],
}


def quiet(**kwargs: Any) -> RouterSettings:
    """Settings with which nothing happens by itself: tests run the rounds."""
    return RouterSettings(report_period_s=3600.0, report_ttl_s=7200.0, **kwargs)


def decode(name: str = "d0", **kwargs: Any) -> "FakeReplica":
    """A fake decode replica."""
    return FakeReplica(role=Role.DECODE, replica_id=name, **kwargs)


def prefill(name: str = "p0", **kwargs: Any) -> "FakeReplica":
    """A fake prefill replica."""
    return FakeReplica(role=Role.PREFILL, replica_id=name, **kwargs)


@cache
def _base_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<s>")])
    return str(tokenizer.to_str())


def make_tokenizer(
    folder: Path, *, chat_template: str | None = CHATML, bos: bool = False, cache_tokens: int = 1 << 16
) -> ModelTokenizer:
    """A byte-level BPE tokenizer with 400 entries, saved to and loaded from `folder`."""
    tokenizer = Tokenizer.from_str(_base_tokenizer())
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>")
    if chat_template is not None:
        wrapped.chat_template = chat_template
    wrapped.save_pretrained(folder)
    return ModelTokenizer(str(folder), cache_tokens=cache_tokens)


@dataclass
class FakeReplica:
    """An HTTP server whose next behaviour is set by the test."""

    role: Role
    replica_id: str
    node_id: str = "n1"
    scope: KvScope | None = SCOPE
    max_model_len: int = 512
    queued_prompt_tokens: int = 0
    draining: bool = False
    has_store: bool = True
    joins: bool = False
    num_metrics: int = 1
    answer: Callable[[web.Request, Plan], Awaitable[web.StreamResponse]] | None = None
    plans: list[Plan] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""
    _runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, max_field_size=1 << 24, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self.url = f"http://127.0.0.1:{port}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def report(self) -> WorkerReport:
        store = StoreEndpoint(
            node_id=self.node_id,
            epoch="e1",
            socket_path="/nowhere",
            events_address="tcp://127.0.0.1:1",
            snapshot_address="tcp://127.0.0.1:2",
        )
        return WorkerReport(
            peer=Peer(self.replica_id, self.url),
            role=self.role,
            node_id=self.node_id,
            model=MODEL,
            max_model_len=self.max_model_len,
            scope=self.scope,
            store=store if self.has_store else None,
            queued_prompt_tokens=self.queued_prompt_tokens,
            draining=self.draining,
            joins=self.joins,
        )

    async def _metrics(self, _: web.Request) -> web.Response:
        page = '# HELP vllm_running Requests\n# TYPE vllm_running gauge\nvllm_running{engine="0"} 1.0\n'
        page += "bare 2\n" * self.num_metrics
        return web.Response(text=page)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        plan = open_plan(request.headers[PLAN_HEADER], secret=SECRET, now_unix_s=0.0)
        self.plans.append(plan)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.bodies.append(await request.read())
        self.entered.set()
        try:
            if self.answer is not None:
                return await self.answer(request, plan)
            return default_answer(request, plan, self.replica_id)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


def default_answer(request: web.Request, plan: Plan, replica_id: str) -> web.Response:
    """What a healthy worker answers."""
    if request.path == "/internal/prefill":
        answer = PrefillAnswer(
            request_id=plan.request_id,
            reused_tokens=0,
            computed_tokens=plan.num_prompt_tokens,
            held=tuple(True for _ in plan.spans),
            seconds=0.1,
        )
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")
    return web.json_response({"replica": replica_id, "prompt_tokens": plan.num_prompt_tokens})


def sse(*events: str, gate: asyncio.Event | None = None, die: bool = False) -> Any:
    """An answer as a stream: the first event at once, the others when `gate` is set; `die` breaks the connection."""

    async def answer(request: web.Request, _: Plan) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for index, event in enumerate(events):
            if index == 1 and gate is not None:
                await gate.wait()
            await response.write(f"data: {event}\n\n".encode())
        if die:
            assert request.transport is not None
            request.transport.abort()
        return response

    return answer


async def die_silently(request: web.Request, _: Plan) -> web.StreamResponse:
    """The connection breaks before anything was answered."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def never(_request: web.Request, _plan: Plan) -> web.StreamResponse:
    """No answer, ever."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


class FakeSource:
    """Reports of the fake replicas; `failing` makes the next rounds raise."""

    def __init__(self, replicas: Sequence[FakeReplica]) -> None:
        self.replicas = list(replicas)
        self.failing = False

    async def reports(self, role: Role, *, timeout_s: float) -> list[WorkerReport]:
        assert timeout_s > 0
        if self.failing:
            raise RuntimeError("nobody answers")
        return [replica.report() for replica in self.replicas if replica.role is role]


class FakeFeeds:
    """Store feeds that tests write into."""

    def __init__(self) -> None:
        self.queues: dict[str, asyncio.Queue[FeedItem]] = {}
        self.opened: list[StoreEndpoint] = []
        self.closed: list[StoreEndpoint] = []

    async def open(self, endpoint: StoreEndpoint) -> AsyncGenerator[FeedItem, None]:
        self.opened.append(endpoint)
        queue = self.queues.setdefault(endpoint.node_id, asyncio.Queue())
        try:
            while True:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed.append(endpoint)


def added(key: bytes, *, node_id: str = "n1", epoch: str = "e1", seq: int = 1, tokens: int = 1) -> ChunkEvent:
    """The event of a chunk that became readable."""
    return ChunkEvent(ChunkChange.ADDED, key, "host", 64 * tokens, tokens, "raw", node_id, epoch, seq)


@dataclass
class Box:
    """A running router with its replicas."""

    url: str
    service: RouterService
    source: FakeSource
    feeds: FakeFeeds
    http: aiohttp.ClientSession

    async def post(self, path: str, body: Any, **kwargs: Any) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Status, JSON and headers of a POST."""
        data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        async with self.http.post(self.url + path, data=data, **kwargs) as response:
            headers = {name.lower(): value for name, value in response.headers.items()}
            return response.status, json.loads(await response.read()), headers

    async def get(self, path: str, **kwargs: Any) -> tuple[int, Any]:
        """Status and JSON of a GET."""
        async with self.http.get(self.url + path, **kwargs) as response:
            return response.status, json.loads(await response.read())

    def hold(self, plan: Plan, *, node_id: str = "n1") -> None:
        """Tell the directory that every chunk of a plan is readable on a node."""
        for index, span in enumerate(plan.spans):
            self.service.directory.apply(added(span.key, node_id=node_id, seq=index + 1))


@asynccontextmanager
async def box(
    folder: Path,
    replicas: Sequence[FakeReplica],
    *,
    settings: RouterSettings | None = None,
    api_keys: frozenset[str] = frozenset(),
    start_replicas: bool = True,
    name_answers: bool = True,
) -> AsyncIterator[Box]:
    """A router on a free port in front of fake replicas; everything is closed at the end, and nothing is left over."""
    if start_replicas:
        for replica in replicas:
            await replica.start()
    source, feeds = FakeSource(replicas), FakeFeeds()
    service = RouterService(
        settings or quiet(),
        tokenizer=make_tokenizer(folder),
        served_model=MODEL,
        secret=SECRET,
        source=source,
        open_feed=feeds.open,
        clock=SystemClock(),
    )
    tasks_before = asyncio.all_tasks()
    config = uvicorn.Config(
        build_app(service, api_keys=api_keys, name_answers=name_answers),
        port=0,
        log_config=None,
        lifespan="on",
        ws="none",
        http="h11",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    serving = asyncio.create_task(server.serve())
    await wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        async with aiohttp.ClientSession() as http:
            yield Box(f"http://127.0.0.1:{port}", service, source, feeds, http)
    finally:
        server.should_exit = True
        with suppress(asyncio.CancelledError):
            await serving
        for replica in replicas:
            await replica.stop()
    await wait_until(lambda: asyncio.all_tasks() <= tasks_before)
    assert [t.name for t in threading.enumerate() if t.name.startswith("tokenizer")] == []


async def wait_until(condition: Callable[[], bool], *, deadline_s: float = 10.0) -> None:
    """Poll until `condition` holds.

    Raises:
        TimeoutError: It did not in `deadline_s` seconds.
    """
    async with asyncio.timeout(deadline_s):
        while not condition():
            await asyncio.sleep(0.002)
