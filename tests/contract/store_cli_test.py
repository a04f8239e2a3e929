"""`learnonce store` against a real store process: what it prints, writes, and exits with."""

import os
import re
import secrets

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cluster import store_cli
from cluster.errors import CallerError, UnavailableError
from cluster.store_cli import store
from kvstore.client import NodeStoreClient
from kvstore.keys import tenant_of
from kvstore.settings import NvmeSettings, StoreSettings
from kvstore.testing import StoreProcess
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_key
from kvstore.testing.store_client import SOON_S, write_chunk
from kvstore.wire import SECRET_VARIABLE


@pytest.fixture
def running(tmp_path, monkeypatch):
    secret = secrets.token_bytes(32)
    monkeypatch.setenv(SECRET_VARIABLE, secret.hex())
    settings = StoreSettings(
        host_bytes=16 << 20, nvme=NvmeSettings(folders=(str(tmp_path / "nvme"),), capacity_bytes=32 << 20)
    )
    with StoreProcess(settings, secret=secret, socket_path=str(tmp_path / "store-one.sock")) as process:
        client = NodeStoreClient(process.socket_path, secret=secret, client_name="test")
        yield process, client, tmp_path
        client.close()


def run(process, *words):
    return CliRunner().invoke(store, [*words, "--socket", process.socket_path], env={"COLUMNS": "200"})


def stored(client, count):
    for index in range(count):
        write_chunk(client, index, 5000 + index)

    def on_disk():
        stats = client.stat(deadline_s=SOON_S)
        return stats is not None and stats.tiers["nvme"].chunks == count

    wait_until(on_disk, what=f"{count} chunks on disk")


def test_ls_lists_every_chunk_and_writes_them_to_parquet(running):
    process, client, folder = running
    stored(client, 3)
    (lease,) = client.read([sample_key(1)], deadline_s=SOON_S)
    lease.release()
    result = run(process, "ls", "--limit", "2", "--parquet", str(folder / "chunks.parquet"))
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert sample_key(1).hex()[:12] in next(line for line in lines if "host nvme" in line)
    assert "3 chunks, 1 more are not shown" in lines[-1]
    rows = pq.read_table(folder / "chunks.parquet").to_pylist()
    assert (rows[0]["key"], rows[0]["uses"]) == (sample_key(1).hex(), 1)
    assert {row["key"] for row in rows} == {sample_key(index).hex() for index in range(3)}
    assert all(row["nvme_bytes"] == row["host_bytes"] == 12288 for row in rows)


def test_stat_shows_tiers_and_sessions(running):
    process, client, _ = running
    stored(client, 2)
    result = run(process, "stat")
    assert result.exit_code == 0, result.output
    assert "node store one" in result.output
    assert "2 sessions, 0 read leases, 0 reservations" in result.output


def test_verify_drops_what_is_damaged_and_says_so(running):
    process, client, folder = running
    stored(client, 3)
    assert "3 sound, 0 damaged" in run(process, "verify").output
    path = next((folder / "nvme").rglob(f"{sample_key(1).hex()}.rec"))
    with path.open("r+b") as file:
        file.seek(6000)
        file.write(b"\xff\x00\xff")
    result = run(process, "verify")
    assert "2 sound, 1 damaged and dropped" in result.output
    assert isinstance(result.exception, UnavailableError)
    assert not path.exists()


def test_verify_reads_part_by_part_each_with_its_own_time(running, monkeypatch):
    """So that a pool of any size can be verified; a part that is late ends it."""
    process, client, _ = running
    stored(client, 5)
    monkeypatch.setattr(store_cli, "_PART_CHUNKS", 2)
    parts = []
    verify_part = NodeStoreClient.verify

    def verify(client, keys, *, deadline_s):
        parts.append((len(keys), deadline_s))
        return verify_part(client, keys, deadline_s=deadline_s)

    monkeypatch.setattr(NodeStoreClient, "verify", verify)
    assert "5 sound, 0 damaged" in run(process, "verify").output
    assert parts == [(2, store_cli._LONG_S), (2, store_cli._LONG_S), (1, store_cli._LONG_S)]
    monkeypatch.setattr(NodeStoreClient, "verify", lambda *_, **__: None)
    assert isinstance(run(process, "verify").exception, UnavailableError)


def test_gc_removes_what_crashes_left(running):
    process, client, folder = running
    stored(client, 1)
    leftover = next((folder / "nvme").rglob("*.rec")).parent / f"{'0' * 64}.rec.1.2.tmp"
    leftover.write_bytes(b"half a record")
    os.utime(leftover, (1, 1))
    result = run(process, "gc")
    assert result.exit_code == 0, result.output
    # The scan that follows a start may have found it first.
    assert re.search(r"[01] left by crashes", result.output)
    assert not leftover.exists()


def test_store_that_is_away_is_an_error_that_names_it(running):
    process, _, _ = running
    process.kill()
    assert "the node store one cannot be reached: no store at" in failure(process)
    assert "`learnonce status`" in failure(process)


def test_store_of_another_cluster_is_told_from_one_that_is_away(running, monkeypatch):
    process, _, _ = running
    monkeypatch.setenv(SECRET_VARIABLE, secrets.token_hex(32))
    assert "the node store one refuses this command" in failure(process)
    assert SECRET_VARIABLE in failure(process)


def test_store_that_hangs_is_told_from_one_that_is_away(running, monkeypatch):
    process, _, _ = running
    monkeypatch.setattr(store_cli, "_QUICK_S", 0.3)
    monkeypatch.setattr(store_cli.NodeStoreClient, "_ask", lambda client, connection, *_: client.away)
    assert "the node store one runs, but does not answer in time" in failure(process)


def failure(process):
    result = run(process, "stat")
    assert isinstance(result.exception, UnavailableError), result.output
    return str(result.exception)


@pytest.mark.parametrize(("words", "typed"), [(["customer 7"], ""), ([], "customer 7\n"), ([], "customer 7")])
def test_tenant_of_a_salt(words, typed):
    """From the arguments, or from standard input: a salt may be a secret."""
    result = CliRunner().invoke(store, ["tenant", *words], input=typed)
    assert result.exit_code == 0, result.output
    assert result.output == f"{tenant_of('customer 7')}\n"


def test_no_salt_has_no_tenant():
    result = CliRunner().invoke(store, ["tenant"], input="\n")
    assert isinstance(result.exception, CallerError)
