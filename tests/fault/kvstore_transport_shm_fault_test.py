"""The shared-memory data path when the peer dies, freezes or restarts: an error in time, and nothing left."""

from pathlib import Path

import pytest

from kvstore.testing.shm_holder import SECRET
from kvstore.testing.transport_faults import TransportFaultContract
from kvstore.transport import Transport
from kvstore.transport.shm import ShmTransport


class TestShmFaults(TransportFaultContract):
    factory = "kvstore.testing.shm_holder:shm_holder"
    bytes_outlive_peer = True

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.options = {"socket_path": str(tmp_path / "s")}

    def make_client(self, address: bytes) -> Transport:
        return ShmTransport(address, secret=SECRET, node_id="puller", epoch=None, connect_timeout_s=1.0)
