"""A live cluster for tests: started and stopped with the `learnonce` command, loaded, and hurt on purpose."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

from cluster import local

LEARNONCE = [sys.executable, "-c", "from cluster.cli import main; main()"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(condition, *, within_s, what):
    """Poll until `condition()` is true; its value."""
    stop_s = time.monotonic() + within_s
    pause = 0.05
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < stop_s, f"not within {within_s} s: {what}"
        # A test may wait for another process, never for time itself.
        select_for(pause)


def select_for(seconds):
    import select

    select.select([], [], [], seconds)


@dataclass
class LiveCluster:
    """One cluster of the test's own."""

    folder: Path
    overrides: dict
    name: str = "test"
    port: int = field(default_factory=free_port)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def command(self, *words, timeout=280, **options):
        values = {
            "cluster.name": self.name,
            "cluster.port": self.port,
            "cluster.state_dir": str(self.folder),
            **self.overrides,
        }
        settings = [word for name, value in values.items() for word in ("--set", f"{name}={json.dumps(value)}")]
        return subprocess.run(
            [*LEARNONCE, *words, *settings], capture_output=True, text=True, timeout=timeout, check=False, **options
        )

    def up(self):
        done = self.command("up")
        assert done.returncode == 0, done.stderr + self.log()
        return done

    def down(self):
        done = self.command("down")
        assert done.returncode == 0, done.stderr
        return done

    def state(self):
        return local.StateFolder(self.folder, self.name).read()

    def log(self):
        with contextlib.suppress(OSError):
            return local.StateFolder(self.folder, self.name).log.read_text()[-4000:]
        return ""

    def processes(self):
        return local.processes_of(self.state().cluster_id)

    def process_named(self, title):
        """The one process whose title holds `title`."""
        return next((p for p in self.processes() if title in " ".join(p.cmdline())), None)

    def engine_core_of(self, role):
        """The engine core process of the replica of one deployment (`Prefill` or `Decode`)."""
        replica = self.process_named(f"ServeReplica:learnonce:{role}")
        children = replica.children(recursive=True) if replica else []
        return next((p for p in children if "EngineCore" in " ".join(p.cmdline())), None)

    def ready(self):
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=5) as answer:
                return json.load(answer)
        except OSError:
            return None

    def metric(self, name, **labels):
        """The sum of one metric's samples that carry `labels`, over all processes."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        samples = [
            line for line in lines if line.startswith((name + "{", name + " ")) and all(w in line for w in wanted)
        ]
        return sum(float(line.rsplit(" ", 1)[1]) for line in samples)


def kill(process):
    """SIGKILL, and wait until it is gone."""
    os.kill(process.pid, signal.SIGKILL)
    until(
        lambda: not psutil.pid_exists(process.pid) or process.status() == psutil.STATUS_ZOMBIE,
        within_s=10,
        what="killed process is gone",
    )


@dataclass
class Outcome:
    """How one request of the load ended."""

    began_s: float
    seconds: float
    ok: bool
    detail: str


class Load:
    """Clients that ask one question after another until told to stop."""

    def __init__(self, cluster, *, clients, body, request_timeout_s):
        self.cluster, self.clients, self.body, self.timeout_s = cluster, clients, body, request_timeout_s
        self.outcomes = []
        self._stop = asyncio.Event()
        self._tasks = []

    async def __aenter__(self):
        timeout = aiohttp.ClientTimeout(total=self.timeout_s)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(self.clients)]
        return self

    async def __aexit__(self, *_):
        self._stop.set()
        await asyncio.gather(*self._tasks)
        await self._session.close()

    async def _client(self, number):
        count = 0
        while not self._stop.is_set():
            began_s = time.monotonic()
            ok, detail = await self._ask(self.body(number, count))
            self.outcomes.append(Outcome(began_s, time.monotonic() - began_s, ok, detail))
            count += 1
            if not ok:
                # A real client backs off; without this a 503 storm is all that is measured.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), 0.3)

    async def _ask(self, body):
        payload = {**body, "stream": True}
        try:
            async with self._session.post(f"{self.cluster.url}/v1/chat/completions", json=payload) as answer:
                text = (await answer.read()).decode(errors="replace")
                if answer.status != 200:
                    return False, f"HTTP {answer.status}"
                if not text.rstrip().endswith("data: [DONE]") or '"error"' in text:
                    return False, "stream broke off"
                return True, "ok"
        except TimeoutError:
            return False, "HUNG"
        except aiohttp.ClientError as error:
            return False, type(error).__name__

    async def wait_ok(self, *, since_s, within_s, count=4):
        """Seconds from `since_s` until `count` requests that began after it have succeeded."""
        stop_s = time.monotonic() + within_s
        while time.monotonic() < stop_s:
            good = sorted(o.began_s + o.seconds for o in list(self.outcomes) if o.ok and o.began_s >= since_s)
            if len(good) >= count:
                return good[count - 1] - since_s
            await asyncio.sleep(0.1)
        tail = [(o.detail, round(o.seconds, 1)) for o in self.outcomes[-12:]]
        raise AssertionError(f"no {count} good answers within {within_s} s; last: {tail}")

    def tally(self):
        counts = {}
        for outcome in self.outcomes:
            counts[outcome.detail] = counts.get(outcome.detail, 0) + 1
        return counts
