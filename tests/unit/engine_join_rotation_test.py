"""Keys that are moved are keys that would have been computed there: against transformers' rotary embeddings.

Covers: half and neighbour pairs, partial rotation, scaled tables, layers with different tables, refusals.
Does not cover: whether a model rotates as its modules say (`tests/engine/engine_join_test.py`).
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvstore.engine.join.rotation import Rotation
from kvstore.engine.paging import UnsupportedLayoutError

HEADS, DIM, POSITIONS = 2, 16, 512


@dataclass
class Module:
    """A rotary module as vLLM has them."""

    cos_sin_cache: torch.Tensor
    rotary_dim: int
    is_neox_style: bool = True


def table(*, dim: int = DIM, base: float = 10000.0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Module:
    rate = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = torch.arange(POSITIONS, dtype=torch.float32)[:, None] * rate
    cache = torch.cat([angles.cos(), angles.sin()], dim=-1) * scale
    return Module(cache.to(dtype), dim)


def keys(tokens: int, layers: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn((layers, 2, tokens, HEADS, DIM), generator=generator)


def interleave(k: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs, written as complex multiplication."""
    cos, sin = cache.chunk(2, dim=-1)
    pairs = torch.view_as_complex(k.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).flatten(-2)


def transformers_keys(k_TNH: torch.Tensor, *, start: int, parameters: dict[str, Any]) -> torch.Tensor:
    config = LlamaConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        rope_parameters=parameters,
    )
    cos, sin = LlamaRotaryEmbedding(config)(k_TNH, torch.arange(start, start + len(k_TNH))[None])
    k = k_TNH.transpose(0, 1)[None]
    return apply_rotary_pos_emb(k, k, cos, sin)[1][0].transpose(0, 1)


@pytest.mark.parametrize(("base", "start"), [(0, 300), (300, 0), (40, 41), (100, 100), (17, 470)])
def test_moved_keys_are_transformers_keys(base: int, start: int) -> None:
    plain = keys(33)
    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    stored = plain.clone()
    stored[0, 0] = transformers_keys(plain[0, 0], start=base, parameters=parameters)
    Rotation([table()]).move(stored, base=base, start=start)
    torch.testing.assert_close(stored[0, 0], transformers_keys(plain[0, 0], start=start, parameters=parameters))
    assert torch.equal(stored[0, 1], plain[0, 1]), "V was touched"


def test_neighbouring_pairs() -> None:
    module = table()
    module.is_neox_style = False
    plain = keys(9)
    stored = plain.clone()
    stored[0, 0] = interleave(plain[0, 0], module.cos_sin_cache[5:14])
    Rotation([module]).move(stored, base=5, start=200)
    torch.testing.assert_close(stored[0, 0], interleave(plain[0, 0], module.cos_sin_cache[200:209]))


def test_dimensions_that_are_not_rotated_stay() -> None:
    module = table(dim=8)
    module.is_neox_style = False
    plain = keys(9)
    stored = plain.clone()
    stored[0, 0, ..., :8] = interleave(plain[0, 0, ..., :8], module.cos_sin_cache[:9])
    Rotation([module]).move(stored, base=0, start=100)
    torch.testing.assert_close(stored[0, 0, ..., :8], interleave(plain[0, 0, ..., :8], module.cos_sin_cache[100:109]))
    assert torch.equal(stored[0, 0, ..., 8:], plain[0, 0, ..., 8:])


def test_scale_of_a_table_is_not_applied_again() -> None:
    module = table(scale=1.37)
    module.is_neox_style = False
    plain = keys(4)
    stored = plain.clone()
    stored[0, 0] = interleave(plain[0, 0], module.cos_sin_cache[:4])
    Rotation([module]).move(stored, base=0, start=77)
    torch.testing.assert_close(stored[0, 0], interleave(plain[0, 0], module.cos_sin_cache[77:81]))


def test_there_and_back_with_tables_by_layer() -> None:
    rotation = Rotation([table(), table(base=500.0), table(dim=8)])
    plain = keys(21, layers=3)
    moved = plain.clone()
    rotation.move(moved, base=3, start=250)
    assert all(not torch.allclose(a[0], b[0], atol=0.1) for a, b in zip(moved, plain, strict=True))
    assert not torch.allclose(moved[0, 0] - plain[0, 0], moved[1, 0] - plain[1, 0], atol=0.1)
    rotation.move(moved, base=250, start=3)
    torch.testing.assert_close(moved, plain)


def test_positions_outside_the_table() -> None:
    rotation = Rotation([table()])
    assert rotation.num_positions == POSITIONS
    for base, start in ((0, POSITIONS - 3), (POSITIONS - 3, 0), (-1, 4)):
        with pytest.raises(ValueError, match="512 known"):
            rotation.move(keys(4), base=base, start=start)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([table(), None], "layer 1 has no rotary embedding"),
        ([Module(torch.zeros(2, 3, 4), 4)], "no table of one row per position"),
        ([Module(torch.zeros(8, 6), 4)], "no table of one row per position"),
    ],
)
def test_what_cannot_be_moved_is_refused(modules: list[Any], message: str) -> None:
    with pytest.raises(UnsupportedLayoutError, match=message):
        Rotation(modules)
