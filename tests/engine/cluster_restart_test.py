"""Every process of a live cluster killed at once: what was learned is found again on disk and in the bucket, and used.

The times that the test prints (`pytest -s`, or the captured output in CI's log) are part of what it shows.
"""

from pathlib import Path

import pytest
from support.live import LiveCluster, kill, until

from cluster import local
from cluster.client import ask
from cluster.demo import load_documents
from kvstore.client import NodeStoreClient

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.timeout(600)]

QUESTION = "Name one fact from the text."


@pytest.fixture
def cluster(tmp_path):
    (tmp_path / "bucket").mkdir()
    live = LiveCluster(
        tmp_path / "state",
        {
            "cluster.prefill_replicas": 0,
            "engine.max_model_len": 4096,
            "engine.kv_cache_bytes": 512 << 20,
            "store.host_bytes": 512 << 20,
            "store.nvme": {"folders": [str(tmp_path / "nvme")]},
            "store.object": {"url": f"file://{tmp_path / 'bucket'}"},
        },
    )
    yield live
    live.down()
    assert live.processes() == []


def test_chunks_survive_the_death_of_the_whole_cluster(cluster, tmp_path):
    first, second = list(load_documents().values())[:2]
    cluster.up()
    cold = {}
    files = {}
    for document in (first, second):
        cold[document["title"]] = answer_from(cluster, document)
        files[document["title"]] = wait_stored(tmp_path)
    assert all(answer.cached_tokens < 64 for answer in cold.values())
    while processes := cluster.processes():
        kill(processes[0])
    # The second document's own chunks leave the disk: only the bucket still has them.
    for path in files[second["title"]] - files[first["title"]]:
        path.unlink()

    cluster.up()
    for document, tier in ((first, "nvme"), (second, "object")):
        warm = answer_from(cluster, document)
        before = cold[document["title"]]
        print(
            f"\nfrom {tier}: cold {before.ttft_s:.2f} s, after the restart {warm.ttft_s:.3f} s "
            f"({warm.cached_tokens} of {warm.prompt_tokens} tokens reused)"
        )
        assert warm.cached_tokens > warm.prompt_tokens - 64
        assert warm.text == before.text
        assert hits(cluster)[tier] >= 1


def hits(cluster):
    """Chunks that this life of the node store fetched into its arena, by where they came from."""
    (path,) = Path(cluster.state().runtime_dir).glob("store-*.sock")
    secret = local.StateFolder(cluster.folder, cluster.name).cluster_secret()
    client = NodeStoreClient(str(path), secret=secret, client_name="test")
    try:
        return client.stat(deadline_s=10.0).hits
    finally:
        client.close()


def answer_from(cluster, document):
    return ask(cluster.url, QUESTION, documents=[document], max_tokens=8, on_text=lambda _: None)


def wait_stored(folder):
    """The record files, once the bucket holds as many objects and nothing is on its way any more."""

    def settled():
        files = set((folder / "nvme").rglob("*.rec"))
        objects = list((folder / "bucket").rglob("*.rec"))
        return files if files and len(files) == len(objects) == settled.before else remember(len(files))

    def remember(count):
        settled.before = count

    settled.before = 0
    return until(settled, within_s=60, what="chunks are written behind")
