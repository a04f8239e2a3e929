"""vLLM's `AsyncLLM` as a worker's engine: what the prefill and the decode role do alike with it.

Covers: starting, warming up, facts for the worker's report, stopping without leftovers.
Does not cover: engine arguments (`kvstore.engine.build`), what is asked of the engine (`*_workers.engine`).
"""

import asyncio
import logging
import time
import uuid
from typing import Final

from vllm import SamplingParams, TokensPrompt
from vllm.v1.engine.async_llm import AsyncLLM

from cluster.errors import SettingsError
from kvstore.engine.build import build_engine_args
from kvstore.engine.coding import check_coding
from kvstore.engine.extension import METHOD
from kvstore.engine.paging import UnsupportedLayoutError
from kvstore.engine.params import build_transfer_params
from kvstore.engine.scope import engine_weights, kv_scope
from kvstore.engine.settings import EngineSettings
from kvstore.engine.worker import kill_children
from kvstore.interfaces import StoreClient
from kvstore.keys import KvScope, child_key, root_key
from kvstore.wire import Role, Span, SpanKind

logger = logging.getLogger(__name__)

_WARMUP_SALT: Final = "warmup"
_WARMUP_WAIT_S: Final = 10.0
_WARMUP_LOADS: Final = 2


class LlmEngine:
    """An `AsyncLLM` behind the `WorkerEngine` protocol."""

    def __init__(
        self, settings: EngineSettings, *, role: Role, store_socket: str, client: type[AsyncLLM] = AsyncLLM
    ) -> None:
        """Start the engine. Call it in the event loop that will use it; it blocks for as long as the model loads.

        Args:
            settings: The engine's; `kvstore.engine.build.engine_environment` is already set.
            role: What the worker does.
            store_socket: Where the engine's own processes find the node store.
            client: The class of the engine's client.

        Raises:
            SettingsError: vLLM cannot run with these settings.
        """
        # The environment has bound this process to its cores, so cores are no question any more.
        unbound = settings.model_copy(update={"cpus": ()})
        args = build_engine_args(unbound, role=role, store_socket=store_socket)
        self.llm = client.from_engine_args(args)
        config = self.llm.vllm_config
        served = config.model_config.served_model_name
        self._model = served[0] if isinstance(served, list) else str(served)
        self._scope: KvScope | None = None
        self._joins = False
        try:
            self._scope = kv_scope(config)
            check_coding(settings.connector, self._scope, weights=engine_weights(config))
        except UnsupportedLayoutError as error:
            logger.warning("KV of this model is not reused: %s", error)
        except SettingsError:
            self.llm.shutdown(timeout=0)
            raise

    @property
    def model(self) -> str:
        """Served model name."""
        return self._model

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        return int(self.llm.model_config.max_model_len)

    @property
    def scope(self) -> KvScope | None:
        """None for a model whose KV cannot be shared."""
        return self._scope

    @property
    def joins(self) -> bool:
        """Whether passages can be moved and joined in its KV."""
        return self._joins

    async def allow_joins(self) -> None:
        """Let the engine join passages, if its model can be. Call before the first request."""
        self._joins = await allow_joins(self.llm)

    @property
    def dead(self) -> bool:
        """In vLLM's own view: its core process has ended, or its output loop has."""
        return bool(self.llm.errored)

    @property
    def running_requests(self) -> int:
        """Requests waiting or running in the engine."""
        return int(self.llm.get_num_unfinished_requests())

    @property
    def queued_prompt_tokens(self) -> int:
        """Prompt tokens of requests without a first token."""
        return int(self.llm.get_num_queued_tokens())

    async def close(self) -> None:
        """Stop the engine and whatever processes it leaves behind."""
        await asyncio.to_thread(self.llm.shutdown, timeout=0)
        await asyncio.to_thread(kill_children)


async def allow_joins(llm: AsyncLLM) -> bool:
    """Let an engine that has just started join passages; the log says why it cannot."""
    try:
        (refusal,) = await llm.collective_rpc(METHOD)
    except Exception:
        # The user's own worker_extension_cls, for one. Such an engine serves without joins.
        logger.exception("event=joins_off")
        return False
    if refusal is not None:
        logger.warning("event=joins_off reason=%r", refusal)
    return refusal is None


async def warm_up(engine: LlmEngine, *, store: StoreClient, num_tokens: int) -> None:
    """Allow joins, then generate, save and load one short prompt: the first user does not pay for first touches.

    The chunk has a fixed key, so all replicas together leave one chunk in the store. A store that is away costs the
    warm-up of its path, not the start.
    """
    await engine.allow_joins()
    if num_tokens == 0:
        return
    started_s = time.monotonic()
    prompt = [index % 500 + 100 for index in range(num_tokens)]
    if engine.scope is None:
        await _generate(engine, prompt, load=(), save=())
        return
    key = child_key(root_key(engine.scope, salt=_WARMUP_SALT), prompt)
    span = Span(key=key, start=0, stop=num_tokens, kind=SpanKind.PREFIX, held=False, save=True)
    await _generate(engine, prompt, load=(), save=(span,))
    (held,) = await asyncio.to_thread(store.wait, [key], deadline_s=_WARMUP_WAIT_S)
    reused = 0
    for _ in range(_WARMUP_LOADS if held else 0):
        reused = await _generate(engine, prompt, load=(span,), save=())
    logger.info("engine warm held=%s reused_tokens=%d seconds=%.2f", held, reused, time.monotonic() - started_s)


async def _generate(engine: LlmEngine, prompt: list[int], *, load: tuple[Span, ...], save: tuple[Span, ...]) -> int:
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    transfer = build_transfer_params(load=load, save=save, load_deadline_s=_WARMUP_WAIT_S)
    params.extra_args = {"kv_transfer_params": transfer}
    name = f"warmup-{uuid.uuid4().hex}"
    # A salt of its own, or vLLM's prefix cache would answer the second time.
    inputs = TokensPrompt(prompt_token_ids=prompt, cache_salt=name)
    reused = 0
    # Not the client's own method, which in the decode role lets plans only name chunks.
    async for output in AsyncLLM.generate(engine.llm, inputs, params, name):
        reused = output.num_cached_tokens or 0
    return reused
