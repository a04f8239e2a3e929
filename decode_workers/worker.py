"""Put a decode replica together: engine, OpenAI app, plan middleware, port.

Covers: assembly on either engine. Does not cover: Ray (`decode_workers.actor`).
"""

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from starlette.types import ASGIApp

from decode_workers.execute import PlanCheck, PlanMiddleware
from decode_workers.noop import build_noop_app
from decode_workers.prefill import PrefillClient
from decode_workers.settings import DecodeSettings
from kvstore.engine.noop import NoopEngine
from kvstore.engine.serving import Gate
from kvstore.engine.settings import EngineSettings
from kvstore.engine.worker import Worker, WorkerEngine, WorkerPlace, leave_process
from kvstore.interfaces import StoreClient
from kvstore.wire import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeParts:
    """An engine and the OpenAI app over it."""

    engine: WorkerEngine
    app: ASGIApp


async def start_decode_worker(
    settings: DecodeSettings,
    engine: EngineSettings,
    *,
    place: WorkerPlace,
    store: StoreClient,
    store_socket: str,
    leave: Callable[[], None] = leave_process,
) -> Worker:
    """Start a decode replica; it is warm and serves when this returns.

    Args:
        settings: The role's settings.
        engine: The engine's settings. For vLLM, `kvstore.engine.build.engine_environment` is already set.
        place: Where the worker runs.
        store: This process' client of the node store; closed with the worker.
        store_socket: Where the engine's own processes find the node store.
        leave: Ends the process once the engine is dead.

    Raises:
        ServerStartError: The port could not be opened.
        SettingsError: The engine cannot run with its settings.
    """
    async with AsyncExitStack() as resources:
        resources.callback(store.close)
        if engine.kind == "noop":
            parts = noop_parts(engine, store=store)
            resources.push_async_callback(parts.engine.close)
        else:
            # Here and not above: vLLM is heavy, and reads its environment when it is imported.
            from decode_workers.engine import start_vllm

            vllm, app = await start_vllm(settings, engine, store=store, store_socket=store_socket, resources=resources)
            parts = DecodeParts(engine=vllm, app=app)
        worker = assemble(parts, settings=settings, place=place, resources=resources, leave=leave)
        await worker.start()
        return worker


def noop_parts(engine: EngineSettings, *, store: StoreClient) -> DecodeParts:
    """The no-op engine and its app."""
    noop = NoopEngine(engine.noop, store=store)
    return DecodeParts(engine=noop, app=build_noop_app(noop))


def assemble(
    parts: DecodeParts,
    *,
    settings: DecodeSettings,
    place: WorkerPlace,
    resources: AsyncExitStack,
    leave: Callable[[], None] = leave_process,
) -> Worker:
    """Wrap an engine's app into a worker that is not started yet.

    Args:
        parts: Engine and app.
        settings: The role's settings.
        place: Where the worker runs.
        resources: What the worker closes at its end; taken over.
        leave: Ends the process once the engine is dead.
    """
    gate, prefill = Gate(), PrefillClient(settings, node_id=place.node_id)
    resources.push_async_callback(prefill.close)
    app = PlanMiddleware(
        parts.app,
        check=PlanCheck(secret=place.secret, required=settings.require_plan),
        settings=settings,
        prefill=prefill,
        gate=gate,
        engine_dead=lambda: parts.engine.dead,
    )
    return Worker(
        app,
        role=Role.DECODE,
        place=place,
        engine=parts.engine,
        gate=gate,
        life=settings.life,
        resources=resources.pop_all(),
        leave=leave,
    )
