"""The NIXL data path between two stores over loopback, sidecars and staging included, beside plain sockets.

Covers: speed and CPU seconds per GB of `NixlTransport`, of a bare pair of agents and of plain sockets; what an idle
sidecar costs. Does not cover: RDMA and GPUs (nothing of them is needed to run it), links slower than memory.

Both ends go through memory larger than any cache, as the floors do. The store's time is that of the holder's copy to
its staging memory and of the pull; the question for it is not in it, nor are waits for room in that memory.

Without RDMA these are the figures of UCX's TCP, which moves bytes with the processor: sockets are cheaper. No figure
of the result file comes from here; see `docs/adr/0010-nixl-in-a-sidecar.md` for what the figures decide.
"""

import functools
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

from cluster.errors import InvariantError, UnavailableError
from kvstore.settings import NixlSettings
from kvstore.transport import Offer
from kvstore.transport.nixl import NixlServer, NixlService, NixlTransport
from loadtest.bench_store import Measured
from loadtest.bench_store.pair_kinds import ARENA_BYTES, new_arena
from loadtest.bench_store.pairs import Pair, PairUnavailableError, Sample

MIB: Final = 1 << 20
COUNTS: Final = {1 * MIB: 64, 10 * MIB: 12}
"""Records per sample."""
_NAMES: Final = {1 * MIB: "1mb", 10 * MIB: "10mb"}
_OURS: Final = "nixl_store"
_FLOORS: Final = ("socket", "nixl")
_ROOT: Final = Path(__file__).resolve().parents[2]
_READY_S: Final = 60.0
_PULL_S: Final = 30.0
_IDLE_S: Final = 3.0
_NETWORK: Final = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
"""Of all agents, the bare ones too. On one node UCX would copy through shared memory; this is what two nodes without
RDMA have."""


class NixlMissingError(UnavailableError):
    """No agent can be made here."""


def measure(*, repeats: int, log: Callable[[str], None]) -> Measured:
    """Samples of ours and of the floors in turn; no figures, only details.

    Args:
        repeats: Rounds; each has one sample per path and size.
        log: Told what is being done.

    Raises:
        NixlMissingError: NIXL cannot be used on this machine; the message says why.
    """
    log("nixl: 1 MiB and 10 MiB records between two stores over UCX's TCP on loopback")
    detail: dict[str, Any] = {"record_bytes": list(COUNTS), "paths": {}, "skipped": {}}
    with _environment(), _StorePair() as ours:
        detail["idle_cores_of_a_sidecar"] = ours.idle_cores()
        runs: dict[str, Callable[[int], Sample]] = {_OURS: ours.run}
        pairs: list[Pair] = []
        try:
            for kind in _FLOORS:
                try:
                    pair = Pair(kind)
                except PairUnavailableError as error:
                    detail["skipped"][kind] = str(error)
                    continue
                pairs.append(pair)
                runs[kind] = functools.partial(_run_floor, pair)
            for size, name in _NAMES.items():
                detail["paths"][name] = _rounds(runs, size, repeats)
        finally:
            for pair in pairs:
                pair.close()
    return Measured(figures={}, detail=detail)


def _run_floor(pair: Pair, record_bytes: int) -> Sample:
    return pair.run(record_bytes, count=COUNTS[record_bytes])


def _rounds(runs: dict[str, Callable[[int], Sample]], size: int, repeats: int) -> dict[str, dict[str, float]]:
    samples: dict[str, list[Sample]] = {kind: [] for kind in runs}
    for run in runs.values():
        run(size)
    for index in range(repeats):
        for kind in list(runs) if index % 2 else list(reversed(runs)):
            samples[kind].append(runs[kind](size))
    return {
        kind: {
            "gb_per_s": statistics.median(sample.gb_per_s for sample in found),
            "best_gb_per_s": max(sample.gb_per_s for sample in found),
            "cpu_s_per_gb": statistics.median(sample.cpu_s_per_gb for sample in found),
            "samples": len(found),
        }
        for kind, found in samples.items()
    }


class _StorePair:
    """This process as the puller, and another one as the holder; both have their sidecar. Use as a context manager."""

    def __enter__(self) -> "_StorePair":
        # Not the cluster's: a secret of this run, which its two processes share.
        self._secret = secrets.token_bytes(32)
        self._arena = memoryview(bytearray(ARENA_BYTES))
        self._turn = 0
        self._checked: set[int] = set()
        self._service = _ready_service("puller", self._secret)
        try:
            self._holder = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(_ROOT)},
                text=True,
            )
        except BaseException:
            self._service.close()
            raise
        try:
            address = self._ask({"secret": self._secret.hex()})
            self._transport = NixlTransport(self._service, address=bytes.fromhex(address))
        except BaseException:
            self.__exit__()
            raise
        me, other = psutil.Process(), psutil.Process(self._holder.pid)
        sidecars = [child for child in me.children() if child.pid != other.pid]
        self._sidecars = [*sidecars, *other.children()]
        self._processes = [me, other, *self._sidecars]
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._holder.stdin, self._holder.stdout):
            if pipe is not None:
                pipe.close()
        self._holder.wait()
        self._service.close()

    def run(self, record_bytes: int) -> Sample:
        """One sample: offering, pulling and ending the offer, as a store does it."""
        if record_bytes not in self._checked:
            self._check(record_bytes)
        num_records = ARENA_BYTES // record_bytes
        cpu_s, wall_s = self._cpu_s(), 0.0
        for _ in range(COUNTS[record_bytes]):
            self._turn += 1
            wall_s += self._move(self._turn % num_records * record_bytes, record_bytes)
        cpu_s = self._cpu_s() - cpu_s
        return Sample(num_bytes=record_bytes * COUNTS[record_bytes], wall_s=wall_s, cpu_s=cpu_s)

    def _move(self, start: int, record_bytes: int) -> float:
        """Bring one record to the same place of this arena; seconds of the offer and of the pull together."""
        answer = self._ask({"start": start, "bytes": record_bytes})
        offer = Offer("nixl", bytes.fromhex(answer["handle"]), record_bytes)
        into = self._arena[start : start + record_bytes]
        start_s = time.perf_counter()
        self._transport.pull(offer, into, stop_s=time.monotonic() + _PULL_S)
        return float(time.perf_counter() - start_s + answer["offer_s"])

    def _check(self, record_bytes: int) -> None:
        landed, expected = np.frombuffer(self._arena, dtype=np.uint8), np.frombuffer(new_arena(), dtype=np.uint8)
        landed[:] = 0
        for start in range(0, ARENA_BYTES - record_bytes + 1, record_bytes):
            self._move(start, record_bytes)
            stop = start + record_bytes
            if not np.array_equal(landed[start:stop], expected[start:stop]):
                raise InvariantError(f"wrong bytes arrived at {start}")
        self._checked.add(record_bytes)

    def idle_cores(self) -> float:
        """Cores that a sidecar uses while nothing is asked of it, the busier one of the two."""
        before = [sum(process.cpu_times()[:2]) for process in self._sidecars]
        time.sleep(_IDLE_S)
        used = [sum(process.cpu_times()[:2]) - at for process, at in zip(self._sidecars, before, strict=True)]
        return max(used) / _IDLE_S

    def _cpu_s(self) -> float:
        """User and system seconds of both stores and both sidecars."""
        return float(sum(sum(process.cpu_times()[:2]) for process in self._processes))

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.write(json.dumps(question) + "\n")
        self._holder.stdin.flush()
        line = self._holder.stdout.readline()
        if not line:
            raise NixlMissingError(f"the holder's process ended with {self._holder.wait()}")
        return json.loads(line)


def _ready_service(node_id: str, secret: bytes) -> NixlService:
    service = NixlService(NixlSettings(net_devices="lo"), secret=secret, node_id=node_id, epoch="bench")
    service.start()
    if not service.wait_ready(_READY_S):
        reason = service.unavailable_reason
        service.close()
        raise NixlMissingError(f"no NIXL agent: {reason}")
    return service


@contextmanager
def _environment() -> Iterator[None]:
    """UCX's settings for this process' sidecar, taken back afterwards."""
    before = {name: os.environ.get(name) for name in _NETWORK}
    os.environ.update(_NETWORK)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def main() -> None:
    """Offer records until the pipe is closed, each until the next is asked for."""
    start = json.loads(sys.stdin.readline())
    service = _ready_service("holder", bytes.fromhex(start["secret"]))
    server = NixlServer(service)
    print(json.dumps(server.address.hex()), flush=True)
    arena = new_arena()
    handle = b""
    for line in sys.stdin:
        asked = json.loads(line)
        record = arena[asked["start"] : asked["start"] + asked["bytes"]]
        server.revoke(handle)
        offer = None
        while offer is None:  # room comes back a moment after an offer has ended
            start_s = time.perf_counter()
            offer = server.offer(record, peer="puller", lifetime_s=_PULL_S)
            offer_s = time.perf_counter() - start_s
            if offer is None:
                time.sleep(0.01)
        handle = offer.handle
        print(json.dumps({"handle": handle.hex(), "offer_s": offer_s}), flush=True)
    server.close()
    service.close()


if __name__ == "__main__":
    main()
