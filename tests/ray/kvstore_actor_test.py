"""The node store under Ray: one per node, back after SIGKILL, reachable from an async actor."""

import asyncio
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from kvstore.actor import (
    actor_name,
    ensure_node_store,
    ensure_node_store_async,
    node_store_endpoint,
    node_store_endpoint_async,
)
from kvstore.client import NodeStoreClient
from kvstore.server import SocketPathError
from kvstore.settings import NvmeSettings, StoreSettings
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_key
from kvstore.testing.store_client import read_bytes, write_chunk
from kvstore.wire import StoreEndpoint

pytestmark = [
    pytest.mark.ray,
    # Ray's own descriptors and subprocess handles.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

SECRET = b"a secret of a test cluster"
NAMESPACE = "learnonce-test"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # Short: unix sockets allow 107 bytes, and Ray's own are deep in its folder.
    with tempfile.TemporaryDirectory(prefix="lo-") as name:
        yield Path(name)


@pytest.fixture(scope="module", autouse=True)
def _ray(folder: Path) -> Iterator[None]:
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 << 20,
        _temp_dir=str(folder / "ray"),
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.getcwd()}},
    )
    yield
    ray.shutdown()


def test_store_is_started_once_and_comes_back_after_sigkill(folder: Path) -> None:
    settings = StoreSettings(
        host_bytes=16 << 20, nvme=NvmeSettings(folders=(str(folder / "files"),), capacity_bytes=64 << 20)
    )
    arguments = {"secret": SECRET, "namespace": NAMESPACE, "runtime_dir": str(folder / "run"), "bind_host": "127.0.0.1"}
    first = ensure_node_store(settings, **arguments)
    assert ensure_node_store(settings, **arguments) == first
    assert ray.get(_AsyncWorker.remote().ensure.remote(settings, arguments), timeout=60) == first

    client = NodeStoreClient(first.socket_path, secret=SECRET, client_name="test")
    payload = write_chunk(client, 1, 100_000)
    wait_until(lambda: _file_chunks(client) == 1, what="the chunk to be written to a file")

    actor = ray.get_actor(actor_name(first.node_id), namespace=NAMESPACE)
    os.kill(ray.get(actor.pid.remote(), timeout=30), signal.SIGKILL)
    wait_until(lambda: _moved_on(first), what="the store's next life", deadline_s=60.0)
    second = node_store_endpoint(namespace=NAMESPACE)
    assert second is not None
    assert (second.node_id, second.socket_path) == (first.node_id, first.socket_path)
    wait_until(
        lambda: client.lookup([sample_key(1)], deadline_s=1.0) == [True], what="the chunk to be found in its file"
    )
    assert read_bytes(client, [sample_key(1)], 5.0) == [payload]
    assert b"learnonce_kvstore_tier_reads_total" in ray.get(actor.metrics.remote(), timeout=30)
    client.close()
    ray.kill(actor, no_restart=True)
    wait_until(lambda: node_store_endpoint(namespace=NAMESPACE, timeout_s=1.0) is None, what="the actor to be gone")


def test_too_long_a_folder_says_so(folder: Path) -> None:
    with pytest.raises(SocketPathError, match="shorter runtime folder"):
        ensure_node_store(
            StoreSettings(host_bytes=1 << 20, nvme=None),
            secret=SECRET,
            namespace=NAMESPACE,
            runtime_dir=str(folder / ("long" * 30)),
            bind_host="127.0.0.1",
        )


def test_unknown_node_has_no_endpoint() -> None:
    assert node_store_endpoint(namespace=NAMESPACE, node_id="f" * 56) is None


@ray.remote(num_cpus=0)
class _AsyncWorker:
    async def ensure(self, settings: StoreSettings, arguments: dict[str, object]) -> StoreEndpoint:
        endpoint = await ensure_node_store_async(settings, **arguments)
        assert await node_store_endpoint_async(namespace=NAMESPACE) == endpoint
        await asyncio.sleep(0)
        return endpoint


def _moved_on(before: StoreEndpoint) -> bool:
    now = node_store_endpoint(namespace=NAMESPACE)
    return now is not None and now.epoch != before.epoch


def _file_chunks(client: NodeStoreClient) -> int:
    stats = client.stat(deadline_s=5.0)
    return stats.tiers["nvme"].chunks if stats else 0
