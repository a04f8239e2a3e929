"""Every store client keeps the client contract: in memory, with fault wrappers that do nothing, over a real process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.client import NodeStoreClient
from kvstore.interfaces import StoreClient
from kvstore.settings import NvmeSettings, StoreSettings
from kvstore.testing import FaultyStoreClient, MemoryStore, MemoryStoreClient
from kvstore.testing.poll import wait_until
from kvstore.testing.process import StoreProcess
from kvstore.testing.samples import sample_key
from kvstore.testing.store_client import MIN_CAPACITY_BYTES, SOON_S, StoreClientContract

SECRET = b"a secret of a test cluster"


class TestMemoryStoreClient(StoreClientContract):
    @pytest.fixture(autouse=True)
    def _store(self) -> None:
        self.store = MemoryStore(capacity_bytes=MIN_CAPACITY_BYTES)

    def make(self) -> StoreClient:
        return MemoryStoreClient(self.store)

    def leftovers(self) -> list[str]:
        return self.store.leftovers()


class TestFaultyStoreClientWithoutFaults(TestMemoryStoreClient):
    def make(self) -> StoreClient:
        return FaultyStoreClient(MemoryStoreClient(self.store))


class TestNodeStoreClient(StoreClientContract):
    """One process for all tests, emptied before each."""

    has_files = False
    path: str
    observer: NodeStoreClient

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _process(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        folder = tmp_path_factory.mktemp("store")
        files = NvmeSettings(folders=(str(folder / "files"),), capacity_bytes=8 * MIN_CAPACITY_BYTES)
        settings = StoreSettings(host_bytes=MIN_CAPACITY_BYTES, nvme=files if cls.has_files else None)
        path = str(folder / "s")
        with StoreProcess(settings, secret=SECRET, socket_path=path) as store:
            cls.path = path
            cls.observer = NodeStoreClient(path, secret=SECRET, client_name="observer")
            assert cls.observer.stat(deadline_s=10.0) is not None
            descriptors = store.num_open_descriptors()
            yield
            wait_until(lambda: store.num_open_descriptors() <= descriptors, what="connections to be closed")
            cls.observer.close()
            store.stop()
            assert not Path(path).exists()
            assert not list(folder.rglob("*.tmp"))

    @pytest.fixture(autouse=True)
    def _empty(self) -> None:
        self.observer.drop([sample_key(i) for i in range(200)], deadline_s=10.0)
        stats = self.observer.stat(deadline_s=10.0)
        assert stats is not None
        assert [tier.chunks for tier in stats.tiers.values()] == [0] * (1 + self.has_files)

    def make(self) -> StoreClient:
        return NodeStoreClient(self.path, secret=SECRET, client_name="test")

    def leftovers(self) -> list[str]:
        stats = self.observer.stat(deadline_s=SOON_S)
        assert stats is not None
        counts = {
            "read leases": stats.read_leases,
            "reservations": stats.reservations,
            "pinned bytes": stats.tiers["host"].pinned_bytes,
        }
        return [f"{count} {what}" for what, count in counts.items() if count]


class TestNodeStoreClientWithFiles(TestNodeStoreClient):
    has_files = True
