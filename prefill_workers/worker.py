"""Put a prefill replica together: engine, service, port.

Covers: assembly on either engine. Does not cover: Ray (`prefill_workers.actor`).
"""

from collections.abc import Callable
from contextlib import AsyncExitStack

from prometheus_client import CollectorRegistry

from kvstore.engine.serving import Gate
from kvstore.engine.settings import EngineSettings
from kvstore.engine.worker import Worker, WorkerPlace, leave_process
from kvstore.interfaces import StoreClient
from kvstore.wire import Role
from prefill_workers.app import PrefillEngine, PrefillService, build_app
from prefill_workers.noop import NoopPrefillEngine
from prefill_workers.settings import PrefillSettings


async def start_prefill_worker(
    settings: PrefillSettings,
    engine: EngineSettings,
    *,
    place: WorkerPlace,
    store: StoreClient,
    store_socket: str,
    leave: Callable[[], None] = leave_process,
) -> Worker:
    """Start a prefill replica; it is warm and serves when this returns.

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
        registry: Callable[[], CollectorRegistry] | None = None
        if engine.kind == "noop":
            started: PrefillEngine = NoopPrefillEngine(engine.noop, store=store)
            resources.push_async_callback(started.close)
        else:
            # Here and not above: vLLM is heavy, and reads its environment when it is imported.
            from prefill_workers.engine import start_vllm

            started, registry = await start_vllm(
                settings, engine, store=store, store_socket=store_socket, resources=resources
            )
        worker = assemble(
            started, registry=registry, settings=settings, place=place, store=store, resources=resources, leave=leave
        )
        await worker.start()
        return worker


def assemble(
    engine: PrefillEngine,
    *,
    settings: PrefillSettings,
    place: WorkerPlace,
    store: StoreClient,
    resources: AsyncExitStack,
    registry: Callable[[], CollectorRegistry] | None = None,
    leave: Callable[[], None] = leave_process,
) -> Worker:
    """Wrap an engine into a worker that is not started yet.

    Args:
        engine: What runs prompts.
        settings: The role's settings.
        place: Where the worker runs.
        store: Asked whether saved chunks can be read.
        resources: What the worker closes at its end; taken over.
        registry: The engine's own metrics, if it has any in this process.
        leave: Ends the process once the engine is dead.
    """
    gate = Gate()
    service = PrefillService(
        engine, store=store, settings=settings, secret=place.secret, node_id=place.node_id, gate=gate
    )
    resources.callback(service.close)
    return Worker(
        build_app(service, engine, registry=registry),
        role=Role.PREFILL,
        place=place,
        engine=engine,
        gate=gate,
        life=settings.life,
        resources=resources.pop_all(),
        leave=leave,
    )
