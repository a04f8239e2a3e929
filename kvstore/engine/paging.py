"""In and out of vLLM's paged KV, whatever a backend keeps inside a block.

Covers: scattering canonical KV into blocks, gathering it back, proving at start-up that both agree with the backend.
Does not cover: which tokens and when (`kvstore.engine.loader`, `kvstore.engine.saver`), models that are refused
(`kvstore.engine.support`).
Shape letters: L layers, 2 for K and V, T tokens, N KV heads, H head dimension, B tokens per block.

Every backend registers `[blocks, N, B, 2*H]` per layer. FlashAttention keeps K and V of a token side by side in the
last dimension. The CPU backend keeps each page `[B, 2*H]` in an order of its own, which depends on the instruction set
(K in transposed tiles, then V). So KV is written only by the backend's own cache operation, and read on the CPU through
a permutation that is learned once by writing patterns with that operation.
"""

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

import torch

from cluster.errors import CallerError
from kvstore.codecs.raw import DTYPES
from kvstore.interfaces import ChunkMeta

_PATTERN_LIMIT: Final = 256
"""Largest integer up to which bfloat16 is exact: bound on block size and head dimension for learning."""
_PRETOUCH_LIMIT_BYTES: Final = 4 << 30
_PAGE_BYTES: Final = 4096


class UnsupportedLayoutError(CallerError):
    """KV that this connector cannot move: it reuses nothing, and the engine serves without it."""


class CacheImpl(Protocol):
    """The part of a vLLM attention implementation that writes KV."""

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write K and V `[T, N, H]` of tokens to slots."""
        ...


class CacheLayer(Protocol):
    """The part of a vLLM attention layer that holds KV."""

    @property
    def impl(self) -> CacheImpl:
        """The attention implementation."""
        ...

    @property
    def kv_cache(self) -> torch.Tensor:
        """`[blocks, N, B, 2*H]`."""
        ...


class Gathered(Protocol):
    """KV on its way out of the engine, independent of the engine's blocks."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds until it is dropped, at most."""
        ...

    def kv(self) -> torch.Tensor:
        """The KV `[L, 2, T, N, H]` on the CPU. Call once, on any thread."""
        ...


class PagedKv:
    """The blocks of one engine worker.

    Args:
        layers: Attention layers in order of depth, with their KV registered.
        block_size: Tokens per block as the scheduler counts them.

    Raises:
        UnsupportedLayoutError: The layers' KV is not what this module can move; the message says why.
    """

    def __init__(self, layers: Sequence[CacheLayer], *, block_size: int) -> None:
        if not layers:
            raise UnsupportedLayoutError("the model has no attention layers with KV")
        cache = layers[0].kv_cache
        if any(layer.kv_cache.shape != cache.shape or layer.kv_cache.dtype != cache.dtype for layer in layers):
            raise UnsupportedLayoutError("layers differ in the shape or dtype of their KV")
        names = [name for name, dtype in DTYPES.items() if dtype is cache.dtype]
        if cache.ndim != 4 or cache.shape[3] % 2 or not names:
            raise UnsupportedLayoutError(f"KV of shape {tuple(cache.shape)} and dtype {cache.dtype} is not known")
        if block_size % cache.shape[2]:
            raise UnsupportedLayoutError(f"blocks of {block_size} tokens do not hold whole pages of {cache.shape[2]}")
        self._layers = tuple(layers)
        self._block_size = block_size
        self._pages_per_block = block_size // cache.shape[2]
        self._page_tokens, self._num_heads, self._head_dim = cache.shape[2], cache.shape[1], cache.shape[3] // 2
        self._dtype_name = names[0]
        self._device = cache.device
        self._order = _learn_order(layers[0]) if cache.device.type == "cpu" else None
        self._prove()

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._block_size

    @property
    def page_tokens(self) -> int:
        """Tokens per page of the attention backend; blocks hold whole pages."""
        return self._page_tokens

    @property
    def bytes_per_block(self) -> int:
        """KV bytes of one block over all layers."""
        token_bytes = 2 * self._num_heads * self._head_dim * DTYPES[self._dtype_name].itemsize
        return len(self._layers) * self._block_size * token_bytes

    @property
    def device(self) -> torch.device:
        """Where the blocks are, and the engine computes."""
        return self._device

    def meta(self, *, num_tokens: int, base_position: int) -> ChunkMeta:
        """How a chunk of this engine is described."""
        return ChunkMeta(
            num_tokens=num_tokens,
            num_layers=len(self._layers),
            num_kv_heads=self._num_heads,
            head_dim=self._head_dim,
            dtype=self._dtype_name,
            base_position=base_position,
        )

    def accepts(self, meta: ChunkMeta) -> bool:
        """Whether a chunk has this engine's layers, heads, head dimension and dtype."""
        ours = self.meta(num_tokens=meta.num_tokens, base_position=meta.base_position)
        return meta.shape == ours.shape and meta.dtype == ours.dtype

    def slots(self, block_ids: Sequence[int], *, start: int, stop: int) -> torch.Tensor:
        """Where tokens `[start, stop)` of a request with these blocks (from token 0 on) live."""
        return self.slots_at(block_ids, torch.arange(start, stop))

    def slots_at(self, block_ids: Sequence[int], positions: torch.Tensor) -> torch.Tensor:
        """Where the tokens at these positions, on the CPU, live."""
        blocks = torch.tensor(block_ids, dtype=torch.int64)[positions // self._block_size]
        return (blocks * self._block_size + positions % self._block_size).to(self._device)

    def pages(self, block_ids: Sequence[int]) -> torch.Tensor:
        """The pages of these blocks, in order, on the CPU."""
        pages = torch.tensor(block_ids, dtype=torch.int64)
        if self._pages_per_block > 1:
            pages = (pages[:, None] * self._pages_per_block + torch.arange(self._pages_per_block)).flatten()
        return pages

    def scatter(self, kv_L2TNH: torch.Tensor, *, slots: torch.Tensor) -> None:
        """Write all layers' KV of the tokens at `slots`."""
        kv = kv_L2TNH.to(self._device)
        for layer, (k_TNH, v_TNH) in zip(self._layers, kv, strict=True):
            layer.impl.do_kv_cache_update(layer, k_TNH, v_TNH, layer.kv_cache, slots)

    def gather(self, block_ids: Sequence[int], *, first: int, num_tokens: int) -> Gathered:
        """Start copying KV out of the engine; when this returns, the blocks may be reused.

        Args:
            block_ids: The blocks to read, in order.
            first: Index of the first token within the first block.
            num_tokens: Tokens to read from there on.
        """
        pages = self.pages(block_ids)
        if self._order is not None:
            copies = torch.stack([layer.kv_cache.index_select(0, pages) for layer in self._layers])
            return _CpuGathered(copies, self._order, first, num_tokens)
        return self._gather_device(pages.to(self._device), first, num_tokens)

    def gather_layer(self, layer: int, block_ids: Sequence[int], *, num_tokens: int) -> torch.Tensor:
        """A copy of one layer's KV of the first tokens, `[2, T, N, H]`, on the engine's device."""
        blocks = block_ids[: -(-num_tokens // self._block_size)]
        pages = self._layers[layer].kv_cache.index_select(0, self.pages(blocks).to(self._device))
        if self._order is not None:
            return self._order.unpack(pages[None])[0][:, :num_tokens]
        return torch.stack(_side_by_side(pages))[:, :num_tokens]

    def pretouch(self) -> int:
        """Make the operating system provide the memory of the KV pool now, not during the first requests.

        Returns:
            Bytes touched; pools beyond 4 GiB are touched in part, device memory not at all.
        """
        if self._device.type != "cpu":
            return 0
        touched_bytes = 0
        for layer in self._layers:
            flat = layer.kv_cache.view(-1) if layer.kv_cache.is_contiguous() else layer.kv_cache.flatten()[:0]
            size_bytes = flat.numel() * flat.element_size()
            if touched_bytes + size_bytes > _PRETOUCH_LIMIT_BYTES:
                break
            flat[:: _PAGE_BYTES // flat.element_size()].zero_()
            touched_bytes += size_bytes
        return touched_bytes

    def _gather_device(self, pages: torch.Tensor, first: int, num_tokens: int) -> Gathered:
        shape = self.meta(num_tokens=num_tokens, base_position=0).shape
        host = torch.empty(shape, dtype=DTYPES[self._dtype_name], pin_memory=True)
        for layer, target in zip(self._layers, host, strict=True):
            tokens = _side_by_side(layer.kv_cache[pages])
            for part, values in zip(target, tokens, strict=True):
                part.copy_(values[first : first + num_tokens], non_blocking=True)
        event = torch.Event(self._device)
        event.record()
        return _DeviceGathered(host, event)

    def _prove(self) -> None:
        """Write one page with the backend's operation and read it back our way, or refuse the layout."""
        layer = self._layers[0]
        generator = torch.Generator().manual_seed(0)
        shape = (2, self._page_tokens, self._num_heads, self._head_dim)
        kv = torch.randn(shape, generator=generator).to(layer.kv_cache.dtype)
        page = _write_page(layer, kv[0], kv[1])
        order = self._order
        seen = torch.stack(_side_by_side(page)).cpu() if order is None else order.unpack(page[None])[0]
        if not torch.equal(seen, kv):
            raise UnsupportedLayoutError(f"the order of KV inside a page of {type(layer.impl).__name__} is not known")


class _CpuGathered:
    """Raw pages; brought into canonical order by whoever asks."""

    def __init__(self, pages: torch.Tensor, order: "_PageOrder", first: int, num_tokens: int) -> None:
        self._pages = pages
        self._order = order
        self._first, self._num_tokens = first, num_tokens

    @property
    def num_bytes(self) -> int:
        # The pages, and the same again in canonical order.
        return 2 * self._pages.numel() * self._pages.element_size()

    def kv(self) -> torch.Tensor:
        return self._order.unpack(self._pages)[:, :, self._first : self._first + self._num_tokens]


class _DeviceGathered:
    """A copy to pinned host memory that the device is working on."""

    def __init__(self, host: torch.Tensor, event: torch.Event) -> None:
        self._host = host
        self._event = event

    @property
    def num_bytes(self) -> int:
        return self._host.numel() * self._host.element_size()

    def kv(self) -> torch.Tensor:
        self._event.synchronize()
        return self._host


class _Axis(NamedTuple):
    """One logical axis of a page as nested strides, outermost first."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class _Tiles(NamedTuple):
    """The order of K or V inside a page, if it is made of nested tiles."""

    base: int
    token: _Axis
    dim: _Axis


class _PageOrder:
    """Where `(K or V, token, dim)` lies inside a page `[B, 2*H]`.

    Cost:
        Orders made of tiles (all that are known) are read as strided copies, others element by element.
    """

    def __init__(self, at_2BH: torch.Tensor) -> None:
        self._at = at_2BH
        self._tiles = [_tiles_of(at) for at in at_2BH]

    def unpack(self, pages: torch.Tensor) -> torch.Tensor:
        """Pages `[L, pages, N, B, 2*H]` as `[L, 2, pages * B, N, H]`."""
        layers, count, heads, page_tokens, width = pages.shape
        out = torch.empty((layers, 2, count, page_tokens, heads, width // 2), dtype=pages.dtype)
        for layer in range(layers):
            flat = pages[layer].reshape(count, heads, page_tokens * width)
            for part, tiles in enumerate(self._tiles):
                self._copy(flat, out[layer, part], self._at[part], tiles)
        return out.view(layers, 2, count * page_tokens, heads, width // 2)

    @staticmethod
    def _copy(flat: torch.Tensor, out: torch.Tensor, at: torch.Tensor, tiles: "_Tiles | None") -> None:
        count, heads, page = flat.shape
        if tiles is None:
            out.copy_(flat[:, :, at].permute(0, 2, 1, 3))
            return
        base, token, dim = tiles
        view = flat.as_strided(
            (count, *token.sizes, heads, *dim.sizes),
            (heads * page, *token.strides, page, *dim.strides),
            flat.storage_offset() + base,
        )
        out.view(count, *token.sizes, heads, *dim.sizes).copy_(view)


def _side_by_side(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V `[pages * B, N, H]` of pages that keep both of a token in the last dimension."""
    k, v = pages.transpose(1, 2).flatten(0, 1).chunk(2, dim=-1)
    return k, v


def _write_page(layer: CacheLayer, k_TNH: torch.Tensor, v_TNH: torch.Tensor) -> torch.Tensor:
    """A page of its own `[1, N, B, 2*H]`, written by the backend's operation."""
    page = torch.zeros_like(layer.kv_cache[:1])
    slots = torch.arange(k_TNH.shape[0], device=page.device)
    layer.impl.do_kv_cache_update(layer, k_TNH.to(page), v_TNH.to(page), page, slots)
    return page


def _learn_order(layer: CacheLayer) -> _PageOrder:
    """Find where the backend puts each element, by writing its coordinates."""
    _, heads, page_tokens, width = layer.kv_cache.shape
    dim = width // 2
    if max(page_tokens, dim) > _PATTERN_LIMIT:
        raise UnsupportedLayoutError(f"a page of {page_tokens} tokens, {dim} values each, is too large to learn")

    def image(k_BH: torch.Tensor, v_BH: torch.Tensor) -> torch.Tensor:
        wide = [x[:, None].expand(page_tokens, heads, dim).to(layer.kv_cache.dtype) for x in (k_BH, v_BH)]
        return _write_page(layer, wide[0].contiguous(), wide[1].contiguous())[0, 0].flatten().long()

    token, column = torch.meshgrid(torch.arange(page_tokens), torch.arange(dim), indexing="ij")
    one = torch.ones_like(token)
    found = image(0 * one, one), image(token, token), image(column, column)
    at = torch.full((2, page_tokens, dim), -1, dtype=torch.int64)
    at[found] = torch.arange(page_tokens * width)
    if bool((at < 0).any()):
        raise UnsupportedLayoutError("two elements of a page look alike: its order cannot be learned")
    return _PageOrder(at)


def _tiles_of(at_BH: torch.Tensor) -> _Tiles | None:
    """The order as nested strides; None if it is not made of tiles.

    Example:
        >>> tiles = torch.arange(8).reshape(2, 2, 2).transpose(1, 2).reshape(4, 2)  # two tiles, each transposed
        >>> _tiles_of(tiles)
        _Tiles(base=0, token=_Axis(sizes=(2, 2), strides=(4, 1)), dim=_Axis(sizes=(2,), strides=(2,)))
        >>> _tiles_of(torch.tensor([[0, 1], [3, 2]])) is None
        True
    """
    base = int(at_BH[0, 0])
    token, dim = _axis(at_BH[:, 0] - base), _axis(at_BH[0] - base)
    rebuilt = base + _offsets(token)[:, None] + _offsets(dim)[None, :]
    return _Tiles(base, token, dim) if torch.equal(rebuilt, at_BH) else None


def _axis(offsets: torch.Tensor) -> _Axis:
    sizes: list[int] = []
    strides: list[int] = []
    span, length = 1, len(offsets)
    while span < length:
        radix = next(r for r in range(2, length // span + 1) if (length // span) % r == 0)
        stride = int(offsets[span])
        if sizes and stride == strides[-1] * sizes[-1]:
            sizes[-1] *= radix
        else:
            sizes.append(radix)
            strides.append(stride)
        span *= radix
    return _Axis(tuple(reversed(sizes)) or (1,), tuple(reversed(strides)) or (0,))


def _offsets(axis: _Axis) -> torch.Tensor:
    total = torch.zeros(math.prod(axis.sizes), dtype=torch.int64).view(axis.sizes)
    for index, (size, stride) in enumerate(zip(axis.sizes, axis.strides, strict=True)):
        shape = [size if i == index else 1 for i in range(len(axis.sizes))]
        total = total + (torch.arange(size) * stride).view(shape)
    return total.flatten()
