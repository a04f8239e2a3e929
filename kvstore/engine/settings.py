"""Settings of an engine and of its connector.

Covers: what a person may choose about the vLLM engine behind a worker.
Does not cover: ports and deadlines of workers (their own `settings.py`), the store (`kvstore.settings`), derived values
(`kvstore.engine.build`). Imports neither torch nor vLLM.
"""

from typing import Annotated, Any, Final, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from cluster.settings_base import SettingsBase
from kvstore.engine.noop import NoopSettings

OWNED_ARGUMENTS: Final = frozenset(
    {
        "model",
        "served_model_name",
        "dtype",
        "max_model_len",
        "block_size",
        "kv_cache_memory_bytes",
        "max_num_seqs",
        "max_num_batched_tokens",
        "enforce_eager",
        "gpu_memory_utilization",
        "seed",
        "reasoning_parser",
        "enable_prefix_caching",
        "enable_chunked_prefill",
        "distributed_executor_backend",
        "kv_transfer_config",
        "disable_log_stats",
    }
)
"""vLLM engine arguments that this project sets; `vllm_arguments` must not hold them."""

CPU_SET_PATTERN: Final = r"^\d+(-\d+)?(,\d+(-\d+)?)*$"


class ConnectorSettings(SettingsBase):
    """How an engine exchanges KV with its node's store."""

    codec: Literal["raw", "lossless", "int8", "int4", "transform"] = "raw"
    """How chunks are stored from now on; stored ones are read whatever codec wrote them. `raw` and `lossless` are
    exact, the others change answers a little (docs/codec.md). `transform` needs a `profile`."""
    level: Literal["auto"] | NonNegativeInt = "auto"
    """Finest level that `transform` stores, 0 is the smallest; `auto` stores every level that the profile has."""
    profile: str | None = None
    """Profile of `transform`: a file, the name of one that ships with the project, or the 64 hex digits of one that is
    in the store. Unset takes the shipped one that was measured on the engine's weights (docs/codec.md)."""
    handoff: Literal["auto", "codec"] = "auto"
    """Chunks that a decode replica waits for: `auto` sends them raw where the link is faster than the codec, and at a
    level that suits the link where not; `codec` treats them as any other chunk."""
    load_threads: Annotated[int, Field(ge=1, le=64)] = 2
    """Loads that read from the store at the same time."""
    decode_threads: Annotated[int, Field(ge=1, le=64)] = 2
    """Threads that decode chunks, of all loads together."""
    load_staging_bytes: PositiveInt = 1 << 30
    """Host memory for decoded KV that waits to be written into the engine; loads beyond it wait."""
    recompute_when_faster: bool = True
    """Compute instead of loading what arrives too slowly: from measured speeds of links, codec and prefill."""
    load_step_bytes: PositiveInt = 64 << 20
    """KV bytes written into the engine per step while other requests compute; bounds how long their tokens wait."""
    join_step_tokens: PositiveInt = 64
    """Tokens that joins compute per step while other requests compute; bounds how long their tokens wait. Without
    others a step computes up to `max_num_batched_tokens`."""
    save_threads: Annotated[int, Field(ge=1, le=64)] = 1
    """Encodings and writes to the store at the same time."""
    save_staging_bytes: NonNegativeInt = 1 << 30
    """Host memory for KV that waits to be written; saves beyond it are dropped. 0 saves nothing."""
    save_deadline_s: PositiveFloat = 5.0
    """Seconds the store may take to give room for a chunk."""


class EngineSettings(SettingsBase):
    """The engine of every worker."""

    kind: Literal["vllm", "noop"] = "vllm"
    """`noop` serves the same API without a model (tests, measuring the serving path); `noop` below sets it up."""
    noop: NoopSettings = NoopSettings()
    """The no-op engine's speeds and sizes; of the settings below it uses none."""
    model: str = "SmolLM2-135M-Instruct"
    """The embedded model's name, a folder, or a Hugging Face id."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id; unset takes its default branch."""
    served_model_name: str | None = None
    """Name in the API; unset takes the last part of `model`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes what the installed vLLM was built for."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """`auto` takes the model's own, except float32 on a CPU that has no bfloat16 arithmetic (3 times faster there)."""
    max_model_len: PositiveInt | None = None
    """Longest prompt plus answer, in tokens; unset takes the model's own limit."""
    block_size: Annotated[int, Field(ge=16, le=256, multiple_of=16)] | None = None
    """Tokens per KV block; unset takes 32 on the CPU and the backend's own choice on a GPU."""
    kv_cache_bytes: PositiveInt | None = None
    """KV pool of one engine; unset takes 1 GiB on the CPU and what `gpu_memory_utilization` leaves on a GPU."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory; not used on the CPU."""
    max_num_seqs: PositiveInt = 64
    """Requests that compute at the same time."""
    max_num_batched_tokens: PositiveInt = 2048
    """Tokens per engine step: long prompts are computed in pieces of this size."""
    cpus: tuple[Annotated[str, Field(pattern=CPU_SET_PATTERN)], ...] = ()
    """Cores of each replica of a node by rank, e.g. ["0-7", "8-15"]; empty shares the allowed cores equally."""
    enforce_eager: bool | None = None
    """No compilation and no CUDA graphs; unset means yes on the CPU, no on a GPU."""
    tool_call_parser: str | None = None
    """vLLM's parser of tool calls for this model; unset serves without tool calls."""
    reasoning_parser: str | None = None
    """vLLM's parser of reasoning for this model."""
    seed: NonNegativeInt = 0
    """Seed of sampling without a seed of its own."""
    connector: ConnectorSettings = ConnectorSettings()
    """Exchange of KV with the store."""
    vllm_arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's engine, passed as they are; those set by settings above are refused."""

    @field_validator("vllm_arguments")
    @classmethod
    def _refuse_owned(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(OWNED_ARGUMENTS & set(value))
        if taken:
            raise ValueError(f"{', '.join(taken)}: set by this project, use the setting of that name or none")
        return value
