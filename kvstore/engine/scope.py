"""What makes the KV of two engines interchangeable, read from vLLM's configuration.

Covers: the scope in every chunk key, and whose weights an engine runs.
Does not cover: keys (`kvstore.keys`), the digest of weights (`kvstore.model_digest`), LoRA adapters (requests with one
reuse nothing yet).
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from kvstore.engine.paging import UnsupportedLayoutError
from kvstore.engine.profiles import Weights
from kvstore.engine.support import kv_dtype_name, refusal_of_model
from kvstore.keys import KvScope
from kvstore.model_digest import feed, model_digest

_ROPE_FIELDS: Final = (
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rope_local_base_freq",
    "rope_interleaved",
)
_LENGTH_DEPENDENT_ROPE: Final = ("longrope", "dynamic", "su")


def kv_scope(vllm_config: Any) -> KvScope:
    """The scope of an engine's KV.

    Raises:
        UnsupportedLayoutError: KV of this model is not reused; the message says why.
    """
    if reason := refusal_of_model(vllm_config):
        raise UnsupportedLayoutError(reason)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return KvScope(
        model_digest=_digest_of(model),
        compute_dtype=str(model.dtype).removeprefix("torch."),
        kv_dtype=kv_dtype_name(vllm_config),
        num_layers=model.get_num_layers(parallel),
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_dim=model.get_head_size(),
        rope=_rope_rule(model),
    )


def engine_weights(vllm_config: Any) -> Weights:
    """Whose weights an engine runs, to find the profile that was measured on them."""
    model = vllm_config.model_config
    folder = Path(model.model)
    is_comparable = folder.is_dir() and _changes(model) is None
    return Weights(folder.absolute().name, model_digest(model.model) if is_comparable else None)


def _digest_of(model: Any) -> str:
    commit = getattr(model.hf_config, "_commit_hash", None)
    plain = model_digest(model.model, revision=commit or model.revision)
    changes = _changes(model)
    if changes is None:
        return plain
    state = hashlib.blake2b(plain.encode(), digest_size=20)
    feed(state, json.dumps(changes, sort_keys=True, default=str).encode())
    return state.hexdigest()


def _changes(model: Any) -> list[Any] | None:
    """What the engine makes other than the model's own files say; None if nothing."""
    overrides = model.hf_overrides if isinstance(model.hf_overrides, dict) else repr(model.hf_overrides)
    changes = [overrides, model.quantization]
    return None if changes == [{}, None] else changes


def _rope_rule(model: Any) -> str:
    config = model.hf_text_config
    rule: dict[str, Any] = {name: getattr(config, name) for name in _ROPE_FIELDS if hasattr(config, name)}
    text = json.dumps(rule, sort_keys=True, default=str)
    if any(f'"{kind}"' in text for kind in _LENGTH_DEPENDENT_ROPE):
        # These rules choose their angles by the longest prompt that the engine allows.
        text = json.dumps({**rule, "max_model_len": model.max_model_len}, sort_keys=True, default=str)
    return text
