"""The index of a node's chunks at 10,000 and 100,000 records: memory, time to find them again, time to look them up.

Covers: `NvmePool` over real record files. Does not cover: the way over the socket (`loadtest.bench_store.shm`).

The records are small, as it is their number that counts here. Memory is what Python's allocator holds more after the
scan than before it, policy included; the scan runs after a start that finds no trace of the former life but the files,
once with the page cache as it is and, where this may be dropped (root), once without it. Only the latter is the figure;
without it there is none.
"""

import gc
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cluster.errors import InvariantError
from kvstore.container import encode_record, stored_bytes
from kvstore.keys import ChunkKey
from kvstore.settings import NvmeSettings
from kvstore.testing.samples import sample_key, sample_meta
from kvstore.tiers.folder import prepare_folder
from kvstore.tiers.nvme import NvmePool
from loadtest.bench_store import Measured

COUNTS: Final = (10_000, 100_000)
NUM_LOOKUPS: Final = 1000
_PAYLOAD: Final = b"index"
_SCAN_S: Final = 600.0
_DROP_CACHES: Final = Path("/proc/sys/vm/drop_caches")


def measure(*, repeats: int, log: Callable[[str], None]) -> Measured:
    """Make the records, start over them, look things up; medians.

    Args:
        repeats: Starts per count, at least 2, and tens of lookups.
        log: Told what is being done.
    """
    detail: dict[str, Any] = {}
    for count in COUNTS:
        with tempfile.TemporaryDirectory(prefix="learnonce-bench-") as home:
            log(f"index: {count} records")
            keys = _write_records(Path(home), count)
            detail[str(count)] = _measure_count(home, keys, repeats=max(2, repeats), log=log)
    small, large = (detail[str(count)] for count in COUNTS)
    detail["lookup_growth_ratio"] = large["lookup_1000_ms"] / small["lookup_1000_ms"]
    figures = {"index_bytes_per_chunk": large["bytes_per_chunk"], "lookup_1000_ms": large["lookup_1000_ms"]}
    if "rescan_cold_s" in large:
        figures["rescan_100k_s"] = large["rescan_cold_s"]
    return Measured(figures=figures, detail=detail)


def _write_records(home: Path, count: int) -> list[ChunkKey]:
    """Files as the tier writes them, without its care for crashes."""
    prepare_folder(str(home))
    keys = [sample_key(index) for index in range(count)]
    for index, key in enumerate(keys):
        name = key.hex()
        fd = os.open(f"{home}/{name[:2]}/{name}.rec", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(fd, encode_record(key, sample_meta(1 + index % 500, base_position=index), _PAYLOAD))
        finally:
            os.close(fd)
    os.sync()
    return keys


def _measure_count(home: str, keys: list[ChunkKey], *, repeats: int, log: Callable[[str], None]) -> dict[str, Any]:
    settings = NvmeSettings(folders=(home,), capacity_bytes=2 * len(keys) * stored_bytes(len(_PAYLOAD)))
    figures: dict[str, Any] = {"bytes_per_chunk": _bytes_per_chunk(settings, len(keys))}
    figures["rescan_warm_s"] = statistics.median(_scan_s(settings, len(keys)) for _ in range(repeats))
    cold_s: list[float] = []
    while len(cold_s) < repeats and _drop_caches():
        cold_s.append(_scan_s(settings, len(keys)))
    if len(cold_s) == repeats:
        figures["rescan_cold_s"] = statistics.median(cold_s)
        figures["rescan_cold_samples_s"] = cold_s
    else:
        log("index: the page cache cannot be dropped without root; there is no figure of the scan without it")
    figures["first_answers_ms"] = _first_answers_ms(settings, keys)
    pool = NvmePool(settings)
    try:
        _wait(pool)
        held = [keys[index * len(keys) // NUM_LOOKUPS] for index in range(NUM_LOOKUPS)]
        missing = [sample_key(index, salt="missing") for index in range(NUM_LOOKUPS)]
        figures["lookup_1000_ms"] = _lookup_ms(pool, held, expected=True, times=20 * repeats)
        figures["lookup_1000_missing_ms"] = _lookup_ms(pool, missing, expected=False, times=20 * repeats)
    finally:
        pool.close()
    return figures


def _drop_caches() -> bool:
    """Whether the page cache was dropped."""
    # Not created where it is missing; access is checked by the kernel, which refuses in many containers.
    try:
        fd = os.open(_DROP_CACHES, os.O_WRONLY)
    except OSError:
        return False
    try:
        os.sync()  # only clean pages are dropped
        return os.write(fd, b"3") == 1
    except OSError:
        return False
    finally:
        os.close(fd)


def _scan_s(settings: NvmeSettings, count: int) -> float:
    start_s = time.perf_counter()
    pool = NvmePool(settings)
    try:
        _wait(pool)
        seconds = time.perf_counter() - start_s
        if pool.stat().chunks != count:
            raise InvariantError(f"{count} records were written, {pool.stat().chunks} found again")
    finally:
        pool.close()
    return seconds


def _bytes_per_chunk(settings: NvmeSettings, count: int) -> float:
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        pool = NvmePool(settings)
        try:
            _wait(pool)
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            pool.close()
    finally:
        tracemalloc.stop()
    return (after - before) / count


def _first_answers_ms(settings: NvmeSettings, keys: list[ChunkKey]) -> float:
    """From the start to the first record that was read, while the scan has only begun."""
    start_s = time.perf_counter()
    pool = NvmePool(settings)
    try:
        if pool.get(keys[-1]) is None:
            raise InvariantError("a record was not found while the scan was under way")
        return 1e3 * (time.perf_counter() - start_s)
    finally:
        pool.close()


def _lookup_ms(pool: NvmePool, keys: list[ChunkKey], *, expected: bool, times: int) -> float:
    samples = []
    for _ in range(times):
        start_s = time.perf_counter()
        answers = [pool.contains(key) for key in keys]
        samples.append(time.perf_counter() - start_s)
        if answers != [expected] * len(keys):
            raise InvariantError("a lookup was wrong")
    return 1e3 * statistics.median(samples)


def _wait(pool: NvmePool) -> None:
    if not pool.wait_scanned(_SCAN_S):
        raise InvariantError(f"the scan did not end in {_SCAN_S} s")
