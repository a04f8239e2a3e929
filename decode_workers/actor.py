"""The decode replica as a Ray Serve deployment class.

Covers: starting the worker where Ray has put it. Does not cover: everything else (`decode_workers.worker`).
"""

from decode_workers.settings import DecodeSettings
from decode_workers.worker import start_decode_worker
from kvstore.engine.actor import ReplicaActor, prepare
from kvstore.engine.settings import EngineSettings
from kvstore.engine.worker import WorkerRuntime
from kvstore.settings import StoreSettings


class DecodeWorker(ReplicaActor):
    """Generates. `cluster.app` makes a deployment of it."""

    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self, settings: DecodeSettings, engine: EngineSettings, store: StoreSettings, *, runtime: WorkerRuntime
    ) -> None:
        """Start; the replica is warm when this returns.

        Raises:
            SettingsError: The engine cannot run with these settings.
            UnavailableError: The node's store or the port could not be opened.
        """
        ready = await prepare(engine, store, runtime)
        self._worker = await start_decode_worker(
            settings, engine, place=ready.place, store=ready.store, store_socket=ready.store_socket
        )
