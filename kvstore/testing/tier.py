"""The contract of `kvstore.interfaces.Tier`, as a suite to inherit.

A new tier subclasses `TierContract` in a test module and implements `make`, `raw_write` and `leftovers`; a durable one
`reopen` as well.

Covers: what every tier promises. Does not cover: failing devices (`tests/fault`).
"""

from collections.abc import Iterator

import pytest

from kvstore.container import encode_record
from kvstore.interfaces import Tier
from kvstore.keys import ChunkKey
from kvstore.testing.samples import sample_key, sample_meta, sample_payload

CAPACITY_BYTES = 1 << 20


class TierContract:
    """Subclass this; pytest collects the subclass."""

    # What a subclass provides.

    def make(self, *, capacity_bytes: int) -> Tier:
        """A new, empty tier."""
        raise NotImplementedError

    def raw_write(self, tier: Tier, key: ChunkKey, data: bytes) -> None:
        """Replace the stored bytes of a key beside the tier's own code, cut or filled as the medium allows."""
        raise NotImplementedError

    def leftovers(self, tier: Tier) -> list[str]:
        """After `close`: descriptors, temporary files and pins that remain, in words."""
        raise NotImplementedError

    # The suite.

    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        """A tier of 1 MiB, closed and checked afterwards."""
        tier = self.make(capacity_bytes=CAPACITY_BYTES)
        yield tier
        assert tier.stat().pinned_bytes == 0
        tier.close()
        assert self.leftovers(tier) == []

    def test_get_returns_what_was_put(self, tier: Tier) -> None:
        """The same bytes, for ragged lengths."""
        for index, size in enumerate((1, 4095, 4096, 4097, 100_001)):
            record = record_of(index, size)
            assert tier.put(sample_key(index), memoryview(record))
            assert tier.contains(sample_key(index))
            assert tier.get(sample_key(index)) == record

    def test_missing_key_is_a_miss(self, tier: Tier) -> None:
        """None, and nothing to drop."""
        assert tier.get(sample_key(1)) is None
        assert not tier.contains(sample_key(1))
        assert not tier.drop(sample_key(1))

    def test_put_twice_keeps_one(self, tier: Tier) -> None:
        """Putting is idempotent per key."""
        record = record_of(1, 5000)
        assert tier.put(sample_key(1), memoryview(record))
        before = tier.stat()
        assert tier.put(sample_key(1), memoryview(record))
        assert tier.stat() == before
        assert tier.get(sample_key(1)) == record

    def test_counts_are_those_of_the_keys(self, tier: Tier) -> None:
        """`keys` and `stat` agree."""
        lengths = {sample_key(i): len(put_record(tier, i, 3000 * i + 1)) for i in range(5)}
        sizes = dict(tier.keys())
        assert sizes.keys() == lengths.keys()
        # Room in this tier: that of the record, or more where the tier adds to it.
        assert all(sizes[key] >= lengths[key] for key in lengths)
        stat = tier.stat()
        assert (stat.chunks, stat.bytes, stat.pinned_bytes) == (5, sum(sizes.values()), 0)
        assert stat.capacity_bytes is None or stat.bytes <= stat.capacity_bytes

    def test_dropped_is_gone(self, tier: Tier) -> None:
        """Once, and only that one."""
        put_record(tier, 1, 100)
        kept = put_record(tier, 2, 100)
        assert tier.drop(sample_key(1))
        assert not tier.drop(sample_key(1))
        assert tier.get(sample_key(1)) is None
        assert tier.get(sample_key(2)) == kept

    def test_least_recently_used_leaves_first(self, tier: Tier) -> None:
        """A read counts as a use, and capacity holds."""
        for index in range(4):
            put_record(tier, index, 250_000 - 4096)
        assert tier.get(sample_key(0)) is not None
        put_record(tier, 4, 250_000 - 4096)
        held = {key for key, _ in tier.keys()}  # noqa: SIM118 not a dict
        assert held == {sample_key(i) for i in (0, 2, 3, 4)}
        assert tier.stat().bytes <= CAPACITY_BYTES

    def test_too_large_a_record_is_refused(self, tier: Tier) -> None:
        """And costs nobody else their place."""
        kept = put_record(tier, 1, 1000)
        assert not tier.put(sample_key(2), memoryview(record_of(2, CAPACITY_BYTES + 1)))
        assert tier.get(sample_key(1)) == kept

    @pytest.mark.parametrize("what", ["garbage", "another key", "cut", "with a tail"])
    def test_put_refuses_what_is_no_record_of_the_key(self, tier: Tier, what: str) -> None:
        """The header says what a record is."""
        record = record_of(1, 9000)
        hostile = {
            "garbage": sample_payload(3, 8192),
            "another key": bytes(record_of(2, 9000)),
            "cut": bytes(record[:-4096]),
            "with a tail": bytes(record + bytes(4096)),
        }[what]
        assert not tier.put(sample_key(1), memoryview(bytearray(hostile)))
        assert tier.get(sample_key(1)) is None

    @pytest.mark.parametrize("at_byte", [0, 30, 90, 4000, 4096, 8000, 12_287])
    def test_flipped_byte_is_a_miss(self, tier: Tier, at_byte: int) -> None:
        """In the header, the metadata, the payload and the padding; and the record is forgotten."""
        record = put_record(tier, 1, 8000)
        damaged = bytearray(record)
        damaged[at_byte] ^= 0x40
        self.raw_write(tier, sample_key(1), bytes(damaged))
        assert tier.get(sample_key(1)) is None
        assert not tier.contains(sample_key(1))
        assert tier.stat().chunks == 0

    def test_record_of_another_chunk_is_a_miss(self, tier: Tier) -> None:
        """A sound record under the wrong name is not believed."""
        put_record(tier, 1, 8000)
        self.raw_write(tier, sample_key(1), bytes(record_of(2, 8000)))
        assert tier.get(sample_key(1)) is None

    def test_damaged_key_can_be_stored_again(self, tier: Tier) -> None:
        """A miss is repaired by whoever recomputes."""
        record = put_record(tier, 1, 8000)
        self.raw_write(tier, sample_key(1), bytes(len(record)))
        assert tier.get(sample_key(1)) is None
        assert tier.put(sample_key(1), memoryview(record))
        assert tier.get(sample_key(1)) == record


class DurableTierContract(TierContract):
    """For tiers whose records outlive the process."""

    def reopen(self, tier: Tier) -> Tier:
        """The same tier after its process ended."""
        raise NotImplementedError

    def test_records_are_found_again(self, tier: Tier) -> None:
        """With their bytes and counts."""
        records = {sample_key(i): put_record(tier, i, 10_000 + i) for i in range(4)}
        before = tier.stat()
        again = self.reopen(tier)
        try:
            assert again.stat() == before
            assert {key: again.get(key) for key, _ in again.keys()} == records  # noqa: SIM118 not a dict
        finally:
            again.close()


def record_of(index: int, payload_bytes: int) -> bytearray:
    """A whole record with seeded payload."""
    return encode_record(sample_key(index), sample_meta(index + 1), sample_payload(index, payload_bytes))


def put_record(tier: Tier, index: int, payload_bytes: int) -> bytearray:
    """Put a sample record; its bytes."""
    record = record_of(index, payload_bytes)
    assert tier.put(sample_key(index), memoryview(record))
    return record
