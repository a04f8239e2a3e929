"""Eviction decisions and the breaker, as tables."""

import pytest

from kvstore.breaker import Breaker
from kvstore.keys import ChunkKey
from kvstore.policy import Resident, lru_victims, lru_window


def resident(name: str, start: int, units: int) -> Resident:
    return Resident(key=ChunkKey(name.encode()), start=start, units=units)


@pytest.mark.parametrize(
    ("need", "expected"), [(-5, []), (0, []), (1, ["a"]), (10, ["a"]), (11, ["a", "b"]), (30, ["a", "b"]), (31, None)]
)
def test_lru_victims_frees_just_enough(need: int, expected: list[str] | None) -> None:
    victims = lru_victims([resident("a", 0, 10), resident("b", 0, 20)], need_units=need)
    assert victims == (None if expected is None else [name.encode() for name in expected])


@pytest.mark.parametrize(
    ("case", "oldest_first", "free", "need", "expected"),
    [
        ("a free run is enough", [("a", 0, 5)], {5: 10}, 10, []),
        ("the oldest alone", [("a", 0, 5), ("b", 5, 5)], {}, 5, ["a"]),
        ("the oldest and the free run beside it", [("b", 5, 5), ("a", 0, 5)], {10: 2}, 7, ["b"]),
        ("an old one that does not help stays", [("far", 20, 5), ("a", 0, 5), ("b", 5, 5)], {}, 10, ["a", "b"]),
        ("a window, not the whole piece", [("a", 0, 2), ("c", 6, 4), ("b", 2, 4)], {}, 8, ["b", "c"]),
        ("the cheapest window", [("a", 0, 6), ("c", 8, 3), ("b", 6, 2)], {11: 4}, 8, ["b", "c"]),
        ("pinned records between", [("a", 0, 4), ("c", 8, 4)], {}, 8, None),
        ("nothing to evict", [], {0: 3}, 4, None),
    ],
)
def test_lru_window_makes_one_piece(
    case: str,
    oldest_first: list[tuple[str, int, int]],
    free: dict[int, int],
    need: int,
    expected: list[str] | None,
) -> None:
    residents = [resident(*each) for each in oldest_first]
    victims = lru_window(residents, free_units_by_start=free, need_units=need)
    assert victims == (None if expected is None else [name.encode() for name in expected]), case


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
