"""Scores by which tokens of a join are chosen.

Covers: `deviation` and `query_aware`, as sequences of bounded forwards.
Does not cover: the choice itself (`kvstore.engine.join.selection`).
Shape letters: T tokens, W tokens of the query, N KV heads, G query heads of one KV head, H head dimension.

`deviation` (CacheBlend): how much V of the second layer, the first one that depends on context, differs from what was
loaded. `query_aware`: how much the request's last tokens, which usually hold the question, attend to each token in a
few early layers, over the KV as it was loaded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from kvstore.engine.paging import PagedKv

Observer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Sees a layer's rotated query `[T, heads, H]` and key, and its value `[T, N, H]`, after K and V were written."""

QUERY_TOKENS: Final = 64
"""Last tokens of a request whose attention is looked at."""
_DEVIATION_LAYER: Final = 1
_FIRST_DEPTH_RATIO: Final = 0.27
_DEPTH_RATIO: Final = 0.13
"""Layers that are looked at: this share of all, from that share of the depth on (8 to 11 of 30)."""


class Forward(Protocol):
    """The engine's model (`kvstore.engine.join.forward`)."""

    @property
    def num_layers(self) -> int:
        """Attention layers."""
        ...

    def attention(self, layer: int) -> Any:
        """A layer's attention module of vLLM."""
        ...

    def run(
        self,
        token_ids: Sequence[int],
        *,
        positions: torch.Tensor,
        block_ids: Sequence[int],
        stop_layer: int | None = None,
        observers: Mapping[int, Observer] | None = None,
    ) -> None:
        """Write fresh K and V of some tokens into their request's blocks."""
        ...


@dataclass(slots=True)
class StepBudget:
    """What forwards may still cost in this engine step.

    Example:
        >>> budget = StepBudget(max_tokens=100, left_tokens=60.0)
        >>> len(next(budget.split(torch.arange(200), depth_ratio=0.5))), budget.left_tokens
        (100, 10.0)
    """

    max_tokens: int
    """Tokens of one forward, however few layers it has."""
    left_tokens: float = 0.0
    """Tokens through all layers; whoever forwards goes on while it is positive."""

    def split(self, positions: torch.Tensor, *, depth_ratio: float) -> Iterator[torch.Tensor]:
        """Consecutive pieces for forwards through that share of the layers, each as large as the step allows then."""
        begin = 0
        while begin < len(positions):
            count = min(self.max_tokens, max(1, int(self.left_tokens / depth_ratio)))
            piece = positions[begin : begin + count]
            begin += count
            self.left_tokens -= len(piece) * depth_ratio
            yield piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request whose KV is being joined."""

    forward: Forward
    blocks: PagedKv
    block_ids: Sequence[int]
    """From token 0 on."""
    token_ids: Sequence[int]
    """Of the whole tail and everything before it."""
    tail_start: int
    tail_stop: int

    def compute(
        self, positions: torch.Tensor, *, stop_layer: int | None = None, observers: Mapping[int, Observer] | None = None
    ) -> None:
        """Write fresh KV of some tokens."""
        token_ids = [self.token_ids[position] for position in positions.tolist()]
        self.forward.run(
            token_ids, positions=positions, block_ids=self.block_ids, stop_layer=stop_layer, observers=observers
        )


def score_deviation(
    request: Request, *, positions: torch.Tensor, scores_T: torch.Tensor, budget: StepBudget
) -> Iterator[None]:
    """Add every token's deviation to its score; pauses after each forward.

    Args:
        request: Its loaded KV is in place.
        positions: All tokens that are not exact, in order.
        scores_T: By position, up to the tail.
        budget: How large the forwards may be.
    """
    layer = min(_DEVIATION_LAYER, request.forward.num_layers - 1)
    loaded = request.blocks.gather_layer(layer, request.block_ids, num_tokens=request.tail_start)[1]
    for piece in budget.split(positions, depth_ratio=(layer + 0.5) / request.forward.num_layers):
        request.compute(piece, stop_layer=layer + 1, observers={layer: _compare(loaded, piece, scores_T)})
        yield


def score_attention(
    request: Request, *, holes: torch.Tensor, scores_T: torch.Tensor, budget: StepBudget
) -> Iterator[None]:
    """Add the attention that the request's end pays to every token; pauses after each forward.

    Args:
        request: Its loaded KV is in place.
        holes: Tokens without KV, in order: they are computed as deep as is looked.
        scores_T: By position, up to the tail.
        budget: How large the forwards may be.
    """
    forward = request.forward
    layers = probe_layers([forward.attention(layer).sliding_window for layer in range(forward.num_layers)])
    stop_layer = layers[-1] + 1
    depth_ratio = stop_layer / forward.num_layers
    for piece in budget.split(holes, depth_ratio=depth_ratio):
        request.compute(piece, stop_layer=stop_layer)
        yield
    # A long tail is cut to its end, which stands where the tail begins: nothing in between is computed yet. What this
    # writes there is written again with the tail.
    count = min(QUERY_TOKENS, request.tail_stop - request.tail_start)
    budget.left_tokens -= count * depth_ratio
    forward.run(
        request.token_ids[request.tail_stop - count : request.tail_stop],
        positions=torch.arange(request.tail_start, request.tail_start + count),
        block_ids=request.block_ids,
        stop_layer=stop_layer,
        observers={layer: _attend(request, layer, count, scores_T) for layer in layers},
    )
    yield


def probe_layers(windows: Sequence[int | None]) -> list[int]:
    """Layers whose attention is looked at, by each layer's sliding window (None: it sees everything).

    Example:
        >>> probe_layers([None] * 30)
        [8, 9, 10, 11]
        >>> probe_layers([512, 512, 512, 512, 512, None] * 2)
        [5, 11]
    """
    depth = len(windows)
    seeing = [layer for layer, window in enumerate(windows) if window is None] or list(range(depth))
    count = max(1, round(_DEPTH_RATIO * depth))
    first = round(_FIRST_DEPTH_RATIO * depth)
    return [layer for layer in seeing if layer >= first][:count] or seeing[-count:]


def attention_mass(query_WQH: torch.Tensor, *, k_TNH: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention that each of T tokens gets from the last W of them, summed over W and all heads, `[T]` in float32.

    Args:
        query_WQH: Rotated queries, N * G heads.
        k_TNH: Rotated keys of all tokens, those of the queries last.
        scale: Of the products.
    """
    width, total, heads = query_WQH.shape[0], k_TNH.shape[0], k_TNH.shape[1]
    query = query_WQH.float().view(width, heads, -1, query_WQH.shape[2])
    later = torch.ones(width, total, dtype=torch.bool, device=k_TNH.device).triu(total - width + 1)
    mass = torch.zeros(total, device=k_TNH.device)
    # Head by head: all of them at once would be heads x W x T numbers.
    for head in range(heads):
        products = torch.einsum("wgh,th->gwt", query[:, head], k_TNH[:, head].float()) * scale
        mass += products.masked_fill_(later, -torch.inf).softmax(-1).sum((0, 1))
    return mass


def _compare(loaded_TNH: torch.Tensor, positions: torch.Tensor, scores_T: torch.Tensor) -> Observer:
    def observe(_query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor) -> None:
        before = loaded_TNH[positions.to(loaded_TNH.device)]
        scores_T[positions] += (value.float() - before.float()).flatten(1).norm(dim=1).to(scores_T)

    return observe


def _attend(request: Request, layer: int, count: int, scores_T: torch.Tensor) -> Observer:
    scale = float(request.forward.attention(layer).impl.scale)

    def observe(query: torch.Tensor, _key: torch.Tensor, _value: torch.Tensor) -> None:
        k = request.blocks.gather_layer(layer, request.block_ids, num_tokens=request.tail_start + count)[0]
        scores_T.add_(attention_mass(query, k_TNH=k, scale=scale)[: request.tail_start].to(scores_T))

    return observe
