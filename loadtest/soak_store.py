"""A long mixed load over every tier of two stores, at the limit of their capacity.

Covers: writes, reads of all kinds, pins, drops, catalogues and maintenance from several clients; every byte that is
read is compared; memory, descriptors and leases of the stores are followed over time.
Does not cover: faults (`tests/fault`), speed (`loadtest.bench_store`).
"""

import itertools
import secrets
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import psutil

from kvstore.client import NodeStoreClient
from kvstore.interfaces import ChunkMeta
from kvstore.keys import ChunkKey
from kvstore.settings import NvmeSettings, ObjectSettings, PeerSettings, StoreSettings
from kvstore.testing import StoreProcess
from kvstore.testing.poll import wait_until
from kvstore.testing.s3 import S3Process
from kvstore.testing.samples import sample_key

ARENA_BYTES: Final = 48 << 20
NVME_BYTES: Final = 96 << 20
OBJECT_BYTES: Final = 192 << 20
NUM_KEYS: Final = 600
"""At 0.5 MiB on average: three times what an arena and its files hold, and more than the bucket keeps."""
MAX_CHUNK_BYTES: Final = 1 << 20
_PATTERN_BYTES: Final = 4096
_DEADLINE_S: Final = 10.0
_SAMPLE_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What the stores took at one moment."""

    at_s: float
    rss_bytes: int
    descriptors: int
    threads: int


@dataclass(slots=True)
class SoakReport:
    """What happened."""

    seconds: float = 0.0
    operations: Counter[str] = field(default_factory=Counter)
    """By kind and outcome, for example "read.hit"."""
    mismatches: list[str] = field(default_factory=list)
    """Bytes that were not those of their key: must stay empty."""
    errors: list[str] = field(default_factory=list)
    """Exceptions of client calls: must stay empty."""
    slowest_s: float = 0.0
    """Longest client call."""
    samples: list[Sample] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    """Leases and reservations after the end: must be zero."""
    tiers: dict[str, Any] = field(default_factory=dict)

    def growth(self, of: Callable[[Sample], int]) -> float:
        """Median over the last quarter, over the median of the second quarter: 1.0 is steady."""
        quarter = max(1, len(self.samples) // 4)
        early = statistics.median(of(s) for s in self.samples[quarter : 2 * quarter] or self.samples)
        late = statistics.median(of(s) for s in self.samples[-quarter:])
        return late / early

    def figures(self) -> dict[str, float]:
        """For the result file."""
        return {
            "soak_seconds": self.seconds,
            "soak_operations": float(sum(self.operations.values())),
            "soak_mismatches": float(len(self.mismatches)),
            "soak_errors": float(len(self.errors)),
            "soak_slowest_call_s": self.slowest_s,
            "soak_memory_growth_ratio": self.growth(lambda s: s.rss_bytes),
            "soak_descriptor_growth_ratio": self.growth(lambda s: s.descriptors),
            "soak_thread_growth_ratio": self.growth(lambda s: s.threads),
            "soak_leases_left": float(sum(self.left.values())),
        }


def soak(*, seconds: float, num_threads: int = 4, seed: int = 0, log: Callable[[str], None]) -> SoakReport:
    """Run the load for `seconds`; the report's figures are to be judged by the caller."""
    report = SoakReport()
    secret = secrets.token_bytes(32)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lo-soak-"))
        bucket = stack.enter_context(S3Process())
        stores = [
            stack.enter_context(
                StoreProcess(
                    _settings(f"{folder}/{name}", bucket),
                    secret=secret,
                    socket_path=f"{folder}/{name}.sock",
                    node_id=name,
                )
            )
            for name in ("a", "b")
        ]
        for store in stores:
            store.set_peers([other.endpoint for other in stores if other is not store])
        clients = [
            stack.enter_context(_client(store.socket_path, secret))
            for store, _ in zip(itertools.cycle(stores), range(num_threads), strict=False)
        ]
        stop = threading.Event()
        threads = [
            threading.Thread(target=_drive, args=(client, report, stop, seed + index), name=f"soak-{index}")
            for index, client in enumerate(clients)
        ]
        start_s = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            _watch(stores, report, start_s=start_s, seconds=seconds, log=log)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        report.seconds = time.monotonic() - start_s
        _settle(clients, report)
    return report


def _settings(folder: str, bucket: S3Process) -> StoreSettings:
    return StoreSettings(
        host_bytes=ARENA_BYTES,
        nvme=NvmeSettings(folders=(f"{folder}-0", f"{folder}-1"), capacity_bytes=NVME_BYTES),
        object=ObjectSettings(
            url=bucket.url, options=bucket.options, capacity_bytes=OBJECT_BYTES, refresh_s=5.0, io_threads=2
        ),
        peers=PeerSettings(transports=("tcp",)),
        ttl_s=600.0,
    )


@contextmanager
def _client(path: str, secret: bytes) -> Iterator[NodeStoreClient]:
    client = NodeStoreClient(path, secret=secret, client_name="soak")
    try:
        yield client
    finally:
        client.close()


def _watch(
    stores: list[StoreProcess], report: SoakReport, *, start_s: float, seconds: float, log: Callable[[str], None]
) -> None:
    done = threading.Event()
    next_log_s = 60.0
    while (now_s := time.monotonic() - start_s) < seconds:
        processes = [psutil.Process(store.pid) for store in stores]
        report.samples.append(
            Sample(
                at_s=now_s,
                # Not the arena: its pages are shared, bounded, and fill up once.
                rss_bytes=sum(p.memory_info().rss - p.memory_info().shared for p in processes),
                descriptors=sum(p.num_fds() for p in processes),
                threads=sum(p.num_threads() for p in processes),
            )
        )
        if now_s >= next_log_s:
            next_log_s += 60.0
            last = report.samples[-1]
            log(
                f"{now_s:6.0f} s: {sum(report.operations.values())} operations, {len(report.mismatches)} mismatches, "
                f"{last.rss_bytes / (1 << 20):.0f} MiB, {last.descriptors} descriptors, {last.threads} threads"
            )
        done.wait(min(_SAMPLE_S, max(0.05, seconds / 40)))


def _settle(clients: list[NodeStoreClient], report: SoakReport) -> None:
    """After the load: no lease may be left; what the tiers hold."""
    for name, client in zip("ab", clients, strict=False):
        wait_until(partial(_is_idle, client), what="leases to end")
        stats = client.stat(deadline_s=_DEADLINE_S)
        assert stats is not None, "it answered just now"
        report.left[name] = stats.read_leases + stats.reservations
        report.tiers[name] = {tier: stat.bytes for tier, stat in stats.tiers.items()}


def _is_idle(client: NodeStoreClient) -> bool:
    stats = client.stat(deadline_s=_DEADLINE_S)
    return stats is not None and stats.read_leases + stats.reservations == 0


def _drive(client: NodeStoreClient, report: SoakReport, stop: threading.Event, seed: int) -> None:
    """One client's share of the load."""
    random = np.random.default_rng(seed)
    kinds = [_write, _read, _read_into, _stream, _pin, _drop, _catalog]
    weights = [0.30, 0.28, 0.28, 0.08, 0.03, 0.02, 0.01]
    while not stop.is_set():
        kind = kinds[int(random.choice(len(kinds), p=weights))]
        # Few keys are asked for often, most of them seldom.
        index = (
            int(min(NUM_KEYS - 1, random.zipf(1.2) - 1)) if random.random() < 0.6 else int(random.integers(NUM_KEYS))
        )
        start_s = time.monotonic()
        try:
            outcome = kind(client, index, report)
        except Exception as error:
            # Whatever it is, a client call must not raise it: the report tells, and the load goes on.
            report.errors.append(f"{kind.__name__} of {index}: {error!r}")
            continue
        report.slowest_s = max(report.slowest_s, time.monotonic() - start_s)
        report.operations[f"{kind.__name__[1:]}.{outcome}"] += 1


def payload_bytes(index: int) -> int:
    """Length of a key's payload: ragged, 1 byte to 1 MiB."""
    return int(np.random.default_rng(index).integers(1, MAX_CHUNK_BYTES))


def pattern(index: int) -> np.ndarray:
    """What a key's payload repeats."""
    return np.random.default_rng(index + (1 << 32)).integers(0, 256, _PATTERN_BYTES, dtype=np.uint8)


def is_payload(index: int, data: memoryview) -> bool:
    """Whether `data` is the payload of a key, to the byte."""
    if len(data) != payload_bytes(index):
        return False
    seen = np.frombuffer(data, dtype=np.uint8)
    whole = len(seen) // _PATTERN_BYTES * _PATTERN_BYTES
    expected = pattern(index)
    same = bool((seen[:whole].reshape(-1, _PATTERN_BYTES) == expected).all())
    same = same and bool((seen[whole:] == expected[: len(seen) - whole]).all())
    del seen
    return same


def _key(index: int) -> ChunkKey:
    return sample_key(index, salt="soak")


def _write(client: NodeStoreClient, index: int, report: SoakReport) -> str:
    meta = ChunkMeta(
        num_tokens=1 + payload_bytes(index) // 512,
        num_layers=2,
        num_kv_heads=1,
        head_dim=4,
        dtype="float32",
        base_position=0,
        tenant=f"t{index % 3}",
        learned_unix_s=time.time(),
    )
    lease = client.reserve(_key(index), meta, payload_bytes(index), deadline_s=_DEADLINE_S)
    if lease is None:
        return "refused"
    target = np.frombuffer(lease.payload, dtype=np.uint8)
    target[:] = np.resize(pattern(index), len(target))
    del target
    return "stored" if lease.commit() else "lost"


def _read(client: NodeStoreClient, index: int, report: SoakReport) -> str:
    (lease,) = client.read([_key(index)], deadline_s=_DEADLINE_S)
    if lease is None:
        return "miss"
    with lease:
        if not is_payload(index, lease.payload):
            report.mismatches.append(f"read of {index}")
    return "hit"


def _read_into(client: NodeStoreClient, index: int, report: SoakReport) -> str:
    out = memoryview(bytearray(payload_bytes(index)))
    if client.read_into(_key(index), out, deadline_s=_DEADLINE_S) is None:
        return "miss"
    if not is_payload(index, out):
        report.mismatches.append(f"read_into of {index}")
    return "hit"


def _stream(client: NodeStoreClient, index: int, report: SoakReport) -> str:
    lease = client.stream(_key(index), deadline_s=_DEADLINE_S)
    if lease is None:
        return "miss"
    with lease:
        if not lease.finish(deadline_s=_DEADLINE_S):
            return "late"
        if not is_payload(index, lease.payload):
            report.mismatches.append(f"stream of {index}")
    return "hit"


def _pin(client: NodeStoreClient, index: int, report: SoakReport) -> str:
    (held,) = client.pin([_key(index)], seconds=2.0, deadline_s=_DEADLINE_S)
    return "held" if held else "miss"


def _drop(client: NodeStoreClient, index: int, report: SoakReport) -> str:
    return "dropped" if client.drop([_key(index)], deadline_s=_DEADLINE_S) else "miss"


def _catalog(client: NodeStoreClient, index: int, report: SoakReport) -> str:
    entries = client.catalog(deadline_s=_DEADLINE_S)
    return "answered" if entries is not None else "late"
