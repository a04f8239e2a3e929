"""Names of chunks: what must be equal for stored KV to be valid.

Covers: the scope (everything about an engine that makes KV interchangeable) and chained chunk keys.
Does not cover: which spans of a prompt become chunks (`router.segments`), or bytes (`kvstore.container`).

A chunk is the KV of a run of tokens *computed behind* some context. Its key hashes the context's key and the tokens:

    root = H(scope, salt)                    nothing before it
    anchor = H(root, system prompt)          an exact chunk
    first passage = H(anchor, passage)       exact behind the anchor, and the same passage anywhere by a join

So an exact chunk and a passage chunk are one kind of thing: a passage learned behind its anchor *is* the exact chunk
of the prompt `anchor + passage` (docs/adr/0003-one-kind-of-key.md).
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final, NewType

import msgspec
import numpy as np

ChunkKey = NewType("ChunkKey", bytes)
"""32 bytes of BLAKE2b: equal keys mean interchangeable KV."""

KEY_BYTES: Final = 32
_KEY_FORMAT: Final = b"learnonce key 1"


class KvScope(msgspec.Struct, frozen=True, kw_only=True):
    """Everything besides tokens that makes two engines' KV interchangeable.

    Two workers whose scopes differ never share a chunk: a disagreement costs misses, never wrong answers.
    """

    model_digest: str
    """Digest of the model's config and weights (`kvstore.engine.scope`), hex."""
    compute_dtype: str
    """Dtype the forward pass runs in, e.g. "bfloat16"."""
    kv_dtype: str
    """Dtype of the paged KV, e.g. "bfloat16"."""
    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope: str
    """The rotary rule as canonical JSON (theta, scaling, rotary dim, style)."""
    lora: str = ""
    """Digest of the LoRA adapter, "" without one."""
    layout: str = "canonical/1"
    """Stored form: `[layer, K/V, token, head, dim]`, K as computed, with its base position."""

    @property
    def bytes_per_token(self) -> int:
        """Raw KV bytes of one token over all layers."""
        width = {"float32": 4, "bfloat16": 2, "float16": 2}[self.kv_dtype]
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * width


def root_key(scope: KvScope, *, salt: str = "") -> ChunkKey:
    """The key of the empty context: the parent of every chunk at position 0.

    Args:
        scope: The engine's scope.
        salt: Tenant or request salt; different salts share nothing.
    """
    return _digest(_KEY_FORMAT, msgspec.json.encode(scope, order="sorted"), salt.encode())


def child_key(parent: ChunkKey, tokens: Sequence[int] | np.ndarray) -> ChunkKey:
    """The key of `tokens` computed behind the context named by `parent`.

    Raises:
        ValueError: No tokens, or a token id outside unsigned 32 bits.
    """
    ids = np.ascontiguousarray(tokens, dtype="<u4")
    if ids.ndim != 1 or not len(ids):
        raise ValueError("a chunk has at least one token")
    return _digest(b"chunk", parent, ids.tobytes())


def chain_keys(root: ChunkKey, spans: Iterable[Sequence[int] | np.ndarray]) -> list[ChunkKey]:
    """Keys of consecutive spans of one prompt, each behind everything before it.

    Example:
        >>> root = ChunkKey(bytes(32))
        >>> a, b = chain_keys(root, [[1, 2], [3]])
        >>> a == child_key(root, [1, 2]), b == child_key(a, [3]), b == child_key(root, [3])
        (True, True, False)
    """
    keys: list[ChunkKey] = []
    parent = root
    for tokens in spans:
        parent = child_key(parent, tokens)
        keys.append(parent)
    return keys


def tenant_of(cache_salt: str) -> str:
    """The name under which the store counts a salt's chunks: 16 hex digits, "" without a salt.

    Not the salt itself, which may be a secret: the name is in records, catalogues and events. A salt that can be
    guessed can be guessed from its name.

    Example:
        >>> tenant_of("customer 7"), tenant_of("")
        ('b6be5b6e9f095377', '')
    """
    return hashlib.blake2b(cache_salt.encode()).hexdigest()[:16] if cache_salt else ""


def parse_key(text: str) -> ChunkKey:
    """A key from its hex form.

    Raises:
        ValueError: Not 64 hex digits.
    """
    raw = bytes.fromhex(text)
    if len(raw) != KEY_BYTES:
        raise ValueError(f"a chunk key has {KEY_BYTES} bytes, got {len(raw)}")
    return ChunkKey(raw)


def _digest(*parts: bytes) -> ChunkKey:
    state = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return ChunkKey(state.digest())
