"""Gather and scatter over invented backends: an order that is made of tiles, one that is not, one that lies."""

from typing import Any

import pytest
import torch

from kvstore.engine.paging import PagedKv, UnsupportedLayoutError

HEADS, DIM, PAGE, PAGES = 2, 8, 16, 12


def tiled(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Like the AVX-512 backend: K in tiles of 4 tokens, each transposed, then V."""
    tiles = k.reshape(PAGE // 4, 4, DIM).transpose(1, 2)
    return torch.cat([tiles.flatten(), v.flatten()])


def scrambled(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """No regular order at all."""
    order = torch.randperm(2 * PAGE * DIM, generator=torch.Generator().manual_seed(3))
    return torch.cat([k.flatten(), v.flatten()])[order]


def rounding(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Looks regular for integers, but keeps nothing behind the point."""
    return torch.cat([k.flatten(), v.flatten()]).round()


def blind(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Keeps no values."""
    return torch.cat([k.flatten(), v.flatten()]) * 0


class Backend:
    """A cache operation that orders each page of a head by `pack`."""

    def __init__(self, pack: Any) -> None:
        self._pack = pack

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
        shadow = layer.shadow.setdefault(id(kv_cache), torch.zeros(kv_cache.shape[0], 2, PAGE, HEADS, DIM))
        for token, slot in enumerate(slot_mapping.tolist()):
            shadow[slot // PAGE, 0, slot % PAGE] = key[token]
            shadow[slot // PAGE, 1, slot % PAGE] = value[token]
        for page in {slot // PAGE for slot in slot_mapping.tolist()}:
            for head in range(HEADS):
                packed = self._pack(shadow[page, 0, :, head], shadow[page, 1, :, head])
                kv_cache[page, head] = packed.view(PAGE, 2 * DIM)


class Layer:
    def __init__(self, pack: Any, **shape: int) -> None:
        self.impl = Backend(pack)
        self.shadow: dict[int, torch.Tensor] = {}
        self.kv_cache = torch.zeros(PAGES, HEADS, PAGE, shape.get("width", 2 * DIM), dtype=torch.float32)


@pytest.mark.parametrize("pack", [tiled, scrambled])
@pytest.mark.parametrize("block_size", [PAGE, 2 * PAGE])
@pytest.mark.parametrize(("start", "stop"), [(0, 40), (3, 37), (17, 18), (16, 48)])
def test_gather_returns_what_scatter_wrote(pack: Any, block_size: int, start: int, stop: int) -> None:
    blocks = PagedKv([Layer(pack), Layer(pack), Layer(pack)], block_size=block_size)
    ids = [5, 1, 3] if block_size == PAGE else [4, 2]
    generator = torch.Generator().manual_seed(7)
    kv = torch.randn(blocks.meta(num_tokens=stop - start, base_position=0).shape, generator=generator)
    blocks.scatter(kv, slots=blocks.slots(ids, start=start, stop=stop))
    first, last = start // block_size, -(-stop // block_size)
    gathered = blocks.gather(ids[first:last], first=start % block_size, num_tokens=stop - start)
    assert gathered.num_bytes <= 2 * (last - first) * blocks.bytes_per_block
    assert torch.equal(gathered.kv(), kv)


def test_gathered_kv_does_not_follow_the_blocks() -> None:
    blocks = PagedKv([Layer(tiled)], block_size=PAGE)
    kv = torch.ones(blocks.meta(num_tokens=PAGE, base_position=0).shape)
    blocks.scatter(kv, slots=blocks.slots([2], start=0, stop=PAGE))
    gathered = blocks.gather([2], first=0, num_tokens=PAGE)
    blocks.scatter(kv * 2, slots=blocks.slots([2], start=0, stop=PAGE))
    assert torch.equal(gathered.kv(), kv)


@pytest.mark.parametrize(
    ("layers", "block_size", "message"),
    [
        ([], PAGE, "no attention layers"),
        ([Layer(tiled), Layer(tiled, width=4 * DIM)], PAGE, "differ"),
        ([Layer(tiled)], PAGE + 1, "whole pages"),
        ([Layer(blind)], PAGE, "look alike"),
        ([Layer(rounding)], PAGE, "is not known"),
    ],
)
def test_refusals(layers: list[Layer], block_size: int, message: str) -> None:
    with pytest.raises(UnsupportedLayoutError, match=message):
        PagedKv(layers, block_size=block_size)


def test_only_its_own_kv_is_accepted() -> None:
    blocks = PagedKv([Layer(tiled)], block_size=PAGE)
    meta = blocks.meta(num_tokens=3, base_position=9)
    assert (meta.shape, meta.dtype, blocks.accepts(meta)) == ((1, 2, 3, HEADS, DIM), "float32", True)
    other = PagedKv([Layer(tiled), Layer(tiled)], block_size=PAGE).meta(num_tokens=3, base_position=9)
    assert not blocks.accepts(other)
