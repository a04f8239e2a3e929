"""The NVMe pool beside fio: direct writes and reads of whole records, same folder, same size, same number of threads.

Covers: `NvmePool.put` into a full pool and `NvmePool.read_into` with its verification. Does not cover: the way from the
arena (the mover's threads call just these), other processes on the same device.

fio writes over one file that exists, which is the most that the device can do; the pool is full, so every put evicts a
record and writes over its file, as it does in a node that has run for a while. What it does while it fills is in the
detail.
"""

import json
import mmap
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from cluster.errors import InvariantError, UnavailableError
from kvstore.container import ALIGN, checksum, encode_header
from kvstore.keys import ChunkKey
from kvstore.settings import NvmeSettings
from kvstore.testing.samples import sample_key, sample_meta
from kvstore.tiers.folder import supports_direct_io
from kvstore.tiers.nvme import NvmePool
from loadtest.bench_store import Measured

RECORD_MIB: Final = (1, 4, 16)
FIGURE_MIB: Final = 16
"""Of the figures; the other sizes are in the detail."""
NUM_THREADS: Final = 4
"""As many as the store has by default, and as many jobs of fio."""
TOTAL_BYTES: Final = 512 << 20
"""Of one pass over all records, which is what the pool holds."""
_FIO_S: Final = 1.0
_MIN_ROUNDS: Final = 5


@dataclass(slots=True)
class _Samples:
    """GB/s by what was measured."""

    puts: list[float] = field(default_factory=list)
    gets: list[float] = field(default_factory=list)
    fio_writes: list[float] = field(default_factory=list)
    fio_reads: list[float] = field(default_factory=list)


def measure(*, repeats: int, log: Callable[[str], None]) -> Measured:
    """Passes over the pool, interleaved with fio; medians.

    Args:
        repeats: Rounds per size, at least 5.
        log: Told what is being done, and what is left out.

    Raises:
        UnavailableError: The folder for temporary files has no direct I/O.
    """
    fio = shutil.which("fio")
    if fio is None:
        log("nvme: fio is not installed (Debian: apt-get install fio): no floor, so no ratios")
    figures: dict[str, float] = {}
    detail: dict[str, Any] = {"threads": NUM_THREADS, "figure_mib": FIGURE_MIB, "total_bytes": TOTAL_BYTES}
    with tempfile.TemporaryDirectory(prefix="learnonce-bench-") as home:
        if not supports_direct_io(home):
            raise UnavailableError(
                f"{home} has no direct I/O: nothing about a disk can be measured there; set TMPDIR to a folder on one"
            )
        for mib in RECORD_MIB:
            log(f"nvme: {mib} MiB records, {NUM_THREADS} threads")
            filling, samples = _measure_size(Path(home), mib << 20, rounds=max(_MIN_ROUNDS, repeats), fio=fio)
            ratios = _ratios(samples) if fio else {}
            detail[f"{mib}_mib"] = {**_medians(samples), "put_gb_per_s_while_filling": filling, **ratios}
            if mib == FIGURE_MIB:
                figures |= ratios
    if fio is None:
        detail["left_out"] = "nvme_read_ratio_to_fio, nvme_write_ratio_to_fio: fio is not installed"
    return Measured(figures=figures, detail=detail)


def _measure_size(home: Path, record_bytes: int, *, rounds: int, fio: str | None) -> tuple[float, _Samples]:
    """The first pass, which fills an empty pool, and all others."""
    samples = _Samples()
    settings = NvmeSettings(folders=(str(home / "pool"),), capacity_bytes=TOTAL_BYTES, low_ratio=1.0, policy="lru")
    passes = _Passes(NvmePool(settings), record_bytes)
    try:
        filling = passes.put()
        if fio:
            _run_fio(fio, home, "write", record_bytes)
        for _ in range(rounds):
            samples.puts.append(passes.put())
            if fio:
                samples.fio_writes.append(_run_fio(fio, home, "write", record_bytes))
            samples.gets.append(passes.get())
            if fio:
                samples.fio_reads.append(_run_fio(fio, home, "read", record_bytes))
    finally:
        passes.close()
        shutil.rmtree(home / "pool")
        (home / "fio").unlink(missing_ok=True)
    return filling, samples


class _Passes:
    """Puts and gets of all records, on threads with a record of their own each."""

    def __init__(self, pool: NvmePool, record_bytes: int) -> None:
        self._pool = pool
        self._num_records = TOTAL_BYTES // record_bytes
        self._buffers = [mmap.mmap(-1, record_bytes) for _ in range(NUM_THREADS)]
        payload = np.random.default_rng(0).bytes(record_bytes - ALIGN)
        self._checksum = checksum(payload)
        self._payload_bytes = len(payload)
        for buffer in self._buffers:
            buffer[ALIGN:] = payload
        self._generation = 0
        if not pool.wait_scanned(60.0):
            raise InvariantError("an empty folder was not scanned in a minute")

    def put(self) -> float:
        """Write every record anew under new keys; GB/s."""
        self._generation += 1
        return self._on_threads(self._put)

    def get(self) -> float:
        """Read every record of the last `put`, not in the order of writing; GB/s."""
        return self._on_threads(self._get)

    def close(self) -> None:
        self._pool.close()
        for buffer in self._buffers:
            buffer.close()

    def _key(self, index: int) -> ChunkKey:
        return sample_key(index, salt=str(self._generation))

    def _put(self, index: int, view: memoryview) -> None:
        key = self._key(index)
        view[:ALIGN] = encode_header(
            key, sample_meta(), payload_bytes=self._payload_bytes, payload_checksum=self._checksum
        )
        if not self._pool.put(key, view):
            raise InvariantError("the pool refused a record that it has room for")

    def _get(self, index: int, view: memoryview) -> None:
        if self._pool.read_into(self._key(index * 7919 % self._num_records), view) is None:
            raise InvariantError("a record that was just written cannot be read")

    def _on_threads(self, work: Callable[[int, memoryview], None]) -> float:
        indices = iter(range(self._num_records))
        lock = threading.Lock()
        failures: list[Exception] = []
        start = threading.Barrier(NUM_THREADS + 1)

        def run(buffer: mmap.mmap) -> None:
            with memoryview(buffer) as view:
                start.wait()
                while not failures:
                    with lock:
                        index = next(indices, None)
                    if index is None:
                        return
                    try:
                        work(index, view)
                    except Exception as error:
                        # Raised again by the thread that waits for the others.
                        failures.append(error)

        threads = [threading.Thread(target=run, args=(buffer,)) for buffer in self._buffers]
        for thread in threads:
            thread.start()
        start.wait()
        start_s = time.perf_counter()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return TOTAL_BYTES / (time.perf_counter() - start_s) / 1e9


def _run_fio(fio: str, home: Path, direction: str, record_bytes: int) -> float:
    """GB/s of fio's direct I/O at random places of one file."""
    command = [
        fio,
        "--name=floor",
        f"--filename={home / 'fio'}",
        f"--rw=rand{direction}",
        f"--bs={record_bytes}",
        f"--size={TOTAL_BYTES}",
        f"--numjobs={NUM_THREADS}",
        f"--runtime={_FIO_S}",
        *("--direct=1", "--ioengine=psync", "--thread", "--time_based", "--group_reporting", "--randrepeat=0"),
        "--output-format=json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise UnavailableError(f"fio failed: {done.stderr.strip()[:500]}")
    return float(json.loads(done.stdout)["jobs"][0][direction]["bw_bytes"]) / 1e9


def _ratios(samples: _Samples) -> dict[str, float]:
    return {
        "nvme_read_ratio_to_fio": statistics.median(samples.gets) / statistics.median(samples.fio_reads),
        "nvme_write_ratio_to_fio": statistics.median(samples.puts) / statistics.median(samples.fio_writes),
    }


def _medians(samples: _Samples) -> dict[str, float | list[float]]:
    named = {
        "put": samples.puts,
        "get": samples.gets,
        "floor_fio_write": samples.fio_writes,
        "floor_fio_read": samples.fio_reads,
    }
    medians: dict[str, float | list[float]] = {
        f"{name}_gb_per_s": statistics.median(values) for name, values in named.items() if values
    }
    return medians | {f"{name}_samples": [round(value, 3) for value in values] for name, values in named.items()}
