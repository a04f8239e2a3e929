"""Which models' KV can be stored and reused, and the reason for each refusal.

Covers: one check over vLLM's configuration, for the connector's two halves and for `kvstore.engine.scope`; another one
for joins.
Does not cover: the order inside pages, which is proved at registration (`kvstore.engine.paging`).

A refusal is not a failure: the connector then loads and saves nothing, says so once, and the engine serves.
"""

from typing import Any, Final

from kvstore.codecs.raw import DTYPES

_PLAIN_SPECS: Final = ("FullAttentionSpec",)
"""KV specs by class name: exactly one page of K and V per block of tokens. Subclasses keep something else."""


def refusal_of_model(vllm_config: Any) -> str | None:
    """Why KV of this model is not reused, from what is known before the engine starts; None if it is."""
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    checks = (
        (model.runner_type != "generate", f"the engine runs {model.runner_type!r}, not text generation"),
        (model.is_encoder_decoder, "encoder-decoder models keep cross-attention KV"),
        (model.use_mla, "multi-head latent attention stores a compressed latent, not K and V"),
        (model.is_hybrid or model.is_attention_free, "the model has state-space or linear-attention layers"),
        (parallel.world_size != 1, f"KV is split over {parallel.world_size} ranks; only one rank is supported"),
        (parallel.decode_context_parallel_size != 1, "decode context parallelism splits the tokens of a block"),
        (kv_dtype_name(vllm_config) not in DTYPES, f"KV dtype {cache.cache_dtype!r} is quantised"),
    )
    return next((reason for refused, reason in checks if refused), None)


def refusal_of_layout(vllm_config: Any, kv_cache_config: Any) -> str | None:
    """Why KV of this engine is not reused; None if it is."""
    if reason := refusal_of_model(vllm_config):
        return reason
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"the model has {len(groups)} KV cache groups; exactly one is supported"
    spec = type(groups[0].kv_cache_spec).__name__
    if spec not in _PLAIN_SPECS:
        return f"KV of kind {spec} is not supported, only {', '.join(_PLAIN_SPECS)}"
    num_layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    if len(groups[0].layer_names) != num_layers:
        return f"{len(groups[0].layer_names)} layers hold KV, the model has {num_layers}: shared KV, or a draft model"
    return None


def refusal_of_joins(vllm_config: Any) -> str | None:
    """Why requests to this engine are not joined although its KV is reused; None if they may be."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    checks = (
        (model.uses_mrope, "positions of the model have several dimensions"),
        (parallel.data_parallel_size > 1, "replicas of a data-parallel group compute in step"),
        (parallel.pipeline_parallel_size > 1, "the model is split over several stages"),
        (vllm_config.speculative_config is not None, "a draft model would keep KV of its own"),
        # Their layers add the adapters of the step's own requests, token by token, to whatever the model is run for.
        (vllm_config.lora_config is not None, "layers with LoRA adapters compute for the engine's own batch only"),
    )
    return next((reason for refused, reason in checks if refused), None)


def kv_dtype_name(vllm_config: Any) -> str:
    """Dtype of the paged KV, e.g. "bfloat16", or vLLM's name of a quantised one."""
    name = str(vllm_config.cache_config.cache_dtype)
    return str(vllm_config.model_config.dtype).removeprefix("torch.") if name == "auto" else name


def refusal_of_request(request: Any) -> str | None:
    """Why KV of this request is not reused though the model's is: it depends on more than its tokens."""
    if request.lora_request is not None:
        return "lora"
    if request.prompt_embeds is not None:
        return "prompt_embeds"
    if request.mm_features:
        return "multimodal"
    return None
