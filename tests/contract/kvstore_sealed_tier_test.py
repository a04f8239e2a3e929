"""An encrypted tier keeps the tier contract, and what is in it tells its reader nothing and believes nobody."""

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cluster.telemetry import REGISTRY
from kvstore.container import ALIGN, checksum, encode_record, parse_header, stored_bytes
from kvstore.interfaces import Tier
from kvstore.keys import ChunkKey
from kvstore.sealing import OVERHEAD_BYTES, Sealer
from kvstore.testing.memory_tier import MemoryTier
from kvstore.testing.samples import sample_key, sample_meta, sample_payload
from kvstore.testing.tier import DurableTierContract, put_record, record_of
from kvstore.tiers.file import FileTier
from kvstore.tiers.sealed import SealedTier

MASTER = bytes(range(32))
OTHER = bytes(range(1, 33))
STOP_S = float("inf")


class TestSealedMemoryTier(DurableTierContract):
    @pytest.fixture(autouse=True)
    def _records(self) -> None:
        self.records: OrderedDict[ChunkKey, bytes] = OrderedDict()

    def make(self, *, capacity_bytes: int) -> Tier:
        inner = MemoryTier(capacity_bytes, sealed=True, records=self.records)
        return SealedTier(inner, sealer=Sealer([MASTER]))

    def reopen(self, tier: Tier) -> Tier:
        tier.close()
        return self.make(capacity_bytes=tier.stat().capacity_bytes or 0)

    def raw_write(self, tier: Tier, key: ChunkKey, data: bytes) -> None:
        self.records[key] = data

    def leftovers(self, tier: Tier) -> list[str]:
        return []


class TestSealedFileTier(DurableTierContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "tier"

    def make(self, *, capacity_bytes: int) -> Tier:
        return scanned(FileTier(self.folder, capacity_bytes=capacity_bytes, sealed=True), MASTER)

    def reopen(self, tier: Tier) -> Tier:
        capacity_bytes = tier.stat().capacity_bytes or 0
        tier.close()
        again = self.make(capacity_bytes=capacity_bytes)
        assert isinstance(again, SealedTier)
        wait_scanned(again)
        return again

    def raw_write(self, tier: Tier, key: ChunkKey, data: bytes) -> None:
        file_of(self.folder, key).write_bytes(data)

    def leftovers(self, tier: Tier) -> list[str]:
        descriptors = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        links = [os.readlink(path) for path in descriptors if os.path.lexists(path)]
        open_files = [f"open {link}" for link in links if link.startswith(str(self.folder))]
        return open_files + [str(path) for path in self.folder.rglob("*.tmp")]


def wait_scanned(tier: SealedTier) -> None:
    """Until the files of a former life are found again."""
    assert isinstance(tier.inner, FileTier)
    assert tier.inner.wait_scanned(10.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tier"


def open_tier(folder: Path, *masters: bytes) -> SealedTier:
    return scanned(FileTier(folder, capacity_bytes=1 << 20, sealed=True), *(masters or [MASTER]))


def scanned(inner: FileTier, *masters: bytes) -> SealedTier:
    assert inner.wait_scanned(30.0)
    return SealedTier(inner, sealer=Sealer(masters))


@pytest.fixture
def tier(folder: Path) -> Iterator[SealedTier]:
    tier = open_tier(folder)
    yield tier
    tier.close()


def file_of(folder: Path, key: ChunkKey) -> Path:
    return folder / key.hex()[:2] / f"{key.hex()}.rec"


def counted(outcome: str) -> float:
    labels = {"tier": "nvme", "outcome": outcome}
    return REGISTRY.get_sample_value("learnonce_kvstore_sealed_records_total", labels) or 0.0


def read(tier: SealedTier, index: int, *, payload_bytes: int) -> bytes | None:
    """Through `read_into`, as the mover does."""
    view = bytearray(stored_bytes(payload_bytes))
    told: list[int] = []
    header = tier.read_into(sample_key(index), memoryview(view), stop_s=STOP_S, on_bytes=told.append)
    assert told == ([len(view)] if header is not None else []), "told of bytes that are not proven"
    assert header is None or header == parse_header(view)
    return bytes(view) if header is not None else None


def test_file_holds_no_plaintext(tier: SealedTier, folder: Path) -> None:
    record = put_record(tier, 1, 100_000)
    stored = file_of(folder, sample_key(1)).read_bytes()
    payload = bytes(record[ALIGN : ALIGN + 100_000])
    assert not any(payload[at : at + 8] in stored for at in range(0, 99_992, 250))
    assert parse_header(stored, expected_sealed=True).is_sealed


def test_entry_is_that_of_the_plain_record(tier: SealedTier) -> None:
    meta = msgspec.structs.replace(sample_meta(7, base_position=3), tenant="a", learned_unix_s=12.5)
    record = encode_record(sample_key(1), meta, sample_payload(1, 10_000))
    assert tier.put(sample_key(1), memoryview(record))
    entry = tier.entry(sample_key(1))
    assert entry is not None
    assert (entry.payload_bytes, entry.stored_bytes) == (10_000, stored_bytes(10_000 + OVERHEAD_BYTES))
    assert (entry.num_tokens, entry.base_position, entry.tenant, entry.learned_unix_s) == (7, 3, "a", 12.5)
    assert tier.stat().bytes == entry.stored_bytes
    assert dict(tier.keys()) == {sample_key(1): entry.stored_bytes}
    assert read(tier, 1, payload_bytes=entry.payload_bytes) == record


def test_view_of_another_length_is_a_miss_that_costs_nothing(tier: SealedTier) -> None:
    record = put_record(tier, 1, 10_000)
    assert read(tier, 1, payload_bytes=20_000) is None
    assert read(tier, 1, payload_bytes=1) is None
    assert read(tier, 1, payload_bytes=10_000) == record


def test_flip_anywhere_in_the_file_is_a_miss(tier: SealedTier, folder: Path) -> None:
    """Every region: header, metadata, prefix, ciphertext of header and payload, tag, padding."""
    path = file_of(folder, sample_key(1))
    for at_byte in [*range(0, 120, 7), 2000, *range(ALIGN, ALIGN + 24, 3), 5000, 9000, 13_131, 13_135, 13_136, 16_383]:
        record = put_record(tier, 1, 5000)
        stored = bytearray(path.read_bytes())
        assert len(stored) == 16_384
        stored[at_byte] ^= 0x10
        path.write_bytes(stored)
        assert read(tier, 1, payload_bytes=5000) is None, f"byte {at_byte}"
        tier.drop(sample_key(1))
        assert tier.put(sample_key(1), memoryview(record))
        assert read(tier, 1, payload_bytes=5000) == record


def test_exchanged_files_are_misses(tier: SealedTier, folder: Path) -> None:
    for index in (1, 2):
        put_record(tier, index, 5000)
    one, two = (file_of(folder, sample_key(index)) for index in (1, 2))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert [read(tier, index, payload_bytes=5000) for index in (1, 2)] == [None, None]
    assert tier.stat().chunks == 0


def test_an_older_record_of_the_same_key_is_the_only_replay(tier: SealedTier, folder: Path) -> None:
    """What sealing cannot see: an attacker who puts back what was there before. It is the right chunk's bytes."""
    record = put_record(tier, 1, 5000)
    before = file_of(folder, sample_key(1)).read_bytes()
    tier.drop(sample_key(1))
    put_record(tier, 1, 5000)
    file_of(folder, sample_key(1)).write_bytes(before)
    assert read(tier, 1, payload_bytes=5000) == record


def test_plain_record_planted_in_the_medium_is_not_believed(tier: SealedTier, folder: Path) -> None:
    put_record(tier, 1, 5000)
    planted = encode_record(sample_key(1), sample_meta(2), sample_payload(66, 5000))
    file_of(folder, sample_key(1)).write_bytes(planted)
    assert read(tier, 1, payload_bytes=5000) is None
    assert tier.get(sample_key(1)) is None


def test_tampered_record_is_dropped(tier: SealedTier, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With checksums that are right, so that only the tag can tell."""
    put_record(tier, 1, 5000)
    path = file_of(folder, sample_key(1))
    path.write_bytes(forge(path.read_bytes(), at_byte=9000))
    before = counted("tampered")
    with caplog.at_level(logging.WARNING):
        assert read(tier, 1, payload_bytes=5000) is None
    assert counted("tampered") == before + 1
    assert "unsealing_failed" in caplog.text
    assert not path.exists()
    assert not tier.contains(sample_key(1))
    assert tier.entry(sample_key(1)) is None


def test_record_of_another_master_key_is_kept_but_missing(folder: Path) -> None:
    tier = open_tier(folder, OTHER)
    record = put_record(tier, 1, 5000)
    tier.close()
    tier = open_tier(folder, MASTER)
    path = file_of(folder, sample_key(1))
    before, seen = path.read_bytes(), counted("other_key")
    assert read(tier, 1, payload_bytes=5000) is None
    assert counted("other_key") == seen + 1
    assert path.read_bytes() == before, "a node that has the key can still read it"
    # Known to be unreadable from now on, so that nobody is promised what cannot be had.
    assert not tier.contains(sample_key(1))
    assert tier.entry(sample_key(1)) is None
    assert tier.get(sample_key(1)) is None
    assert list(tier.keys()) == []
    # And its place is taken when the chunk is learned again.
    assert tier.put(sample_key(1), memoryview(record))
    assert tier.contains(sample_key(1))
    assert read(tier, 1, payload_bytes=5000) == record
    tier.close()


def test_dropped_record_of_another_master_key_is_gone(folder: Path) -> None:
    tier = open_tier(folder, OTHER)
    put_record(tier, 1, 5000)
    tier.close()
    tier = open_tier(folder, MASTER)
    assert read(tier, 1, payload_bytes=5000) is None
    assert not tier.drop(sample_key(1)), "it was not there for us"
    assert not file_of(folder, sample_key(1)).exists()
    tier.close()


def test_rotated_key_reads_the_old_and_writes_the_new(folder: Path) -> None:
    tier = open_tier(folder, OTHER)
    old = put_record(tier, 1, 5000)
    tier.close()
    tier = open_tier(folder, MASTER, OTHER)
    assert read(tier, 1, payload_bytes=5000) == old
    new = put_record(tier, 2, 5000)
    tier.close()
    tier = open_tier(folder, MASTER)
    assert read(tier, 1, payload_bytes=5000) is None
    assert read(tier, 2, payload_bytes=5000) == new
    tier.close()


def test_turning_encryption_on_deletes_plain_files_and_off_deletes_sealed_ones(folder: Path) -> None:
    plain = FileTier(folder, capacity_bytes=1 << 20)
    put_record(plain, 1, 5000)
    plain.close()
    tier = open_tier(folder)
    wait_scanned(tier)
    assert not file_of(folder, sample_key(1)).exists()
    put_record(tier, 2, 5000)
    tier.close()
    plain = FileTier(folder, capacity_bytes=1 << 20)
    assert plain.wait_scanned(30.0)
    assert plain.get(sample_key(2)) is None
    assert not file_of(folder, sample_key(2)).exists()
    plain.close()


def test_buffers_are_used_again(tier: SealedTier) -> None:
    """Fresh pages would cost as much as a copy."""
    for index in range(4):
        put_record(tier, index, 100_000)
        assert read(tier, index, payload_bytes=100_000) == record_of(index, 100_000)
    assert len(tier._buffers._idle) == 1


def forge(stored: bytes, *, at_byte: int) -> bytes:
    """Flip a byte and make the checksums right again."""
    forged = bytearray(stored)
    forged[at_byte] ^= 1
    payload_bytes = int.from_bytes(forged[64:72], "little")
    forged[80:88] = checksum(bytes(forged[ALIGN : ALIGN + payload_bytes])).to_bytes(8, "little")
    forged[24:32] = bytes(8)
    forged[24:32] = checksum(bytes(forged[:ALIGN])).to_bytes(8, "little")
    return bytes(forged)
