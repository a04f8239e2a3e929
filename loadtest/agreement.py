"""How far two distributions are apart, and how sure a figure is.

Covers: KL, agreement of the first choice, change of the likelihood; paired bootstrap. Does not cover: what is compared
(the benchmarks).
Shape letters: T tokens of a continuation, W words of the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

RESAMPLES: Final = 2000
_LEAST_VALID_RATIO: Final = 0.95
"""Of the resamples for which the statistic must exist, or there is no interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """One continuation over other KV, against the same continuation over exact KV."""

    kl: float
    """Mean over tokens of KL(exact || other), nats."""
    first_token_kl: float
    top1_ratio: float
    """Tokens at which both put the same word first."""
    dnll: float
    """Mean rise of the negative log likelihood of the text itself, nats; may be negative."""


def log_probabilities(logits_TW: torch.Tensor) -> torch.Tensor:
    """Natural logarithms of the probabilities, float32."""
    return logits_TW.float().log_softmax(dim=-1)


def agreement(exact_TW: torch.Tensor, other_TW: torch.Tensor, *, targets_T: torch.Tensor) -> Agreement:
    """Compare log probabilities.

    Args:
        exact_TW: Log probabilities over exact KV.
        other_TW: The same over the KV in question.
        targets_T: The words that the text goes on with.

    Example:
        >>> exact = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> other = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
        >>> found = agreement(exact, other, targets_T=torch.tensor([0, 0]))
        >>> [round(value, 4) for value in (found.kl, found.first_token_kl, found.top1_ratio, found.dnll)]
        [0.0719, 0.1438, 0.5, 0.3466]
    """
    kl_T = (exact_TW.exp() * (exact_TW - other_TW)).sum(dim=-1, dtype=torch.float64)
    same_T = exact_TW.argmax(dim=-1) == other_TW.argmax(dim=-1)
    dnll_T = (exact_TW - other_TW).gather(1, targets_T[:, None])[:, 0].double()
    # Rounding can leave a sum of tiny terms below zero; a divergence is not.
    return Agreement(
        kl=max(0.0, float(kl_T.mean())),
        first_token_kl=max(0.0, float(kl_T[0])),
        top1_ratio=float(same_T.double().mean()),
        dnll=float(dnll_T.mean()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A figure and the 95 % interval of its paired bootstrap."""

    value: float
    low: float | None
    high: float | None
    """None: with other documents, there might be no such figure."""

    def as_json(self) -> dict[str, float | None]:
        """For a result file."""
        return {"value": self.value, "low": self.low, "high": self.high}


Statistic = Callable[[NDArray[np.intp]], float]
"""From the indices of documents (with repeats) to a figure; NaN where it does not exist."""


def bootstrap(statistic: Statistic, *, count: int, seed: int = 1, resamples: int = RESAMPLES) -> Interval:
    """The statistic of all documents, and the interval that other draws of documents give.

    Documents are drawn, not tokens: tokens of a document err together. All codecs see the same draws, so what two of
    them share cancels in ratios and differences.

    Args:
        statistic: Pure.
        count: How many documents there are.
        seed: Of the draws.
        resamples: How many draws.
    """
    value = statistic(np.arange(count))
    if count < 2:
        return Interval(value=value, low=None, high=None)
    draws = np.random.default_rng(seed).integers(0, count, size=(resamples, count))
    found = np.array([statistic(indices) for indices in draws])
    valid = found[np.isfinite(found)]
    if len(valid) < _LEAST_VALID_RATIO * resamples:
        return Interval(value=value, low=None, high=None)
    low, high = np.quantile(valid, (0.025, 0.975))
    return Interval(value=value, low=float(low), high=float(high))
