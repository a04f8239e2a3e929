"""Which tokens of a join are recomputed.

Covers: the choice, given scores; pure, on positions alone.
Does not cover: scores (`kvstore.engine.join.probe`), tokens that must be computed anyway (holes and tail, added by
`kvstore.engine.join.run`).
"""

from collections.abc import Sequence

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
) -> Positions:
    """Positions to recompute, sorted: `round(share * tokens)` of them.

    Args:
        method: `first_k` takes the first tokens of every span alike, `random` any (a control), `naive` none; the
            others take the tokens with the highest scores.
        spans: Joined ranges of positions, in order, half-open, not overlapping.
        share: How many, from 0 to 1.
        seed: For `random`: the same request chooses the same tokens.
        scores: One per joined token in order of position; needed by methods that score.

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
        # Stable, so that equal scores are chosen in order of position.
        chosen = np.argsort(-scores, kind="stable")[:count]
    found: Positions = np.sort(positions[chosen])
    return found


def positions_of(spans: Sequence[tuple[int, int]]) -> Positions:
    """All positions of some ranges, in their order."""
    return np.concatenate([np.arange(*span, dtype=np.int64) for span in spans] or [np.empty(0, np.int64)])


def _order_of_heads(spans: Sequence[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """Indices of all tokens: first tokens of all spans, then second ones, then third ones."""
    offsets = np.concatenate([np.arange(stop - start) for start, stop in spans])
    return np.argsort(offsets, kind="stable")
