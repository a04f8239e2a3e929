"""Cost-aware order: what saves the fewest seconds of prefill per byte and time leaves first.

Covers: comparing records, and what is remembered of those that left. Does not cover: how likely a use is
(`kvstore.policy.reuse`), how long a recompute takes (`kvstore.policy.recompute`).

    value = reuse index (history, age) x recompute seconds / stored bytes

Time is counted in tokens that were stored or read. Records of a request are dated back to its beginning, and of those
the deeper leave first: without what stands before them they are of no use, while what stands before is useful alone.
Only records of one history and one size per token stand in one line, by age; who leaves is the lowest of their heads.
What a line's index says about ages in its middle is not asked: there an older record may be worth more.
"""

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from kvstore.interfaces import TierEntry
from kvstore.keys import ChunkKey
from kvstore.policy.ranking import Ranking
from kvstore.policy.recompute import recompute_s
from kvstore.policy.reuse import ReuseEstimate, history_of

GHOSTS_PER_RECORD: Final = 2
"""Records that left and are remembered, for each one that is held."""
_MIN_GHOSTS: Final = 64
_MIN_PERIOD: Final = 256
"""Uses between two fits, at least; else a quarter of the records and ghosts."""
_HALF_LIFE: Final = 10.0
"""Uses per record or ghost after which a count has half its weight."""
_MAX_SAMPLE: Final = 2048
"""Waits that go on that one fit looks at, of records and of ghosts."""
_DEPTH_WEIGHT: Final = 1.01
"""A little over one: deeper records of one request come out a little older."""

_Line = tuple[int, int]
"""History, and size per token in octaves."""


@dataclass(slots=True)
class _Held:
    uses: int
    since_tokens: float
    """When it was last used, on the clock of tokens."""
    line: _Line
    num_tokens: int
    base_position: int
    seconds_per_byte: float


class CostPolicy:
    """Learned reuse times recompute seconds, per byte.

    Cost:
        O(log n) per call, amortised: once per n / 4 uses a fit passes over all records at C speed, and looks at a
        bounded sample of them. At most twice as many remembered keys as records. 460 bytes per record with its books
        (measured).
    """

    def __init__(self) -> None:
        self._held: dict[ChunkKey, _Held] = {}
        self._lines: dict[_Line, Ranking] = {}
        self._ghosts: OrderedDict[ChunkKey, tuple[int, float]] = OrderedDict()
        """Uses and last use of records that left."""
        self._estimate = ReuseEstimate()
        self._clock_tokens = 0.0
        self._uses_since_fit = 0

    def admit(self, key: ChunkKey, entry: TierEntry) -> None:
        """A record came in; if it was here before, that is a use of what is remembered of it."""
        before = self._held.get(key)
        stored_bytes = max(1, entry.stored_bytes)
        seconds_per_byte = recompute_s(entry.num_tokens, base_position=entry.base_position) / stored_bytes
        if before is None:
            uses, since_tokens = self._ghosts.pop(key, (0, 0.0))
        else:
            uses, since_tokens = before.uses, before.since_tokens
            self._leave_line(key, before)
        line = (history_of(max(1, uses)), round(math.log2(stored_bytes / entry.num_tokens)))
        held = _Held(uses, since_tokens, line, entry.num_tokens, entry.base_position, seconds_per_byte)
        if before is None:
            self._use(key, held)
        else:
            self._enter_line(key, held)

    def touch(self, key: ChunkKey) -> None:
        """A record was used."""
        held = self._held.get(key)
        if held is not None:
            self._leave_line(key, held)
            self._use(key, held)

    def remove(self, key: ChunkKey, *, evicted: bool) -> None:
        """A record left, for whatever reason: its history is kept for a while, as it may come back."""
        held = self._held.pop(key, None)
        if held is None:
            return
        self._leave_line(key, held)
        self._ghosts[key] = (held.uses, held.since_tokens)
        while len(self._ghosts) > max(_MIN_GHOSTS, GHOSTS_PER_RECORD * len(self._held)):
            _, (uses, since_tokens) = self._ghosts.popitem(last=False)
            self._estimate.note_end(uses=uses, age_tokens=self._clock_tokens - since_tokens, is_use=False)

    def victims(self) -> Iterator[ChunkKey]:
        """Lowest value first, comparing the oldest of each line."""
        fringe: list[tuple[float, _Line, ChunkKey, Iterator[ChunkKey] | None]] = []
        for line, ranking in self._lines.items():
            first = ranking.first()
            if first is not None:
                fringe.append((self._value(self._held[first[1]]), line, first[1], None))
        heapq.heapify(fringe)
        while fringe:
            _, line, key, rest = heapq.heappop(fringe)
            yield key
            # Most searches end here: only a line that gave one away is read on.
            if rest is None:
                rest = self._lines[line].in_order()
                next(rest)
            following = next(rest, None)
            if following is not None:
                heapq.heappush(fringe, (self._value(self._held[following]), line, following, rest))

    def _value(self, held: _Held) -> float:
        age_tokens = self._clock_tokens - held.since_tokens
        return self._estimate.index(uses=held.uses, age_tokens=age_tokens) * held.seconds_per_byte

    def _use(self, key: ChunkKey, held: _Held) -> None:
        """End the wait that went on, and begin the next."""
        self._clock_tokens += held.num_tokens
        if held.uses:
            age_tokens = self._clock_tokens - held.since_tokens
            self._estimate.note_end(uses=held.uses, age_tokens=age_tokens, is_use=True)
        held.uses += 1
        held.since_tokens = self._clock_tokens - _DEPTH_WEIGHT * held.base_position
        self._enter_line(key, held)
        self._uses_since_fit += 1
        num_waits = len(self._held) + len(self._ghosts)
        if self._uses_since_fit >= max(_MIN_PERIOD, num_waits // 4):
            keep_ratio = 0.5 ** (self._uses_since_fit / (_HALF_LIFE * max(_MIN_PERIOD, num_waits)))
            self._estimate.fit(self._waits(), keep_ratio=keep_ratio)
            self._uses_since_fit = 0

    def _waits(self) -> Iterator[tuple[int, float, int]]:
        """Waits that go on, a sample: uses, age, and how many it stands for."""
        stride = 1 + len(self._held) // _MAX_SAMPLE
        for held in islice(self._held.values(), 0, None, stride):
            yield held.uses, self._clock_tokens - held.since_tokens, stride
        stride = 1 + len(self._ghosts) // _MAX_SAMPLE
        for uses, since_tokens in islice(self._ghosts.values(), 0, None, stride):
            yield uses, self._clock_tokens - since_tokens, stride

    def _enter_line(self, key: ChunkKey, held: _Held) -> None:
        history = history_of(held.uses)
        if held.line[0] != history:
            held.line = (history, held.line[1])
        self._held[key] = held
        self._lines.setdefault(held.line, Ranking()).put(key, rank=held.since_tokens)

    def _leave_line(self, key: ChunkKey, held: _Held) -> None:
        ranking = self._lines[held.line]
        ranking.discard(key)
        if not ranking:
            del self._lines[held.line]
