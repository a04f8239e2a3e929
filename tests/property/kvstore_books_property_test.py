"""The books of a tier against a plain dict, for every policy; and quotas under attack.

Covers: the conservation law, that victims are allowed to leave, that policies and books know the same records.
Does not cover: which record leaves first (`tests/unit`, `tests/sim`).
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.interfaces import TierEntry
from kvstore.keys import ChunkKey
from kvstore.policy import POLICIES, Quotas, make_policy
from kvstore.settings import PolicyName
from kvstore.testing.samples import sample_key
from kvstore.tiers.books import TierBooks

CAPACITY_BYTES = 100
TENANTS = ("", "a", "b")
KEYS = [sample_key(index) for index in range(24)]


def entry(stored_bytes: int, *, tenant: str = "", position: int = 0) -> TierEntry:
    return TierEntry(
        payload_bytes=stored_bytes,
        stored_bytes=stored_bytes,
        num_tokens=stored_bytes,
        base_position=position,
        codec="raw",
        tenant=tenant,
    )


class BooksMachine(RuleBasedStateMachine):
    """What is held is what a dict holds; sums are sums; nobody leaves who may not."""

    keys = st.sampled_from(KEYS)
    tenants = st.sampled_from(TENANTS)

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        quota_a=st.none() | st.integers(5, 120),
        quota_b=st.none() | st.integers(5, 120),
        default=st.none() | st.integers(5, 120),
        high_ratio=st.sampled_from([1.0, 0.9]),
        low_ratio=st.sampled_from([1.0, 0.7]),
    )
    def start(
        self,
        policy: PolicyName,
        quota_a: int | None,
        quota_b: int | None,
        default: int | None,
        high_ratio: float,
        low_ratio: float,
    ) -> None:
        by_tenant = {name: quota for name, quota in (("a", quota_a), ("b", quota_b)) if quota is not None}
        self.quotas = Quotas(by_tenant=by_tenant, default=default)
        self.high_bytes = int(high_ratio * CAPACITY_BYTES)
        self.policy = make_policy(policy)
        self.books = TierBooks(
            capacity_bytes=CAPACITY_BYTES,
            policy=self.policy,
            quotas=self.quotas,
            high_ratio=high_ratio,
            low_ratio=low_ratio,
        )
        self.model: dict[ChunkKey, TierEntry] = {}
        self.pins: dict[ChunkKey, float] = {}
        self.now_s = 0.0
        self.busy: set[ChunkKey] = set()

    def used(self, tenant: str) -> int:
        return sum(held.stored_bytes for held in self.model.values() if held.tenant == tenant)

    @rule(key=keys, tenant=tenants, size=st.integers(1, 40), position=st.integers(0, 99))
    def store(self, key: ChunkKey, tenant: str, size: int, position: int) -> None:
        if key in self.model:
            return
        before = dict(self.model)
        victims = self.books.make_room(size, tenant=tenant, now_s=self.now_s, is_busy=self.busy.__contains__)
        if victims is None:
            assert dict(self.books.items()) == before
            return
        assert len(set(victims)) == len(victims)
        for victim in victims:
            assert victim not in self.busy
            assert self.pins.get(victim, self.now_s) <= self.now_s
            del self.model[victim]
            self.pins.pop(victim, None)
        added = entry(size, tenant=tenant, position=position)
        self.books.admit(key, added)
        self.model[key] = added
        assert sum(held.stored_bytes for held in self.model.values()) <= self.high_bytes
        limit_bytes = self.quotas.limit_bytes(tenant)
        assert limit_bytes is None or self.used(tenant) <= limit_bytes

    @rule(key=keys)
    def touch(self, key: ChunkKey) -> None:
        uses = self.books.uses(key)
        self.books.touch(key)
        assert self.books.uses(key) == uses + (key in self.model)

    @rule(key=keys, evicted=st.booleans())
    def remove(self, key: ChunkKey, evicted: bool) -> None:
        assert self.books.remove(key, evicted=evicted) == self.model.pop(key, None)
        self.pins.pop(key, None)

    @rule(key=keys, seconds=st.integers(1, 5))
    def pin(self, key: ChunkKey, seconds: int) -> None:
        until_s = self.now_s + seconds
        if self.books.pin(key, until_s=until_s, now_s=self.now_s):
            assert key in self.model
            self.pins[key] = max(until_s, self.pins.get(key, 0.0))
        elif key in self.model:
            held_s = {pinned: until for pinned, until in self.pins.items() if until > self.now_s}
            pinned_bytes = sum(self.model[pinned].stored_bytes for pinned in held_s)
            assert pinned_bytes + self.model[key].stored_bytes > CAPACITY_BYTES // 2

    @rule(key=keys)
    def unpin(self, key: ChunkKey) -> None:
        self.books.unpin(key)
        self.pins.pop(key, None)

    @rule(key=keys)
    def flip_busy(self, key: ChunkKey) -> None:
        self.busy ^= {key}

    @rule(seconds=st.integers(1, 4))
    def time_passes(self, seconds: int) -> None:
        self.now_s += seconds

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "books"):
            return
        assert dict(self.books.items()) == self.model
        assert self.books.used_bytes == sum(held.stored_bytes for held in self.model.values())
        for tenant in TENANTS:
            assert self.books.used_by(tenant) == self.used(tenant)
        for key in KEYS:
            assert self.books.is_pinned(key, self.now_s) == (self.pins.get(key, -1.0) > self.now_s)
        pinned = {key for key in self.pins if self.books.is_pinned(key, self.now_s)}
        assert self.books.pinned_bytes == sum(self.model[key].stored_bytes for key in pinned) <= CAPACITY_BYTES // 2
        order = list(self.policy.victims())
        assert len(order) == len(set(order))
        assert set(order) == set(self.model) - pinned
        stat = self.books.stat()
        assert (stat.chunks, stat.bytes) == (len(self.model), self.books.used_bytes)


TestBooks = BooksMachine.TestCase
TestBooks.settings = settings(deadline=None, max_examples=150, stateful_step_count=40)


@pytest.mark.parametrize("policy", POLICIES)
@settings(deadline=None, max_examples=40)
@given(
    owned=st.lists(st.integers(1, 10), min_size=1, max_size=12),
    scan=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    quota=st.integers(10, 80),
    scanner_quota=st.none() | st.integers(30, 120),
)
def test_no_scan_takes_what_a_tenant_holds_within_its_quota(
    policy: PolicyName, owned: list[int], scan: list[int], quota: int, scanner_quota: int | None
) -> None:
    """Whatever the policy thinks of records that are never used again: these are somebody's."""
    by_tenant = {"owner": quota}
    if scanner_quota is not None:
        by_tenant["scanner"] = min(scanner_quota, CAPACITY_BYTES - quota)
    books = TierBooks(capacity_bytes=CAPACITY_BYTES, policy=make_policy(policy), quotas=Quotas(by_tenant=by_tenant))
    for index, size in enumerate(owned):
        if books.used_by("owner") + size <= quota:
            books.admit(sample_key(index, salt="owner"), entry(size, tenant="owner"))
    held = dict(books.items())
    stored = 0
    for index, size in enumerate(scan):
        if books.make_room(size, tenant="scanner", now_s=0.0) is not None:
            key = sample_key(index, salt="scan")
            books.admit(key, entry(size, tenant="scanner"))
            books.touch(key)
            books.touch(key)
            stored += 1
        assert held.items() <= dict(books.items()).items()
    room_bytes = by_tenant.get("scanner", CAPACITY_BYTES - quota)
    assert stored >= sum(size <= room_bytes for size in scan), "and the scan itself is not starved"
