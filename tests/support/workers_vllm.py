"""Worker processes on a real store: starting, finding, stopping."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil
from support.workers import SECRET

from kvstore.client import NodeStoreClient
from kvstore.node import NodeStore
from kvstore.settings import StoreSettings
from kvstore.wire import WorkerReport

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"
START_S = 240.0
VLLM = {
    "model": str(MODEL),
    "served_model_name": "smol",
    "dtype": "float32",
    "max_model_len": 2048,
    "block_size": 32,
    "kv_cache_bytes": 1 << 30,
    "cpus": ["0", "1"],
    "tool_call_parser": "hermes",
}


@dataclass
class WorkerProcess:
    """A running `support.worker_process`."""

    process: subprocess.Popen
    log: Path
    report: WorkerReport | None = None
    lines: list = field(default_factory=list)

    @property
    def url(self):
        return self.report.peer.url

    def wait_ready(self, *, within_s=START_S):
        stop_s = time.monotonic() + within_s
        reader = threading.Thread(target=self._read_line, daemon=True)
        reader.start()
        while reader.is_alive() and time.monotonic() < stop_s:
            reader.join(0.2)
        assert self.report is not None, f"worker not ready:\n{self.log.read_text()[-6000:]}"
        return self

    def _read_line(self):
        for line in self.process.stdout:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self.report = msgspec.convert(json.loads(line)["report"], WorkerReport)
                return

    def children(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def stop(self, *, within_s=30.0):
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(within_s)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.process.stdout.close()


def start_worker(folder, role, *, socket, engine, rank=0, **settings):
    """Start one worker; call `wait_ready` on it."""
    log = Path(folder) / f"{role}.log"
    given = {
        "role": role,
        "replica_id": f"{role}-0",
        "engine": engine,
        "settings": settings,
        "socket": str(socket),
        "rank": rank,
    }
    environment = os.environ | {
        "LEARNONCE_CLUSTER_SECRET": SECRET.hex(),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "support.worker_process", json.dumps(given)],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            cwd=ROOT / "tests",
            text=True,
        )
    return WorkerProcess(process, log)


@contextlib.contextmanager
def node_store(folder, *, host_bytes=2 << 30):
    """A node store in this process; its socket and a client."""
    socket = Path(folder) / "store.sock"
    store = NodeStore(
        StoreSettings(host_bytes=host_bytes, nvme=None),
        secret=SECRET,
        node_id="n0",
        socket_path=str(socket),
        bind_host="127.0.0.1",
    )
    store.start()
    client = NodeStoreClient(str(socket), secret=SECRET, client_name="test")
    try:
        yield socket, client
    finally:
        client.close()
        store.stop()
