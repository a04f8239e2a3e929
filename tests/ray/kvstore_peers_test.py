"""Three raylets on one machine, three node stores: they find each other, read from each other, and survive each other.

Every test has stores of its own, in a namespace of its own.
"""

import importlib.util
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvstore.actor import actor_name, ensure_node_store, node_store_endpoint, stop_node_stores
from kvstore.client import NodeStoreClient
from kvstore.protocol import PeerStat
from kvstore.settings import PeerSettings, StoreSettings
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_key, sample_payload
from kvstore.testing.store_client import SOON_S, read_bytes, write_chunk
from kvstore.wire import StoreEndpoint

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(480),
    # Ray's own descriptors and subprocess handles.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

SECRET = b"a secret of a test cluster"
NUM_NODES = 3
RAY_S = 120.0
PATHS = ["shm", "tcp", *(["nixl"] if importlib.util.find_spec("nixl_cu12") else [])]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # Short: unix sockets allow 107 bytes, and Ray's own are deep in its folder.
    with tempfile.TemporaryDirectory(prefix="lo-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def node_ids(folder: Path) -> Iterator[list[str]]:
    os.environ.pop("RAY_ADDRESS", None)
    cluster = Cluster()
    sizes = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster.add_node(**sizes, include_dashboard=False, temp_dir=str(folder / "ray"))
    for _ in range(NUM_NODES - 1):
        cluster.add_node(**sizes)
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": os.getcwd()}})
    cluster.wait_for_nodes(timeout=RAY_S)
    yield [node["NodeID"] for node in ray.nodes()]
    ray.shutdown()
    cluster.shutdown()


class Stores:
    """One store per node, in one namespace."""

    def __init__(self, folder: Path, node_ids: list[str], *, namespace: str, transport: str) -> None:
        self.namespace = namespace
        self.node_ids = node_ids
        peers = PeerSettings(transports=(transport,), breaker_pause_s=0.2)
        settings = StoreSettings(host_bytes=64 << 20, nvme=None, peers=peers)
        arguments = {
            "secret": SECRET,
            "namespace": namespace,
            "runtime_dir": str(folder / namespace),
            "bind_host": "127.0.0.1",
            "timeout_s": RAY_S,
        }
        starts = [
            _ensure.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(
                settings, arguments
            )
            for node_id in node_ids
        ]
        self.endpoints: list[StoreEndpoint] = ray.get(starts, timeout=RAY_S)
        self.clients = [
            NodeStoreClient(endpoint.socket_path, secret=SECRET, client_name="test") for endpoint in self.endpoints
        ]
        self.wait_connected()

    def wait_connected(self) -> None:
        wait_until(
            lambda: all(len(self.peers_up(number)) == NUM_NODES - 1 for number in range(NUM_NODES)),
            what="every store to know every other",
            deadline_s=RAY_S,
        )

    def peers_up(self, number: int) -> dict[str, PeerStat]:
        stats = self.clients[number].stat(deadline_s=1.0)
        return {node: peer for node, peer in stats.peers.items() if peer.is_up} if stats else {}

    def wait_readable(self, number: int, index: int) -> None:
        wait_until(
            lambda: self.clients[number].lookup([sample_key(index)], deadline_s=1.0) == [True],
            what=f"store {number} to hear of chunk {index}",
        )

    def wait_read(self, number: int, index: int, payload: bytes) -> None:
        """A read may miss, on a machine that is busy starting three raylets; it never brings anything else."""

        def is_read() -> bool:
            (found,) = read_bytes(self.clients[number], [sample_key(index)], SOON_S)
            assert found in (None, payload)
            return found is not None

        wait_until(is_read, what=f"store {number} to read chunk {index}")

    def kill(self, number: int) -> None:
        """SIGKILL the store's process; Ray starts another life."""
        actor = ray.get_actor(actor_name(self.node_ids[number]), namespace=self.namespace)
        os.kill(ray.get(actor.pid.remote(), timeout=RAY_S), signal.SIGKILL)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        assert stop_node_stores(namespace=self.namespace) == NUM_NODES


@ray.remote(num_cpus=0)
def _ensure(settings: StoreSettings, arguments: dict[str, object]) -> StoreEndpoint:
    return ensure_node_store(settings, **arguments)


@pytest.mark.parametrize("transport", PATHS)
def test_chunk_learned_on_one_node_is_read_on_the_others(folder: Path, node_ids: list[str], transport: str) -> None:
    stores = Stores(folder, node_ids, namespace=f"read-{transport}", transport=transport)
    payload = write_chunk(stores.clients[0], 1, 3_000_001)
    for number in (1, 2):
        stores.wait_read(number, 1, payload)
        assert {peer.transport for peer in stores.peers_up(number).values()} == {transport}
    for client in stores.clients:
        stats = client.stat(deadline_s=SOON_S)
        assert stats is not None
        wait_until(lambda c=client: c.stat(deadline_s=1.0).read_leases == 0, what="leases to end")
    stores.close()


def test_killed_store_loses_only_what_no_other_holds(folder: Path, node_ids: list[str]) -> None:
    stores = Stores(folder, node_ids, namespace="kill", transport="tcp")
    first, second, third = stores.clients
    for index in (1, 2):
        write_chunk(first, index, 500_000)
    write_chunk(third, 3, 500_000)
    # Chunk 1 has a copy on the second node from now on; chunk 2 has none.
    stores.wait_read(1, 1, sample_payload(1, 500_000))
    stores.wait_readable(1, 2)
    before = node_store_endpoint(namespace="kill", node_id=node_ids[0])
    assert before is not None
    stores.kill(0)
    keys = [sample_key(1), sample_key(2), sample_key(3)]
    wait_until(lambda: second.lookup(keys, deadline_s=1.0)[1] is False, what="the dead store's chunk to be gone")
    stores.wait_readable(2, 1)
    for number in (1, 2):
        for index in (1, 3):
            stores.wait_read(number, index, sample_payload(index, 500_000))
        assert read_bytes(stores.clients[number], [sample_key(2)], SOON_S) == [None]

    # Its next life knows nothing, finds the others, is found by them, and reads what it had.
    def moved_on() -> bool:
        now = node_store_endpoint(namespace="kill", node_id=node_ids[0])
        return now is not None and now.epoch != before.epoch

    wait_until(moved_on, what="the store's next life", deadline_s=RAY_S)
    stores.wait_connected()
    stores.wait_readable(0, 1)
    for index in (1, 3):
        stores.wait_read(0, index, sample_payload(index, 500_000))
    assert read_bytes(first, [sample_key(2)], SOON_S) == [None]
    assert write_chunk(first, 2, 500_000) == sample_payload(2, 500_000)
    stores.wait_read(2, 2, sample_payload(2, 500_000))
    stores.close()
