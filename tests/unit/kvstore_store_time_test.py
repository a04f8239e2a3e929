"""Ages of chunks when clocks jump: neither is everything lost, nor anything kept for ever."""

import pytest
from support.gated_store import FakeTime

from kvstore.store_time import SETTLING_S, StoreTime
from kvstore.testing.samples import sample_meta

TTL_S = 3600.0
YEAR_S = 365 * 86_400.0


def store_time(clock: FakeTime) -> StoreTime:
    return StoreTime(ttl_s=TTL_S, wall_s=lambda: clock.wall_s, steady=lambda: clock.steady_s)


def test_without_a_ttl_nothing_expires() -> None:
    time = StoreTime(ttl_s=None)
    assert not time.has_expired(1.0)
    assert not time.has_expired(1e12)
    assert time.dated(sample_meta()) == sample_meta()


@pytest.mark.parametrize("jump_s", [-YEAR_S, -2 * TTL_S, 2 * TTL_S, YEAR_S])
def test_a_jump_in_the_life_of_a_store_changes_no_age(jump_s: float) -> None:
    clock = FakeTime()
    time = store_time(clock)
    clock.pass_s(SETTLING_S)
    learned = time.now_unix_s()
    clock.wall_s += jump_s
    assert not time.tick()
    assert not time.has_expired(learned)
    # A writer's clock has jumped too: its date is not believed.
    later = time.dated(sample_meta()).learned_unix_s
    assert not time.has_expired(later)
    clock.pass_s(TTL_S + 1)
    assert time.has_expired(learned)
    assert time.has_expired(later)


@pytest.mark.parametrize("jump_s", [-YEAR_S, 2 * TTL_S, YEAR_S])
def test_a_machine_that_gets_its_time_late(jump_s: float) -> None:
    """Chunks of former lives look expired (or not yet learned) at first; they are not deleted, and come back."""
    clock = FakeTime()
    learned = clock.wall_s - 60.0
    clock.wall_s -= jump_s
    time = store_time(clock)
    assert not time.is_settled
    clock.pass_s(30.0)
    clock.wall_s += jump_s
    assert time.tick()
    assert not time.has_expired(learned)
    clock.pass_s(SETTLING_S)
    assert time.is_settled


@pytest.mark.parametrize(
    ("ahead_s", "expired"), [(0.0, False), (TTL_S / 2, False), (1.01 * TTL_S, True), (YEAR_S, True)]
)
def test_dates_in_the_future(ahead_s: float, expired: bool) -> None:
    """Another node's clock may be ahead; one that is ahead by more than a TTL says nothing."""
    clock = FakeTime()
    time = store_time(clock)
    assert time.has_expired(clock.wall_s + ahead_s) is expired


def test_nothing_outlives_two_ttls() -> None:
    clock = FakeTime()
    time = store_time(clock)
    dates = [clock.wall_s + ahead_s for ahead_s in (-YEAR_S, -10.0, 0.0, TTL_S / 2, TTL_S, YEAR_S)] + [0.0]
    clock.pass_s(2 * TTL_S + 1)
    assert [time.has_expired(date) for date in dates if date != dates[-2]] == [True] * 6


def test_chunks_without_a_date_count_from_the_start_of_the_store() -> None:
    clock = FakeTime()
    time = store_time(clock)
    assert not time.has_expired(0.0)
    clock.pass_s(TTL_S + 1)
    assert time.has_expired(0.0)


def test_sleep_of_the_machine_counts() -> None:
    """Both clocks go on while it sleeps."""
    clock = FakeTime()
    time = store_time(clock)
    learned = time.now_unix_s()
    clock.pass_s(10 * TTL_S)
    assert not time.tick()
    assert time.has_expired(learned)
