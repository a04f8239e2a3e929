"""How likely a record is to be used again, from what happened to others of its age and history.

Covers: counting uses and ends of waits, and the index by which records are compared. Does not cover: what a use is
worth, who holds what (`kvstore.policy.cost`).

Between two uses a record waits. For records of each history (how often they were used) this counts, by age, how many
waits ended in a use, how many were given up, and how many go on. That gives the rate of uses at each age, for records
that got that far, and from it the index: the most uses per unit of room and time that can be had by keeping the record
for some time from now on. A record whose uses come at once and then never again falls as it ages; one of a kind that
is used in long circles does not.

Source:
    The index is that of Gittins (Gittins, Glazebrook, Weber: "Multi-armed bandit allocation indices", 2011) for a
    record that pays one use and ends. Ranking by uses per byte and time learned by age: Beckmann, Chen, Cidon, "LHD:
    improving cache hit rate by maximizing hit density", NSDI 2018. Counting waits that go on, so that they do not look
    as if they had never been: Kaplan, Meier, "Nonparametric estimation from incomplete observations", JASA 1958.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Final

BINS_PER_OCTAVE: Final = 2
NUM_BINS: Final = 44 * BINS_PER_OCTAVE
"""Ages of up to 2^44 tokens; older ones count as that old."""
NUM_HISTORIES: Final = 4
"""Used once, 2-3 times, 4-7 times, more: finer ones learn more slowly, and tear apart what is read together."""
PRIOR_WAITS: Final = 10.0
"""Waits assumed before any is seen, per octave; they make a new policy rank by uses over age."""
_PRIOR_USE_RATIO: Final = 0.3
"""Share of the assumed waits that end in a use in their octave."""
_PRIOR_GROWTH: Final = 1.4
"""By how much that share grows with each history."""

_WIDTHS: Final = tuple(2 ** ((i + 1) / BINS_PER_OCTAVE) - 2 ** (i / BINS_PER_OCTAVE) for i in range(NUM_BINS))


def history_of(uses: int) -> int:
    """The history that a record with so many uses has.

    Example:
        >>> [history_of(uses) for uses in (1, 2, 3, 4, 7, 8, 1000)]
        [0, 1, 1, 2, 2, 3, 3]
    """
    return min(NUM_HISTORIES, uses.bit_length()) - 1


class ReuseEstimate:
    """Index by history and age, learned as waits end.

    Guarantees:
        At the same age, more uses never have a lower index.

    Cost:
        `note_end` and `index` O(1). `fit` linear in the waits that it is given.
    """

    def __init__(self) -> None:
        self._used = [[0.0] * NUM_BINS for _ in range(NUM_HISTORIES)]
        self._given_up = [[0.0] * NUM_BINS for _ in range(NUM_HISTORIES)]
        self._index: list[list[float]] = []
        self.fit((), keep_ratio=1.0)

    def note_end(self, *, uses: int, age_tokens: float, is_use: bool) -> None:
        """A wait ended: in a use, or nobody looks any more."""
        counts = self._used if is_use else self._given_up
        counts[history_of(uses)][_bin_of(age_tokens)] += 1.0

    def index(self, *, uses: int, age_tokens: float) -> float:
        """Uses per token of time, at best, of keeping a record of that history and age."""
        index = self._index[history_of(uses)]
        # Between the middles of bins, so that of two ages in one bin the older still comes out lower.
        place = BINS_PER_OCTAVE * math.log2(max(1.0, age_tokens)) - 0.5
        lower = min(NUM_BINS - 2, max(0, int(place)))
        share = min(1.0, max(0.0, place - lower))
        return index[lower] * (1.0 - share) + index[lower + 1] * share

    def fit(self, going_on: Iterable[tuple[int, float, int]], *, keep_ratio: float) -> None:
        """Learn from all that was counted.

        Args:
            going_on: Waits that have not ended: uses, age, and for how many such waits it stands.
            keep_ratio: What of the earlier counts still counts afterwards, so that old habits are forgotten.
        """
        live = [[0.0] * NUM_BINS for _ in range(NUM_HISTORIES)]
        for uses, age_tokens, weight in going_on:
            live[history_of(uses)][_bin_of(age_tokens)] += weight
        fitted: list[list[float]] = []
        for history in range(NUM_HISTORIES):
            for counts in (self._used[history], self._given_up[history]):
                counts[:] = [count * keep_ratio for count in counts]
            index = self._fit_one(history, live[history])
            fitted.append(list(map(max, index, fitted[-1])) if fitted else index)
        self._index = fitted

    def _fit_one(self, history: int, live: Sequence[float]) -> list[float]:
        """From the oldest bin to the youngest: uses and time of all waits that got so far, joined while that pays.

        The index of a bin is the best of (uses from here to there) / (time from here to there), over all "there": as
        with slopes of a hull, later bins are joined to this one while they have the higher rate.
        """
        used, given_up = self._used[history], self._given_up[history]
        prior_waits = PRIOR_WAITS / BINS_PER_OCTAVE
        prior_uses = prior_waits * _PRIOR_USE_RATIO * _PRIOR_GROWTH**history
        index = [0.0] * NUM_BINS
        hull: list[tuple[float, float]] = []
        waits = prior_waits
        for i in range(NUM_BINS - 1, -1, -1):
            ended = used[i] + given_up[i] + live[i]
            uses = used[i] + prior_uses
            time = _WIDTHS[i] * (waits + ended / 2)
            waits += ended
            while hull and hull[-1][0] * time > uses * hull[-1][1]:
                more_uses, more_time = hull.pop()
                uses, time = uses + more_uses, time + more_time
            hull.append((uses, time))
            index[i] = uses / time
        return index


def _bin_of(age_tokens: float) -> int:
    return min(NUM_BINS - 1, int(BINS_PER_OCTAVE * math.log2(age_tokens))) if age_tokens > 1 else 0
