"""A whole store process with every tier, encrypted or not: chunks are found again below, in the order of the tiers."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.client import NodeStoreClient
from kvstore.protocol import Stats
from kvstore.sealing import OVERHEAD_BYTES
from kvstore.settings import STORE_KEY_VARIABLE, NvmeSettings, ObjectSettings, StoreSettings
from kvstore.testing import StoreProcess
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_key, sample_payload
from kvstore.testing.store_client import SOON_S, read_bytes, write_chunk

SECRET = b"a secret of a test cluster"
SIZE = 300_000
NUM_CHUNKS = 5
KEYS = [sample_key(index) for index in range(NUM_CHUNKS)]


def settings(folder: Path, *, encrypt: bool = False) -> StoreSettings:
    (folder / "bucket").mkdir(exist_ok=True)
    return StoreSettings(
        host_bytes=8 << 20,
        nvme=NvmeSettings(folders=(str(folder / "d0"), str(folder / "d1")), capacity_bytes=64 << 20),
        object=ObjectSettings(url=f"file://{folder}/bucket", refresh_s=1.0),
        encrypt_at_rest=encrypt,
    )


@pytest.fixture(params=[False, True], ids=["plain", "encrypted"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreProcess]:
    chosen = settings(tmp_path, encrypt=request.param)
    environment = {STORE_KEY_VARIABLE: "5a" * 32}
    with StoreProcess(chosen, secret=SECRET, socket_path=str(tmp_path / "s"), environment=environment) as store:
        yield store


@pytest.fixture
def client(store: StoreProcess) -> Iterator[NodeStoreClient]:
    client = NodeStoreClient(store.socket_path, secret=SECRET, client_name="test")
    yield client
    client.close()


def stats_of(client: NodeStoreClient) -> Stats:
    found: list[Stats] = []

    def ask() -> bool:
        stats = client.stat(deadline_s=1.0)
        found.extend([stats] if stats else [])
        return stats is not None

    wait_until(ask, what="the store to answer")
    return found[-1]


@pytest.mark.parametrize("encrypt_then", [True, False], ids=["switched on", "switched off"])
def test_verify_removes_what_another_kind_of_store_left_in_the_bucket(tmp_path: Path, encrypt_then: bool) -> None:
    """Names of objects do not tell whether a record is encrypted: only reading does, and this reads all."""
    socket_path, environment = str(tmp_path / "s"), {STORE_KEY_VARIABLE: "5a" * 32}
    bucket = tmp_path / "bucket"

    def serve(encrypt: bool) -> StoreProcess:
        chosen = settings(tmp_path, encrypt=encrypt).model_copy(update={"nvme": None})
        return StoreProcess(chosen, secret=SECRET, socket_path=socket_path, environment=environment)

    def objects() -> list[Path]:
        return list(bucket.rglob("*.rec"))

    with serve(not encrypt_then) as process:
        client = NodeStoreClient(socket_path, secret=SECRET, client_name="test")
        write_all(client)
        wait_until(lambda: len(objects()) == NUM_CHUNKS, what="objects")
        client.close()
        process.stop()
    with serve(encrypt_then):
        client = NodeStoreClient(socket_path, secret=SECRET, client_name="test")
        wait_until(lambda: stats_of(client).tiers["object"].chunks == NUM_CHUNKS, what="the listing")
        done = client.verify(KEYS, deadline_s=SOON_S)
        assert done is not None
        assert (done.good, done.bad, done.unread) == (0, NUM_CHUNKS, 0)
        wait_until(lambda: not objects(), what="the objects to be deleted")
        write_all(client)
        wait_until(lambda: len(objects()) == NUM_CHUNKS, what="objects of this kind")
        client.close()


def test_verify_leaves_what_another_store_key_sealed(tmp_path: Path) -> None:
    """It is sound, and another node may have the key: no damage is told, and nothing is deleted."""
    chosen = settings(tmp_path, encrypt=True)
    socket_path = str(tmp_path / "s")
    for number, store_key in enumerate(("5a" * 32, "a5" * 32)):
        environment = {STORE_KEY_VARIABLE: store_key}
        with StoreProcess(chosen, secret=SECRET, socket_path=socket_path, environment=environment) as process:
            client = NodeStoreClient(socket_path, secret=SECRET, client_name="test")
            if not number:
                fill(client)
            wait_held(client)
            done = client.verify(KEYS, deadline_s=SOON_S)
            assert done is not None
            sound, unread = (0, 2 * NUM_CHUNKS) if number else (2 * NUM_CHUNKS, 0)
            assert (done.good, done.bad, done.unread) == (sound, 0, unread)
            client.close()
            process.stop()
    assert len(list(tmp_path.rglob("*.rec"))) == 2 * NUM_CHUNKS


def size_of(index: int) -> int:
    """Payload bytes. The first one is shorter than what sealing adds to a record."""
    return SIZE if index else OVERHEAD_BYTES - 1


def write_all(client: NodeStoreClient) -> None:
    for index in range(NUM_CHUNKS):
        write_chunk(client, index, size_of(index))


def fill(client: NodeStoreClient) -> None:
    write_all(client)
    for tier in ("nvme", "object"):
        wait_until(lambda tier=tier: stats_of(client).tiers[tier].chunks == NUM_CHUNKS, what=f"chunks to be in {tier}")


def wait_held(client: NodeStoreClient) -> None:
    keys = [sample_key(index) for index in range(NUM_CHUNKS)]
    wait_until(lambda: all(client.lookup(keys, deadline_s=1.0)), what="all chunks to be found again")


def all_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_chunks_come_back_from_disk_and_from_the_bucket(
    store: StoreProcess, client: NodeStoreClient, tmp_path: Path
) -> None:
    fill(client)
    expected = [sample_payload(index, size_of(index)) for index in range(NUM_CHUNKS)]
    keys = [sample_key(index) for index in range(NUM_CHUNKS)]
    store.kill()
    store.restart()
    wait_held(client)
    assert read_bytes(client, keys, SOON_S) == expected
    assert stats_of(client).hits["nvme"] == NUM_CHUNKS
    store.kill()
    for device in ("d0", "d1"):
        shutil.rmtree(tmp_path / device)
    store.restart()
    wait_held(client)
    assert read_bytes(client, keys, SOON_S) == expected
    assert stats_of(client).hits["object"] == NUM_CHUNKS
    # Somebody wanted them again: the disk has them back.
    wait_until(lambda: stats_of(client).tiers["nvme"].chunks == NUM_CHUNKS, what="chunks to be on disk again")
    store.stop()
    assert not list(tmp_path.rglob("*.tmp"))


def test_media_hold_the_bytes_in_the_clear_only_without_encryption(
    store: StoreProcess, client: NodeStoreClient, tmp_path: Path
) -> None:
    fill(client)
    store.stop()
    for folder in ("d0", "d1", "bucket"):
        found = sample_payload(1, SIZE)[1000:1064] in all_bytes(tmp_path / folder)
        other = any(sample_payload(i, SIZE)[1000:1064] in all_bytes(tmp_path / folder) for i in range(1, NUM_CHUNKS))
        assert not (found and store.settings.encrypt_at_rest)
        assert other is not store.settings.encrypt_at_rest


def test_dropped_chunks_are_gone_from_every_medium(
    store: StoreProcess, client: NodeStoreClient, tmp_path: Path
) -> None:
    fill(client)
    keys = [sample_key(index) for index in range(NUM_CHUNKS)]
    assert client.drop(keys, deadline_s=SOON_S)
    assert client.lookup(keys, deadline_s=SOON_S) == [False] * NUM_CHUNKS
    assert client.catalog(deadline_s=SOON_S) == []
    store.kill()
    store.restart()
    stats_of(client)
    assert client.lookup(keys, deadline_s=SOON_S) == [False] * NUM_CHUNKS
    assert not list(tmp_path.rglob("*.rec"))


def test_verify_reads_every_tier(store: StoreProcess, client: NodeStoreClient, tmp_path: Path) -> None:
    fill(client)
    victim = next((tmp_path / "d0").rglob("*.rec"), None) or next((tmp_path / "d1").rglob("*.rec"))
    damaged = bytearray(victim.read_bytes())
    damaged[10_000] ^= 4
    victim.write_bytes(damaged)
    verified = client.verify(KEYS, deadline_s=60.0)
    assert verified is not None
    assert (verified.good, verified.bad, verified.unread) == (2 * NUM_CHUNKS - 1, 1, 0)
    again = client.verify(KEYS, deadline_s=60.0)
    assert again is not None
    assert (again.good, again.bad) == (2 * NUM_CHUNKS - 1, 0)


def test_a_pin_reaches_the_tiers_below(store: StoreProcess, client: NodeStoreClient) -> None:
    fill(client)
    store.kill()
    store.restart()
    wait_held(client)
    assert client.pin([sample_key(0)], seconds=600.0, deadline_s=SOON_S) == [True]
    entries = {entry.key: entry for entry in client.catalog(deadline_s=SOON_S) or ()}
    assert entries[sample_key(0)].is_pinned
    assert set(entries[sample_key(0)].stored_bytes_by_tier) == {"nvme", "object"}
    assert not entries[sample_key(1)].is_pinned


def test_encryption_without_a_key_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STORE_KEY_VARIABLE, raising=False)
    with pytest.raises(RuntimeError, match="ended with 1"):
        StoreProcess(settings(tmp_path, encrypt=True), secret=SECRET, socket_path=str(tmp_path / "s"))
    assert not list(tmp_path.rglob("*.rec"))
    assert not (tmp_path / "s").exists()
