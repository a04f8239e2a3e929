"""The shared-memory data path keeps the transport contract, over a real unix socket and arena."""

import os
import stat
from pathlib import Path

import pytest

from kvstore.testing.shm_holder import SECRET, ShmHolder
from kvstore.testing.transport import TransportContract, soon
from kvstore.transport import PeerGoneError, Transport, TransportServer
from kvstore.transport.shm import ShmTransport, socket_problem


def transport(address: bytes, *, secret: bytes = SECRET, epoch: str | None = None) -> ShmTransport:
    return ShmTransport(address, secret=secret, node_id="puller", epoch=epoch, connect_timeout_s=1.0)


class TestShm(TransportContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.num_servers = 0

    def make_server(self) -> TransportServer:
        self.num_servers += 1
        return ShmHolder(str(self.folder / f"s{self.num_servers}"))

    def make_client(self, server: TransportServer) -> Transport:
        return transport(server.address)

    def place(self, server: TransportServer, data: bytes) -> memoryview:
        assert isinstance(server, ShmHolder)
        return server.place(data)

    def leftovers(self) -> list[str]:
        return [str(path) for path in self.folder.iterdir()]

    def test_record_outside_of_the_arena_is_not_offered(self, server: TransportServer) -> None:
        assert server.offer(memoryview(bytearray(8192)), peer="puller", lifetime_s=1.0) is None

    @pytest.mark.parametrize("wrong", ["secret", "epoch"])
    def test_stranger_and_another_life_get_nothing(self, server: TransportServer, wrong: str) -> None:
        offer, _ = self.offered(server, 1, 8192)
        stranger = (
            transport(server.address, secret=b"another cluster's secret")
            if wrong == "secret"
            else transport(server.address, epoch="another life")
        )
        with pytest.raises(PeerGoneError, match=r"secret|another life|handshake"):
            stranger.pull(offer, memoryview(bytearray(8192)), stop_s=soon())
        stranger.close()


def test_socket_problem_names_what_is_wrong(tmp_path: Path) -> None:
    holder = ShmHolder(str(tmp_path / "s"))
    assert socket_problem(holder.address) is None
    if os.geteuid() == 0:
        os.chown(tmp_path / "s", 12345, -1)
        assert "belongs to user 12345" in str(socket_problem(holder.address))
    holder.close()
    assert "not visible here" in str(socket_problem(holder.address))
    (tmp_path / "s").write_text("")
    assert stat.S_ISREG((tmp_path / "s").stat().st_mode)
    assert "no socket" in str(socket_problem(holder.address))
