"""What makes the KV of two engines interchangeable, read from vLLM's configuration.

Covers: the scope in every chunk key, and a digest of a model that is fast for 140 GB of weights.
Does not cover: keys (`kvstore.keys`), LoRA adapters (requests with one reuse nothing yet).
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from kvstore.engine.paging import UnsupportedLayoutError
from kvstore.engine.support import kv_dtype_name, refusal_of_model
from kvstore.keys import KvScope

_DIGEST_FORMAT: Final = b"learnonce model 1"
_WEIGHT_PATTERNS: Final = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_WINDOW_BYTES: Final = 4 << 10
_WINDOWS: Final = 1024
"""Per weight file: every run of more than a thousandth of the file is seen, so a tensor of 5 MB in a file of 5 GB. A
fine-tune may leave most tensors alone."""
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


def model_digest(model: str, *, revision: str | None = None) -> str:
    """A digest of a model, hex.

    Args:
        model: A local folder, or a hub id.
        revision: Commit, tag or branch of a hub id. A branch may move: two nodes that took it at different times then
            share keys though their weights differ, so callers pass the commit where they know it.

    Guarantees:
        Two folders with the same files have the same digest, wherever they are. For a folder, the configuration is
        hashed whole, and of each weight file its name, its size and 1,024 windows of 4 KiB: 4 MiB read per file.
        Two models that differ only between those windows have the same digest.
    """
    state = hashlib.blake2b(_DIGEST_FORMAT, digest_size=20)
    folder = Path(model)
    if not folder.is_dir():
        _feed(state, b"hub", model.encode(), (revision or "main").encode())
        return state.hexdigest()
    config = folder / "config.json"
    _feed(state, b"config", config.read_bytes() if config.is_file() else b"")
    for path in sorted({path for pattern in _WEIGHT_PATTERNS for path in folder.glob(pattern)}):
        _feed(state, path.name.encode(), *_samples(path))
    return state.hexdigest()


def _samples(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield size.to_bytes(8, "little")
    last_start = max(0, size - _WINDOW_BYTES)
    with path.open("rb") as file:
        for start in sorted({last_start * index // (_WINDOWS - 1) for index in range(_WINDOWS)}):
            file.seek(start)
            yield file.read(_WINDOW_BYTES)


def _digest_of(model: Any) -> str:
    commit = getattr(model.hf_config, "_commit_hash", None)
    plain = model_digest(model.model, revision=commit or model.revision)
    changes = [model.hf_overrides if isinstance(model.hf_overrides, dict) else repr(model.hf_overrides)]
    changes.append(model.quantization)
    if changes == [{}, None]:
        return plain
    state = hashlib.blake2b(plain.encode(), digest_size=20)
    _feed(state, json.dumps(changes, sort_keys=True, default=str).encode())
    return state.hexdigest()


def _rope_rule(model: Any) -> str:
    config = model.hf_text_config
    rule: dict[str, Any] = {name: getattr(config, name) for name in _ROPE_FIELDS if hasattr(config, name)}
    text = json.dumps(rule, sort_keys=True, default=str)
    if any(f'"{kind}"' in text for kind in _LENGTH_DEPENDENT_ROPE):
        # These rules choose their angles by the longest prompt that the engine allows.
        text = json.dumps({**rule, "max_model_len": model.max_model_len}, sort_keys=True, default=str)
    return text


def _feed(state: "hashlib.blake2b", *parts: bytes) -> None:
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
