"""Deterministic keys, metadata and payloads for tests.

Covers: chunks as a store sees them. Does not cover: payloads that decode to KV (`kvstore.codecs`).
"""

import hashlib

import numpy as np

from kvstore.interfaces import ChunkMeta
from kvstore.keys import ChunkKey


def sample_key(index: int, *, salt: str = "") -> ChunkKey:
    """A key that looks like a real one: 32 bytes of a digest."""
    return ChunkKey(hashlib.blake2b(f"{salt}/{index}".encode(), digest_size=32).digest())


def sample_meta(num_tokens: int = 3, *, base_position: int = 0) -> ChunkMeta:
    """Metadata of a small model's chunk."""
    return ChunkMeta(
        num_tokens=num_tokens,
        num_layers=2,
        num_kv_heads=1,
        head_dim=4,
        dtype="float32",
        base_position=base_position,
    )


def sample_payload(seed: int, num_bytes: int) -> bytes:
    """Bytes that differ per seed and do not compress."""
    return np.random.default_rng(seed).bytes(num_bytes)
