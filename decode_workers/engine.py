"""The decode role on vLLM: its own OpenAI app and serving classes, with three hooks that make them obey a plan.

Covers: building the app, and the hooks. Does not cover: the engine process itself (`kvstore.engine.llm`).

1. `PlannedChat` and `PlannedCompletion` stand in front of vLLM's serving classes. They give vLLM the plan's token ids
   as the prompt, through the fields that vLLM has for it, so nothing is rendered or tokenised twice and `documents`
   are not rendered again. Tools, structured output and validation stay vLLM's.
2. `PlannedLLM.generate` attaches what to load and save, only if the prompt *is* the plan's, and drops whatever a
   client sent in its place: KV is never loaded into another prompt, and clients cannot name chunks.
3. The same method corrects `num_cached_tokens`: tokens that a prefill replica computed for this very request are not
   reused tokens.
"""

from argparse import Namespace
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.routing import Route
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.outputs import RequestOutput
from vllm.renderers.inputs.preprocess import extract_prompt_components
from vllm.sampling_params import SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.prometheus import get_prometheus_registry

from decode_workers.execute import CURRENT, count_reuse
from decode_workers.metrics import FALLBACKS
from decode_workers.plan import Execution, FallbackReason
from decode_workers.settings import DecodeSettings
from kvstore.engine.exposition import metrics_endpoint
from kvstore.engine.llm import LlmEngine, warm_up
from kvstore.engine.params import JoinParams, build_transfer_params
from kvstore.engine.settings import EngineSettings
from kvstore.interfaces import StoreClient
from kvstore.wire import Role

_TRANSFER = "kv_transfer_params"


class PlannedLLM(AsyncLLM):
    """vLLM's engine client; a request made while `CURRENT` is set obeys it."""

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `AsyncLLM.generate`."""
        execution = CURRENT.get()
        ids = extract_prompt_components(self.model_config, prompt).token_ids
        _attach(sampling_params, execution, ids)
        reused: int | None = None
        async with aclosing(super().generate(prompt, sampling_params, request_id, **options)) as outputs:
            async for output in outputs:
                if reused is None:
                    cached = output.num_cached_tokens or 0
                    reused = count_reuse(execution, prompt_tokens=len(ids or ()), cached_tokens=cached)
                output.num_cached_tokens = reused
                yield output


def _attach(params: SamplingParams, execution: Execution | None, ids: list[int] | None) -> None:
    extra = dict(params.extra_args or {})
    extra.pop(_TRANSFER, None)
    if execution is not None and (execution.load or execution.save):
        if ids is not None and tuple(ids) == execution.prompt_token_ids:
            extra[_TRANSFER] = build_transfer_params(
                load=execution.load,
                save=execution.save,
                load_deadline_s=execution.load_deadline_s,
                cache_salt=execution.cache_salt,
                join=_join_params(execution),
            )
        else:
            FALLBACKS.labels(reason=FallbackReason.OTHER_PROMPT).inc()
    params.extra_args = extra or None


def _join_params(execution: Execution) -> JoinParams | None:
    if (join := execution.join) is None:
        return None
    return JoinParams(method=join.method, share=join.share, tail_start=execution.tail_start)


class PlannedChat:
    """In front of vLLM's chat completions."""

    def __init__(self, serving: OpenAIServingChat) -> None:
        self._serving = serving

    async def create_chat_completion(self, request: ChatCompletionRequest, raw_request: Request | None = None) -> Any:
        """As vLLM's, with the plan's prompt."""
        execution = _strip(request)
        if execution is not None and execution.prompt_token_ids:
            # vLLM's decode-side token reuse: it takes these ids in place of rendering the messages.
            request.kv_transfer_params = {"prompt_token_ids": list(execution.prompt_token_ids)}
        return await self._serving.create_chat_completion(request, raw_request)


class PlannedCompletion:
    """In front of vLLM's text completions."""

    def __init__(self, serving: OpenAIServingCompletion) -> None:
        self._serving = serving

    async def create_completion(self, request: CompletionRequest, raw_request: Request | None = None) -> Any:
        """As vLLM's, with the plan's prompt."""
        execution = _strip(request)
        if execution is not None and execution.prompt_token_ids:
            request.prompt, request.prompt_embeds = list(execution.prompt_token_ids), None
        return await self._serving.create_completion(request, raw_request)


def _strip(request: ChatCompletionRequest | CompletionRequest) -> Execution | None:
    """Drop what only we may say, put in what the plan says for every prompt."""
    request.kv_transfer_params = request.ec_transfer_params = None
    if request.vllm_xargs:
        allowed = {name: value for name, value in request.vllm_xargs.items() if not name.endswith("_transfer_params")}
        request.vllm_xargs = allowed or None
    execution = CURRENT.get()
    if execution is not None and execution.engine_salt:
        request.cache_salt = execution.engine_salt
    return execution


async def start_vllm(
    settings: DecodeSettings,
    engine: EngineSettings,
    *,
    store: StoreClient,
    store_socket: str,
    resources: AsyncExitStack,
) -> tuple[LlmEngine, FastAPI]:
    """Start an engine and vLLM's OpenAI app over it, obeying plans; warm when this returns.

    Args:
        settings: The role's settings.
        engine: The engine's settings.
        store: For the warm-up.
        store_socket: Where the engine's own processes find the node store.
        resources: Closes the engine.
    """
    started = LlmEngine(engine, role=Role.DECODE, store_socket=store_socket, client=PlannedLLM)
    resources.push_async_callback(started.close)
    app = await build_vllm_app(started.llm, engine, chat_template=settings.chat_template)
    await warm_up(started, store=store, num_tokens=settings.warmup_tokens)
    return started, app


async def build_vllm_app(llm: AsyncLLM, settings: EngineSettings, *, chat_template: str | None) -> FastAPI:
    """Build vLLM's OpenAI app over a running engine, obeying plans.

    Args:
        llm: The engine; a `PlannedLLM`, except in tests of vLLM itself.
        settings: What the engine was started with; its parsers are used here.
        chat_template: File of a chat template; None takes the model's own.
    """
    args = _frontend_args(settings, llm, chat_template)
    tasks = await llm.get_supported_tasks()
    app = build_app(args, tasks, llm.model_config)
    await init_app_state(llm, app.state, args, tasks)
    app.state.openai_serving_chat = PlannedChat(app.state.openai_serving_chat)
    app.state.openai_serving_completion = PlannedCompletion(app.state.openai_serving_completion)
    # vLLM's error handler tells "the server" to stop when the engine is dead; our worker leaves by itself.
    app.state.server = SimpleNamespace(should_exit=False)
    app.router.routes.insert(0, Route("/metrics", metrics_endpoint(get_prometheus_registry)))
    return app


def _frontend_args(settings: EngineSettings, llm: AsyncLLM, chat_template: str | None) -> Namespace:
    config = llm.model_config
    line = ["--model", config.model, "--served-model-name", str(config.served_model_name)]
    line += ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log", "--disable-fastapi-docs"]
    if settings.tool_call_parser is not None:
        line += ["--enable-auto-tool-choice", "--tool-call-parser", settings.tool_call_parser]
    if settings.reasoning_parser is not None:
        line += ["--reasoning-parser", settings.reasoning_parser]
    if chat_template is not None:
        line += ["--chat-template", chat_template]
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(line)
    return args
