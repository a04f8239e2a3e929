"""What a node store's clients see when something breaks: a miss or the right bytes, in time, and nothing left."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.client import NodeStoreClient
from kvstore.connection import StoreConnection
from kvstore.node import NodeStore
from kvstore.protocol import Granted, Lookup, Read, Release, Stats
from kvstore.settings import NvmeSettings, StoreSettings
from kvstore.testing.poll import wait_until
from kvstore.testing.process import StoreProcess
from kvstore.testing.samples import sample_key, sample_meta, sample_payload
from kvstore.testing.store_client import LATE_S, SOON_S, read_bytes, write_chunk
from kvstore.tiers.folder import FolderBusyError

SECRET = b"a secret of a test cluster"
DEADLINE_S = 0.3


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreProcess]:
    settings = StoreSettings(
        host_bytes=4 << 20,
        nvme=NvmeSettings(folders=(str(tmp_path / "files"),), capacity_bytes=64 << 20),
        handshake_s=1.0,
        reservation_s=3.0,
    )
    with StoreProcess(settings, secret=SECRET, socket_path=str(tmp_path / "s")) as store:
        yield store


@pytest.fixture
def client(store: StoreProcess) -> Iterator[NodeStoreClient]:
    before = _descriptors()
    client = NodeStoreClient(store.socket_path, secret=SECRET, client_name="test")
    yield client
    client.close()
    assert [t.name for t in threading.enumerate() if t.name.startswith("kvstore")] == []
    assert _descriptors() <= before


def stats_of(client: NodeStoreClient) -> Stats:
    found: list[Stats] = []

    def ask() -> bool:
        stats = client.stat(deadline_s=1.0)
        found.extend([stats] if stats else [])
        return stats is not None

    wait_until(ask, what="the store to answer")
    return found[-1]


def wait_for_files(client: NodeStoreClient, num_chunks: int) -> None:
    wait_until(lambda: stats_of(client).tiers["nvme"].chunks == num_chunks, what=f"{num_chunks} files")


def assert_nothing_left(client: NodeStoreClient) -> None:
    def is_clean() -> bool:
        stats = stats_of(client)
        return (stats.read_leases, stats.reservations, stats.tiers["host"].pinned_bytes) == (0, 0, 0)

    wait_until(is_clean, what="leases, reservations and pins to end")


def file_of(store: StoreProcess, index: int) -> Path:
    assert store.settings.nvme is not None
    name = sample_key(index).hex()
    return Path(store.settings.nvme.folders[0]) / name[:2] / f"{name}.rec"


def test_store_killed_between_lookup_and_read(store: StoreProcess, client: NodeStoreClient) -> None:
    payload = write_chunk(client, 1, 50_000)
    wait_for_files(client, 1)
    assert client.lookup([sample_key(1)], deadline_s=SOON_S) == [True]
    store.kill()
    start_s = time.monotonic()
    assert read_bytes(client, [sample_key(1)], 60.0) == [None]
    assert time.monotonic() - start_s < LATE_S
    store.restart()
    wait_until(lambda: client.lookup([sample_key(1)], deadline_s=1.0) == [True], what="the store's next life")
    assert read_bytes(client, [sample_key(1)], SOON_S) == [payload]
    assert_nothing_left(client)


def test_store_killed_while_a_lease_is_read(store: StoreProcess, client: NodeStoreClient) -> None:
    payload = write_chunk(client, 1, 50_000)
    (lease,) = client.read([sample_key(1)], deadline_s=SOON_S)
    assert lease is not None
    store.kill()
    store.restart()
    write_again = write_chunk_when_back(client, 2)
    assert bytes(lease.payload) == payload
    lease.release()
    assert read_bytes(client, [sample_key(2)], SOON_S) == [write_again]


def test_store_killed_before_a_commit(store: StoreProcess, client: NodeStoreClient) -> None:
    write = client.reserve(sample_key(1), sample_meta(2), 50_000, deadline_s=SOON_S)
    assert write is not None
    store.kill()
    write.payload[:] = sample_payload(1, 50_000)
    assert not write.commit()
    store.restart()
    wait_until(lambda: client.stat(deadline_s=1.0), what="the store's next life")
    assert client.lookup([sample_key(1)], deadline_s=SOON_S) == [False]
    write_chunk(client, 1, 50_000)
    assert_nothing_left(client)


def test_store_killed_again_and_again_under_load(store: StoreProcess, client: NodeStoreClient) -> None:
    wrong: list[str] = []
    counts = {"hits": 0}
    over = threading.Event()

    def work(thread: int) -> None:
        index = thread
        while not over.is_set():
            index = (index * 7 + 3) % 11
            start_s = time.monotonic()
            write = client.reserve(sample_key(index), sample_meta(2), 30_000, deadline_s=DEADLINE_S)
            if write is not None:
                write.payload[:] = sample_payload(index, 30_000)
                write.commit()
            for found in read_bytes(client, [sample_key(index)], DEADLINE_S):
                if found is not None and found != sample_payload(index, 30_000):
                    wrong.append(f"bytes of chunk {index}")
                counts["hits"] += found is not None
            if time.monotonic() - start_s > 2 * DEADLINE_S + 2.0 + LATE_S:
                wrong.append(f"{time.monotonic() - start_s:.1f} s for one round")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        hits = counts["hits"]
        wait_until(lambda hits=hits: counts["hits"] > hits + 20, what="reads that hit", deadline_s=30.0)
        store.kill()
        store.restart()
    over.set()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert_nothing_left(client)


def test_frozen_store_costs_one_deadline_then_nothing(store: StoreProcess, client: NodeStoreClient) -> None:
    payload = write_chunk(client, 1, 50_000)
    store.freeze()
    start_s = time.monotonic()
    assert read_bytes(client, [sample_key(1)], DEADLINE_S) == [None]
    assert time.monotonic() - start_s < DEADLINE_S + LATE_S
    wait_until(lambda: _seconds_of_lookup(client) < DEADLINE_S / 2, what="the client to see that the store is frozen")
    assert client.reserve(sample_key(2), sample_meta(), 10, deadline_s=DEADLINE_S) is None
    store.thaw()
    wait_until(lambda: client.lookup([sample_key(1)], deadline_s=1.0) == [True], what="the thawed store")
    assert read_bytes(client, [sample_key(1)], SOON_S) == [payload]
    assert_nothing_left(client)


def test_store_frozen_before_the_first_call(store: StoreProcess, client: NodeStoreClient) -> None:
    store.freeze()
    start_s = time.monotonic()
    assert client.lookup([sample_key(1)], deadline_s=DEADLINE_S) == [False]
    assert time.monotonic() - start_s < DEADLINE_S + LATE_S
    store.thaw()
    assert stats_of(client).sessions == 1


def test_commit_to_a_frozen_store_ends(store: StoreProcess, client: NodeStoreClient) -> None:
    write = client.reserve(sample_key(1), sample_meta(2), 50_000, deadline_s=SOON_S)
    assert write is not None
    store.freeze()
    assert not write.commit()
    store.thaw()
    assert_nothing_left(client)


def test_flipped_byte_in_the_arena(store: StoreProcess, client: NodeStoreClient) -> None:
    payload = write_chunk(client, 1, 50_000)
    wait_for_files(client, 1)
    assert store.damage(sample_key(1), at_byte=49_999)
    assert read_bytes(client, [sample_key(1)], SOON_S) == [None]
    wait_until(lambda: stats_of(client).tiers["host"].chunks == 0, what="the damaged chunk to leave the arena")
    # The file is sound: the next read promotes it.
    assert read_bytes(client, [sample_key(1)], SOON_S) == [payload]
    assert_nothing_left(client)


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "longer", "of another chunk", "gone"])
def test_broken_file(store: StoreProcess, client: NodeStoreClient, how: str) -> None:
    for index in (1, 2):
        write_chunk(client, index, 50_000)
    wait_for_files(client, 2)
    store.kill()
    store.restart()
    keys = [sample_key(1), sample_key(2)]
    wait_until(lambda: client.lookup(keys, deadline_s=1.0) == [True, True], what="the files to be found again")
    path, record = file_of(store, 1), file_of(store, 1).read_bytes()
    broken = {
        "flipped": record[:20_000] + bytes([record[20_000] ^ 1]) + record[20_001:],
        "truncated": record[:8192],
        "empty": b"",
        "longer": record + bytes(4096),
        "of another chunk": file_of(store, 2).read_bytes(),
        "gone": None,
    }[how]
    path.unlink()
    if broken is not None:
        path.write_bytes(broken)
    assert read_bytes(client, [sample_key(1), sample_key(2)], SOON_S) == [None, sample_payload(2, 50_000)]
    assert not path.exists()
    wait_until(lambda: client.lookup([sample_key(1)], deadline_s=1.0) == [False], what="the broken chunk to be gone")
    assert_nothing_left(client)


def test_wrong_secret_is_refused(store: StoreProcess, client: NodeStoreClient) -> None:
    write_chunk(client, 1, 100)
    stranger = NodeStoreClient(store.socket_path, secret=b"another cluster's secret", client_name="stranger")
    assert stranger.lookup([sample_key(1)], deadline_s=SOON_S) == [False]
    assert stranger.read([sample_key(1)], deadline_s=SOON_S) == [None]
    stranger.close()
    wait_until(lambda: stats_of(client).sessions == 1, what="the stranger to be gone")


def test_silent_and_babbling_strangers_do_not_disturb(store: StoreProcess, client: NodeStoreClient) -> None:
    strangers = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(5)]
    for number, stranger in enumerate(strangers):
        stranger.settimeout(SOON_S)
        stranger.connect(store.socket_path)
        if number % 2:
            stranger.sendall(b"\xff" * 100)
    write_chunk(client, 1, 100)
    for stranger in strangers:
        # The challenge, then the end: nothing else is ever told to a stranger.
        received = b""
        while part := _receive(stranger):
            received += part
        assert len(received) < 100
        stranger.close()


def test_killed_client_leaves_no_pins(store: StoreProcess, client: NodeStoreClient) -> None:
    write_chunk(client, 1, 50_000)
    program = (
        "import sys\n"
        "from kvstore.client import NodeStoreClient\n"
        "from kvstore.testing.samples import sample_key, sample_meta\n"
        f"client = NodeStoreClient({store.socket_path!r}, secret={SECRET!r}, client_name='victim')\n"
        "leases = client.read([sample_key(1)] * 100, deadline_s=5.0)\n"
        "write = client.reserve(sample_key(2), sample_meta(), 50_000, deadline_s=5.0)\n"
        "print(len(leases), flush=True)\n"
        "sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    victim = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert victim.stdin is not None
    assert victim.stdout is not None
    assert victim.stdout.readline() == b"100\n"
    stats = stats_of(client)
    assert (stats.read_leases, stats.reservations) == (100, 1)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    victim.stdin.close()
    victim.stdout.close()
    assert_nothing_left(client)
    write_chunk(client, 2, 50_000)


def test_expired_reservation_frees_its_key_but_not_its_memory(store: StoreProcess, client: NodeStoreClient) -> None:
    slow = client.reserve(sample_key(1), sample_meta(2), 50_000, deadline_s=SOON_S)
    assert slow is not None
    wait_until(lambda: client.reserve(sample_key(1), sample_meta(2), 10, deadline_s=1.0), what="the key to be free")
    other = NodeStoreClient(store.socket_path, secret=SECRET, client_name="other")
    payload = write_chunk_when_back(other, 3)
    slow.payload[:] = bytes(50_000)
    assert read_bytes(other, [sample_key(3)], SOON_S) == [payload]
    assert not slow.commit()
    other.close()
    client.lookup([], deadline_s=1.0)
    assert_nothing_left(client)


def test_commit_after_close_touches_nobodys_memory(store: StoreProcess, client: NodeStoreClient) -> None:
    closed = NodeStoreClient(store.socket_path, secret=SECRET, client_name="closed")
    late = closed.reserve(sample_key(1), sample_meta(2), 50_000, deadline_s=SOON_S)
    assert late is not None
    closed.close()
    assert_nothing_left(client)
    # The whole arena, so also the pages that the closed client had.
    payload = write_chunk(client, 2, (4 << 20) - 4096)
    assert not late.commit()
    assert read_bytes(client, [sample_key(2)], SOON_S) == [payload]


def test_lease_that_nobody_released_does_not_keep_a_dead_connection(
    store: StoreProcess, client: NodeStoreClient
) -> None:
    write_chunk(client, 1, 50_000)
    before = _descriptors()
    leases = client.read([sample_key(1)], deadline_s=SOON_S)
    store.kill()
    del leases
    store.restart()
    stats_of(client)
    wait_until(lambda: _descriptors() <= before, what="the dead connection's descriptors to be closed")


def test_smaller_file_tier_after_a_restart(store: StoreProcess, client: NodeStoreClient) -> None:
    for index in range(4):
        write_chunk(client, index, 50_000)
    wait_for_files(client, 4)
    store.kill()
    assert store.settings.nvme is not None
    smaller = store.settings.nvme.model_copy(update={"capacity_bytes": 120_000})
    store.settings = store.settings.model_copy(update={"nvme": smaller})
    store.restart()
    # The scan goes on behind the first answers. Its count of chunks rises before it falls; that of files only falls.
    folder = Path(smaller.folders[0])
    wait_until(lambda: len(list(folder.rglob("*.rec"))) == 2, what="the scan to keep what there is room for")
    keys = [sample_key(index) for index in range(4)]
    wait_until(lambda: client.lookup(keys, deadline_s=1.0).count(True) == 2, what="what is left to be readable")
    assert stats_of(client).tiers["nvme"].chunks == 2


def test_second_store_on_the_folder_leaves_the_first_one_its_socket(
    store: StoreProcess, client: NodeStoreClient
) -> None:
    payload = write_chunk(client, 1, 50_000)
    assert store.settings.nvme is not None
    settings = store.settings.model_copy(update={"nvme": store.settings.nvme.model_copy(update={"lock_wait_s": 0.0})})
    second = NodeStore(settings, secret=SECRET, node_id="n", socket_path=store.socket_path, bind_host="127.0.0.1")
    with pytest.raises(FolderBusyError):
        second.start()
    newcomer = NodeStoreClient(store.socket_path, secret=SECRET, client_name="newcomer")
    assert read_bytes(newcomer, [sample_key(1)], SOON_S) == [payload]
    newcomer.close()


def test_expelled_client_keeps_its_memory_until_it_lets_go(store: StoreProcess, client: NodeStoreClient) -> None:
    payload = write_chunk(client, 1, 50_000)
    stop_s = time.monotonic() + SOON_S
    rude = StoreConnection(store.socket_path, secret=SECRET, client_name="rude", stop_s=stop_s)
    granted = rude.call(Read(1, [sample_key(1)], 1.0), number=1, stop_s=stop_s)
    assert isinstance(granted, Granted)
    grant = granted.grants[0]
    assert grant is not None
    rude.post(Lookup(2, [sample_key(n) for n in range(9000)]))
    wait_until(lambda: rude.is_dead, what="the store to expel the client")
    for index in range(2, 200):
        write_chunk(client, index, 60_000)
    assert stats_of(client).read_leases == 1
    start = grant.offset + 4096
    assert bytes(rude.read_only(start, start + 50_000)) == payload
    rude.end_lease(grant.lease, Release([grant.lease]))
    assert_nothing_left(client)
    rude.close()


def test_arena_full_of_pins_refuses_writes_and_recovers(store: StoreProcess, client: NodeStoreClient) -> None:
    for index in range(4):
        write_chunk(client, index, 1_000_000)
    leases = client.read([sample_key(i) for i in range(4)], deadline_s=SOON_S)
    held = [lease for lease in leases if lease is not None]
    assert len(held) >= 3
    assert client.reserve(sample_key(9), sample_meta(), 2_000_000, deadline_s=SOON_S) is None
    for lease in held:
        lease.release()
    write_chunk(client, 9, 2_000_000)
    assert_nothing_left(client)


def write_chunk_when_back(client: NodeStoreClient, index: int) -> bytes:
    wait_until(lambda: client.stat(deadline_s=1.0), what="the store to answer")
    return write_chunk(client, index, 50_000)


def _seconds_of_lookup(client: NodeStoreClient) -> float:
    start_s = time.monotonic()
    client.lookup([sample_key(1)], deadline_s=DEADLINE_S)
    return time.monotonic() - start_s


def _receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(4096)
    except ConnectionResetError:
        return b""


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
