"""What the prefill and the decode replica do alike as Ray Serve deployments.

Covers: where the replica runs, its node's store, the methods that Serve and routers call.
Does not cover: the worker itself (`kvstore.engine.worker`), placement (`cluster.app`).
"""

import logging
import os
from dataclasses import dataclass
from typing import Final

import ray.util
from ray import serve

from cluster.telemetry import configure_logging
from kvstore.actor import ensure_node_store_async, node_store_endpoint_async
from kvstore.client import NodeStoreClient
from kvstore.engine.settings import EngineSettings
from kvstore.engine.worker import Worker, WorkerPlace, WorkerRuntime
from kvstore.settings import StoreSettings
from kvstore.wire import StoreEndpoint, WorkerReport, cluster_secret

logger = logging.getLogger(__name__)

_ANY_ADDRESS: Final = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a replica knows before its engine starts."""

    place: WorkerPlace
    store: NodeStoreClient
    store_socket: str


async def prepare(engine: EngineSettings, store: StoreSettings, runtime: WorkerRuntime) -> Prepared:
    """Find out where this replica runs, start its node's store, and set the engine's environment.

    Raises:
        SettingsError: No secret in the environment, or the engine cannot run here.
        StoreNotReadyError: The node's store did not start in time.
    """
    configure_logging(level=runtime.log_level, json_lines=runtime.log_json)
    replica, secret = serve.get_replica_context(), cluster_secret()
    host = ray.util.get_node_ip_address() if runtime.bind_host in _ANY_ADDRESS else runtime.bind_host
    if engine.kind == "vllm":
        # Imported here: a no-op replica needs none of it.
        from kvstore.engine.build import engine_environment

        os.environ.update(engine_environment(engine, replica_rank=replica.rank.local_rank))
    endpoint = await ensure_node_store_async(
        store, secret=secret, namespace=runtime.namespace, runtime_dir=runtime.runtime_dir, bind_host=host
    )

    async def find_store() -> StoreEndpoint | None:
        return await node_store_endpoint_async(namespace=runtime.namespace)

    return Prepared(
        place=WorkerPlace(
            replica_id=replica.replica_tag, node_id=endpoint.node_id, host=host, secret=secret, find_store=find_store
        ),
        store=NodeStoreClient(endpoint.socket_path, secret=secret, client_name=replica.replica_tag),
        store_socket=endpoint.socket_path,
    )


class ReplicaActor:
    """The methods that Serve and routers call; subclasses start `_worker` in their constructor."""

    _worker: Worker

    async def report(self) -> WorkerReport:
        """What routers need to know, asked about once a second."""
        return await self._worker.report()

    def check_health(self) -> None:
        """Raise if the replica cannot serve; Serve then replaces it."""
        self._worker.check_health()

    async def __del__(self) -> None:
        """Serve calls and awaits this at shutdown: requests inside finish, then the engine's processes end."""
        if worker := getattr(self, "_worker", None):
            await worker.stop()
