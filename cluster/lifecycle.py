"""The supervisor: one process that owns a local cluster from start to end, and deployment onto a Ray that runs already.

Covers: starting Ray and Serve, watching the application become ready, draining, stopping.
Does not cover: finding and ending processes from outside (`cluster.local`), what is deployed (`cluster.app`).

Run as `python -m cluster.lifecycle STATE_FOLDER` by `learnonce up`; ends on SIGTERM or SIGINT.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import ray
from ray import serve

from cluster.app import APP_NAME, RAY_NAMESPACE, Runtime, application
from cluster.errors import LearnonceError, UnavailableError
from cluster.local import CLUSTER_ID_VARIABLE, ClusterState, Phase, StateFolder, Step, sweep
from cluster.settings import Settings, settings_from_json
from cluster.telemetry import configure_logging
from kvstore.actor import stop_node_stores
from kvstore.wire import SECRET_VARIABLE

log = logging.getLogger(__name__)

_POLL_S: Final = 0.25
_STEP_RAY: Final = "Ray"
_STEP_HTTP: Final = "HTTP proxy"
_STEP_READY: Final = "first answer from the API"
_STEPS: Final = {
    "Prefill": "prefill replicas: engine and model",
    "Decode": "decode replicas: engine and model",
    "Router": "router: tokenizer and ingress",
}
"""Deployments of the application, and what start-up waits for in each."""


class DeployFailedError(UnavailableError):
    """Serve gave up on the application; the message is Serve's."""


class Progress:
    """Writes what start-up waits for into the state folder."""

    def __init__(self, folder: StateFolder, state: ClusterState) -> None:
        self._folder = folder
        self._began_s = time.monotonic()
        self.state = state

    def plan(self, names: list[str]) -> None:
        """Announce the steps in their order."""
        self.state.steps = [Step(name=name) for name in names]
        self._folder.write(self.state)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Run one step; it fails with the exception that leaves it."""
        self.update(name, "working")
        try:
            yield
        except BaseException:
            self.update(name, "failed")
            raise
        self.update(name, "done")

    def update(self, name: str, state: str, detail: str = "") -> None:
        """Set one step's state; writes only when something changed."""
        step = next(step for step in self.state.steps if step.name == name)
        if (step.state, step.detail) == (state, detail):
            return
        now_s = time.monotonic() - self._began_s
        if step.started_s is None:
            step.started_s = now_s
        if state in ("done", "failed"):
            step.finished_s = now_s
        step.state, step.detail = state, detail
        self._folder.write(self.state)

    def phase(self, phase: Phase, message: str = "") -> None:
        """Enter a phase of the cluster's life."""
        self.state.phase, self.state.message = phase, message
        if phase == Phase.READY:
            self.state.ready_after_s = time.monotonic() - self._began_s
        self._folder.write(self.state)


class Supervisor:
    """Owns one local Ray with one learnonce application on it."""

    def __init__(self, settings: Settings, progress: Progress, secret: bytes) -> None:
        self._settings = settings
        self._progress = progress
        self._secret = secret
        self._stop = threading.Event()

    def request_stop(self, *_: object) -> None:
        """Signal handler: leave as soon as the current step allows."""
        self._stop.set()

    def run(self) -> None:
        """Start, wait until told to stop, stop."""
        self._progress.plan([_STEP_RAY, _STEP_HTTP, *deployment_steps(self._settings).values(), _STEP_READY])
        try:
            with self._progress.step(_STEP_RAY):
                self._start_ray()
            # Told to stop meanwhile: what has not begun does not begin.
            if not self._stop.is_set():
                with self._progress.step(_STEP_HTTP):
                    start_http(self._settings)
            if not self._stop.is_set():
                self._deploy()
                with self._progress.step(_STEP_READY):
                    self._await_ready()
            if not self._stop.is_set():
                self._progress.phase(Phase.READY)
                log.info("cluster ready seconds=%.1f", self._progress.state.ready_after_s or 0.0)
            self._stop.wait()
        finally:
            self._shut_down()

    def _start_ray(self) -> None:
        engines = self._settings.cluster.prefill_replicas + self._settings.cluster.decode_replicas
        ray.init(
            address="local",
            namespace=RAY_NAMESPACE,
            # Logical processors: one per engine, whatever the machine has; the engines bind real ones themselves.
            num_cpus=max(engines, len(os.sched_getaffinity(0))),
            object_store_memory=self._settings.cluster.object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=self._progress.state.runtime_dir,
        )

    def _deploy(self) -> None:
        runtime = Runtime(runtime_dir=self._progress.state.runtime_dir, secret_hex=self._secret.hex())
        deploy(self._settings, runtime)
        names = list(deployment_steps(self._settings))
        while not self._stop.is_set():
            if all([_mark(self._progress, *seen) for seen in deployment_states(names)]):
                return
            self._stop.wait(_POLL_S)

    def _await_ready(self) -> None:
        while not self._stop.is_set():
            ready, detail = ask_ready(self._progress.state.url, self._settings)
            if ready:
                return
            self._progress.update(_STEP_READY, "working", detail)
            self._stop.wait(_POLL_S)

    def _shut_down(self) -> None:
        self._progress.phase(Phase.STOPPING, self._progress.state.message)
        # The drain is bounded here as well: a Serve controller that hangs must not keep the cluster alive.
        deadline = threading.Timer(self._settings.cluster.drain_s + 20.0, lambda: os._exit(4))
        deadline.daemon = True
        deadline.start()
        if ray.is_initialized():
            with contextlib.suppress(Exception):
                # First the application: its replicas finish what they have while the proxy still carries it.
                serve.delete(APP_NAME)
                serve.shutdown()
                stop_node_stores(namespace=RAY_NAMESPACE)
            ray.shutdown()
        deadline.cancel()


def deployment_steps(settings: Settings) -> dict[str, str]:
    """Deployments of these settings by name, and what start-up waits for in each."""
    return {name: step for name, step in _STEPS.items() if name != "Prefill" or settings.cluster.prefill_replicas}


def start_http(settings: Settings) -> None:
    """Start Serve's HTTP proxy where the settings say."""
    serve.start(
        proxy_location="HeadOnly",
        http_options={
            "host": settings.cluster.host,
            "port": settings.cluster.port,
            # The router bounds every request itself and answers in OpenAI's error format.
            "request_timeout_s": None,
        },
    )


def deploy(settings: Settings, runtime: Runtime) -> None:
    """Hand the application to Serve and return at once."""
    target = serve.RunTarget(target=application(settings, runtime), name=APP_NAME, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def deployment_states(names: list[str]) -> Iterator[tuple[str, str, str]]:
    """Each deployment's name, step state and detail as Serve sees them now.

    Raises:
        DeployFailedError: Serve gave up.
    """
    app = serve.status().applications.get(APP_NAME)
    if app is not None and app.status == "DEPLOY_FAILED":
        raise DeployFailedError(app.message.strip())
    for name in names:
        deployment = app.deployments.get(name) if app else None
        if deployment is None:
            yield name, "waiting", ""
            continue
        states = {str(getattr(state, "value", state)): count for state, count in deployment.replica_states.items()}
        detail = ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()))
        if deployment.status == "HEALTHY":
            yield name, "done", detail
        else:
            first_line = deployment.message.strip().partition("\n")[0]
            failing = "failed to start" in first_line
            yield name, "working", first_line if failing else detail


def deploy_to_running_ray(settings: Settings, folder: StateFolder, *, url: str) -> None:
    """Deploy onto the Ray cluster at `cluster.address`, wait until it answers, and leave it running.

    Raises:
        DeployFailedError: Serve gave up, or it was not ready within `cluster.start_deadline_s`.
    """
    folder.create()
    state = ClusterState(
        name=settings.cluster.name,
        cluster_id=folder.path.name,
        supervisor_pid=0,
        url=url,
        runtime_dir=f"/tmp/lo-{settings.cluster.name}",
        started_unix_s=time.time(),
    )
    steps = deployment_steps(settings)
    progress = Progress(folder, state)
    progress.plan([_STEP_HTTP, *steps.values(), _STEP_READY])
    stop_s = time.monotonic() + settings.cluster.start_deadline_s
    with _connected(settings):
        with progress.step(_STEP_HTTP):
            start_http(settings)
        deploy(settings, Runtime(runtime_dir=state.runtime_dir, secret_hex=folder.cluster_secret().hex()))
        while (
            not all([_mark(progress, *seen) for seen in deployment_states(list(steps))])
            or not ask_ready(url, settings)[0]
        ):
            if time.monotonic() > stop_s:
                raise DeployFailedError(
                    f"not ready after {settings.cluster.start_deadline_s:.0f} s: see `serve status`"
                )
            time.sleep(_POLL_S)
    progress.phase(Phase.READY)


def remove_from_running_ray(settings: Settings, folder: StateFolder) -> None:
    """Take the application and its node stores off the Ray cluster; Ray itself and other applications stay."""
    with _connected(settings):
        serve.delete(APP_NAME)
        stop_node_stores(namespace=RAY_NAMESPACE)
    state = folder.read()
    if state is not None:
        Progress(folder, state).phase(Phase.STOPPED)


@contextlib.contextmanager
def _connected(settings: Settings) -> Iterator[None]:
    ray.init(address=settings.cluster.address, namespace=RAY_NAMESPACE, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def _mark(progress: Progress, name: str, state: str, detail: str) -> bool:
    progress.update(_STEPS[name], state, detail)
    return state == "done"


def ask_ready(url: str, settings: Settings) -> tuple[bool, str]:
    """Whether the API answers and its router knows every replica with its node's store, and what is missing."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=2.0) as answer:
            return missing_workers(json.load(answer)["workers"], settings)
    except urllib.error.HTTPError as error:
        with contextlib.suppress(ValueError):
            body: dict[str, Any] = json.loads(error.read())
            return False, ", ".join(body.get("waiting_for", ()))
        return False, f"HTTP {error.code}"
    except OSError:
        return False, "no answer yet"


def missing_workers(workers: list[dict[str, Any]], settings: Settings) -> tuple[bool, str]:
    """Whether the listed workers are all that the settings ask for, and which are missing."""
    wanted = {"prefill": settings.cluster.prefill_replicas, "decode": settings.cluster.decode_replicas}
    usable = [worker["role"] for worker in workers if worker["state"] == "ready" and worker["store_epoch"]]
    missing = [
        f"{count - usable.count(role)} {role} replica(s) to report with a node store"
        for role, count in wanted.items()
        if usable.count(role) < count
    ]
    return not missing, ", ".join(missing)


def main() -> int:
    """Run the supervisor of the cluster whose state folder is the only argument."""
    path = Path(sys.argv[1])
    folder = StateFolder(path.parent, path.name)
    settings = settings_from_json(folder.settings.read_text())
    configure_logging(level=settings.log.level, json_lines=settings.log.json_lines)
    state = _own_state(folder)
    progress = Progress(folder, state)
    supervisor = Supervisor(settings, progress, bytes.fromhex(os.environ[SECRET_VARIABLE]))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, supervisor.request_stop)
    exit_status = 0
    try:
        supervisor.run()
    except LearnonceError as error:
        progress.phase(Phase.FAILED, str(error))
        exit_status = 3
    except Exception as error:
        log.exception("supervisor failed")
        progress.phase(Phase.FAILED, f"{type(error).__name__}: {error}")
        exit_status = 1
    else:
        progress.phase(Phase.STOPPED)
    finally:
        sweep(os.environ[CLUSTER_ID_VARIABLE])
        if state.phase == Phase.STOPPED:
            # After a failure `down` takes the logs out of it first.
            shutil.rmtree(state.runtime_dir, ignore_errors=True)
    return exit_status


def _own_state(folder: StateFolder) -> ClusterState:
    """The state that `learnonce up` wrote about this process (it writes right after starting it)."""
    wanted = os.environ[CLUSTER_ID_VARIABLE]
    stop_s = time.monotonic() + 10.0
    while time.monotonic() < stop_s:
        state = folder.read()
        if state is not None and state.cluster_id == wanted:
            return state
        time.sleep(0.02)
    raise UnavailableError(f"no state of cluster {wanted} in {folder.path}")


if __name__ == "__main__":
    sys.exit(main())
