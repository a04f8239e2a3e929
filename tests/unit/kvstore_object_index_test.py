"""Names of objects, and what listings do to the index."""

import threading
from collections.abc import Callable
from typing import cast

import pytest

from kvstore.container import stored_bytes
from kvstore.interfaces import EvictionPolicy, TierEntry
from kvstore.keys import ChunkKey
from kvstore.policy import make_policy
from kvstore.policy.quota import Quotas
from kvstore.settings import PolicyName
from kvstore.testing.samples import sample_key
from kvstore.tiers.books import TierBooks
from kvstore.tiers.bucket import Listed
from kvstore.tiers.object_index import ObjectIndex, order_by_age
from kvstore.tiers.object_names import MAX_NAME_CHARS, object_name, parse_name

KEY = sample_key(1)


def entry(**changes: object) -> TierEntry:
    payload_bytes = int(changes.get("payload_bytes", 5000))  # type: ignore[call-overload]
    values: dict[str, object] = {
        "payload_bytes": payload_bytes,
        "stored_bytes": stored_bytes(payload_bytes),
        "num_tokens": 3,
        "base_position": 0,
        "codec": "raw",
    }
    return TierEntry(**{**values, **changes})  # type: ignore[arg-type]


def listed(key: ChunkKey, item: TierEntry, *, at_s: float = 1.0) -> Listed:
    return Listed(object_name(key, item), item.stored_bytes, at_s)


def make_index(capacity_bytes: int | None = None, *, policy: PolicyName = "lru") -> ObjectIndex:
    return ObjectIndex(TierBooks(capacity_bytes=capacity_bytes, policy=make_policy(policy), quotas=Quotas()))


def list_all(index: ObjectIndex, *pages: list[Listed]) -> tuple[list[ChunkKey], list[ChunkKey]]:
    index.begin_listing()
    changed = [key for page in pages for key in index.take_page(page)]
    gone, _ = index.end_listing()
    return changed, gone


@pytest.mark.parametrize("tenant", ["", "-", "acme", "a.b/c", "=", "日本", "a" * 64, "..", "a b\\"])
@pytest.mark.parametrize("codec", ["raw", "int8", "kivi-2", ""])
def test_names_are_read_as_they_were_written(tenant: str, codec: str) -> None:
    item = entry(tenant=tenant, codec=codec, base_position=2**31 - 1, num_tokens=2**31 - 1, learned_unix_s=7.5)
    name = object_name(KEY, item)
    assert parse_name(name, learned_unix_s=7.5) == (KEY, item)
    assert name.count("/") == 1
    assert name.isascii()


def hostile_names() -> list[str]:
    name = object_name(KEY, entry())
    digits = KEY.hex()
    return [
        "",
        "/" + name,
        name + "\n",
        name.upper(),
        name.replace(".rec", ""),
        name.replace(f"{digits[:2]}/", "zz/"),
        name.replace(f"{digits[:2]}/", "../"),
        name.replace(".3.0.", ".٣.0."),
        name.replace(".3.0.", ".03.0."),
        name.replace(".3.0.", ".0.0."),
        name.replace(".3.0.", ".3.-1."),
        name.replace(".3.0.", f".{2**31}.0."),
        name.replace(".5000.", ".0."),
        name.replace(".5000.", f".{2**41}."),
        name.replace(".raw.", ".=726177."),  # "raw", written otherwise
        name.replace(".raw.", ".=ff."),
        name.replace(".raw.", f".{'a' * MAX_NAME_CHARS}."),
        name.replace(".raw.", "..") * 1000,
    ]


@pytest.mark.parametrize("name", hostile_names())
def test_hostile_names_are_no_records(name: str) -> None:
    assert parse_name(name) is None


def test_pages_count_at_once_and_a_whole_listing_forgets_what_is_gone() -> None:
    index = make_index()
    assert list_all(index, [listed(sample_key(1), entry())], [listed(sample_key(2), entry())]) == (
        [sample_key(1), sample_key(2)],
        [],
    )
    index.begin_listing()
    assert index.take_page([listed(sample_key(3), entry())]) == [sample_key(3)]
    assert len(index.books) == 3, "nothing is forgotten before the end"
    index.begin_listing()
    assert index.take_page([listed(sample_key(3), entry())]) == []
    assert index.end_listing() == ([sample_key(1), sample_key(2)], 0)
    assert [key for key, _ in index.books.items()] == [sample_key(3)]


def test_own_write_during_a_listing_is_not_gone() -> None:
    index = make_index()
    index.begin_listing()
    index.admit(KEY, entry())
    assert index.end_listing() == ([], 0)
    assert KEY in index.books
    assert list_all(index) == ([], [KEY])


def test_write_that_a_listing_found_under_way_is_not_gone() -> None:
    index = make_index()
    index.admit(KEY, entry())
    index.begin_listing(own=[KEY])
    assert index.take_page([]) == []
    assert index.end_listing() == ([], 0)
    assert KEY in index.books
    assert list_all(index) == ([], [KEY])


def test_object_of_a_write_that_was_given_up_is_doomed_again_when_it_appears() -> None:
    index = make_index()
    index.begin_listing()
    index.admit(KEY, entry())
    index.remove(KEY)
    index.doom_late(KEY, entry())
    index.doomed.clear()  # deleted, before it was there
    assert index.end_listing() == ([], 0)
    assert list_all(index, [listed(KEY, entry())]) == ([], [])
    assert index.doomed == {object_name(KEY, entry()): None}
    index.doomed.clear()
    assert list_all(index, [listed(KEY, entry())]) == ([KEY], []), "somebody else's by now"


@pytest.mark.parametrize("lose", ["drop", "gone"])
def test_own_loss_during_a_listing_does_not_come_back(lose: str) -> None:
    index = make_index()
    index.admit(KEY, entry())
    index.begin_listing()
    index.remove(KEY)
    if lose == "drop":
        index.doom(KEY, entry())
    assert index.take_page([listed(KEY, entry())]) == []
    assert index.end_listing() == ([], 0)
    assert KEY not in index.books


def test_doomed_object_stays_out_until_it_is_written_again() -> None:
    index = make_index()
    index.admit(KEY, entry())
    index.remove(KEY)
    index.doom(KEY, entry())
    assert list_all(index, [listed(KEY, entry())]) == ([], [])
    assert index.reprieve(object_name(KEY, entry()))
    assert not index.reprieve(object_name(KEY, entry()))
    assert list_all(index, [listed(KEY, entry())]) == ([KEY], [])


def test_object_of_another_length_is_foreign() -> None:
    index = make_index()
    index.begin_listing()
    assert index.take_page([Listed(object_name(KEY, entry()), 4096, 1.0), Listed("notes.txt", 5, 1.0)]) == []
    assert index.end_listing() == ([], 2)


@pytest.mark.parametrize("order", ["old first", "new first"])
@pytest.mark.parametrize("ages_s", [(1.0, 2.0), (1.0, 1.0)])
def test_of_two_objects_of_a_key_the_newest_counts_on_every_node(order: str, ages_s: tuple[float, float]) -> None:
    loser, winner = entry(codec="int8"), entry(codec="raw")
    page = [listed(KEY, loser, at_s=ages_s[0]), listed(KEY, winner, at_s=ages_s[1])]
    if order == "new first":
        page.reverse()
    index = make_index()
    list_all(index, page)
    found = index.books.find(KEY)
    assert found is not None
    assert found.codec == "raw"
    assert list_all(index, page) == ([], []), "the next listing changes nothing"
    index.remove(KEY)
    index.doom(KEY, winner)
    assert set(index.doomed) == {object_name(KEY, loser), object_name(KEY, winner)}


def test_loser_counts_again_when_the_winner_is_gone() -> None:
    loser, winner = entry(codec="int8"), entry(codec="raw")
    index = make_index()
    list_all(index, [listed(KEY, loser), listed(KEY, winner, at_s=2.0)])
    list_all(index, [listed(KEY, loser)])
    assert list_all(index, [listed(KEY, loser)]) == ([KEY], [])
    found = index.books.find(KEY)
    assert found is not None
    assert found.codec == "int8"


@pytest.mark.parametrize("policy", ["lru", "cost", "s3fifo", "arc"])
def test_first_listing_is_evicted_by_age_not_by_name(policy: PolicyName) -> None:
    """What was used meanwhile leaves last, what came or went meanwhile is as it is now, pins hold."""
    item = entry()
    index = make_index(9 * item.stored_bytes, policy=policy)
    keys = sorted(sample_key(number) for number in range(8))
    # Names in their order, dates in another.
    dates = dict(zip(keys, (5.0, 2.0, 7.0, 1.0, 8.0, 3.0, 6.0, 4.0), strict=True))
    list_all(index, [listed(key, item, at_s=dates[key]) for key in keys])
    by_age = sorted(keys, key=lambda key: dates[key])
    used, pinned, dropped, written = by_age[1], by_age[2], by_age[3], sample_key(100)
    index.books.touch(used)
    index.books.touch(used)

    class Slow:
        """What happens while the new policy is being told."""

        def __init__(self, told: EvictionPolicy) -> None:
            self._told = told

        def __getattr__(self, name: str) -> object:
            return getattr(self._told, name)

        def admit(self, key: ChunkKey, item: TierEntry) -> None:
            self._told.admit(key, item)
            if key == by_age[0]:
                index.remove(dropped)
                index.admit(written, entry(learned_unix_s=9.0))
                assert index.books.pin(pinned, until_s=10.0)

    order_by_age(index, cast("EvictionPolicy", Slow(make_policy(policy))), lock=threading.Lock())
    left = [key for key in by_age if key not in (used, pinned, dropped)]
    assert list(index.books.victims(tenant="", now_s=0.0)) == [*left, written, used]
    index.books.unpin(pinned)
    assert pinned in list(index.books.victims(tenant="", now_s=0.0))


def test_first_listing_is_in_order_of_age_within_a_tenant_too() -> None:
    index = ObjectIndex(
        TierBooks(capacity_bytes=None, policy=make_policy("cost"), quotas=Quotas(by_tenant={"t": 4 * 12288}))
    )
    item = entry(tenant="t")
    keys = sorted(sample_key(number) for number in range(4))
    list_all(index, [listed(key, item, at_s=float(10 - at)) for at, key in enumerate(keys)])
    order_by_age(index, make_policy("cost"), lock=threading.Lock())
    assert index.make_room(item, now_s=0.0, is_busy=lambda key: False) == [keys[-1]]
    assert list(index.books._by_tenant["t"]) == keys[2::-1]


def test_busy_records_are_not_evicted() -> None:
    busy: Callable[[ChunkKey], bool] = lambda key: key == sample_key(0)  # noqa: E731
    room = entry().stored_bytes
    index = make_index(capacity_bytes=2 * room)
    for i in range(2):
        index.admit(sample_key(i), entry())
    assert index.make_room(entry(), now_s=0.0, is_busy=busy) == [sample_key(1)]
    assert index.make_room(entry(payload_bytes=2 * room), now_s=0.0, is_busy=busy) is None
