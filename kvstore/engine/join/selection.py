"""Which tokens of a join are recomputed.

Covers: the choice, given scores; pure, on positions alone.
Does not cover: scores (`kvstore.engine.join.probe`), tokens that must be computed anyway (holes and tail, added by
`kvstore.engine.join.run`).
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kvstore.engine.params import JoinMethod

Positions = npt.NDArray[np.int64]


def select(
    method: JoinMethod,
    *,
    spans: Sequence[tuple[int, int]],
    share: float,
    seed: int,
    scores: npt.NDArray[np.float32] | None = None,
    group_tokens: int = 1,
    max_gap: int = 0,
) -> Positions:
    """Positions to recompute, sorted: `round(share * tokens)` of them before gaps are filled.

    Args:
        method: `first_k` takes the first tokens of every span alike, `random` any (a control), `naive` none; the
            others take the tokens with the highest scores.
        spans: Joined ranges of positions, in order, half-open, not overlapping.
        share: How many, from 0 to 1.
        seed: For `random`: the same request chooses the same tokens.
        scores: One per joined token in order of position; needed by methods that score.
        group_tokens: Tokens of a span are chosen in groups of this many, by their mean score. The last group is cut.
        max_gap: Gaps of at most this many tokens between chosen ones of a span are chosen too.

    Raises:
        ValueError: Scores are missing or not one per token.

    Example:
        >>> select("first_k", spans=[(10, 14), (14, 22)], share=0.5, seed=0)
        array([10, 11, 12, 14, 15, 16])
    """
    positions = positions_of(spans)
    count = 0 if method == "naive" else round(share * len(positions))
    if count == 0:
        return positions[:0]
    if count == len(positions):
        return positions
    if method == "first_k":
        chosen = _order_of_heads(spans)[:count]
    elif method == "random":
        chosen = np.random.default_rng(seed).permutation(len(positions))[:count]
    else:
        if scores is None or len(scores) != len(positions):
            raise ValueError(f"{method} needs one score for each of {len(positions)} tokens")
        means = _group_means(scores, spans, group_tokens)
        # Stable, so that equal scores are chosen in order of position.
        chosen = np.argsort(-means, kind="stable")[:count]
    found: Positions = np.sort(positions[chosen])
    return _fill_gaps(found, spans, max_gap)


def positions_of(spans: Sequence[tuple[int, int]]) -> Positions:
    """All positions of some ranges, in their order."""
    return np.concatenate([np.arange(*span, dtype=np.int64) for span in spans] or [np.empty(0, np.int64)])


def _order_of_heads(spans: Sequence[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """Indices of all tokens: first tokens of all spans, then second ones, then third ones."""
    offsets = np.concatenate([np.arange(stop - start) for start, stop in spans])
    return np.argsort(offsets, kind="stable")


def _group_means(
    scores: npt.NDArray[np.float32], spans: Sequence[tuple[int, int]], group_tokens: int
) -> npt.NDArray[np.float64]:
    means = np.array(scores, dtype=np.float64)
    if group_tokens <= 1:
        return means
    begin = 0
    for start, stop in spans:
        for first in range(begin, begin + stop - start, group_tokens):
            last = min(first + group_tokens, begin + stop - start)
            means[first:last] = means[first:last].mean()
        begin += stop - start
    return means


def _fill_gaps(chosen: Positions, spans: Sequence[tuple[int, int]], max_gap: int) -> Positions:
    if max_gap <= 0:
        return chosen
    parts = []
    for start, stop in spans:
        inside = chosen[(chosen >= start) & (chosen < stop)]
        for left, right in pairwise(inside.tolist()):
            if right - left - 1 <= max_gap:
                parts.append(np.arange(left + 1, right))
    return np.unique(np.concatenate([chosen, *parts]))
