"""Reads on the same node: a chunk from the arena into a tensor, beside a plain copy of the same bytes.

Covers: `NodeStoreClient.read_into` and lookups over the unix socket, against a store in another process.
Does not cover: lookups without the socket (`loadtest.bench_store.index`), other nodes (`loadtest.bench_store.tcp`).
"""

import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np
import torch

from cluster.errors import InvariantError
from kvstore.client import NodeStoreClient
from kvstore.interfaces import ChunkMeta
from kvstore.keys import ChunkKey
from kvstore.settings import StoreSettings
from kvstore.testing import StoreProcess
from kvstore.testing.samples import sample_key
from loadtest.bench_store import Measured

CHUNK_BYTES: Final = 10 << 20
NUM_CHUNKS: Final = 32
"""320 MiB together: more than any cache holds, so that every copy starts in memory."""
NUM_LOOKUPS: Final = 1000
_DEADLINE_S: Final = 20.0


def measure(*, repeats: int, log: Callable[[str], None]) -> Measured:
    """Copies of 10 MiB chunks, interleaved with plain copies of the same bytes; lookups of 1,000 keys.

    Args:
        repeats: Rounds over all chunks; medians over all copies are reported.
        log: Told what is being done.
    """
    log("same node: reading 10 MiB chunks from a store in another process")
    secret = secrets.token_bytes(32)
    settings = StoreSettings(host_bytes=(NUM_CHUNKS + 2) * (CHUNK_BYTES + (1 << 20)), nvme=None, peers=None)
    with tempfile.TemporaryDirectory(prefix="lo-bench-") as folder:
        path = f"{folder}/store.sock"
        with StoreProcess(settings, secret=secret, socket_path=path):
            client = NodeStoreClient(path, secret=secret, client_name="bench")
            try:
                return _measure(client, repeats=repeats)
            finally:
                client.close()


def _measure(client: NodeStoreClient, *, repeats: int) -> Measured:
    keys = [sample_key(index) for index in range(NUM_CHUNKS)]
    for index, key in enumerate(keys):
        _write(client, key, index)
    tensor = torch.zeros(CHUNK_BYTES, dtype=torch.uint8)
    target = tensor.numpy()
    out = memoryview(target.data)
    leases = [lease for lease in client.read(keys, deadline_s=_DEADLINE_S) if lease is not None]
    sources = [np.frombuffer(lease.payload, dtype=np.uint8) for lease in leases]
    reads_s: list[float] = []
    copies_s: list[float] = []
    for index in range(repeats * NUM_CHUNKS):
        # The two take chunks half a round apart: neither finds its bytes in a cache.
        key, source = keys[index % NUM_CHUNKS], sources[(index + NUM_CHUNKS // 2) % NUM_CHUNKS]
        reads_s.append(_timed(partial(_read, client, key, out)))
        copies_s.append(_timed(partial(np.copyto, target, source)))
    sources.clear()
    del source
    for lease in leases:
        lease.release()
    lookups_s = [_timed(lambda: client.lookup(_lookup_keys(keys), deadline_s=_DEADLINE_S)) for _ in range(20 * repeats)]
    read_s, copy_s = statistics.median(reads_s), statistics.median(copies_s)
    return Measured(
        figures={"shm_read_ratio_to_memcpy": copy_s / read_s},
        detail={
            "chunk_bytes": CHUNK_BYTES,
            "read_gb_per_s": CHUNK_BYTES / read_s / 1e9,
            "floor_memcpy_gb_per_s": CHUNK_BYTES / copy_s / 1e9,
            "lookup_1000_over_socket_ms": 1e3 * statistics.median(lookups_s),
            "samples": len(reads_s),
        },
    )


def _write(client: NodeStoreClient, key: ChunkKey, seed: int) -> None:
    meta = ChunkMeta(num_tokens=228, num_layers=30, num_kv_heads=3, head_dim=64, dtype="float32", base_position=0)
    lease = client.reserve(key, meta, CHUNK_BYTES, deadline_s=_DEADLINE_S)
    if lease is None:
        raise InvariantError("the store refused a chunk that it has room for")
    np.frombuffer(lease.payload, dtype=np.uint8)[:] = np.random.default_rng(seed).integers(
        0, 256, CHUNK_BYTES, dtype=np.uint8
    )
    if not lease.commit():
        raise InvariantError("the store did not take a chunk that it gave room for")


def _read(client: NodeStoreClient, key: ChunkKey, out: memoryview) -> None:
    if client.read_into(key, out, deadline_s=_DEADLINE_S) is None:
        raise InvariantError("a chunk that was just written cannot be read")


def _lookup_keys(keys: list[ChunkKey]) -> list[ChunkKey]:
    return [keys[index % len(keys)] for index in range(NUM_LOOKUPS)]


def _timed(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s
