"""The books of a tier, case by case: room, quotas, shares, pins.

Covers: what an owner may rely on. Does not cover: random histories (`tests/property`).
"""

import pytest

from kvstore.interfaces import TierEntry
from kvstore.keys import ChunkKey
from kvstore.policy import Quotas, make_policy
from kvstore.tiers import books as books_module
from kvstore.tiers.books import TierBooks


def make(
    capacity_bytes: int | None = 100,
    *,
    quotas: Quotas | None = None,
    high_ratio: float = 1.0,
    low_ratio: float = 1.0,
    max_pinned_ratio: float = 0.5,
) -> TierBooks:
    return TierBooks(
        capacity_bytes=capacity_bytes,
        policy=make_policy("lru"),
        quotas=quotas or Quotas(),
        high_ratio=high_ratio,
        low_ratio=low_ratio,
        max_pinned_ratio=max_pinned_ratio,
    )


def entry(stored_bytes: int = 10, *, tenant: str = "") -> TierEntry:
    return TierEntry(
        payload_bytes=stored_bytes,
        stored_bytes=stored_bytes,
        num_tokens=1,
        base_position=0,
        codec="raw",
        tenant=tenant,
    )


def key(name: str) -> ChunkKey:
    return ChunkKey(name.encode())


def admit(books: TierBooks, names: str, *, stored_bytes: int = 10, tenant: str = "") -> None:
    for name in names:
        books.admit(key(name), entry(stored_bytes, tenant=tenant))


def room(books: TierBooks, need_bytes: int, *, tenant: str = "", now_s: float = 0.0, busy: str = "") -> str | None:
    victims = books.make_room(
        need_bytes, tenant=tenant, now_s=now_s, is_busy=lambda victim: victim.decode() in set(busy)
    )
    return None if victims is None else b"".join(victims).decode()


class TestRoom:
    def test_nothing_leaves_while_there_is_room(self) -> None:
        books = make()
        admit(books, "abcdefghi")
        assert room(books, 10) == ""
        assert len(books) == 9

    def test_oldest_leave_until_it_fits(self) -> None:
        books = make()
        admit(books, "abcdefghij")
        books.touch(key("a"))
        assert room(books, 15) == "bc"
        assert books.used_bytes == 80
        assert key("b") not in books

    def test_one_eviction_goes_down_to_the_low_mark(self) -> None:
        books = make(low_ratio=0.5)
        admit(books, "abcdefghij")
        assert room(books, 10) == "abcdef"
        assert books.used_bytes + 10 == 50

    def test_the_low_mark_is_a_wish(self) -> None:
        books = make(low_ratio=0.5)
        admit(books, "abcdefghij")
        assert room(books, 10, busy="bcdefghij") == "a"

    def test_above_the_high_mark_records_leave(self) -> None:
        books = make(high_ratio=0.8, low_ratio=0.6)
        admit(books, "abcdefgh")
        assert room(books, 10) == "abc"

    def test_what_never_fits_costs_nobody_their_place(self) -> None:
        books = make()
        admit(books, "abc")
        assert room(books, 101) is None
        admit(books, "defghij")
        assert room(books, 30, busy="abcdefgh") is None
        assert len(books) == 10

    def test_a_tier_without_capacity_evicts_nothing(self) -> None:
        books = make(None)
        admit(books, "abc", stored_bytes=1 << 40)
        assert room(books, 1 << 50) == ""
        assert books.stat().capacity_bytes is None

    def test_a_replaced_entry_counts_once(self) -> None:
        books = make()
        admit(books, "a")
        books.touch(key("a"))
        books.admit(key("a"), entry(30, tenant="t"))
        assert (books.used_bytes, books.used_by(""), books.used_by("t"), len(books)) == (30, 0, 30, 1)
        assert books.uses(key("a")) == 1

    def test_uses_are_counted_from_the_admission(self) -> None:
        books = make()
        admit(books, "a")
        for _ in range(3):
            books.touch(key("a"))
        books.touch(key("unknown"))
        assert (books.uses(key("a")), books.uses(key("unknown"))) == (3, 0)
        books.remove(key("a"))
        admit(books, "a")
        assert books.uses(key("a")) == 0

    def test_items_can_be_removed_while_they_are_read(self) -> None:
        books = make()
        admit(books, "abc")
        for held, _ in books.items():  # noqa: PERF102 not a dict
            books.remove(held)
        assert len(books) == books.used_bytes == 0


class TestQuotas:
    def test_who_would_exceed_its_quota_evicts_its_own(self) -> None:
        books = make(quotas=Quotas(by_tenant={"t": 30}))
        admit(books, "ab")
        admit(books, "xyz", tenant="t")
        assert room(books, 10, tenant="t") == "x"
        assert room(books, 31, tenant="t") is None

    def test_a_quota_of_busy_records_refuses(self) -> None:
        books = make(quotas=Quotas(by_tenant={"t": 20}))
        admit(books, "xy", tenant="t")
        assert room(books, 10, tenant="t", busy="xy") is None
        assert books.used_by("t") == 20

    def test_within_its_quota_nobody_loses_to_others(self) -> None:
        """x is the oldest of all, and stays."""
        books = make(quotas=Quotas(by_tenant={"t": 30}))
        admit(books, "xyz", tenant="t")
        admit(books, "abcdefg")
        assert room(books, 60) == "abcdef"
        assert books.used_by("t") == 30

    def test_below_its_share_a_tenant_takes_from_others_first(self) -> None:
        """Or it would never come to hold what is its own."""
        books = make(quotas=Quotas(by_tenant={"t": 50}))
        admit(books, "x", tenant="t")
        admit(books, "abcdefghi")
        assert room(books, 10, tenant="t") == "a"
        assert room(books, 20, tenant="t", busy="bcdefghi") == "x", "but its own leave before it is refused"

    def test_the_default_quota_is_for_everybody_else(self) -> None:
        books = make(quotas=Quotas(by_tenant={"t": 50}, default=20))
        admit(books, "ab", tenant="u")
        admit(books, "cd", tenant="v")
        assert room(books, 10, tenant="u") == "a"
        assert room(books, 10, tenant="v") == "c"
        assert room(books, 40, tenant="t") == ""

    def test_quotas_beyond_the_tier_shrink_in_proportion(self) -> None:
        """a holds all; b, with as large a quota, gets half of it and no more."""
        books = make(quotas=Quotas(by_tenant={"a": 100, "b": 100}))
        admit(books, "0123456789", tenant="a")
        for name in "uvwxy":
            assert room(books, 10, tenant="b") in set("0123456789")
            admit(books, name, tenant="b")
        assert (books.used_by("a"), books.used_by("b")) == (50, 50)
        assert room(books, 10, tenant="b") == "u"

    def test_a_quota_of_the_whole_tier_locks_nobody_out(self) -> None:
        books = make(quotas=Quotas(by_tenant={"a": 100}))
        admit(books, "0123456789", tenant="a")
        assert room(books, 9) == "0"
        books.admit(key("n"), entry(9))
        assert room(books, 9) == "n", "others have a tenth of the tier, and share it among themselves"

    def test_a_small_tenant_behind_many_records_of_others_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The search passes a bounded number of records that it may not take, then goes on by last use."""
        monkeypatch.setattr(books_module, "_MAX_PASSED", 3)
        books = make(quotas=Quotas(by_tenant={"t": 20}))
        admit(books, "abcdefgh", stored_bytes=5)
        admit(books, "xy", tenant="t")
        books.touch(key("x"))
        assert room(books, 10, tenant="t") == "y"
        admit(books, "z", tenant="t")
        assert books.pin(key("x"), until_s=1.0)
        assert room(books, 10, tenant="t") == "z", "x was used before it, but is pinned"


class TestPins:
    def test_a_pinned_record_stays(self) -> None:
        books = make()
        admit(books, "abcdefghij")
        assert books.pin(key("a"), until_s=5.0)
        assert room(books, 10, now_s=4.9) == "b"
        assert books.is_pinned(key("a"), 4.9)

    def test_a_pin_ends_by_itself(self) -> None:
        books = make()
        admit(books, "abcdefghij")
        books.pin(key("a"), until_s=5.0)
        books.pin(key("b"), until_s=9.0)
        assert room(books, 80, now_s=5.0) == "cdefghij"
        assert not books.is_pinned(key("a"), 5.0)
        assert books.pinned_bytes == 10

    def test_a_pin_is_never_cut_short_by_another(self) -> None:
        books = make()
        admit(books, "a")
        books.pin(key("a"), until_s=9.0)
        books.pin(key("a"), until_s=1.0)
        assert books.is_pinned(key("a"), 5.0)
        books.unpin(key("a"))
        assert not books.is_pinned(key("a"), 0.0)

    def test_pins_hold_no_more_than_their_share(self) -> None:
        books = make(max_pinned_ratio=0.25)
        admit(books, "abc")
        assert books.pin(key("a"), until_s=9.0)
        assert books.pin(key("b"), until_s=5.0)
        assert not books.pin(key("c"), until_s=9.0, now_s=4.0)
        assert books.pin(key("c"), until_s=9.0, now_s=6.0), "b's pin is over"
        assert books.pinned_bytes == 20

    def test_unknown_records_cannot_be_pinned(self) -> None:
        assert not make().pin(key("a"), until_s=1.0)

    def test_removed_and_replaced_records_are_counted_right(self) -> None:
        books = make()
        admit(books, "ab")
        books.pin(key("a"), until_s=9.0)
        books.admit(key("a"), entry(30))
        assert books.pinned_bytes == 30
        assert books.remove(key("a")) == entry(30)
        assert (books.pinned_bytes, books.used_bytes) == (0, 10)

    def test_many_pins_cost_a_search_nothing(self) -> None:
        """The policy does not even see them."""
        books = make(1000)
        for number in range(50):
            books.admit(key(f"p{number}"), entry())
            assert books.pin(key(f"p{number}"), until_s=9.0)
        admit(books, "abc")
        looked: list[ChunkKey] = []
        victims = books.victims(tenant="", now_s=0.0, is_busy=lambda victim: bool(looked.append(victim)))
        assert next(victims) == key("a")
        assert looked == [key("a")]
