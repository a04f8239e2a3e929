"""The prefill replica as a Ray Serve deployment class.

Covers: starting the worker where Ray has put it. Does not cover: everything else (`prefill_workers.worker`).
"""

from kvstore.engine.actor import ReplicaActor, prepare
from kvstore.engine.settings import EngineSettings
from kvstore.engine.worker import WorkerRuntime
from kvstore.settings import StoreSettings
from prefill_workers.settings import PrefillSettings
from prefill_workers.worker import start_prefill_worker


class PrefillWorker(ReplicaActor):
    """Fills the store. `cluster.app` makes a deployment of it."""

    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self, settings: PrefillSettings, engine: EngineSettings, store: StoreSettings, *, runtime: WorkerRuntime
    ) -> None:
        """Start; the replica is warm when this returns.

        Raises:
            SettingsError: The engine cannot run with these settings.
            UnavailableError: The node's store or the port could not be opened.
        """
        ready = await prepare(engine, store, runtime)
        self._worker = await start_prefill_worker(
            settings, engine, place=ready.place, store=ready.store, store_socket=ready.store_socket
        )
