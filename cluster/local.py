"""One local cluster as processes: start its supervisor, follow its progress, stop exactly what it started.

Covers: the state folder, the supervisor's life as seen from the command line, finding every process of one cluster.
Does not cover: Ray and Serve themselves (`cluster.lifecycle`, which runs inside the supervisor).

Every process of a cluster inherits one environment variable with the cluster's random id. Stopping means: ask the
supervisor, wait, then end what still carries that id. Nothing else on the machine is touched
(docs/adr/0007-a-supervisor-owns-the-local-cluster.md).
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec
import psutil

from cluster.errors import CallerError, UnavailableError
from kvstore.wire import SECRET_VARIABLE

CLUSTER_ID_VARIABLE: Final = "LEARNONCE_CLUSTER_ID"
_POLL_S: Final = 0.1
_KILL_AFTER_S: Final = 5.0
"""Seconds between asking a left-over process to end and ending it."""
_MAX_SWEEPS: Final = 8
"""Looks for processes that came while others were being ended."""


class PortTakenError(CallerError):
    """Another process listens where the cluster should."""


class AlreadyRunningError(CallerError):
    """A cluster of that name runs already."""


class StartFailedError(UnavailableError):
    """The cluster did not become ready; the message says what failed and where the log is."""


class Phase(StrEnum):
    """Where a cluster is in its life."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class Step(msgspec.Struct, kw_only=True):
    """One thing that start-up waits for."""

    name: str
    state: str = "waiting"
    """"waiting", "working", "done" or "failed"."""
    detail: str = ""
    started_s: float | None = None
    """Seconds after the supervisor began."""
    finished_s: float | None = None


class ClusterState(msgspec.Struct, kw_only=True):
    """What the supervisor writes for everyone else, in `status.json`."""

    name: str
    cluster_id: str
    supervisor_pid: int
    url: str
    runtime_dir: str
    phase: Phase = Phase.STARTING
    message: str = ""
    started_unix_s: float = 0.0
    ready_after_s: float | None = None
    steps: list[Step] = msgspec.field(default_factory=list)


class StateFolder:
    """The files of one named cluster: settings, status, secret, log."""

    def __init__(self, state_dir: Path, name: str) -> None:
        self.path = state_dir.expanduser() / name
        self.settings = self.path / "settings.json"
        self.status = self.path / "status.json"
        self.secret = self.path / "secret"
        self.log = self.path / "supervisor.log"
        self.failed_logs = self.path / "failed-start-logs"

    def create(self) -> None:
        """Make the folder, private to its user."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path.chmod(0o700)

    def read(self) -> ClusterState | None:
        """The last state written, or None if there is none that can be read."""
        try:
            return msgspec.json.decode(self.status.read_bytes(), type=ClusterState)
        except (OSError, msgspec.DecodeError):
            return None

    def write(self, state: ClusterState) -> None:
        """Replace the state in one step: a reader sees the old or the new one, never a part."""
        scratch = self.status.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=1))
        scratch.replace(self.status)

    def keep_logs(self, runtime_dir: Path) -> None:
        """Copy Ray's logs, those of the replicas among them, out of a cluster that failed before its folder goes."""
        for logs in runtime_dir.glob("session_2*/logs"):
            shutil.copytree(logs, self.failed_logs, dirs_exist_ok=True, ignore_dangling_symlinks=True)

    def cluster_secret(self) -> bytes:
        """The cluster's secret, made at first use, readable by its owner only."""
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(self.secret, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
        return bytes.fromhex(self.secret.read_text())


def is_alive(state: ClusterState) -> bool:
    """Whether the supervisor named in `state` runs (its pid may have been given to another process since)."""
    return _carries(state.supervisor_pid, state.cluster_id)


def processes_of(cluster_id: str) -> list[psutil.Process]:
    """Every live process that inherited the cluster's id, supervisor included."""
    return [process for process in psutil.process_iter() if _carries(process.pid, cluster_id)]


def require_port(host: str, port: int) -> None:
    """Check that the HTTP port is free.

    Raises:
        PortTakenError: Somebody listens there.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortTakenError(
                f"cannot listen on {host}:{port} ({error.strerror}): stop what uses it, "
                f"or choose another with --set cluster.port={port + 1}"
            ) from error


def spawn_supervisor(folder: StateFolder, settings_json: str, *, name: str, url: str) -> ClusterState:
    """Start the supervisor of a new cluster and return at once.

    Args:
        folder: Where the cluster keeps its files.
        settings_json: The complete settings.
        name: The cluster's name.
        url: Where its HTTP API will answer.

    Raises:
        AlreadyRunningError: The named cluster runs.
    """
    running = folder.read()
    if running and is_alive(running):
        raise AlreadyRunningError(f"cluster {name!r} is {running.phase} at {running.url}: `learnonce down` stops it")
    if running:
        sweep(running.cluster_id)
        shutil.rmtree(running.runtime_dir, ignore_errors=True)
    folder.create()
    folder.settings.write_text(settings_json)
    # Short, because unix socket paths end at 107 bytes and Ray adds about 70 of its own.
    runtime_dir = tempfile.mkdtemp(prefix="lo-", dir="/tmp")
    state = ClusterState(
        name=name,
        cluster_id=secrets.token_hex(8),
        supervisor_pid=0,
        url=url,
        runtime_dir=runtime_dir,
        started_unix_s=time.time(),
    )
    environment = {
        **os.environ,
        CLUSTER_ID_VARIABLE: state.cluster_id,
        SECRET_VARIABLE: folder.cluster_secret().hex(),
        **_ray_environment(),
    }
    environment.pop("RAY_ADDRESS", None)
    with folder.log.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.lifecycle", str(folder.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        state.supervisor_pid = process.pid
        folder.write(state)
    except BaseException:
        # Interrupted, or the disk is full: nobody else knows of it.
        process.kill()
        process.wait()
        shutil.rmtree(runtime_dir, ignore_errors=True)
        raise
    return state


def _ray_environment() -> dict[str, str]:
    """Ray's own switches; it reads them when it is imported."""
    return {
        # A token of this cluster's own, instead of one written into the user's home.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # One event loop per replica and proxy: halves what the serving path adds (12 against 20 ms p50 to the first
        # token with the no-op engine, 37 against 62 ms with a 4,000-token prompt). Our actors block the
        # loop only while they start.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    }


def follow_start(folder: StateFolder, *, deadline_s: float) -> Iterator[ClusterState]:
    """Yield the state about ten times a second until the cluster is ready.

    Raises:
        StartFailedError: It failed, its supervisor died, or it was not ready in time.
    """
    stop_s = time.monotonic() + deadline_s
    while True:
        state = folder.read()
        if state is not None:
            yield state
            if state.phase == Phase.READY:
                return
            if state.phase in (Phase.FAILED, Phase.STOPPED) or not is_alive(state):
                reason = state.message or "its supervisor ended"
                raise StartFailedError(
                    f"cluster {state.name!r} did not start: {reason}\n  log: {folder.log}, {folder.failed_logs}"
                )
        if time.monotonic() > stop_s:
            waiting = ", ".join(s.name for s in state.steps if s.state != "done") if state else "its supervisor"
            raise StartFailedError(
                f"not ready after {deadline_s:.0f} s; still waiting for: {waiting}\n  log: {folder.log}"
            )
        time.sleep(_POLL_S)


def stop(folder: StateFolder, *, deadline_s: float) -> bool:
    """Stop a cluster: ask its supervisor to drain and end, then end what is left of it.

    Returns:
        Whether anything of it was running.
    """
    state = folder.read()
    if state is None:
        return False
    found = bool(processes_of(state.cluster_id))
    if is_alive(state):
        with contextlib.suppress(ProcessLookupError):
            os.kill(state.supervisor_pid, signal.SIGTERM)
        stop_s = time.monotonic() + deadline_s
        while is_alive(state) and time.monotonic() < stop_s:
            time.sleep(_POLL_S)
    sweep(state.cluster_id)
    state = folder.read() or state
    if state.phase == Phase.FAILED:
        folder.keep_logs(Path(state.runtime_dir))
    shutil.rmtree(state.runtime_dir, ignore_errors=True)
    state.phase = Phase.STOPPED
    folder.write(state)
    return found


def sweep(cluster_id: str) -> int:
    """End every process that carries the cluster's id (not this one): SIGTERM, then SIGKILL. How many there were.

    Also those that they start meanwhile: a supervisor or a raylet in the middle of its start goes on until it ends.
    """
    own = os.getpid()
    ended: set[int] = set()
    for _ in range(_MAX_SWEEPS):
        left = [process for process in processes_of(cluster_id) if process.pid != own]
        if not left:
            break
        ended.update(process.pid for process in left)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, stubborn = psutil.wait_procs(left, timeout=_KILL_AFTER_S)
        for process in stubborn:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(stubborn, timeout=_KILL_AFTER_S)
    return len(ended)


def _carries(pid: int, cluster_id: str) -> bool:
    """Whether a live process has the cluster's id in the environment it was started with."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return bool(process.environ().get(CLUSTER_ID_VARIABLE) == cluster_id)
    except (psutil.Error, OSError):
        return False
