"""The choice between loading and computing, over whole workloads on simulated links.

Covers: random links and models, fast and slow, a slow disk, a dead peer, links that die, recover and change: never more
than 5 % slower than the better of "always load" and "always compute"; levels under a deadline.
Does not cover: threads and real streams (`tests/unit/engine_transfers_test.py`), the speeds of real links.

The simulated reader does what `kvstore.engine.reading` does with the same functions: it chooses before every part of a
chunk, waits no longer than its patience, and tells what arrived. Chunks arrive one after the other, whole, as sources
send them. After a load was given up, a probe watches the link for up to two seconds, at nobody's cost.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from kvstore.codecs.controller import PRIORS, Rate, Rest, Speeds, choose, patience_s, with_link

PARTS = 8
DEADLINE_S = 30.0
PROBE_S = 2.0
BETWEEN_S = 100.0
"""From one request to the next: all policies see the same link at the same request."""

Link = Callable[[float], float]
"""Bytes per second at a time of the workload."""


@dataclass(frozen=True)
class Model:
    """One model's sizes and speeds."""

    prefill_tokens_per_s: float
    bytes_per_token: float
    output_bytes_per_token: float
    decode_bytes_per_s: float


@dataclass
class Worker:
    """One worker's knowledge and clock."""

    link: Link
    model: Model
    speeds: Speeds
    now_s: float = 0.0

    def fetch(self, num_bytes: float, limit_s: float) -> tuple[float, float]:
        """Bytes that arrive, and seconds that pass, until all are there or the time is over."""
        step_s, arrived, spent = 0.002, 0.0, 0.0
        while arrived < num_bytes and spent < limit_s:
            rate = self.link(self.now_s + spent)
            if rate * step_s >= num_bytes - arrived > 0:
                spent += (num_bytes - arrived) / rate
                arrived = num_bytes
            else:
                arrived, spent = arrived + rate * step_s, spent + step_s
        self.now_s += spent
        return arrived, spent

    def recompute_s(self, tokens: float) -> float:
        return tokens / self.model.prefill_tokens_per_s

    def serve(self, chunks: list[int]) -> float:
        """Seconds until all KV of one request is there, by the controller."""
        began_s, model = self.now_s, self.model
        left = list(chunks)
        while left:
            tokens = left[0]
            part_bytes = tokens * model.bytes_per_token / PARTS
            for part in range(PARTS):
                rest_tokens = sum(left)
                rest_bytes = (PARTS - part) * part_bytes + sum(left[1:]) * model.bytes_per_token
                rest = Rest(
                    bytes_by_level=(int(rest_bytes),),
                    output_bytes=int(rest_tokens * model.output_bytes_per_token),
                    tokens=rest_tokens,
                    target_s=DEADLINE_S - (self.now_s - began_s),
                )
                choice = choose(rest, speeds=self.speeds, path="remote")
                expected_s = part_bytes / self.speeds.link["remote"].per_s
                patience = patience_s(expected_s, recompute_s=choice.recompute_s)
                assert patience is not None
                arrived, spent = (0.0, 0.0) if choice.level is None else self.fetch(part_bytes, patience)
                self.speeds = with_link(self.speeds, "remote", arrived, seconds=spent)
                if choice.level is None or arrived < part_bytes:
                    seconds = self.now_s - began_s + self.recompute_s(rest_tokens)
                    self.probe(rest_bytes - arrived)
                    self.now_s = max(self.now_s, began_s + seconds)
                    return seconds
            left.pop(0)
        return self.now_s - began_s + self.tail_s(chunks)

    def tail_s(self, chunks: list[int]) -> float:
        """The last layer is decoded when everything has arrived."""
        return max(chunks) * self.model.output_bytes_per_token / self.model.decode_bytes_per_s / 30

    def probe(self, num_bytes: float) -> None:
        watcher = replace(self)
        arrived, spent = watcher.fetch(num_bytes, PROBE_S)
        self.speeds = with_link(self.speeds, "remote", arrived, seconds=spent)

    def load_always(self, chunks: list[int]) -> float:
        """Load whole chunks as long as the deadline allows, then compute the rest."""
        total = sum(chunks) * self.model.bytes_per_token
        arrived, spent = self.fetch(total, DEADLINE_S)
        return spent + self.tail_s(chunks) + self.recompute_s(sum(chunks) * (1 - arrived / total))


def totals(link: Link, model: Model, requests: list[list[int]]) -> tuple[float, float, float]:
    """Seconds of the whole workload: by the controller, always loading, always computing."""
    speeds = replace(PRIORS, prefill=Rate(model.prefill_tokens_per_s, 1.0), decode=Rate(model.decode_bytes_per_s, 1.0))
    chosen = Worker(link, model, speeds)
    loading = Worker(link, model, speeds)
    chosen_s = load_s = compute_s = 0.0
    for index, chunks in enumerate(requests):
        chosen.now_s = loading.now_s = index * BETWEEN_S
        chosen_s += chosen.serve(chunks)
        load_s += loading.load_always(chunks)
        compute_s += chosen.recompute_s(sum(chunks))
    return chosen_s, load_s, compute_s


def workload(draw: random.Random, num_requests: int = 40) -> list[list[int]]:
    return [[draw.randrange(128, 1500) for _ in range(draw.randrange(1, 8))] for _ in range(num_requests)]


def random_model(draw: random.Random) -> Model:
    kv_bytes = draw.choice([23_040.0, 131_072.0])
    return Model(
        prefill_tokens_per_s=10 ** draw.uniform(2.5, 4.5),
        bytes_per_token=kv_bytes / draw.choice([1.0, 4.0, 8.0]),
        output_bytes_per_token=kv_bytes,
        decode_bytes_per_s=10 ** draw.uniform(9, 11),
    )


LINKS: dict[str, Callable[[float, float], Link]] = {
    "steady": lambda rate, _: lambda now_s: rate,
    "dead": lambda rate, _: lambda now_s: 0.0,
    "dies": lambda rate, at_s: lambda now_s: rate if now_s < at_s else 0.0,
    "recovers": lambda rate, at_s: lambda now_s: 0.0 if now_s < at_s else rate,
    "slow disk": lambda rate, _: lambda now_s: 2e7,
    "stutters": lambda rate, _: lambda now_s: 0.0 if (now_s % 0.5) < 0.03 else rate,
}


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("seed", range(12))
def test_never_much_worse_than_the_better_of_the_two(kind: str, seed: int) -> None:
    draw = random.Random(f"{kind} {seed}")
    model = random_model(draw)
    requests = workload(draw)
    link = LINKS[kind](10 ** draw.uniform(6, 9.5), BETWEEN_S * draw.randrange(5, 35))
    chosen_s, load_s, compute_s = totals(link, model, requests)
    assert chosen_s <= 1.05 * min(load_s, compute_s), (chosen_s, load_s, compute_s, model)


def test_a_mixed_link_is_better_than_either() -> None:
    """Fast and dead in turns of ten requests: whoever decides once is wrong half of the time."""
    model = Model(1000.0, 3000.0, 23_040.0, 1e9)
    chosen_s, load_s, compute_s = totals(
        lambda now_s: 2e7 if now_s % 2000 < 1000 else 0.0, model, workload(random.Random(5), num_requests=80)
    )
    assert chosen_s < 0.8 * min(load_s, compute_s)


def test_without_the_patience_a_dead_peer_costs_the_deadline() -> None:
    """The control: what the tests above would see if silence were not noticed."""
    model = Model(1000.0, 3000.0, 23_040.0, 1e9)
    requests = workload(random.Random(1))
    chosen_s, load_s, compute_s = totals(lambda now_s: 0.0, model, requests)
    assert load_s > 3 * compute_s > 2.8 * chosen_s


def with_rate(bytes_per_s: float) -> Speeds:
    return replace(PRIORS, link={"remote": Rate(bytes_per_s, 1.0)})


@pytest.mark.parametrize(("target_s", "level"), [(10.0, 2), (2.5, 1), (1.5, 0), (0.1, 0)])
def test_the_finest_level_that_the_deadline_allows(target_s: float, level: int) -> None:
    rest = Rest(bytes_by_level=(10**8, 2 * 10**8, 4 * 10**8), output_bytes=10, tokens=10**6, target_s=target_s)
    assert choose(rest, speeds=with_rate(1e8), path="remote").level == level


def test_a_queue_in_front_of_prefill_speaks_for_loading() -> None:
    speeds = replace(with_rate(1e8), prefill=Rate(1000.0, 1.0))
    rest = Rest(bytes_by_level=(2 * 10**8,), output_bytes=10, tokens=1000, target_s=10.0)
    assert choose(rest, speeds=speeds, path="remote").level is None
    assert choose(replace(rest, queue_s=3.0), speeds=speeds, path="remote").level == 0
    assert choose(rest, speeds=speeds, path="remote", may_recompute=False).level == 0
