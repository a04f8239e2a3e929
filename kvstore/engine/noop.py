"""An engine that computes nothing, for tests of the cluster and for measuring what the serving path itself costs.

Covers: real loads and saves through the store, a deterministic answer, configurable time per token.
Does not cover: HTTP (`*_workers.noop`). Imports neither torch nor vLLM.

KV of a chunk is bytes derived from its key and tokens, so wrong bytes are noticed: they count as a miss, as a corrupt
chunk does on a real engine. The answer depends on the prompt's tokens only, never on what was loaded.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from pydantic import NonNegativeFloat, PositiveInt

from cluster.clock import Clock, SystemClock
from cluster.errors import UnavailableError
from cluster.settings_base import SettingsBase
from kvstore.interfaces import ChunkMeta, StoreClient
from kvstore.keys import ChunkKey, KvScope
from kvstore.wire import JoinPlan, Span, key_of

T = TypeVar("T")

_IO_THREADS: Final = 8
_RESERVE_DEADLINE_S: Final = 1.0
_VOCABULARY: Final = 50_000


class NoopSettings(SettingsBase):
    """Speeds and sizes of the no-op engine."""

    model: str = "noop"
    """Served model name."""
    max_model_len: PositiveInt = 131_072
    """Tokens of prompt and answer together."""
    prefill_s_per_token: NonNegativeFloat = 0.0
    """Seconds per prompt token that is computed."""
    decode_s_per_token: NonNegativeFloat = 0.0
    """Seconds per token of the answer."""
    kv_bytes_per_token: PositiveInt = 1024
    """Bytes of a chunk per token; a multiple of 8."""


class NoopEngineDeadError(UnavailableError):
    """The no-op engine was killed."""


@dataclass(frozen=True, slots=True)
class NoopToken:
    """One token of an answer."""

    token_id: int
    cached_tokens: int
    """Prompt tokens that were not computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoopRequest:
    """One prompt and what to do with its chunks."""

    prompt: tuple[int, ...]
    load: tuple[Span, ...] = ()
    save: tuple[Span, ...] = ()
    load_deadline_s: float = 0.0
    tenant: str = ""
    """Whose chunks are saved."""
    join: JoinPlan | None = None
    """Chunks may stand elsewhere than they were learned, and behind gaps."""
    max_tokens: int = 16


class NoopEngine:
    """See the module. One per process, like a real engine."""

    def __init__(self, settings: NoopSettings, *, store: StoreClient, clock: Clock | None = None) -> None:
        self._settings, self._store = settings, store
        self._clock = clock or SystemClock()
        self._threads = ThreadPoolExecutor(_IO_THREADS, thread_name_prefix="noop-io")
        self._dead = asyncio.Event()
        self._uncomputed: dict[object, int] = {}

    @property
    def model(self) -> str:
        """Served model name."""
        return self._settings.model

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self._settings.max_model_len

    @property
    def scope(self) -> KvScope:
        """All no-op engines with equal settings share chunks."""
        return KvScope(
            model_digest=hashlib.sha256(self._settings.model.encode()).hexdigest(),
            compute_dtype="float32",
            kv_dtype="float32",
            num_layers=1,
            num_kv_heads=1,
            head_dim=self._settings.kv_bytes_per_token // 8,
            rope="{}",
        )

    @property
    def joins(self) -> bool:
        """It can do what it is told, as it does nothing."""
        return True

    @property
    def dead(self) -> bool:
        """Whether `kill` was called."""
        return self._dead.is_set()

    @property
    def running_requests(self) -> int:
        """Requests inside the engine."""
        return len(self._uncomputed)

    @property
    def queued_prompt_tokens(self) -> int:
        """Prompt tokens accepted and not yet computed."""
        return sum(self._uncomputed.values())

    def kill(self) -> None:
        """Die like an engine whose process was killed: running requests fail, new ones too."""
        self._dead.set()

    async def close(self) -> None:
        """Stop the threads."""
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)

    async def generate(self, request: NoopRequest) -> AsyncIterator[NoopToken]:
        """Load, "compute", save, then yield the answer token by token.

        Raises:
            NoopEngineDeadError: The engine was killed.
        """
        ticket = object()
        self._uncomputed[ticket] = len(request.prompt)
        try:
            cached = min(await self._load(request), len(request.prompt) - 1)
            await self._work((len(request.prompt) - cached) * self._settings.prefill_s_per_token)
            self._uncomputed[ticket] = 0
            await self._in_thread(self._save_all, request)
            for token_id in answer_tokens(request.prompt, request.max_tokens):
                await self._work(self._settings.decode_s_per_token)
                yield NoopToken(token_id, cached)
        finally:
            del self._uncomputed[ticket]

    async def _work(self, seconds: float) -> None:
        if seconds > 0 and not self.dead:
            sleep = asyncio.ensure_future(self._clock.sleep_s(seconds))
            death = asyncio.create_task(self._dead.wait())
            try:
                await asyncio.wait({sleep, death}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                sleep.cancel()
                death.cancel()
        if self.dead:
            raise NoopEngineDeadError("the no-op engine was killed")

    async def _load(self, request: NoopRequest) -> int:
        if not request.load:
            return 0
        return await self._in_thread(self._load_all, request)

    async def _in_thread(self, function: Callable[[NoopRequest], T], request: NoopRequest) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, request)

    def _load_all(self, request: NoopRequest) -> int:
        """Tokens that need not be computed."""
        leases = self._store.read([key_of(span) for span in request.load], deadline_s=request.load_deadline_s)
        intact = []
        for span, lease in zip(request.load, leases, strict=True):
            if lease is not None:
                with lease:
                    intact += [span] if lease.payload == self._payload(span, request.prompt) else []
        exact_tokens = 0
        for span in intact:
            if span.base is not None or span.start != exact_tokens:
                break
            exact_tokens = span.stop
        if request.join is None:
            return exact_tokens
        moved_tokens = sum(span.num_tokens for span in intact if span.base is not None)
        return exact_tokens + moved_tokens - round(request.join.share * moved_tokens)

    def _save_all(self, request: NoopRequest) -> None:
        for span in request.save:
            payload = self._payload(span, request.prompt)
            lease = self._store.reserve(
                key_of(span), self._meta(span, request.tenant), len(payload), deadline_s=_RESERVE_DEADLINE_S
            )
            if lease is not None:
                lease.payload[:] = payload
                lease.commit()

    def _meta(self, span: Span, tenant: str) -> ChunkMeta:
        return ChunkMeta(
            num_tokens=span.num_tokens,
            num_layers=1,
            num_kv_heads=1,
            head_dim=self._settings.kv_bytes_per_token // 8,
            dtype="float32",
            base_position=span.start,
            tenant=tenant,
            learned_unix_s=time.time(),
        )

    def _payload(self, span: Span, prompt: Sequence[int]) -> bytes:
        return chunk_payload(
            ChunkKey(span.key), prompt[span.start : span.stop], bytes_per_token=self._settings.kv_bytes_per_token
        )


def chunk_payload(key: ChunkKey, tokens: Sequence[int], *, bytes_per_token: int) -> bytes:
    """The no-op KV of one chunk."""
    mixed = np.asarray(tokens, dtype="<u4") ^ np.frombuffer(key[:4], dtype="<u4")
    return np.repeat(mixed, bytes_per_token // 4).astype("<u4").tobytes()


def answer_tokens(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The no-op answer to a prompt: the same prompt always gets the same tokens.

    Example:
        >>> answer_tokens([1, 2, 3], 4) == answer_tokens([1, 2, 3], 8)[:4] != answer_tokens([3, 2, 1], 4)
        True
    """
    seed = hashlib.blake2b(np.asarray(prompt, dtype="<u4").tobytes(), digest_size=8).digest()
    draws = np.random.default_rng(int.from_bytes(seed, "little")).integers(0, _VOCABULARY, size=num_tokens)
    return [int(draw) for draw in draws]
