"""Eviction decisions by hand-worked tables: each policy against its paper's rules, windows in an arena, the breaker.

Covers: orders, ghosts, what all policies promise. Does not cover: what they save on streams (`tests/sim`).
"""

from itertools import islice

import pytest

from kvstore.breaker import Breaker
from kvstore.interfaces import EvictionPolicy, TierEntry
from kvstore.keys import ChunkKey
from kvstore.policy import POLICIES, FreeRuns, Resident, make_policy, victim_window
from kvstore.policy.arc import ArcPolicy
from kvstore.policy.cost import CostPolicy
from kvstore.policy.recompute import recompute_s
from kvstore.policy.reuse import ReuseEstimate
from kvstore.policy.s3fifo import S3FifoPolicy
from kvstore.settings import PolicyName


def entry(stored_bytes: int = 1000, *, num_tokens: int = 100, base_position: int = 0) -> TierEntry:
    return TierEntry(
        payload_bytes=stored_bytes,
        stored_bytes=stored_bytes,
        num_tokens=num_tokens,
        base_position=base_position,
        codec="raw",
    )


def key(name: str) -> ChunkKey:
    return ChunkKey(name.encode())


def fill(policy: EvictionPolicy, names: str, *, stored_bytes: int = 1000) -> None:
    for name in names:
        policy.admit(key(name), entry(stored_bytes))


def touch(policy: EvictionPolicy, names: str) -> None:
    for name in names:
        policy.touch(key(name))


def order(policy: EvictionPolicy) -> str:
    return b"".join(policy.victims()).decode()


def evict(policy: EvictionPolicy, count: int = 1) -> str:
    gone = ""
    for _ in range(count):
        victim = next(iter(policy.victims()))
        policy.remove(victim, evicted=True)
        gone += victim.decode()
    return gone


@pytest.mark.parametrize("name", POLICIES)
class TestEveryPolicy:
    def test_each_record_comes_up_once_and_nothing_changes(self, name: PolicyName) -> None:
        policy = make_policy(name)
        fill(policy, "abcdefgh")
        touch(policy, "aabchhhh")
        evict(policy, 2)
        fill(policy, "ij")
        before = order(policy)
        assert len(set(before)) == len(before) == 8
        list(islice(policy.victims(), 3))
        assert order(policy) == before

    def test_unknown_keys_are_ignored(self, name: PolicyName) -> None:
        policy = make_policy(name)
        policy.touch(key("x"))
        policy.remove(key("x"), evicted=True)
        policy.remove(key("x"), evicted=False)
        assert order(policy) == ""

    def test_dropped_records_do_not_come_up(self, name: PolicyName) -> None:
        policy = make_policy(name)
        fill(policy, "abc")
        policy.remove(key("b"), evicted=False)
        assert sorted(order(policy)) == ["a", "c"]

    def test_a_record_can_be_replaced_by_one_of_another_size(self, name: PolicyName) -> None:
        policy = make_policy(name)
        fill(policy, "abc")
        policy.admit(key("b"), entry(50_000, num_tokens=77))
        assert sorted(order(policy)) == ["a", "b", "c"]
        assert sorted(evict(policy, 3)) == ["a", "b", "c"]
        assert order(policy) == ""

    def test_victims_in_any_order_can_be_taken(self, name: PolicyName) -> None:
        """An arena takes those that lie together."""
        policy = make_policy(name)
        fill(policy, "abcdefghij")
        touch(policy, "aaccee")
        for name_out in "ejbf":
            policy.remove(key(name_out), evicted=True)
        fill(policy, "ej")
        assert sorted(order(policy)) == sorted("acdghiej")

    def test_order_is_what_one_eviction_after_another_gives(self, name: PolicyName) -> None:
        policy = make_policy(name)
        fill(policy, "abcdefghijkl")
        touch(policy, "aaabbcjjk")
        foreseen = order(policy)
        assert evict(policy, 12) == foreseen


def test_lru_goes_by_last_use() -> None:
    policy = make_policy("lru")
    fill(policy, "abcd")
    touch(policy, "ba")
    assert order(policy) == "cdba"


class TestS3Fifo:
    """Small is due from a tenth of the bytes: with ten records of one size, from one on."""

    def test_used_once_leaves_used_twice_is_promoted(self) -> None:
        policy = S3FifoPolicy()
        fill(policy, "abc")
        touch(policy, "aab")
        assert evict(policy) == "b", "one use in the small queue is not enough, a went to main"
        assert evict(policy) == "c"
        assert evict(policy) == "a"

    def test_a_ghost_returns_to_main_and_outlives_newer_ones(self) -> None:
        policy = S3FifoPolicy()
        fill(policy, "mnopqrst")
        touch(policy, "mnopqrst" * 2)
        fill(policy, "g")
        assert evict(policy) == "g", "all others were promoted on the way"
        fill(policy, "gxyz")
        assert evict(policy, 3) == "xyz", "g is in main, where nothing is due while small is"

    def test_main_gives_used_records_another_round(self) -> None:
        policy = S3FifoPolicy()
        fill(policy, "abc")
        touch(policy, "aabbcc")
        fill(policy, "z")
        evict(policy)
        touch(policy, "aa")
        assert evict(policy, 3) == "bca"

    def test_ghosts_stand_for_no_more_bytes_than_main_holds(self) -> None:
        policy = S3FifoPolicy()
        fill(policy, "m")
        touch(policy, "mm")
        fill(policy, "abc")
        assert evict(policy, 3) == "abc"
        fill(policy, "a")
        assert evict(policy) == "a", "its ghost was gone, as c's is all that fits: it came in as new"


class TestArc:
    def test_scan_passes_by_what_was_used_twice(self) -> None:
        policy = ArcPolicy()
        fill(policy, "abcd")
        touch(policy, "abcd")
        for name in "123456789":
            fill(policy, name)
            assert evict(policy) == name

    def test_ghosts_of_new_records_make_room_for_new_records(self) -> None:
        policy = ArcPolicy()
        fill(policy, "abcdef")
        touch(policy, "abc")
        assert evict(policy, 2) == "de"
        fill(policy, "d")
        # The target of records used once is now one record: f may stay, the oldest of those used again leaves.
        assert evict(policy) == "a"

    def test_ghosts_stand_for_no_more_than_the_tier_twice(self) -> None:
        """With those of records used once bounded by the tier less the records used once that it holds."""
        policy = ArcPolicy()
        fill(policy, "abcd")
        touch(policy, "ab")
        for number in range(100):
            policy.admit(key(f"one-off {number}"), entry())
            policy.remove(key(f"one-off {number}"), evicted=True)
        assert list(policy._once_ghosts.sizes) == [b"one-off 97", b"one-off 98", b"one-off 99"]
        for number in range(100):
            policy.admit(key(f"twice {number}"), entry())
            policy.touch(key(f"twice {number}"))
            policy.remove(key(f"twice {number}"), evicted=True)
        assert policy._once_ghosts.bytes + policy._again_ghosts.bytes <= 2 * 5000 - 4000

    def test_ghosts_of_used_records_take_that_room_back(self) -> None:
        policy = ArcPolicy()
        fill(policy, "abcdef")
        touch(policy, "abc")
        evict(policy, 2)
        fill(policy, "d")
        assert evict(policy) == "a"
        fill(policy, "a")
        assert evict(policy) == "f"


class TestCost:
    def test_fewest_seconds_per_byte_leave_first(self) -> None:
        policy = CostPolicy()
        policy.admit(key("raw"), entry(100_000, num_tokens=100))
        policy.admit(key("coded"), entry(12_000, num_tokens=100))
        assert list(policy.victims()) == [b"raw", b"coded"]

    def test_deep_chunks_cost_more(self) -> None:
        """By bytes alone the deep one would leave: attention to 60,000 tokens more than doubles its prefill."""
        policy = CostPolicy()
        policy.admit(key("shallow"), entry(60_000, num_tokens=100))
        policy.admit(key("head"), entry(1, num_tokens=60_000))
        policy.admit(key("deep"), entry(100_000, num_tokens=100, base_position=60_000))
        assert recompute_s(100, base_position=60_000) > 2 * recompute_s(100, base_position=0)
        assert list(policy.victims()) == [b"shallow", b"deep", b"head"]

    def test_of_one_request_the_deepest_leaves_first(self) -> None:
        policy = CostPolicy()
        for index, name in enumerate("abcd"):
            policy.admit(key(name), entry(base_position=100 * index))
        assert order(policy) == "dcba"
        touch(policy, "abcd")
        assert order(policy) == "dcba"

    def test_uses_count_also_after_an_eviction(self) -> None:
        policy = CostPolicy()
        fill(policy, "a")
        touch(policy, "aaaa")
        policy.remove(key("a"), evicted=True)
        fill(policy, "ab")
        policy.admit(key("later"), entry(1, num_tokens=10_000))
        assert list(policy.victims()) == [b"b", b"a", b"later"]

    def test_what_is_remembered_is_bounded(self) -> None:
        policy = CostPolicy()
        fill(policy, "keep")
        for number in range(5000):
            policy.admit(key(f"one-off {number}"), entry())
            policy.remove(key(f"one-off {number}"), evicted=True)
        assert len(policy._ghosts) <= 64


class TestReuseEstimate:
    def test_index_falls_with_age_and_rises_with_uses_before_anything_is_learned(self) -> None:
        estimate = ReuseEstimate()
        ages = [1.0, 3.0, 100.0, 1e4, 1e6, 1e9]
        young_first = [estimate.index(uses=1, age_tokens=age) for age in ages]
        assert young_first == sorted(young_first, reverse=True)
        assert estimate.index(uses=9, age_tokens=1e4) > estimate.index(uses=1, age_tokens=1e4)

    def test_learns_that_records_used_once_are_not_used_again(self) -> None:
        estimate = ReuseEstimate()
        for _ in range(1000):
            estimate.note_end(uses=1, age_tokens=1e6, is_use=False)
            estimate.note_end(uses=2, age_tokens=1e5, is_use=True)
        estimate.fit((), keep_ratio=1.0)
        young_once = estimate.index(uses=1, age_tokens=1e4)
        older_twice = estimate.index(uses=2, age_tokens=5e4)
        assert older_twice > 10 * young_once

    def test_a_use_that_comes_late_is_waited_for(self) -> None:
        """All are used at an age of about 100,000: just before, a record is worth more than just after the last use."""
        estimate = ReuseEstimate()
        for _ in range(1000):
            estimate.note_end(uses=1, age_tokens=1e9, is_use=False)
            estimate.note_end(uses=2, age_tokens=1e5, is_use=True)
        estimate.fit((), keep_ratio=1.0)
        assert estimate.index(uses=2, age_tokens=9e4) > 1.5 * estimate.index(uses=2, age_tokens=1e4)
        assert estimate.index(uses=2, age_tokens=9e4) > 10 * estimate.index(uses=2, age_tokens=1e6)

    def test_waits_that_go_on_count_against_uses(self) -> None:
        few, many = ReuseEstimate(), ReuseEstimate()
        for estimate, waiting in ((few, 10), (many, 10_000)):
            for _ in range(100):
                estimate.note_end(uses=1, age_tokens=1e4, is_use=True)
            estimate.fit([(1, 1e6, waiting)], keep_ratio=1.0)
        assert few.index(uses=1, age_tokens=5e3) > 10 * many.index(uses=1, age_tokens=5e3)

    def test_old_habits_are_forgotten(self) -> None:
        estimate = ReuseEstimate()
        for _ in range(1000):
            estimate.note_end(uses=1, age_tokens=1e4, is_use=True)
        estimate.fit((), keep_ratio=1.0)
        at_first = estimate.index(uses=1, age_tokens=5e3)
        for _ in range(1000):
            estimate.note_end(uses=1, age_tokens=1e7, is_use=False)
        for _ in range(10):
            estimate.fit((), keep_ratio=0.5)
            for _ in range(1000):
                estimate.note_end(uses=1, age_tokens=1e7, is_use=False)
        estimate.fit((), keep_ratio=1.0)
        assert estimate.index(uses=1, age_tokens=5e3) < at_first / 20

    def test_more_uses_never_count_for_less(self) -> None:
        estimate = ReuseEstimate()
        for _ in range(1000):
            estimate.note_end(uses=1, age_tokens=1e4, is_use=True)
            estimate.note_end(uses=9, age_tokens=1e6, is_use=False)
        estimate.fit((), keep_ratio=1.0)
        for age in (1.0, 5e3, 1e5, 1e8):
            assert estimate.index(uses=9, age_tokens=age) >= estimate.index(uses=1, age_tokens=age)


def resident(name: str, start: int, units: int) -> Resident:
    return Resident(key=key(name), start=start, units=units)


@pytest.mark.parametrize(
    ("case", "in_order", "free", "need", "expected"),
    [
        ("the first alone", [("a", 0, 5), ("b", 5, 5)], {}, 5, ["a"]),
        ("the first and the free run beside it", [("b", 5, 5), ("a", 0, 5)], {10: 2}, 7, ["b"]),
        ("free runs on both sides", [("b", 5, 5)], {3: 2, 10: 2}, 9, ["b"]),
        ("one that does not help stays", [("far", 20, 5), ("a", 0, 5), ("b", 5, 5)], {}, 10, ["a", "b"]),
        ("a window, not the whole piece", [("a", 0, 2), ("c", 6, 4), ("b", 2, 4)], {}, 8, ["b", "c"]),
        ("the cheapest window", [("a", 0, 6), ("c", 8, 3), ("b", 6, 2)], {11: 4}, 8, ["b", "c"]),
        ("two pieces and the run between them", [("a", 0, 3), ("c", 5, 3)], {3: 2}, 8, ["a", "c"]),
        ("pinned records between", [("a", 0, 4), ("c", 8, 4)], {}, 8, None),
        ("nothing to evict", [], {0: 3}, 4, None),
    ],
)
def test_a_window_is_one_piece(
    case: str,
    in_order: list[tuple[str, int, int]],
    free: dict[int, int],
    need: int,
    expected: list[str] | None,
) -> None:
    runs = FreeRuns(units_by_start=free, start_by_stop={start + units: start for start, units in free.items()})
    victims = victim_window([resident(*each) for each in in_order], free=runs, need_units=need)
    assert victims == (None if expected is None else [key(name) for name in expected]), case


def test_breaker_pauses_longer_and_longer_until_a_success() -> None:
    breaker = Breaker(failures=1, first_pause_s=1.0, max_pause_s=3.0)
    now_s = 0.0
    for pause_s in (1.0, 2.0, 3.0, 3.0):
        breaker.record_failure(now_s=now_s)
        assert not breaker.allows(now_s=now_s + pause_s - 0.01)
        now_s += pause_s
        assert breaker.allows(now_s=now_s)
    breaker.record_success()
    breaker.record_failure(now_s=now_s)
    assert breaker.allows(now_s=now_s + 1.0)


def test_failures_of_one_moment_make_one_pause() -> None:
    breaker = Breaker(failures=1, first_pause_s=1.0, max_pause_s=8.0)
    for now_s in (0.0, 0.0, 0.1, 0.9):
        breaker.record_failure(now_s=now_s)
    assert not breaker.allows(now_s=0.99)
    assert breaker.allows(now_s=1.0)
