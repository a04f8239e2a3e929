"""The Serve application: which deployments there are, and what each is given.

Covers: the graph of router, decode and prefill deployments. Does not cover: when it is deployed or stopped
(`cluster.lifecycle`), what the deployments do (`*.actor`).
"""

import os
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from ray import serve
from ray.serve import Application

from cluster.resolve import role_engines
from cluster.settings import Settings
from decode_workers.actor import DecodeWorker
from decode_workers.settings import DecodeSettings
from kvstore.engine.settings import EngineSettings
from kvstore.engine.worker import WorkerRuntime
from kvstore.settings import STORE_KEY_VARIABLE
from kvstore.wire import SECRET_VARIABLE
from prefill_workers.actor import PrefillWorker
from prefill_workers.settings import PrefillSettings
from router.actor import RouterIngress
from router.ingress import API_KEYS_VARIABLE

APP_NAME: Final = "learnonce"
RAY_NAMESPACE: Final = "learnonce"
_HEALTH_PERIOD_S: Final = 2.0
_HEALTH_TIMEOUT_S: Final = 10.0
_DRAIN_MARGIN_S: Final = 10.0
"""On top of the drain: closing the engine's processes."""
_MAX_QUEUED: Final = 1024
"""Requests that Serve may hold for a busy router; more are refused at once."""
_MAX_ONGOING: Final = 1000
"""Calls of Serve handles (reports); requests do not come this way."""


RoleSettings = TypeVar("RoleSettings", PrefillSettings, DecodeSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What is decided when the cluster starts, and no setting."""

    runtime_dir: str
    """Folder on every node for sockets and other files that die with the cluster."""
    secret_hex: str
    """Signs plans and opens the node stores."""


def application(settings: Settings, runtime: Runtime) -> Application:
    """The application, bound and ready to be run.

    Args:
        settings: Resolved settings (`cluster.resolve.resolve`).
        runtime: Of this start.
    """
    prefill_engine, decode_engine = role_engines(settings, tuple(sorted(os.sched_getaffinity(0))))
    place = WorkerRuntime(
        namespace=RAY_NAMESPACE,
        runtime_dir=runtime.runtime_dir,
        bind_host=settings.cluster.host,
        log_level=settings.log.level,
        log_json=settings.log.json_lines,
    )
    store = settings.store
    prefill = None
    if settings.cluster.prefill_replicas:
        prefill = _worker(PrefillWorker, "Prefill", settings, runtime, settings.cluster.prefill_replicas).bind(
            _drained(settings.prefill, settings), prefill_engine, store, runtime=place
        )
    decode = _worker(DecodeWorker, "Decode", settings, runtime, settings.cluster.decode_replicas).bind(
        _drained(settings.decode, settings), decode_engine, store, runtime=place
    )
    deployment: Any = RouterIngress  # Serve's decorator made a Deployment of the class
    environment = _environment(settings, runtime, API_KEYS_VARIABLE)
    router = deployment.options(
        ray_actor_options={"num_cpus": 0, **environment}, max_queued_requests=_MAX_QUEUED, **_times(settings)
    )
    bound: Application = router.bind(
        settings.router,
        settings.engine.model,
        served_model_name(settings.engine),
        decode,
        prefill,
        log_level=settings.log.level,
        log_json=settings.log.json_lines,
    )
    return bound


def _drained(role: RoleSettings, settings: Settings) -> RoleSettings:
    """A role's settings with the cluster's drain: Serve's own bound follows the same number."""
    return role.model_copy(update={"life": role.life.model_copy(update={"drain_s": settings.cluster.drain_s})})


def served_model_name(engine: EngineSettings) -> str:
    """The model's name in the API."""
    return engine.noop.model if engine.kind == "noop" else (engine.served_model_name or engine.model)


def _worker(worker: type, name: str, settings: Settings, runtime: Runtime, replicas: int) -> Any:
    options: dict[str, Any] = {"num_cpus": 1, **_environment(settings, runtime, STORE_KEY_VARIABLE)}
    if settings.engine.kind == "vllm" and settings.engine.device != "cpu" and _has_gpus():
        options["num_gpus"] = int(settings.engine.vllm_arguments.get("tensor_parallel_size", 1))
    return serve.deployment(
        worker,
        name=name,
        num_replicas=replicas,
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options=options,
        **_times(settings),
    )


def _times(settings: Settings) -> dict[str, float]:
    return {
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "graceful_shutdown_timeout_s": settings.cluster.drain_s + _DRAIN_MARGIN_S,
        "graceful_shutdown_wait_loop_s": 0.5,
    }


def _environment(settings: Settings, runtime: Runtime, *variables: str) -> dict[str, Any]:
    """The secret, and `variables` as they are set here, for processes that do not inherit them from the supervisor."""
    if settings.cluster.address == "local":
        return {}
    own = {name: os.environ[name] for name in variables if name in os.environ}
    return {"runtime_env": {"env_vars": {SECRET_VARIABLE: runtime.secret_hex, **own}}}


def _has_gpus() -> bool:
    import ray

    return bool(ray.cluster_resources().get("GPU"))
