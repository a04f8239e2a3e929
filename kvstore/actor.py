"""The node store as a Ray actor: one named, detached process per node, restarted by Ray.

Covers: starting it once per node, finding it again after a restart, telling the stores of a cluster of each other.
Does not cover: the store itself (`kvstore.node`), who calls this (the workers, on their own node).

The store's bytes do not pass through Ray: its clients speak to the socket in the runtime folder, which keeps its path
over restarts. Only event addresses and the epoch change; `node_store_endpoint` tells them.

Every store looks for the others every few seconds. It asks only those that it does not know, or that do not answer it:
a store that is well has the address that it had.
"""

import asyncio
import contextlib
import logging
import os
import random
import threading
from typing import Any, Final

import msgspec
import ray
from prometheus_client import generate_latest
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import UnavailableError
from cluster.telemetry import REGISTRY, configure_logging
from kvstore.node import NodeStore
from kvstore.server import check_socket_path
from kvstore.settings import StoreSettings
from kvstore.wire import StoreEndpoint

START_TIMEOUT_S: Final = 60.0
ENDPOINT_TIMEOUT_S: Final = 2.0
_NODE_ID_DIGITS: Final = 12
_NAME_PREFIX: Final = "node-store-"
_METHOD_THREADS: Final = 4
_DISCOVERY_S: Final = 2.0
"""Between two looks for other stores."""
_MAX_ASKED: Final = 64
"""Stores asked for their address in one look; the others have their turn in the next."""

log = logging.getLogger(__name__)


class StoreNotReadyError(UnavailableError):
    """The node's store did not answer in time: it is starting, restarting, or frozen."""


class NodeStoreActor:
    """Holds one `NodeStore`. Small values only go in and out."""

    def __init__(
        self, settings_json: str, secret: bytes, node_id: str, socket_path: str, bind_host: str, namespace: str
    ) -> None:
        configure_logging()
        settings = StoreSettings.model_validate_json(settings_json)
        self._store = NodeStore(settings, secret=secret, node_id=node_id, socket_path=socket_path, bind_host=bind_host)
        endpoint = self._store.start()
        self._endpoint = msgspec.msgpack.encode(endpoint)
        self._stopping = threading.Event()
        self._discovery: threading.Thread | None = None
        if endpoint.peer_address:
            self._discovery = threading.Thread(
                target=_tell_of_peers,
                args=(self._store, endpoint, namespace, self._stopping),
                name="kvstore-discovery",
                daemon=True,
            )
            self._discovery.start()

    def endpoint(self) -> bytes:
        """Where this life of the store can be reached: a `StoreEndpoint` as msgpack."""
        return self._endpoint

    def pid(self) -> int:
        """Process id, for operators and tests."""
        return os.getpid()

    def metrics(self) -> bytes:
        """This process' metrics in Prometheus' text format."""
        return generate_latest(REGISTRY)

    def stop(self, drain_s: float) -> None:
        """Write what is queued for files, and close."""
        self._stopping.set()
        if self._discovery is not None:
            self._discovery.join(2 * ENDPOINT_TIMEOUT_S)
        self._store.stop(drain_s=drain_s)


def ensure_node_store(
    settings: StoreSettings,
    *,
    secret: bytes,
    namespace: str,
    runtime_dir: str,
    bind_host: str,
    timeout_s: float = START_TIMEOUT_S,
) -> StoreEndpoint:
    """This node's store, started if there is none; whoever comes first decides its settings.

    Blocks: call it from threads, or before an event loop runs. In async actors use `ensure_node_store_async`.

    Raises:
        SocketPathError: `runtime_dir` is too long for a unix socket.
        StoreNotReadyError: Not ready within `timeout_s`.
    """
    node_id = ray.get_runtime_context().get_node_id()
    path = socket_path(runtime_dir, node_id)
    os.makedirs(runtime_dir, mode=0o700, exist_ok=True)
    actor_class = ray.remote(NodeStoreActor)
    actor = actor_class.options(
        name=actor_name(node_id),
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_concurrency=_METHOD_THREADS,
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    ).remote(settings.model_dump_json(), secret, node_id, path, bind_host, namespace)
    return _ask_endpoint(actor, timeout_s)


async def ensure_node_store_async(
    settings: StoreSettings,
    *,
    secret: bytes,
    namespace: str,
    runtime_dir: str,
    bind_host: str,
    timeout_s: float = START_TIMEOUT_S,
) -> StoreEndpoint:
    """`ensure_node_store` for event loops: on a thread."""
    return await asyncio.to_thread(
        ensure_node_store,
        settings,
        secret=secret,
        namespace=namespace,
        runtime_dir=runtime_dir,
        bind_host=bind_host,
        timeout_s=timeout_s,
    )


def node_store_endpoint(
    *, namespace: str, node_id: str | None = None, timeout_s: float = ENDPOINT_TIMEOUT_S
) -> StoreEndpoint | None:
    """Where a node's store is now; None if there is none, or it does not answer in time.

    Args:
        namespace: Ray namespace given to `ensure_node_store`.
        node_id: Ray's id of the node; None means this one.
        timeout_s: Longest wait, whatever state the actor is in.
    """
    name = actor_name(node_id or ray.get_runtime_context().get_node_id())
    try:
        return _ask_endpoint(ray.get_actor(name, namespace=namespace), timeout_s)
    except (ValueError, StoreNotReadyError):
        return None


async def node_store_endpoint_async(
    *, namespace: str, node_id: str | None = None, timeout_s: float = ENDPOINT_TIMEOUT_S
) -> StoreEndpoint | None:
    """`node_store_endpoint` for event loops: on a thread, and never longer than `timeout_s`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            return await asyncio.to_thread(
                node_store_endpoint, namespace=namespace, node_id=node_id, timeout_s=timeout_s
            )
    return None


def stop_node_stores(*, namespace: str, drain_s: float = 5.0) -> int:
    """Stop every node's store in a namespace, files written; how many there were.

    Args:
        namespace: Ray namespace given to `ensure_node_store`.
        drain_s: Longest time for writing what is queued, per store.
    """
    found = []
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] == namespace and entry["name"].startswith(_NAME_PREFIX):
            with contextlib.suppress(ValueError):  # gone since it was listed
                found.append(ray.get_actor(entry["name"], namespace=namespace))
    for actor in found:
        # One that hangs, is dead, or fails to stop is killed like the others.
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(actor.stop.remote(drain_s), timeout=drain_s + 1.0)
        ray.kill(actor, no_restart=True)
    return len(found)


def _tell_of_peers(store: NodeStore, own: StoreEndpoint, namespace: str, stopping: threading.Event) -> None:
    """The discovery thread: keep the store's peers those that there are."""
    known: dict[str, StoreEndpoint] = {}
    while True:
        try:
            known = _look_for_peers(own, known, namespace=namespace, doubtful=store.unreachable_peers())
            store.set_peers([own, *known.values()])
        except Exception:
            # Whatever Ray raises: what is known stays good until a peer itself falls silent.
            log.exception("discovery_failed")
        if stopping.wait(_DISCOVERY_S):
            return


def _look_for_peers(
    own: StoreEndpoint, known: dict[str, StoreEndpoint], *, namespace: str, doubtful: set[str]
) -> dict[str, StoreEndpoint]:
    """The other stores of a namespace, by node.

    Args:
        own: Left out.
        known: What the last look found.
        namespace: Ray's.
        doubtful: Nodes of `known` that do not answer, so may have another address now.
    """
    names = {
        entry["name"]
        for entry in ray.util.list_named_actors(all_namespaces=True)
        if entry["namespace"] == namespace and entry["name"].startswith(_NAME_PREFIX)
    }
    node_ids = {name.removeprefix(_NAME_PREFIX) for name in names} - {own.node_id}
    found = {node_id: endpoint for node_id, endpoint in known.items() if node_id in node_ids}
    # New ones first: those in doubt may stay so for long, and take turns.
    in_doubt = list(doubtful & found.keys())
    random.shuffle(in_doubt)
    asked = [*(node_ids - found.keys()), *in_doubt]
    calls = {}
    for node_id in asked[:_MAX_ASKED]:
        with contextlib.suppress(ValueError):  # gone since it was listed
            calls[ray.get_actor(actor_name(node_id), namespace=namespace).endpoint.remote()] = node_id
    ready, late = ray.wait(list(calls), num_returns=len(calls), timeout=ENDPOINT_TIMEOUT_S) if calls else ([], [])
    for call in late:
        ray.cancel(call)
    for call in ready:
        try:
            found[calls[call]] = msgspec.msgpack.decode(ray.get(call), type=StoreEndpoint)
        except ray.exceptions.RayError as error:
            # It died, or its node did; if it comes back, the next look finds it.
            log.info("peer_actor_gone node=%s error=%s", calls[call], type(error).__name__)
            found.pop(calls[call], None)
    return found


def actor_name(node_id: str) -> str:
    """Name of a node's store actor."""
    return f"{_NAME_PREFIX}{node_id}"


def socket_path(runtime_dir: str, node_id: str) -> str:
    """The node's store socket.

    Raises:
        SocketPathError: Too long for a unix socket.
    """
    return check_socket_path(os.path.join(runtime_dir, f"store-{node_id[:_NODE_ID_DIGITS]}.sock"))


def _ask_endpoint(actor: Any, timeout_s: float) -> StoreEndpoint:
    call = actor.endpoint.remote()
    try:
        return msgspec.msgpack.decode(ray.get(call, timeout=timeout_s), type=StoreEndpoint)
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError) as error:
        ray.cancel(call)
        raise StoreNotReadyError(f"the node's store is not ready: {error}") from error
