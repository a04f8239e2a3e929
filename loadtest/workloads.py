"""Streams of requests made by seeded generators, each with one thing in it that an eviction policy must get right.

Covers: what is asked for, in order. Does not cover: arrival times, texts; recorded streams (`loadtest.traces`).
"""

import bisect
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from loadtest.traces import Request, Span, trace_key

_SYSTEM_TOKENS: Final = 600
_QUESTION_TOKENS: Final = 20


class Zipf:
    """Draws indices below `size`, index i in proportion to 1 / (i + 1) ** exponent."""

    def __init__(self, size: int, *, exponent: float) -> None:
        self._sums = list(itertools.accumulate(1.0 / (i + 1) ** exponent for i in range(size)))

    def draw(self, rng: random.Random) -> int:
        """One index."""
        return bisect.bisect_left(self._sums, rng.random() * self._sums[-1])

    def draw_several(self, rng: random.Random, count: int) -> list[int]:
        """Different indices, in the order in which they were drawn."""
        found: dict[int, None] = {}
        while len(found) < min(count, len(self._sums)):
            found[self.draw(rng)] = None
        return list(found)


def passages(
    seed: int,
    *,
    num_requests: int = 3000,
    pool: int = 1500,
    exponent: float = 0.9,
    one_off_tokens: int = 0,
    tenant: str = "",
) -> list[Request]:
    """Five passages per request behind one of four system prompts, and a history that never comes again."""
    rng = random.Random(f"passages/{seed}/{tenant}")
    sizes = _ragged(rng, pool)
    popular, prompts = Zipf(pool, exponent=exponent), Zipf(4, exponent=1.0)
    return [
        _request(
            prompt=prompts.draw(rng),
            names=[(f"passage/{index}", sizes[index]) for index in popular.draw_several(rng, 5)],
            one_off=(f"history/{number}", one_off_tokens),
            tenant=tenant,
        )
        for number in range(num_requests)
    ]


def one_off_histories(seed: int) -> list[Request]:
    """As `passages`, and half of all tokens are histories that never come again."""
    return passages(seed, one_off_tokens=1300)


def scans(seed: int, *, scan_every: int = 300, scan_requests: int = 100) -> list[Request]:
    """As `passages`, but now and then somebody reads a whole collection once."""
    rng = random.Random(f"scans/{seed}")
    served = passages(seed)
    stream: list[Request] = []
    for number, request in enumerate(served):
        stream.append(request)
        if number % scan_every == scan_every - 1:
            stream.extend(
                _request(
                    prompt=0,
                    names=[(f"scan/{number}/{page}/{part}", size) for part, size in enumerate(_ragged(rng, 5))],
                )
                for page in range(scan_requests)
            )
    return stream


def sliding_histories(seed: int, *, num_requests: int = 3000, at_once: int = 60, mean_turns: int = 8) -> list[Request]:
    """Conversations that take turns: each turn reads all before it, adds to it, and some day is the last."""
    rng = random.Random(f"histories/{seed}")
    numbers = itertools.count()
    sessions: list[tuple[int, list[int]]] = [(next(numbers), []) for _ in range(at_once)]
    stream: list[Request] = []
    for _ in range(num_requests):
        at = rng.randrange(at_once)
        name, turns = sessions[at]
        turns.append(rng.randint(50, 800))
        starts = itertools.accumulate((_SYSTEM_TOKENS, *turns))
        spans = [
            Span(key=trace_key("turn", name, index), num_tokens=tokens, position=start)
            for index, (tokens, start) in enumerate(zip(turns, starts, strict=False))
        ]
        stream.append(Request(prefix=(_system(0), *spans), other_tokens=_QUESTION_TOKENS))
        if rng.random() < 1 / mean_turns:
            sessions[at] = (next(numbers), [])
    return stream


def drifting(seed: int, *, num_requests: int = 4000, every: int = 1000) -> list[Request]:
    """As `passages`, but what is popular changes all at once, several times."""
    rng = random.Random(f"drift/{seed}")
    pool = 1500
    sizes = _ragged(rng, pool)
    popular = Zipf(pool, exponent=0.9)
    order = list(range(pool))
    stream: list[Request] = []
    for number in range(num_requests):
        if number % every == 0:
            rng.shuffle(order)
        names = [(f"passage/{order[i]}", sizes[order[i]]) for i in popular.draw_several(rng, 5)]
        stream.append(_request(prompt=0, names=names))
    return stream


WORKLOADS: Final[Mapping[str, Callable[[int], list[Request]]]] = {
    "passages": passages,
    "one_off_histories": one_off_histories,
    "scans": scans,
    "sliding_histories": sliding_histories,
    "drifting": drifting,
}
"""Every stream, by name; each takes a seed."""


def _ragged(rng: random.Random, count: int) -> list[int]:
    """Lengths of passages in tokens: ragged, 266 in the mean, as in the RAGPulse trace."""
    return [min(2000, max(20, round(rng.lognormvariate(5.45, 0.5)))) for _ in range(count)]


def _system(prompt: int, *, tenant: str = "") -> Span:
    return Span(key=trace_key(tenant, "system", prompt), num_tokens=_SYSTEM_TOKENS, position=0)


def _request(
    *, prompt: int, names: Sequence[tuple[str, int]], one_off: tuple[str, int] = ("", 0), tenant: str = ""
) -> Request:
    system = _system(prompt, tenant=tenant)
    spans = [each for each in (*names, one_off) if each[1] > 0]
    starts = itertools.accumulate((tokens for _, tokens in spans), initial=system.num_tokens)
    return Request(
        prefix=(system,),
        passages=tuple(
            Span(key=trace_key(tenant, name), num_tokens=tokens, position=start)
            for (name, tokens), start in zip(spans, starts, strict=False)
        ),
        other_tokens=_QUESTION_TOKENS,
        tenant=tenant,
    )
