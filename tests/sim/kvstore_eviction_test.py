"""The production policies on seeded streams: what they save, beside LRU and beside what nobody can exceed.

Covers: gains where there is something to gain, no loss elsewhere, scans, drift, decay of reuse, wear of disks.
Does not cover: recorded traces (`learnonce bench eviction --trace FILE`), places in an arena (`kvstore_arena_test.py`).
"""

from collections.abc import Sequence
from functools import cache

import pytest

from kvstore.keys import ChunkKey
from kvstore.placement import Admission, Origin, should_write
from kvstore.policy import POLICIES, Quotas, make_policy
from kvstore.settings import NvmeSettings, PolicyName, StoreSettings
from loadtest.sim_store import Saved, StoreSimulator, belady, bound, footprint_bytes, span_bytes
from loadtest.traces import Request, Span
from loadtest.workloads import WORKLOADS, passages

SEED = 11
CAPACITIES = (0.05, 0.2)


@cache
def stream(name: str) -> tuple[Request, ...]:
    return tuple(WORKLOADS[name](SEED))


@cache
def saved(name: str, policy: PolicyName, ratio: float) -> Saved:
    requests = stream(name)
    capacity_bytes = int(ratio * footprint_bytes(requests))
    return StoreSimulator(make_policy(policy), capacity_bytes=capacity_bytes).run(requests)


@pytest.mark.parametrize("ratio", CAPACITIES)
@pytest.mark.parametrize("name", WORKLOADS)
def test_the_default_policy_never_loses_to_lru_by_much(name: str, ratio: float) -> None:
    """Sliding histories, all equally likely to go on, are LRU's own: a store far too small for them may lose three
    points by the learned order, which tears some apart. Nowhere else anything.
    """
    allowed = 0.035 if name == "sliding_histories" else 0.0
    assert StoreSettings().host_policy == NvmeSettings().policy == "cost"
    cost, lru = saved(name, "cost", ratio), saved(name, "lru", ratio)
    assert cost.hit_ratio >= lru.hit_ratio - allowed
    assert cost.saved_ratio >= lru.saved_ratio - allowed


@pytest.mark.parametrize(("name", "gain"), [("passages", 0.08), ("one_off_histories", 0.07), ("scans", 0.05)])
def test_the_default_policy_gains_where_popularity_lasts(name: str, gain: float) -> None:
    assert saved(name, "cost", 0.05).hit_ratio >= saved(name, "lru", 0.05).hit_ratio + gain
    for other in ("s3fifo", "arc"):
        assert saved(name, "cost", 0.05).hit_ratio > saved(name, other, 0.05).hit_ratio


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ratio", CAPACITIES)
def test_nobody_saves_more_than_can_be_saved(policy: PolicyName, ratio: float) -> None:
    """The bound is above Belady, and Belady above all, where chunks are of use by themselves."""
    requests = stream("passages")
    capacity_bytes = int(ratio * footprint_bytes(requests))
    most, reached = bound(requests, capacity_bytes=capacity_bytes), belady(requests, capacity_bytes=capacity_bytes)
    assert saved("passages", policy, ratio).hit_ratio < reached.hit_ratio <= most.hit_ratio
    assert saved("passages", policy, ratio).saved_ratio < most.saved_ratio
    assert reached.hit_ratio > 0.95 * most.hit_ratio, "a bound far above what is possible says nothing"


def test_the_bound_is_right_where_it_can_be_counted() -> None:
    """Three chunks in turn, room for one: of the six uses that are no first ones every second interval fits."""
    spans = [Span(key=ChunkKey(bytes([n]) * 32), num_tokens=1000, position=0) for n in range(3)]
    requests = [Request(passages=(spans[n % 3],)) for n in range(9)]
    room = span_bytes(spans[0])
    assert bound(requests, capacity_bytes=3 * room).hit_tokens == 6000
    assert bound(requests, capacity_bytes=room).hit_tokens == 2666, "8 requests of room / 3 requests an interval"
    assert bound(requests, capacity_bytes=room - 1).hit_tokens == 0
    assert belady(requests, capacity_bytes=3 * room).hit_tokens == 6000
    assert belady(requests, capacity_bytes=room).hit_tokens == 2000


def test_a_scan_leaves_what_is_read_daily() -> None:
    """The hit ratio of ordinary requests in the hundred after a scan, against the hundred before it."""
    requests = stream("scans")
    capacity_bytes = int(0.05 * footprint_bytes(requests))
    drop: dict[str, float] = {}
    for policy in ("cost", "lru"):
        hits = StoreSimulator(make_policy(policy), capacity_bytes=capacity_bytes).run(requests).hit_ratio_by_request
        starts = range(700, len(requests) - 200, 400)
        before = [sum(hits[at - 100 : at]) for at in starts]
        after = [sum(hits[at + 100 : at + 200]) for at in starts]
        drop[policy] = 1 - sum(after) / sum(before)
    assert drop["cost"] < 0.05 < drop["lru"]


def test_what_was_popular_is_forgotten() -> None:
    """After each change of fashion the last 500 of 1,000 requests do as well as under the first."""
    requests = stream("drifting")
    hits = StoreSimulator(make_policy("cost"), capacity_bytes=int(0.1 * footprint_bytes(requests))).run(requests)
    by_fashion = [sum(hits.hit_ratio_by_request[at + 500 : at + 1000]) / 500 for at in range(0, len(requests), 1000)]
    assert min(by_fashion[1:]) > 0.93 * by_fashion[0]


def test_reuse_does_not_decay() -> None:
    """R16 (LMCache #4663): a store a little larger than the passages in use, and every request brings junk of its own.

    After 300 requests the next 500 get at least 95 % of what the offline optimum gets from the same store, and the
    last hundred are no worse than the first.
    """
    requests = passages(SEED, num_requests=800, pool=150, one_off_tokens=1300)
    in_use = footprint_bytes(passages(SEED, num_requests=800, pool=150))
    capacity_bytes = int(1.1 * in_use)
    optimum = belady(requests, capacity_bytes=capacity_bytes).hit_ratio_by_request[300:]
    for policy, reaches in (("cost", True), ("lru", False)):
        hits = StoreSimulator(make_policy(policy), capacity_bytes=capacity_bytes).run(requests)
        last_500 = hits.hit_ratio_by_request[300:]
        assert (sum(last_500) >= 0.95 * sum(optimum)) == reaches, policy
        assert sum(last_500[-100:]) >= 0.97 * sum(last_500[:100])


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_starves(policy: PolicyName) -> None:
    """What becomes popular late gets in, even where the old favourites are still asked for."""
    old = passages(SEED, num_requests=1500, pool=60)
    new = passages(SEED + 1, num_requests=1500, pool=60, tenant="late")
    mixed = [*old[:500], *(each for pair in zip(old[500:], new, strict=False) for each in pair)]
    simulator = StoreSimulator(make_policy(policy), capacity_bytes=int(0.6 * footprint_bytes(mixed)))
    hits = simulator.run(mixed).hit_ratio_by_request
    late = [hit for hit, request in zip(hits, mixed, strict=True) if request.tenant == "late"]
    assert sum(late[-300:]) / 300 > 0.5
    assert sum(late[-300:]) > 0.8 * sum(hits[100:400])


def test_a_tenant_within_its_quota_is_served_as_if_alone() -> None:
    """A neighbour scans without end; without quotas it takes a part of what the tenant would have saved."""
    mine = passages(SEED, num_requests=800, pool=150, tenant="mine")
    scan = passages(SEED, num_requests=1600, pool=100_000, exponent=0.0, tenant="scan")
    mixed = [each for three in zip(mine, scan[::2], scan[1::2], strict=True) for each in three]
    quota = footprint_bytes(mine) // 2

    def hits_of_mine(requests: Sequence[Request], quotas: Quotas, capacity_bytes: int) -> float:
        simulator = StoreSimulator(make_policy("lru"), capacity_bytes=capacity_bytes, quotas=quotas)
        hits = simulator.run(requests).hit_ratio_by_request
        return sum(hit for hit, request in zip(hits, requests, strict=True) if request.tenant == "mine")

    alone = hits_of_mine(mine, Quotas(by_tenant={"mine": quota}), 2 * quota)
    assert hits_of_mine(mixed, Quotas(by_tenant={"mine": quota}), 2 * quota) >= 0.99 * alone
    assert hits_of_mine(mixed, Quotas(), 2 * quota) < 0.9 * alone


class _WithDisk(StoreSimulator):
    """An arena with a disk below that admits by the production rule; the disk never fills."""

    def __init__(self, capacity_bytes: int, *, admit: Admission) -> None:
        super().__init__(make_policy("cost"), capacity_bytes=capacity_bytes)
        self._admit = admit
        self.disk: dict[ChunkKey, int] = {}

    def serve(self, request: Request, *, now_s: float = 0.0) -> None:
        super().serve(request, now_s=now_s)
        for span in (*request.prefix, *request.passages):
            uses = self.books.uses(span.key)
            is_due = should_write("nvme", admit=self._admit, origin=Origin.COMMIT, uses=uses)
            if is_due and span.key not in self.disk and span.key in self.books:
                self.disk[span.key] = span_bytes(span)


def test_one_offs_do_not_wear_out_a_disk() -> None:
    """R29: with admit = reused, bytes written are at most 1.2 x the bytes that were ever read again."""
    requests = stream("one_off_histories")
    capacity_bytes = int(0.1 * footprint_bytes(requests))
    counts: dict[ChunkKey, int] = {}
    size: dict[ChunkKey, int] = {}
    for request in requests:
        for span in (*request.prefix, *request.passages):
            counts[span.key] = counts.get(span.key, 0) + 1
            size[span.key] = span_bytes(span)
    reused_bytes = sum(size[key] for key, count in counts.items() if count > 1)
    written: dict[Admission, int] = {}
    for admit in ("all", "reused"):
        simulator = _WithDisk(capacity_bytes, admit=admit)
        simulator.run(requests)
        written[admit] = sum(simulator.disk.values())
    assert written["reused"] <= 1.2 * reused_bytes
    assert written["reused"] >= 0.5 * reused_bytes, "and what is popular does get there"
    assert written["all"] > 5 * written["reused"]
