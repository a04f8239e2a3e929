"""Where decoded KV goes on a device: paged blocks, or a tensor of its own.

Covers: addresses and strides for the kernels, and the checks that keep every write inside its tensor.
Does not cover: which slots a request has (`kvstore.engine.paging`).
Shape letters: L layers, 2 for K and V, T tokens, N KV heads, H head dimension, B slots per block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import torch

from cluster.errors import CallerError
from kvstore.codecs.raw import DTYPES
from kvstore.interfaces import ChunkMeta

KINDS: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""KV dtypes, as the kernels number them."""
_MAX_SLOTS: Final = 1 << 31


class PlaceError(CallerError):
    """A place that does not fit the KV that shall go there; nothing was written."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Place:
    """Room for the KV of some chunks and layers. Made by `in_blocks` or `apart`."""

    dtype: torch.dtype
    num_heads: int
    head_dim: int
    addresses: torch.Tensor
    """int64 `[chunks or 1, L, 2]`: where a layer's K and V start."""
    slots: torch.Tensor
    """int32: the slots of all chunks' tokens, one chunk behind the other; what is no slot is not written."""
    slot_counts: tuple[int, ...]
    """How many of them each chunk has."""
    num_slots: int
    block_slots: int
    block_stride: int
    """Elements, as the strides below."""
    head_stride: int
    slot_stride: int
    tensors: tuple[torch.Tensor, ...]
    """What the addresses point into, so that it lives as long."""

    @classmethod
    def in_blocks(cls, caches: Sequence[torch.Tensor], *, slots: Sequence[torch.Tensor]) -> Self:
        """The paged KV of an engine.

        Args:
            caches: For every layer `[blocks, N, B, 2*H]`, K and V of a token side by side; any strides but the last.
            slots: For every chunk, its tokens' slots `[T]` (block * B + place in the block), integers on any device.
                Tokens with a slot outside the blocks, for example -1, are not written.

        Raises:
            PlaceError: The caches differ, or are not of that form.
        """
        first = caches[0]
        alike = all(
            (cache.shape, cache.stride(), cache.dtype, cache.device)
            == (first.shape, first.stride(), first.dtype, first.device)
            for cache in caches
        )
        if not alike or first.ndim != 4 or first.shape[3] % 2 or first.stride(3) != 1 or first.dtype not in KINDS:
            raise PlaceError(f"caches must be alike, [blocks, N, B, 2*H] of {', '.join(DTYPES)}: {tuple(first.shape)}")
        num_blocks, num_heads, block_slots, width = first.shape
        if num_blocks * block_slots >= _MAX_SLOTS:
            raise PlaceError(f"{num_blocks} blocks of {block_slots} slots are more than 32 bits can number")
        value_bytes = width // 2 * first.element_size()
        addresses = [(cache.data_ptr(), cache.data_ptr() + value_bytes) for cache in caches]
        # A slot that does not fit 32 bits must not come back as one that does.
        small = [slot.to(first.device, torch.int64).clamp(-1, num_blocks * block_slots).int() for slot in slots]
        return cls(
            dtype=first.dtype,
            num_heads=num_heads,
            head_dim=width // 2,
            addresses=torch.tensor([addresses], device=first.device),
            slots=torch.cat(small),
            slot_counts=tuple(len(slot) for slot in small),
            num_slots=num_blocks * block_slots,
            block_slots=block_slots,
            block_stride=first.stride(0),
            head_stride=first.stride(1),
            slot_stride=first.stride(2),
            tensors=tuple(caches),
        )

    @classmethod
    def apart(cls, metas: Sequence[ChunkMeta], *, num_layers: int, device: torch.device) -> Self:
        """New tensors `[L, 2, T, N, H]`, one for each chunk: `tensors`. Chunks share dtype and heads."""
        first = metas[0]
        dtype, heads, dim = DTYPES[first.dtype], first.num_kv_heads, first.head_dim
        if any((meta.dtype, meta.num_kv_heads, meta.head_dim) != (first.dtype, heads, dim) for meta in metas):
            raise PlaceError("chunks of different dtypes or heads need places of their own")
        # Layers that a damaged chunk leaves out hold zeros, not what was in the memory before.
        kv = [torch.zeros((num_layers, 2, meta.num_tokens, heads, dim), dtype=dtype, device=device) for meta in metas]
        most_tokens = max(meta.num_tokens for meta in metas)
        return cls(
            dtype=dtype,
            num_heads=heads,
            head_dim=dim,
            addresses=torch.tensor(
                [[[part.data_ptr() for part in layer] for layer in chunk] for chunk in kv], device=device
            ),
            slots=torch.cat([torch.arange(meta.num_tokens, dtype=torch.int32, device=device) for meta in metas]),
            slot_counts=tuple(meta.num_tokens for meta in metas),
            num_slots=most_tokens,
            block_slots=1,
            block_stride=heads * dim,
            head_stride=dim,
            slot_stride=0,
            tensors=tuple(kv),
        )
