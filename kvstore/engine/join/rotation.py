"""Keys at another position: chunks are stored with the positions at which they were learned.

Covers: moving stored K from one position to another, by the tables of the model's own rotary modules.
Does not cover: V, which has no position; proving that a model rotates as its modules say
(`kvstore.engine.join.forward`).
Shape letters: L layers, T tokens, N KV heads, H head dimension, R rotated dimensions, P positions.

A rotary module turns each pair of a key's first R dimensions by an angle that depends on the position. Its table holds
cosine and sine of every position, perhaps scaled. The quotient of two rows turns a key from one position to the
other, whatever rule made the table (YaRN's scale cancels out, a rounded table is undone by its own values).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kvstore.engine.paging import UnsupportedLayoutError


class RotaryModule(Protocol):
    """The part of a vLLM rotary embedding that says how it turns keys."""

    @property
    def cos_sin_cache(self) -> torch.Tensor:
        """Cosines and sines side by side, `[P, R]`."""
        ...

    @property
    def rotary_dim(self) -> int:
        """R."""
        ...

    @property
    def is_neox_style(self) -> bool:
        """Pairs are halves of the R dimensions; otherwise neighbours."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """One rotary module: complex numbers by position and pair."""

    turns_PR: torch.Tensor
    is_neox_style: bool


class Rotation:
    """How keys of every layer are moved. Safe for several threads.

    Args:
        modules: The layers' rotary modules in order of depth; layers may share one.

    Raises:
        UnsupportedLayoutError: A layer has none, or one of a kind that is not known.

    Cost:
        About as much as copying the keys twice, in float32.
    """

    def __init__(self, modules: Sequence[RotaryModule | None]) -> None:
        known: dict[int, _Table] = {}
        self._tables: list[_Table] = []
        for layer, module in enumerate(modules):
            if module is None:
                raise UnsupportedLayoutError(f"layer {layer} has no rotary embedding: its keys cannot be moved")
            if id(module) not in known:
                known[id(module)] = _table_of(module, layer=layer)
            self._tables.append(known[id(module)])

    @property
    def num_positions(self) -> int:
        """Positions that every layer's table has."""
        return min(table.turns_PR.shape[0] for table in self._tables)

    def move(self, kv_L2TNH: torch.Tensor, *, base: int, start: int) -> None:
        """Turn K in place from positions `base` on to positions `start` on. `kv_L2TNH` is on the CPU.

        Raises:
            ValueError: The positions lie outside the tables.
        """
        num_tokens = kv_L2TNH.shape[2]
        if min(base, start) < 0 or max(base, start) + num_tokens > self.num_positions:
            raise ValueError(f"{num_tokens} tokens cannot be moved from {base} to {start}: {self.num_positions} known")
        if base == start:
            return
        factors: dict[int, torch.Tensor] = {}
        for kv_2TNH, table in zip(kv_L2TNH, self._tables, strict=True):
            if id(table) not in factors:
                turns = table.turns_PR
                factors[id(table)] = turns[start : start + num_tokens] / turns[base : base + num_tokens]
            _turn(kv_2TNH[0], factors[id(table)], is_neox_style=table.is_neox_style)


def _table_of(module: RotaryModule, *, layer: int) -> _Table:
    cache = getattr(module, "cos_sin_cache", None)
    rotary_dim = getattr(module, "rotary_dim", None)
    if not isinstance(cache, torch.Tensor) or cache.ndim != 2 or cache.shape[1] != rotary_dim:
        raise UnsupportedLayoutError(
            f"layer {layer} rotates by {type(module).__name__}, which has no table of one row per position"
        )
    cos, sin = cache.detach().to("cpu", torch.float32).chunk(2, dim=-1)
    return _Table(turns_PR=torch.complex(cos, sin), is_neox_style=bool(module.is_neox_style))


def _turn(k_TNH: torch.Tensor, factor_TR: torch.Tensor, *, is_neox_style: bool) -> None:
    half = factor_TR.shape[1]
    rotated = k_TNH[..., : 2 * half]
    first, second = (
        (rotated[..., :half], rotated[..., half:]) if is_neox_style else (rotated[..., ::2], rotated[..., 1::2])
    )
    cos, sin = factor_TR.real[:, None], factor_TR.imag[:, None]
    x, y = first.float(), second.float()
    # The products are made before either half is overwritten: x and y may be views of k.
    turned = x * cos - y * sin, x * sin + y * cos
    first.copy_(turned[0])
    second.copy_(turned[1])
