"""The object tier beside the bare client library: the same bytes, the same server, in turns.

Covers: `ObjectTier.read_into` and `put` over obstore against an S3 server in another process that keeps its objects in
memory, verification included. Does not cover: networks and real object stores, TLS, Arrow's clients.

The floor of a read is obstore's own `get`, copied to where the tier's bytes end up: the client cannot write there
itself. What it takes without that copy is in the detail, and so are several requests at a time.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import Any, Final

import obstore
from obstore.store import ObjectStore, from_url

from cluster.errors import InvariantError
from kvstore.container import ALIGN, checksum, encode_header, stored_bytes
from kvstore.keys import ChunkKey
from kvstore.settings import ObjectSettings
from kvstore.testing.s3 import S3Process
from kvstore.testing.samples import sample_key, sample_meta, sample_payload
from kvstore.tiers.object import ObjectTier, open_object_tier
from kvstore.tiers.object_names import object_name
from loadtest.bench_store import Measured

SIZES_MB: Final = (1, 10, 100)
FIGURE_MB: Final = 10
AT_A_TIME: Final = 4
_SEVERAL: Final = f"{FIGURE_MB}mb_{AT_A_TIME}_at_a_time"
_ROUNDS: Final = 4
"""Per repeat."""
_ROUND_BYTES: Final = 100_000_000
_MAX_SAMPLES: Final = 40
_DEADLINE_S: Final = 60.0


def measure(*, repeats: int, log: Callable[[str], None]) -> Measured:
    """Reads and writes of records of 1, 10 and 100 MB, by the tier and by the bare client in turns.

    Args:
        repeats: Four rounds each; medians over all samples are reported.
        log: Told what is being done.
    """
    times_s: dict[str, dict[str, list[float]]] = {}
    record_bytes: dict[str, int] = {}
    with S3Process() as server:
        for number in range(_ROUNDS * repeats):
            for size_mb in SIZES_MB:
                if number == 0:
                    log(f"object tier: {size_mb} MB against the bare client")
                # A round has connections of its own: how fast one is depends on where its threads came to run.
                with _tier(server) as tier:
                    pair = _Pair(server, tier, payload_bytes=size_mb * 1_000_000 - ALIGN, seed=number)
                    samples = max(1, min(_MAX_SAMPLES, _ROUND_BYTES // (size_mb * 1_000_000)))
                    found = {f"{size_mb}mb": pair.measure(samples)}
                    record_bytes[f"{size_mb}mb"] = pair.record_bytes
                    if size_mb == FIGURE_MB:
                        found[_SEVERAL] = pair.measure_many(samples // AT_A_TIME + 1)
                        record_bytes[_SEVERAL] = AT_A_TIME * pair.record_bytes
                for name, ways in found.items():
                    for way, values in ways.items():
                        times_s.setdefault(name, {}).setdefault(way, []).extend(values)
    detail = {name: _summary(ways, record_bytes[name]) for name, ways in times_s.items()}
    at_figure = detail[f"{FIGURE_MB}mb"]
    figures = {
        "object_get_ratio_to_client": at_figure["get_ratio"],
        "object_put_ratio_to_client": at_figure["put_ratio"],
    }
    return Measured(figures=figures, detail=detail)


class _Pair:
    """One record, read and written by the tier and by the bare client."""

    def __init__(self, server: S3Process, tier: ObjectTier, *, payload_bytes: int, seed: int) -> None:
        self._tier = tier
        # Connections of their own for each way: what one way leaves in a connection's windows is not another's.
        self._client, self._reader, self._writer = (_bare_client(server) for _ in range(3))
        self._order = random.Random(seed)
        self._numbers = count()
        self._salt = f"bench {seed} {payload_bytes}"
        self._payload = sample_payload(seed, payload_bytes)
        self._checksum = checksum(self._payload)
        self._record = self._new_record()
        self._key = self._stamp(self._record)
        if not tier.put(self._key, self._record):
            raise InvariantError("the object tier did not take a record")
        obstore.put(self._client, "bare", self._record, use_multipart=False)
        self._views = [memoryview(bytearray(len(self._record))) for _ in range(AT_A_TIME)]
        self._bare_put()
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            list(pool.map(self._read, range(AT_A_TIME)))
            list(pool.map(self._bare_read, range(AT_A_TIME)))

    @property
    def record_bytes(self) -> int:
        """What is moved."""
        return len(self._record)

    def measure(self, samples: int) -> dict[str, list[float]]:
        """Seconds of single requests, one after the other."""
        ways: dict[str, Callable[[], float]] = {
            "get": lambda: _timed(lambda: self._read(0)),
            "get_client": lambda: _timed(lambda: self._bare_read(0)),
            "get_client_without_copy": lambda: _timed(lambda: obstore.get(self._reader, "bare").bytes()),
            "put": self._put,
            "put_client": self._bare_put,
            "put_client_multipart": lambda: self._bare_put(use_multipart=True),
        }
        times_s: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(samples):
            # In an order of its own each time: none always follows the same other.
            for name in self._order.sample(list(ways), len(ways)):
                times_s[name].append(ways[name]())
        return times_s

    def measure_many(self, samples: int) -> dict[str, list[float]]:
        """Seconds of several reads at the same time."""
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            times_s: dict[str, list[float]] = {"get": [], "get_client": []}
            for _ in range(samples):
                times_s["get"].append(_timed(lambda: list(pool.map(self._read, range(AT_A_TIME)))))
                times_s["get_client"].append(_timed(lambda: list(pool.map(self._bare_read, range(AT_A_TIME)))))
        return times_s

    def _read(self, number: int) -> None:
        if self._tier.read_into(self._key, self._views[number], stop_s=time.monotonic() + _DEADLINE_S) is None:
            raise InvariantError("a record that was just written cannot be read")

    def _bare_read(self, number: int) -> None:
        self._views[number][:] = memoryview(obstore.get(self._reader, "bare").bytes())

    def _put(self) -> float:
        record = self._record
        key = self._stamp(record)
        time_s = _timed(lambda: self._tier.put(key, record))
        entry = self._tier.entry(key)
        if entry is None:
            raise InvariantError("the object tier did not take a record")
        # Not by the tier, which deletes later: while something else is measured.
        obstore.delete(self._client, object_name(key, entry))
        self._tier.drop(key)
        return time_s

    def _bare_put(self, *, use_multipart: bool = False) -> float:
        # A new object each time, as the tier writes: replacing one costs the server more.
        name = f"bare-{next(self._numbers)}"
        # Its default for more than 5 MB are several requests.
        time_s = _timed(lambda: obstore.put(self._writer, name, self._record, use_multipart=use_multipart))
        obstore.delete(self._client, name)
        return time_s

    def _new_record(self) -> memoryview:
        record = bytearray(stored_bytes(len(self._payload)))
        record[ALIGN : ALIGN + len(self._payload)] = self._payload
        return memoryview(record)

    def _stamp(self, record: memoryview) -> ChunkKey:
        """Make the record one of a new key."""
        key = sample_key(next(self._numbers), salt=self._salt)
        record[:ALIGN] = encode_header(
            key, sample_meta(), payload_bytes=len(self._payload), payload_checksum=self._checksum
        )
        return key


def _bare_client(server: S3Process) -> ObjectStore:
    # Unsigned bodies, as the tier sends them: signing would be most of the time of both.
    config: Any = {**server.options, "unsigned_payload": "true"}
    del config["allow_http"]
    client: Any = {"allow_http": True, "timeout": "60s"}
    return from_url(server.url, config=config, client_options=client)


def _summary(times_s: dict[str, list[float]], num_bytes: int) -> dict[str, float]:
    medians_s = {way: statistics.median(values) for way, values in times_s.items()}
    summary = {f"{way}_gb_per_s": num_bytes / median_s / 1e9 for way, median_s in medians_s.items()}
    summary["get_ratio"] = medians_s["get_client"] / medians_s["get"]
    if "put" in medians_s:
        summary["get_ratio_to_client_without_copy"] = medians_s["get_client_without_copy"] / medians_s["get"]
        summary["put_ratio"] = medians_s["put_client"] / medians_s["put"]
    summary["samples"] = len(times_s["get"])
    return summary


@contextmanager
def _tier(server: S3Process) -> Iterator[ObjectTier]:
    settings = ObjectSettings(
        url=server.url, options=server.options, refresh_s=3600.0, timeout_s=_DEADLINE_S, deadline_s=_DEADLINE_S
    )
    tier = open_object_tier(settings)
    try:
        tier.refresh()
        yield tier
    finally:
        tier.close()


def _timed(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s
