"""Ray's object store as a path between two processes of one node: put in one, get in the other.

Covers: speed, and CPU seconds of the workers and of Ray's own processes. Does not cover: our paths.
"""

import tempfile
import time
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import psutil

from cluster.errors import UnavailableError
from loadtest.bench_store.pairs import Sample

_STORE_BYTES: Final = 256 << 20
_DEADLINE_S: Final = 60.0


class RayUnavailableError(UnavailableError):
    """Ray does not start here."""


class RayPair:
    """A Ray of its own, with one worker that puts; this process gets and copies. Use as a context manager.

    Raises:
        RayUnavailableError: Ray is in use by this process already, or does not start.
    """

    def __init__(self) -> None:
        import ray

        if ray.is_initialized():
            raise RayUnavailableError("this process is connected to a Ray already")
        self._ray: Any = ray
        self._folder = tempfile.TemporaryDirectory(prefix="lo-ray-", ignore_cleanup_errors=True)
        try:
            ray.init(
                address="local",
                num_cpus=1,
                object_store_memory=_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _temp_dir=self._folder.name,
            )
            self._holder = ray.remote(_Holder).remote()
            self._get(1 << 20)
        except Exception as error:  # whatever it is: the figure is left out, and says why
            self._close()
            raise RayUnavailableError(f"{type(error).__name__}: {error}") from error
        self._into = np.zeros(10 << 20, dtype=np.uint8)

    def run(self, record_bytes: int, *, count: int) -> Sample:
        """Move `count` records."""
        cpu_s, wall_s = _tree_cpu_s(), time.perf_counter()
        for _ in range(count):
            self._into[:record_bytes] = self._get(record_bytes)
        wall_s = time.perf_counter() - wall_s
        return Sample(num_bytes=record_bytes * count, wall_s=wall_s, cpu_s=_tree_cpu_s() - cpu_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _get(self, record_bytes: int) -> Any:
        return self._ray.get(self._holder.record.remote(record_bytes), timeout=_DEADLINE_S)

    def _close(self) -> None:
        self._ray.shutdown()
        self._folder.cleanup()


class _Holder:
    """The worker that puts; its result goes into Ray's object store."""

    def __init__(self) -> None:
        self._data = np.random.default_rng(7).integers(0, 256, 10 << 20, dtype=np.uint8)

    def record(self, record_bytes: int) -> Any:
        return self._data[:record_bytes]


def _tree_cpu_s() -> float:
    """User and system seconds of this process and of all that it started, Ray's own included."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total
