"""The prefill role on vLLM: run a prompt for its KV, throw the token away.

Covers: one call into `AsyncLLM`. Does not cover: the engine process (`kvstore.engine.llm`), queueing
(`prefill_workers.app`).
"""

import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack

from prometheus_client import CollectorRegistry
from vllm import SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.metrics.prometheus import get_prometheus_registry

from kvstore.engine.llm import LlmEngine, warm_up
from kvstore.engine.params import build_transfer_params
from kvstore.engine.settings import EngineSettings
from kvstore.interfaces import StoreClient
from kvstore.wire import Role
from prefill_workers.plan import PrefillWork
from prefill_workers.settings import PrefillSettings


async def start_vllm(
    settings: PrefillSettings,
    engine: EngineSettings,
    *,
    store: StoreClient,
    store_socket: str,
    resources: AsyncExitStack,
) -> "tuple[LlmPrefillEngine, Callable[[], CollectorRegistry]]":
    """Start an engine; warm when this returns.

    Args:
        settings: The role's settings.
        engine: The engine's settings.
        store: For the warm-up.
        store_socket: Where the engine's own processes find the node store.
        resources: Closes the engine.

    Returns:
        The engine, and where its metrics are.
    """
    started = LlmPrefillEngine(engine, role=Role.PREFILL, store_socket=store_socket)
    resources.push_async_callback(started.close)
    await warm_up(started, store=store, num_tokens=settings.warmup_tokens)
    return started, get_prometheus_registry


class LlmPrefillEngine(LlmEngine):
    """An `AsyncLLM` that fills the store."""

    async def prefill(self, work: PrefillWork) -> int:
        """Load what is held, compute the rest, let the connector save it.

        Cancelling the call aborts the engine's request.

        Returns:
            Prompt tokens that were not computed.
        """
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        params.extra_args = {
            "kv_transfer_params": build_transfer_params(
                load=work.load,
                save=work.save,
                load_deadline_s=work.load_deadline_s,
                cache_salt=work.cache_salt,
                handoff=work.handoff,
            )
        }
        prompt = TokensPrompt(prompt_token_ids=list(work.prompt_token_ids))
        if work.cache_salt:
            prompt["cache_salt"] = work.cache_salt
        # A name of our own: the same request may come again after a retry, and vLLM refuses a name twice.
        reused = 0
        async for output in self.llm.generate(prompt, params, f"prefill-{work.request_id}-{uuid.uuid4().hex[:8]}"):
            reused = output.num_cached_tokens or 0
        return reused
