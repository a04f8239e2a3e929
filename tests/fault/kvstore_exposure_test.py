"""What a running store shows to the outside: ports on the configured interface only, nothing readable on disk."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from cluster.errors import SettingsError
from kvstore.client import NodeStoreClient
from kvstore.node import NodeStore
from kvstore.settings import STORE_KEY_VARIABLE, NvmeSettings, PeerSettings, StoreSettings
from kvstore.testing.certificates import SampleAuthority
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_key
from kvstore.testing.store_client import SOON_S, read_bytes, write_chunk

SECRET = b"a secret of a test cluster"
INTERFACE = "127.0.0.2"
"""Neither every interface nor the one that is bound by habit."""
PROGRAM = """
import sys
from kvstore.node import NodeStore
from kvstore.settings import StoreSettings
store = NodeStore(
    StoreSettings.model_validate_json(sys.argv[1]),
    secret=bytes.fromhex(sys.argv[2]), node_id="n", socket_path=sys.argv[3], bind_host=sys.argv[4],
)
store.start()
print("started", flush=True)
sys.stdin.read()
store.stop()
"""


@contextmanager
def store_process(settings: StoreSettings, path: Path, *, bind_host: str) -> Iterator[psutil.Process]:
    """A store alone in a process, so that every socket of the process is the store's."""
    arguments = [settings.model_dump_json(), SECRET.hex(), str(path), bind_host]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"started\n"
        yield psutil.Process(process.pid)
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def listeners(process: psutil.Process) -> set[tuple[str, int]]:
    """Addresses on which the process, or one that it started, accepts connections or packets."""
    family = [process, *process.children(recursive=True)]
    return {
        (connection.laddr.ip, connection.laddr.port)
        for each in family
        for connection in each.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or (connection.type.name == "SOCK_DGRAM" and not connection.raddr)
    }


@pytest.mark.parametrize("has_tls", [False, True])
def test_every_port_is_on_the_configured_interface(tmp_path: Path, has_tls: bool) -> None:
    """Events, snapshots, control and data between nodes: four ports, and no fifth somewhere else."""
    tls = SampleAuthority("cluster").issue(tmp_path, "node") if has_tls else None
    settings = StoreSettings(host_bytes=1 << 20, nvme=None, peers=PeerSettings(transports=("shm", "tcp")), tls=tls)
    with store_process(settings, tmp_path / "s", bind_host=INTERFACE) as process:
        seen = listeners(process)
    assert {host for host, _ in seen} == {INTERFACE}
    assert len(seen) == 4, seen


def test_store_without_peers_has_the_ports_of_its_events_only(tmp_path: Path) -> None:
    settings = StoreSettings(host_bytes=1 << 20, nvme=None, peers=None)
    with store_process(settings, tmp_path / "s", bind_host=INTERFACE) as process:
        seen = listeners(process)
    assert {host for host, _ in seen} == {INTERFACE}
    assert len(seen) == 2, seen


def test_the_look_at_ports_sees_one_on_every_interface(tmp_path: Path) -> None:
    """The check can fail."""
    settings = StoreSettings(host_bytes=1 << 20, nvme=None, peers=None)
    with store_process(settings, tmp_path / "s", bind_host="0.0.0.0") as process:
        assert {host for host, _ in listeners(process)} == {"0.0.0.0"}


def test_sockets_and_folders_are_for_this_user_only(tmp_path: Path) -> None:
    folder = tmp_path / "chunks"
    settings = StoreSettings(host_bytes=1 << 20, nvme=NvmeSettings(folders=(str(folder),)), peers=None)
    before = os.umask(0)
    try:
        with running(settings, tmp_path / "s") as client:
            write_chunk(client, 1, 5000)
            wait_until(lambda: files_in(folder), what="the chunk's file")
            modes = {path: path.stat().st_mode & 0o077 for path in [tmp_path / "s", folder, *folder.rglob("*")]}
    finally:
        os.umask(before)
    assert not {path: oct(mode) for path, mode in modes.items() if mode}


@contextmanager
def running(settings: StoreSettings, path: Path) -> Iterator[NodeStoreClient]:
    store = NodeStore(settings, secret=SECRET, node_id="n", socket_path=str(path), bind_host="127.0.0.1")
    store.start()
    client = NodeStoreClient(str(path), secret=SECRET, client_name="test")
    try:
        yield client
    finally:
        client.close()
        store.stop()


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.rec"))


def is_another(folder: Path, former: bytes) -> bool:
    """Whether a chunk's file has other bytes; the former one may be removed while this looks."""
    for path in files_in(folder):
        with suppress(FileNotFoundError):
            return path.read_bytes() != former
    return False


@pytest.fixture
def encrypted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreSettings:
    monkeypatch.setenv(STORE_KEY_VARIABLE, "5c" * 32)
    nvme = NvmeSettings(folders=(str(tmp_path / "chunks"),))
    return StoreSettings(host_bytes=1 << 20, nvme=nvme, peers=None, encrypt_at_rest=True)


def test_encrypted_store_leaves_nothing_readable_and_finds_it_again(tmp_path: Path, encrypted: StoreSettings) -> None:
    folder = tmp_path / "chunks"
    with running(encrypted, tmp_path / "s") as client:
        payload = write_chunk(client, 1, 50_000)
        wait_until(lambda: files_in(folder), what="the chunk's file")
    pieces = [payload[at : at + 8] for at in range(0, 49_992, 200)]
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(piece in content for piece in pieces), path
    with running(encrypted, tmp_path / "s") as client:
        wait_until(lambda: client.lookup([sample_key(1)], deadline_s=SOON_S) == [True], what="the chunk to be found")
        assert read_bytes(client, [sample_key(1)], SOON_S) == [payload]


def test_store_with_another_key_misses_and_learns_again(
    tmp_path: Path, encrypted: StoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "chunks"
    with running(encrypted, tmp_path / "s") as client:
        payload = write_chunk(client, 1, 50_000)
        wait_until(lambda: files_in(folder), what="the chunk's file")
    first = files_in(folder)[0].read_bytes()
    monkeypatch.setenv(STORE_KEY_VARIABLE, "5d" * 32)
    with running(encrypted, tmp_path / "s") as client:
        assert read_bytes(client, [sample_key(1)], SOON_S) == [None]
        wait_until(lambda: client.lookup([sample_key(1)], deadline_s=SOON_S) == [False], what="the promise to end")
        assert write_chunk(client, 1, 50_000) == payload
        wait_until(lambda: is_another(folder, first), what="the new file")
    with running(encrypted, tmp_path / "s") as client:
        wait_until(lambda: client.lookup([sample_key(1)], deadline_s=SOON_S) == [True], what="the chunk to be found")
        assert read_bytes(client, [sample_key(1)], SOON_S) == [payload]


def test_tampered_file_is_a_miss_for_clients(tmp_path: Path, encrypted: StoreSettings) -> None:
    folder = tmp_path / "chunks"
    with running(encrypted, tmp_path / "s") as client:
        write_chunk(client, 1, 50_000)
        wait_until(lambda: files_in(folder), what="the chunk's file")
    (path,) = files_in(folder)
    data = bytearray(path.read_bytes())
    data[20_000] ^= 1
    path.write_bytes(data)
    with running(encrypted, tmp_path / "s") as client:
        assert read_bytes(client, [sample_key(1)], SOON_S) == [None]
        wait_until(lambda: not path.exists(), what="the tampered file to be deleted")
        wait_until(lambda: client.lookup([sample_key(1)], deadline_s=SOON_S) == [False], what="the promise to end")


def test_encrypted_store_without_a_key_does_not_start(
    tmp_path: Path, encrypted: StoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than to write records in the clear."""
    monkeypatch.delenv(STORE_KEY_VARIABLE)
    with pytest.raises(SettingsError, match="openssl rand -hex 32"), running(encrypted, tmp_path / "s"):
        pass
    assert not files_in(tmp_path / "chunks")
