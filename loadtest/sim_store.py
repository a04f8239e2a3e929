"""What a bounded store would have saved on a stream of requests: the production policies, without bytes.

Covers: one tier with its books and a policy, replayed request by request; two offline figures beside them.
Does not cover: time (nothing is late here), several tiers or nodes, the arena's places.

Per request: chunks of its prefix are of use up to the first that is missing, passages each by itself; what is of use
counts as read. Then whatever was missing is stored, as learning it would.

The offline figures know the future:

- `belady`: of the stored chunks and the new one, the one that is read again last goes. A store could reach it.
- `bound`: no store can save more. Holding a chunk from one use to the next takes its bytes for that many requests; a
  tier has its capacity times all requests; the intervals that save most per byte and request fill it.
  Source: the relaxation of Berger, Beckmann, Harchol-Balter, "Practical bounds on optimal caching with variable object
  sizes", POMACS 2018 (PFOO-U), weighted by what a hit saves.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvstore.container import stored_bytes
from kvstore.interfaces import EvictionPolicy, TierEntry
from kvstore.keys import ChunkKey
from kvstore.policy import Quotas
from kvstore.policy.ranking import Ranking
from kvstore.policy.recompute import recompute_s
from kvstore.tiers.books import TierBooks
from loadtest.traces import Request, Span

BYTES_PER_TOKEN: Final = 131_072
"""Raw bfloat16 KV of a model with 32 layers and 8 KV heads of 128."""


@dataclass(slots=True, kw_only=True)
class Saved:
    """What a store saved on a stream."""

    prompt_tokens: int = 0
    hit_tokens: int = 0
    prompt_s: float = 0.0
    """Seconds that all prompts would take to compute."""
    saved_s: float = 0.0
    """Seconds of the chunks that were of use, at their place in the request."""
    stored_bytes: int = 0
    """Bytes that were written."""
    hit_ratio_by_request: list[float] = field(default_factory=list)

    @property
    def hit_ratio(self) -> float:
        """Tokens that were of use over all prompt tokens."""
        return self.hit_tokens / max(1, self.prompt_tokens)

    @property
    def saved_ratio(self) -> float:
        """Seconds that were saved over the seconds that all prompts would take."""
        return self.saved_s / max(1e-12, self.prompt_s)


class StoreSimulator:
    """One tier.

    Args:
        policy: A production policy, or one that knows the future.
        capacity_bytes: Of the tier.
        quotas: Bytes per tenant.
        bytes_per_token: Of the stored KV.
        low_ratio: As `TierBooks`.
    """

    def __init__(
        self,
        policy: EvictionPolicy,
        *,
        capacity_bytes: int,
        quotas: Quotas | None = None,
        bytes_per_token: int = BYTES_PER_TOKEN,
        low_ratio: float = 1.0,
    ) -> None:
        self.books = TierBooks(
            capacity_bytes=capacity_bytes, policy=policy, quotas=quotas or Quotas(), low_ratio=low_ratio
        )
        self.saved = Saved()
        self._bytes_per_token = bytes_per_token

    def serve(self, request: Request, *, now_s: float = 0.0) -> None:
        """One request: read what is of use, store what is missing."""
        found = list(self._usable(request))
        for span in found:
            self.books.touch(span.key)
        for span in (*request.prefix, *request.passages):
            if span.key not in self.books:
                self._store(span, request.tenant, now_s)
            elif span not in found:
                self.books.touch(span.key)
        hit_tokens = sum(span.num_tokens for span in found)
        self.saved.prompt_tokens += request.num_tokens
        self.saved.hit_tokens += hit_tokens
        self.saved.prompt_s += recompute_s(request.num_tokens, base_position=0)
        self.saved.saved_s += sum(_worth_s(span) for span in found)
        self.saved.hit_ratio_by_request.append(hit_tokens / max(1, request.num_tokens))

    def run(self, requests: Sequence[Request]) -> Saved:
        """A whole stream, one request a second."""
        for index, request in enumerate(requests):
            self.serve(request, now_s=float(index))
        return self.saved

    def _usable(self, request: Request) -> Iterator[Span]:
        for span in request.prefix:
            if span.key not in self.books:
                break
            yield span
        for span in request.passages:
            if span.key in self.books:
                yield span

    def _store(self, span: Span, tenant: str, now_s: float) -> None:
        size = span_bytes(span, bytes_per_token=self._bytes_per_token)
        if self.books.make_room(size, tenant=tenant, now_s=now_s) is None:
            return
        self.saved.stored_bytes += size
        self.books.admit(
            span.key,
            TierEntry(
                payload_bytes=span.num_tokens * self._bytes_per_token,
                stored_bytes=size,
                num_tokens=span.num_tokens,
                base_position=span.position,
                codec="raw",
                tenant=tenant,
                learned_unix_s=now_s,
            ),
        )


def span_bytes(span: Span, *, bytes_per_token: int = BYTES_PER_TOKEN) -> int:
    """Stored bytes of a chunk."""
    return stored_bytes(span.num_tokens * bytes_per_token)


def footprint_bytes(requests: Sequence[Request], *, bytes_per_token: int = BYTES_PER_TOKEN) -> int:
    """Bytes of all chunks of a stream, each once: what a store without a bound would hold at the end."""
    sizes = {
        span.key: span_bytes(span, bytes_per_token=bytes_per_token)
        for request in requests
        for span in (*request.prefix, *request.passages)
    }
    return sum(sizes.values())


def bound(requests: Sequence[Request], *, capacity_bytes: int, bytes_per_token: int = BYTES_PER_TOKEN) -> Saved:
    """More than any store of that capacity can save: tokens and seconds, each by itself."""
    last_use: dict[ChunkKey, int] = {}
    intervals: list[tuple[int, int, float]] = []
    saved = Saved()
    for index, request in enumerate(requests):
        saved.prompt_tokens += request.num_tokens
        saved.prompt_s += recompute_s(request.num_tokens, base_position=0)
        for span in (*request.prefix, *request.passages):
            size = span_bytes(span, bytes_per_token=bytes_per_token)
            if span.key in last_use and size <= capacity_bytes:
                intervals.append((size * (index - last_use[span.key]), span.num_tokens, _worth_s(span)))
            last_use[span.key] = index
    budget = capacity_bytes * max(0, len(requests) - 1)
    saved.hit_tokens = int(_fill(budget, [(room, float(tokens)) for room, tokens, _ in intervals]))
    saved.saved_s = _fill(budget, [(room, seconds) for room, _, seconds in intervals])
    return saved


def _fill(budget: int, intervals: list[tuple[int, float]]) -> float:
    """The most worth that fits a budget when intervals may be cut: the best per room first."""
    worth = 0.0
    left = float(budget)
    for room, gain in sorted(intervals, key=lambda each: each[0] / each[1]):
        share = min(1.0, left / room)
        worth += gain * share
        left -= room * share
        if left <= 0:
            break
    return worth


def _worth_s(span: Span) -> float:
    return recompute_s(span.num_tokens, base_position=span.position)


class BeladyPolicy:
    """Farthest next use first, for a stream that is known."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._uses: dict[ChunkKey, list[int]] = {}
        for index in range(len(requests) - 1, -1, -1):
            for span in (*requests[index].prefix, *requests[index].passages):
                self._uses.setdefault(span.key, []).append(index)
        self._ranking = Ranking()
        self._never = len(requests)
        self.now = 0
        """Index of the request that is being served."""

    def next_use(self, key: ChunkKey) -> int:
        """Index of the next request behind this one that names a chunk; the length of the stream if none does."""
        uses = self._uses[key]
        while uses and uses[-1] <= self.now:
            uses.pop()
        return uses[-1] if uses else self._never

    def is_worth(self, key: ChunkKey, *, is_full: bool) -> bool:
        """Whether a chunk will be read again, and in a full store before the one that is read again last."""
        next_use = self.next_use(key)
        last = self._ranking.first()
        return next_use < self._never and (not is_full or last is None or next_use < -last[0])

    def admit(self, key: ChunkKey, entry: TierEntry) -> None:
        """A chunk came in."""
        self._ranking.put(key, rank=-self.next_use(key))

    def touch(self, key: ChunkKey) -> None:
        """A chunk was read: its next use is another one."""
        if key in self._ranking:
            self._ranking.put(key, rank=-self.next_use(key))

    def remove(self, key: ChunkKey, *, evicted: bool) -> None:
        """A chunk left."""
        self._ranking.discard(key)

    def victims(self) -> Iterator[ChunkKey]:
        """Read again last, first."""
        return self._ranking.in_order()


class _BeladySimulator(StoreSimulator):
    def __init__(self, requests: Sequence[Request], *, capacity_bytes: int, bytes_per_token: int) -> None:
        self._future = BeladyPolicy(requests)
        super().__init__(self._future, capacity_bytes=capacity_bytes, bytes_per_token=bytes_per_token)

    def serve(self, request: Request, *, now_s: float = 0.0) -> None:
        self._future.now = int(now_s)
        super().serve(request, now_s=now_s)

    def _store(self, span: Span, tenant: str, now_s: float) -> None:
        size = span_bytes(span, bytes_per_token=self._bytes_per_token)
        is_full = self.books.used_bytes + size > (self.books.capacity_bytes or 0)
        if self._future.is_worth(span.key, is_full=is_full):
            super()._store(span, tenant, now_s)


def belady(requests: Sequence[Request], *, capacity_bytes: int, bytes_per_token: int = BYTES_PER_TOKEN) -> Saved:
    """What a store saves that knows which chunk is read again last."""
    return _BeladySimulator(requests, capacity_bytes=capacity_bytes, bytes_per_token=bytes_per_token).run(requests)
