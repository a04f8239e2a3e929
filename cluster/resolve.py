"""What settings mean on one machine: the model's folder, cores per engine, memory enough.

Covers: facts of the machine, and what follows from settings and facts, as pure functions. Does not cover: reading
settings (`cluster.settings`), one engine's derived values (`kvstore.engine.build`).
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from cluster.errors import SettingsError
from cluster.settings import Settings
from kvstore.engine.build import machine_facts
from kvstore.engine.settings import EngineSettings
from kvstore.settings import StoreSettings

_GIB: Final = 1 << 30
_ENGINE_BYTES: Final = 2 * _GIB
"""One engine's processes besides weights and KV (measured with the embedded model: 1.5 to 2.2 GB)."""
_NOOP_BYTES: Final = _GIB // 8
_RAY_BYTES: Final = _GIB
"""GCS, raylet, agents, Serve's controller and proxy, the router (measured: 1.0 GB)."""
_DEFAULT_KV_BYTES: Final = _GIB
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the machine is, as far as settings depend on it."""

    cores: tuple[int, ...]
    """Processor numbers this process may run on."""
    available_bytes: int
    """Memory that can be taken without swapping."""
    total_bytes: int
    num_gpus: int = 0
    cpu_vllm: bool = True
    """The installed vLLM computes on the CPU."""


def facts() -> Facts:
    """The facts of this machine, now."""
    memory = psutil.virtual_memory()
    return Facts(
        cores=tuple(sorted(os.sched_getaffinity(0))),
        available_bytes=memory.available,
        total_bytes=memory.total,
        num_gpus=len(list(Path("/proc/driver/nvidia/gpus").glob("*"))),
        cpu_vllm=machine_facts().cpu_vllm,
    )


def resolve(settings: Settings, machine: Facts, *, model_path: str) -> Settings:
    """The settings a cluster is started with: model found, memory checked.

    Args:
        settings: What was asked for.
        machine: Where a local cluster would run.
        model_path: What vLLM loads for `engine.model`.

    Raises:
        SettingsError: A local cluster would not fit into memory; the message names what to lower.
    """
    name = settings.engine.served_model_name or settings.engine.model.rstrip("/").rsplit("/", 1)[-1]
    engine = settings.engine.model_copy(update={"model": model_path, "served_model_name": name})
    resolved = settings.model_copy(update={"engine": engine, "store": _store(settings)})
    if settings.cluster.address == "local":
        _require_memory(resolved, machine)
        _require_gpus(resolved, machine)
    elif settings.cluster.host in _LOOPBACK:
        raise SettingsError(
            f"cluster.host {settings.cluster.host} is reached from its own node only, and cluster.address names a Ray "
            "cluster: --set cluster.host=0.0.0.0 listens on every node's own address"
        )
    return resolved


def needed_bytes(settings: Settings, machine: Facts) -> dict[str, int]:
    """Memory that a local cluster takes when everything in it is full, by part."""
    engines = settings.cluster.prefill_replicas + settings.cluster.decode_replicas
    if settings.engine.kind == "noop":
        engine_bytes = _NOOP_BYTES
    else:
        engine_bytes = _ENGINE_BYTES + (settings.engine.kv_cache_bytes or _DEFAULT_KV_BYTES)
    return {
        f"{engines} engines": engines * engine_bytes,
        "node store": settings.store.host_bytes or int(settings.store.host_ram_share * machine.total_bytes),
        "Ray and the router": _RAY_BYTES,
    }


def role_engines(settings: Settings, cores: tuple[int, ...]) -> tuple[EngineSettings, EngineSettings]:
    """Engine settings of the prefill and of the decode replicas, with cores of their own on a local cluster.

    The cores are shared out equally, prefill replicas first; with more engines than cores they take turns.

    Example:
        >>> prefill, decode = role_engines(Settings(), (0, 1, 2, 3))
        >>> prefill.cpus, decode.cpus
        (('0,1',), ('2,3',))
    """
    cluster = settings.cluster
    if settings.engine.cpus or cluster.address != "local":
        return settings.engine, settings.engine
    count = cluster.prefill_replicas + cluster.decode_replicas
    share = max(1, len(cores) // count)
    slices = [
        ",".join(str(cores[(rank * share + offset) % len(cores)]) for offset in range(share)) for rank in range(count)
    ]
    prefill, decode = slices[: cluster.prefill_replicas], slices[cluster.prefill_replicas :]
    return (
        settings.engine.model_copy(update={"cpus": tuple(prefill)}),
        settings.engine.model_copy(update={"cpus": tuple(decode)}),
    )


def _require_gpus(settings: Settings, machine: Facts) -> None:
    if machine.cpu_vllm or settings.engine.kind == "noop":
        return
    cluster = settings.cluster
    per_engine = int(settings.engine.vllm_arguments.get("tensor_parallel_size", 1))
    needed = (cluster.prefill_replicas + cluster.decode_replicas) * per_engine
    if needed > machine.num_gpus:
        raise SettingsError(
            f"too few GPUs: {cluster.prefill_replicas} prefill and {cluster.decode_replicas} decode replicas take "
            f"{needed}, this machine has {machine.num_gpus}. On one GPU: --set cluster.prefill_replicas=0"
        )


def _store(settings: Settings) -> StoreSettings:
    """The store's settings with folders of this cluster's own: two clusters on one machine share none.

    The object tier is left as it is: buckets are shared between machines on purpose, by the same `url`.
    """
    store = settings.store
    if store.nvme is not None:
        folders = tuple(str(Path(folder).expanduser() / settings.cluster.name) for folder in store.nvme.folders)
        store = store.model_copy(update={"nvme": store.nvme.model_copy(update={"folders": folders})})
    if store.tls is not None and settings.cluster.address == "local":
        # The store's process runs in another folder than this one.
        store = store.model_copy(update={"tls": store.tls.absolute()})
    return store


def _require_memory(settings: Settings, machine: Facts) -> None:
    parts = needed_bytes(settings, machine)
    needed = sum(parts.values())
    if needed <= machine.available_bytes:
        return
    listed = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in parts.items())
    raise SettingsError(
        f"too little memory: this cluster can take {needed / _GIB:.1f} GiB ({listed}), "
        f"{machine.available_bytes / _GIB:.1f} GiB are available. Lower store.host_bytes, engine.kv_cache_bytes "
        "or the number of replicas, for example --set store.host_bytes=536870912"
    )
