"""SIGKILL of the store at every named point: each chunk is the right bytes or a miss then, and nothing is left."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.client import NodeStoreClient
from kvstore.crash import CRASH_POINTS, UnknownCrashPointError, arm
from kvstore.settings import NvmeSettings, StoreSettings
from kvstore.testing import StoreProcess
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_key, sample_meta, sample_payload
from kvstore.testing.store_client import SOON_S, read_bytes, write_chunk

SECRET = b"a secret of a test cluster"
SIZE = 300_000
NUM_CHUNKS = 4
WRITES = ("reserved", "header_written", "committed_before_announce", "announced_before_reply")
WRITES_BEHIND = (
    "write_behind_opened",
    "write_behind_half",
    "write_behind_before_rename",
    "after_rename",
    "write_behind_stored",
)
PROMOTIONS = ("promotion_opened", "promotion_half", "promotion_before_commit", "promoted")
DROPS = ("dropped_before_unlink",)
EVICTIONS = ("evicted_before_unlink",)


def test_every_point_is_tested() -> None:
    assert {*WRITES, *WRITES_BEHIND, *PROMOTIONS, *DROPS, *EVICTIONS} == set(CRASH_POINTS)


def test_unknown_points_are_refused() -> None:
    with pytest.raises(UnknownCrashPointError, match="write_behind_half"):
        arm("no such point")


def settings(folder: Path, *, capacity_bytes: int = 64 << 20) -> StoreSettings:
    nvme = NvmeSettings(folders=(str(folder / "d0"), str(folder / "d1")), capacity_bytes=capacity_bytes)
    return StoreSettings(host_bytes=8 << 20, nvme=nvme, peers=None)


def wait_for_files(client: NodeStoreClient, num_chunks: int) -> None:
    def count() -> int:
        stats = client.stat(deadline_s=1.0)
        return stats.tiers["nvme"].chunks if stats else -1

    wait_until(lambda: count() == num_chunks, what=f"{num_chunks} files")


def outcome_of(work: Callable[[], object]) -> None:
    """Run it beside the store's death: it must end, by itself."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(SOON_S)
    assert not thread.is_alive(), "a client call hangs over the store's death"


def check_after_restart(store: StoreProcess, client: NodeStoreClient, folder: Path, *, sure: set[int]) -> None:
    """Right bytes or misses; `sure` are the chunks that must be there; no temporary files, leases or descriptors."""
    store.crash_at = None
    store.restart()
    wait_until(lambda: client.stat(deadline_s=1.0), what="the store's next life")
    # What a former life left is found in the background.
    wait_until(
        lambda: {i for i in range(NUM_CHUNKS) if client.lookup([sample_key(i)], deadline_s=1.0) == [True]} >= sure,
        what=f"chunks {sure}",
    )
    for index in range(NUM_CHUNKS + 1):
        (found,) = read_bytes(client, [sample_key(index)], SOON_S)
        assert found in (None, sample_payload(index, SIZE)), f"chunk {index} has other bytes"
        assert found is not None or index not in sure, f"chunk {index} is lost"
    wait_until(lambda: not list(folder.rglob("*.tmp")), what="temporary files to be deleted")
    stats = client.stat(deadline_s=SOON_S)
    assert stats is not None
    assert (stats.read_leases, stats.reservations, stats.tiers["host"].pinned_bytes) == (0, 0, 0)
    files = {path.name for path in folder.rglob("*.rec")}
    assert files <= {f"{sample_key(index).hex()}.rec" for index in range(NUM_CHUNKS + 1)}
    # The chunk that was being worked on can be learned again.
    if client.lookup([sample_key(0)], deadline_s=SOON_S) == [False]:
        write_chunk(client, 0, SIZE)
    assert read_bytes(client, [sample_key(0)], SOON_S) == [sample_payload(0, SIZE)]


class Life:
    """A store with some chunks on disk, and a client."""

    def __init__(self, folder: Path, chosen: StoreSettings | None = None) -> None:
        self.folder = folder
        self.store = StoreProcess(chosen or settings(folder), secret=SECRET, socket_path=str(folder / "s"))
        self.client = NodeStoreClient(str(folder / "s"), secret=SECRET, client_name="test")

    def __enter__(self) -> "Life":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.store.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def fill(self, indexes: range) -> None:
        """Chunks on disk, whole."""
        for index in indexes:
            write_chunk(self.client, index, SIZE)
        wait_for_files(self.client, len(indexes))


def write_one(client: NodeStoreClient) -> None:
    lease = client.reserve(sample_key(0), sample_meta(1), SIZE, deadline_s=2.0)
    if lease is not None:
        lease.payload[:] = sample_payload(0, SIZE)
        lease.commit()


@pytest.mark.parametrize("point", WRITES)
def test_killed_while_a_chunk_is_committed(tmp_path: Path, point: str) -> None:
    with Life(tmp_path) as life:
        life.fill(range(1, NUM_CHUNKS))
        life.store.arm(point)
        outcome_of(lambda: write_one(life.client))
        assert life.store.wait_dead() == -9
        check_after_restart(life.store, life.client, tmp_path, sure={1, 2, 3})


@pytest.mark.parametrize("point", WRITES_BEHIND)
def test_killed_while_a_chunk_is_written_behind(tmp_path: Path, point: str) -> None:
    with Life(tmp_path) as life:
        life.fill(range(1, NUM_CHUNKS))
        life.store.arm(point)
        outcome_of(lambda: write_one(life.client))
        assert life.store.wait_dead() == -9
        # Once it has its name the record survives the process.
        done = {0} if point in ("after_rename", "write_behind_stored") else set()
        check_after_restart(life.store, life.client, tmp_path, sure={1, 2, 3} | done)


@pytest.mark.parametrize("point", PROMOTIONS)
def test_killed_while_a_chunk_is_promoted(tmp_path: Path, point: str) -> None:
    with Life(tmp_path) as life:
        life.fill(range(NUM_CHUNKS))
        life.store.stop()
        life.store.crash_at = point
        life.store.restart()
        wait_until(lambda: life.client.stat(deadline_s=1.0), what="the store's next life")
        outcome_of(lambda: read_bytes(life.client, [sample_key(0)], 5.0))
        assert life.store.wait_dead() == -9
        check_after_restart(life.store, life.client, tmp_path, sure={0, 1, 2, 3})


@pytest.mark.parametrize("point", DROPS)
def test_killed_while_a_chunk_is_dropped(tmp_path: Path, point: str) -> None:
    """It may come back: it was being dropped, and its bytes are right."""
    with Life(tmp_path) as life:
        life.fill(range(NUM_CHUNKS))
        life.store.arm(point)
        outcome_of(lambda: life.client.drop([sample_key(0)], deadline_s=5.0))
        assert life.store.wait_dead() == -9
        check_after_restart(life.store, life.client, tmp_path, sure={1, 2, 3})


@pytest.mark.parametrize("point", EVICTIONS)
def test_killed_while_a_file_is_evicted(tmp_path: Path, point: str) -> None:
    small = settings(tmp_path, capacity_bytes=4 * (SIZE + 8192))
    with Life(tmp_path, small) as life:
        life.store.arm(point)

        def work() -> None:
            for index in range(NUM_CHUNKS + 1):
                lease = life.client.reserve(sample_key(index), sample_meta(index + 1), SIZE, deadline_s=2.0)
                if lease is not None:
                    lease.payload[:] = sample_payload(index, SIZE)
                    lease.commit()

        outcome_of(work)
        assert life.store.wait_dead() == -9
        check_after_restart(life.store, life.client, tmp_path, sure=set())


def test_a_store_that_was_told_nothing_does_not_die(tmp_path: Path) -> None:
    """Points are off, also for those who set environment variables."""
    with Life(tmp_path) as life:
        environment = dict.fromkeys(("CRASH_AT", "LEARNONCE_CRASH_AT"), "reserved")
        assert not set(environment) & set(os.environ)
        life.store.stop()
        life.store.environment = environment
        life.store.restart()
        wait_until(lambda: life.client.stat(deadline_s=1.0), what="the store's next life")
        write_chunk(life.client, 1, SIZE)
