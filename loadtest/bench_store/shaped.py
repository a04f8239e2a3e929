"""The TCP data path over a link of 3 Gbit/s, beside iperf3 over the same link.

Covers: two network namespaces joined by a shaped pair of interfaces, made and removed here; with and without delay.
Does not cover: loopback (`loadtest.bench_store.tcp`). Nothing leaves the two namespaces.
"""

import json
import os
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, Self

from cluster.errors import UnavailableError
from loadtest.bench_store import Measured
from loadtest.bench_store.pairs import Pair
from loadtest.bench_store.tcp import describe

_MIB: Final = 1 << 20
RATE: Final = "3gbit"
RECORD_BYTES: Final = 10 * _MIB
SAMPLE_BYTES: Final = 240 * _MIB
"""0.7 s at 3 Gbit/s."""
NUM_STREAMS: Final = 4
DELAY_S: Final = 0.005
_TOOLS: Final = ("ip", "tc", "iperf3")
HOLDER_HOST: Final = "10.255.77.1"
READER_HOST: Final = "10.255.77.2"
_IPERF_PORT: Final = 5201
_COMMAND_S: Final = 30.0


class LinkUnavailableError(UnavailableError):
    """This process may not, or cannot, make a shaped link."""


def measure(*, repeats: int, log: Callable[[str], None]) -> Measured:
    """Records pulled by four threads, as a request's chunks are, interleaved with iperf3 with as many streams; medians.

    One thread alone leaves the link idle from the end of a record to the start of the next: that is in the detail.

    Args:
        repeats: Rounds per link.
        log: Told what is being done.

    Raises:
        LinkUnavailableError: Not root, or a tool is missing.
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        raise LinkUnavailableError(f"a shaped link needs root and {', '.join(_TOOLS)}; missing: {missing or 'root'}")
    detail: dict[str, Any] = {"rate": RATE, "record_bytes": RECORD_BYTES, "links": {}}
    for delay_s in (0.0, DELAY_S):
        log(f"shaped: {RATE} between two network namespaces, delay {delay_s * 1e3:.0f} ms each way")
        name = f"delay_{delay_s * 1e3:.0f}ms"
        try:
            with ShapedLink(delay_s=delay_s) as link:
                detail["links"][name] = _measure(link, repeats=repeats)
        except LinkUnavailableError as error:
            if not delay_s:
                raise
            # Some kernels come without netem; the figure needs no delay.
            detail["links"][name] = {"skipped": str(error)}
            log(f"shaped: without delay only: {error}")
    ratio = detail["links"]["delay_0ms"]["ratio_to_iperf_4_threads"]
    return Measured(figures={"shaped_3gbit_ratio_to_iperf": ratio}, detail=detail)


class ShapedLink:
    """Two namespaces and a shaped pair of interfaces. Use as a context manager.

    They go with this process, however it ends: a guard process waits for the end of a pipe and removes them.

    Args:
        delay_s: Added in each direction.
        rate: Of each direction, in the words of `tc`.

    Raises:
        LinkUnavailableError: The system refuses; its words are in the message.
    """

    def __init__(self, *, delay_s: float = 0.0, rate: str = RATE) -> None:
        self._rate = rate
        name = f"lob{os.getpid()}"
        self._names = (f"{name}h", f"{name}r")
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _guard_script(self._names)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._make(delay_s)
        except BaseException:
            self.close()
            raise

    @property
    def holder_prefix(self) -> list[str]:
        """Runs a command at the holder's end."""
        return ["ip", "netns", "exec", self._names[0]]

    @property
    def reader_prefix(self) -> list[str]:
        """Runs a command at the reader's end."""
        return ["ip", "netns", "exec", self._names[1]]

    def close(self) -> None:
        """Remove everything, and whatever still runs in the namespaces."""
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        self._guard.wait(_COMMAND_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make(self, delay_s: float) -> None:
        holder, reader = self._names
        for name in self._names:
            _run(["ip", "netns", "add", name])
        _run(["ip", "-n", holder, "link", "add", "link0", "type", "veth", "peer", "name", "link0", "netns", reader])
        for name, host in zip(self._names, (HOLDER_HOST, READER_HOST), strict=True):
            _run(["ip", "-n", name, "addr", "add", f"{host}/30", "dev", "link0"])
            _run(["ip", "-n", name, "link", "set", "link0", "up"])
            _run(["ip", "-n", name, "link", "set", "lo", "up"])
            shape = ["tc", "-n", name, "qdisc", "add", "dev", "link0", "root"]
            if delay_s:
                _run([*shape, "netem", "rate", self._rate, "delay", f"{delay_s * 1e6:.0f}us", "limit", "10000"])
            else:
                _run([*shape, "tbf", "rate", self._rate, "burst", "512kb", "latency", "20ms"])


def _guard_script(names: Sequence[str]) -> str:
    """Waits for the end of its input, then ends what runs in the namespaces and removes them."""
    ends = [f"ip netns pids {name} | xargs -r kill -9; ip netns del {name}" for name in names]
    return "; ".join(["cat >/dev/null", *ends])


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=True)
    except subprocess.CalledProcessError as error:
        raise LinkUnavailableError(f"{' '.join(command)}: {error.stderr.strip() or error.stdout.strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LinkUnavailableError(f"{' '.join(command)}: {error}") from error
    return done.stdout


def _measure(link: ShapedLink, *, repeats: int) -> dict[str, Any]:
    ends: dict[str, Any] = {
        "host": HOLDER_HOST,
        "holder_prefix": link.holder_prefix,
        "reader_prefix": link.reader_prefix,
    }
    num_records = SAMPLE_BYTES // RECORD_BYTES
    paths: dict[str, list[Any]] = {"tcp_1_thread": [], "tcp_4_threads": [], "socket_1_thread": []}
    iperf_gb_per_s: list[float] = []
    with Pair("tcp", **ends) as ours, Pair("socket", **ends) as floor:
        for pair in (ours, floor):
            pair.run(RECORD_BYTES, count=1)
        for _ in range(repeats):
            iperf_gb_per_s.append(_iperf(link))
            paths["tcp_1_thread"].append(ours.run(RECORD_BYTES, count=num_records))
            paths["tcp_4_threads"].append(ours.run(RECORD_BYTES, count=num_records // NUM_STREAMS, threads=NUM_STREAMS))
            paths["socket_1_thread"].append(floor.run(RECORD_BYTES, count=num_records))
    found: dict[str, Any] = {"iperf_gb_per_s": statistics.median(iperf_gb_per_s), "rounds": repeats}
    for name, samples in paths.items():
        found[name] = describe(samples)
        pairs = zip(samples, iperf_gb_per_s, strict=True)
        found[f"ratio_to_iperf_{name.removeprefix('tcp_')}"] = statistics.median(s.gb_per_s / i for s, i in pairs)
    return found


def _iperf(link: ShapedLink) -> float:
    """Payload that iperf3 brings from the holder's end to the reader's, in GB/s."""
    server = subprocess.Popen(
        [*link.reader_prefix, "iperf3", "--server", "--one-off", "--port", str(_IPERF_PORT)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return _wait_for_iperf(link)
    finally:
        server.kill()
        server.wait()


def _wait_for_iperf(link: ShapedLink) -> float:
    """Ask until the server listens."""
    client = ["iperf3", "--client", READER_HOST, "--port", str(_IPERF_PORT), "--json"]
    client += ["--parallel", str(NUM_STREAMS), "--bytes", str(SAMPLE_BYTES)]
    stop_s = time.monotonic() + _COMMAND_S
    pause = threading.Event()
    while True:
        # It says what is wrong in its answer, whatever its exit status.
        done = subprocess.run(
            [*link.holder_prefix, *client], capture_output=True, text=True, timeout=_COMMAND_S, check=False
        )
        answer = json.loads(done.stdout or "{}")
        received = answer.get("end", {}).get("sum_received")
        if received:
            return float(received["bits_per_second"]) / 8e9
        if time.monotonic() >= stop_s:
            raise LinkUnavailableError(f"iperf3: {answer.get('error') or done.stderr.strip()}")
        pause.wait(0.05)
