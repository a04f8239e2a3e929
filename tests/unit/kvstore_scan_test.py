"""What is true while a scan of former records is under way: each race by itself, the scan held at the right moment."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.clock import ManualClock
from kvstore import metrics
from kvstore.interfaces import TierEntry
from kvstore.keys import ChunkKey
from kvstore.policy import Quotas, make_policy
from kvstore.testing.samples import sample_key
from kvstore.testing.tier import put_record, record_of
from kvstore.tiers import records
from kvstore.tiers.books import TierBooks
from kvstore.tiers.file import FileTier
from kvstore.tiers.findings import Findings
from kvstore.tiers.ledger import Ledger
from kvstore.tiers.records import ListedFile, RecordFiles, Spares

PAYLOAD_BYTES = 9000
RECORD_BYTES = len(record_of(0, PAYLOAD_BYTES))
NUM_RECORDS = 6


class Brake:
    """Holds the scan's threads before they list, or before they read headers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_list = threading.Event()
        self.may_read = threading.Event()
        self.reads = threading.Semaphore(0)
        self._list, self._read = RecordFiles.listing, RecordFiles.read_start
        brake = self

        def listing(files: RecordFiles, part: int) -> Iterator[object]:
            assert brake.may_list.wait(30.0)
            yield from brake._list(files, part)

        def read_start(files: RecordFiles, key: ChunkKey, page: memoryview) -> int:
            is_scan = threading.current_thread().name.startswith("kvstore-scan")
            if is_scan:
                brake.reads.release()
                assert brake.may_read.wait(30.0)
            return brake._read(files, key, page)

        monkeypatch.setattr(RecordFiles, "listing", listing)
        monkeypatch.setattr(RecordFiles, "read_start", read_start)

    def release(self) -> None:
        self.may_list.set()
        self.may_read.set()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tier"
    tier = FileTier(folder, capacity_bytes=1 << 20)
    for index in range(NUM_RECORDS):
        put_record(tier, index, PAYLOAD_BYTES)
        os.utime(path_of(folder, index), (index, index))
    tier.close()
    return folder


@pytest.fixture
def brake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Brake]:
    brake = Brake(monkeypatch)
    yield brake
    brake.release()


@pytest.fixture
def opened(folder: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., FileTier]]:
    brake: Brake | None = request.getfixturevalue("brake") if "brake" in request.fixturenames else None
    tiers: list[FileTier] = []

    def open_tier(**more: object) -> FileTier:
        tiers.append(FileTier(folder, **{"capacity_bytes": 1 << 20, **more}))  # type: ignore[arg-type]
        return tiers[-1]

    yield open_tier
    if brake is not None:
        brake.release()
    for tier in tiers:
        tier.close()


def path_of(folder: Path, index: int) -> Path:
    name = sample_key(index).hex()
    return folder / name[:2] / f"{name}.rec"


def test_unlisted_record_is_read_at_once(brake: Brake, opened: Callable[..., FileTier]) -> None:
    found: list[ChunkKey] = []
    tier = opened(on_found=found.extend)
    assert tier.contains(sample_key(1))
    assert tier.get(sample_key(2)) == record_of(2, PAYLOAD_BYTES)
    assert not tier.contains(sample_key(99))
    assert found == [sample_key(1), sample_key(2)]
    brake.release()
    assert tier.wait_scanned(10.0)
    assert sorted(found) == sorted(sample_key(index) for index in range(NUM_RECORDS)), "each is told once"
    assert tier.stat().chunks == NUM_RECORDS


def test_listed_record_counts_before_its_header_was_read(brake: Brake, opened: Callable[..., FileTier]) -> None:
    tier = opened()
    brake.may_list.set()
    assert brake.reads.acquire(timeout=10.0)
    assert (tier.stat().chunks, tier.stat().bytes) == (NUM_RECORDS, NUM_RECORDS * RECORD_BYTES)
    assert tier.get(sample_key(3)) == record_of(3, PAYLOAD_BYTES)
    assert (tier.stat().chunks, tier.stat().bytes) == (NUM_RECORDS, NUM_RECORDS * RECORD_BYTES)


@pytest.mark.parametrize("stage", ["unlisted", "listed"])
def test_dropped_record_does_not_come_back(brake: Brake, opened: Callable[..., FileTier], stage: str) -> None:
    """Though the scan saw its name, or has its header on the way."""
    tier = opened()
    if stage == "listed":
        brake.may_list.set()
        assert brake.reads.acquire(timeout=10.0)
    assert tier.drop(sample_key(1))
    assert not tier.contains(sample_key(1))
    brake.release()
    assert tier.wait_scanned(10.0)
    assert not tier.contains(sample_key(1))
    assert tier.stat().chunks == NUM_RECORDS - 1


@pytest.mark.parametrize("stage", ["unlisted", "listed"])
def test_new_record_survives_the_scan_of_a_damaged_one(
    brake: Brake, opened: Callable[..., FileTier], folder: Path, stage: str
) -> None:
    """The scan has seen the damaged file of that name; the new one must not be deleted for it."""
    path_of(folder, 1).write_bytes(b"damaged")
    tier = opened()
    if stage == "listed":
        brake.may_list.set()
        assert brake.reads.acquire(timeout=10.0)
    put_record(tier, 1, PAYLOAD_BYTES)
    brake.release()
    assert tier.wait_scanned(10.0)
    assert tier.get(sample_key(1)) == record_of(1, PAYLOAD_BYTES)
    assert tier.stat().bytes == NUM_RECORDS * RECORD_BYTES


def test_capacity_holds_during_the_scan_and_the_oldest_leave(brake: Brake, opened: Callable[..., FileTier]) -> None:
    tier = opened(capacity_bytes=NUM_RECORDS * RECORD_BYTES)
    brake.may_list.set()
    assert brake.reads.acquire(timeout=10.0)
    for index in (10, 11):
        put_record(tier, index, PAYLOAD_BYTES)
    assert tier.stat().bytes <= NUM_RECORDS * RECORD_BYTES
    brake.release()
    assert tier.wait_scanned(10.0)
    assert dict(tier.keys()).keys() == {sample_key(index) for index in (2, 3, 4, 5, 10, 11)}


@pytest.mark.parametrize("reader", ["scan", "caller"])
def test_file_whose_header_is_being_read_is_not_written_over(
    brake: Brake, opened: Callable[..., FileTier], folder: Path, reader: str
) -> None:
    """It stays until it was looked at, and others leave in its place."""
    tier = opened(capacity_bytes=NUM_RECORDS * RECORD_BYTES)
    brake.may_list.set()
    assert brake.reads.acquire(timeout=10.0)
    # The scan reads the youngest header first; a caller, held like the scan, asks for the oldest.
    index = NUM_RECORDS - 1 if reader == "scan" else 0
    caller = threading.Thread(target=tier.contains, args=(sample_key(0),), name="kvstore-scan-caller")
    if reader == "caller":
        caller.start()
        assert brake.reads.acquire(timeout=10.0)
    inode = path_of(folder, index).stat().st_ino
    corrupt = metrics.TIER_READS.labels("nvme", "corrupt")
    corrupt_before = corrupt._value.get()
    for other in range(10, 10 + NUM_RECORDS):
        put_record(tier, other, PAYLOAD_BYTES)
        assert path_of(folder, index).stat().st_ino == inode
    brake.release()
    if reader == "caller":
        caller.join(10.0)
    assert tier.wait_scanned(10.0)
    assert corrupt._value.get() == corrupt_before
    assert tier.stat().bytes <= NUM_RECORDS * RECORD_BYTES


def test_new_records_are_younger_than_found_ones(brake: Brake, opened: Callable[..., FileTier]) -> None:
    """What was learned while the scan ran must not be the first to leave."""
    tier = opened(capacity_bytes=(NUM_RECORDS + 1) * RECORD_BYTES)
    put_record(tier, 10, PAYLOAD_BYTES)
    brake.release()
    assert tier.wait_scanned(10.0)
    for index in range(11, 11 + NUM_RECORDS):
        put_record(tier, index, PAYLOAD_BYTES)
    assert tier.contains(sample_key(10))
    assert not tier.contains(sample_key(NUM_RECORDS - 1))


def test_looks_out_of_turn_are_bounded(
    brake: Brake, opened: Callable[..., FileTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lookup of many keys must not wait for a slow disk once per key: the rest are misses until the scan is done."""
    tier = opened()
    monkeypatch.setattr("kvstore.tiers.findings.Findings.may_probe", lambda self: False)
    assert not tier.contains(sample_key(1))
    brake.release()
    assert tier.wait_scanned(10.0)
    assert tier.contains(sample_key(1))


def test_part_that_cannot_be_listed_is_looked_into_key_by_key(
    folder: Path, opened: Callable[..., FileTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One damaged folder does not hide what can still be read in it."""
    real = os.scandir
    broken = str(path_of(folder, 1).parent)

    def scandir(path: str) -> object:
        if path == broken:
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(records.os, "scandir", scandir)
    tier = opened()
    assert tier.wait_scanned(10.0)
    assert tier.stat().chunks == NUM_RECORDS - 1
    assert tier.get(sample_key(1)) == record_of(1, PAYLOAD_BYTES)
    assert tier.stat().chunks == NUM_RECORDS
    assert tier.drop(sample_key(1))
    assert not tier.contains(sample_key(1))


def test_close_in_the_middle_of_a_scan_ends_it(brake: Brake, opened: Callable[..., FileTier], folder: Path) -> None:
    tier = opened()
    closing = threading.Thread(target=tier.close)
    closing.start()
    brake.release()
    closing.join(10.0)
    assert not closing.is_alive()
    assert len(list(folder.rglob("*.rec"))) == NUM_RECORDS


def test_what_the_scan_saw_before_a_change_is_old() -> None:
    """A name or a header that was on its way to the books while its record was dropped."""
    findings = Findings()
    dropped, kept = (ChunkKey(bytes([0, index]) + bytes(30)) for index in range(2))
    entry = TierEntry(payload_bytes=1, stored_bytes=8192, num_tokens=1, base_position=0, codec="raw")
    assert not findings.forget(dropped)
    findings.note_listed(0, [ListedFile(dropped, 8192, 0), ListedFile(kept, 8192, 0)])
    assert (len(findings), findings.bytes) == (1, 8192)
    assert not findings.note_header(dropped, entry)
    assert findings.note_header(kept, entry)
    assert not findings.note_header(kept, entry), "known already"
    assert findings.forget(kept)
    assert not findings.note_header(kept, entry)
    assert (len(findings), findings.bytes) == (0, 0)


def test_found_record_that_has_no_room_stays_while_it_is_read() -> None:
    books = TierBooks(capacity_bytes=4096, policy=make_policy("lru"), quotas=Quotas())
    ledger = Ledger(books, capacity_bytes=4096, clock=ManualClock())
    key = ChunkKey(bytes(32))
    entry = TierEntry(payload_bytes=1, stored_bytes=8192, num_tokens=1, base_position=0, codec="raw")
    ledger.findings.note_listed(0, [ListedFile(key, 8192, 0)])
    ledger.findings.note_all_listed()
    assert ledger.findings.note_header(key, entry)
    assert ledger.begin_read(key, 8192) is entry
    assert ledger.enter(ledger.findings.next_to_enter(1)) == []
    assert ledger.find(key) == (entry, False)
    assert ledger.stat().bytes == 8192
    ledger.end_read(key)
    assert ledger.enter(ledger.findings.next_to_enter(1)) == [key]
    assert ledger.stat().bytes == 0


def test_header_that_was_under_way_when_its_record_changed_is_old() -> None:
    """Also in a part that cannot be listed, where names alone prove nothing."""
    books = TierBooks(capacity_bytes=8192, policy=make_policy("lru"), quotas=Quotas())
    ledger = Ledger(books, capacity_bytes=8192, clock=ManualClock())
    key, other = ChunkKey(bytes(32)), ChunkKey(bytes([1]) * 32)
    entry = TierEntry(payload_bytes=1, stored_bytes=8192, num_tokens=1, base_position=0, codec="raw")
    assert ledger.begin_look(key)
    assert ledger.begin_look(key), "two at once"
    assert ledger.note_header(key, entry)
    ledger.end_read(key)
    ledger.end_scan()
    assert ledger.enter(ledger.findings.next_to_enter(1)) == []
    assert key in books
    assert not ledger.note_header(key, entry), "it is in the books by now"
    assert ledger.begin_write(other, entry) is None, "the second look still reads its file"
    ledger.end_read(key)
    assert ledger.begin_write(other, entry) == (False, [key])
    assert not ledger.begin_look(key), "its file is on its way out"
    ledger.end_leave(key)
    ledger.end_write(other, stored=True)
    assert not ledger.begin_look(other), "nothing is to be learned of what is in the books"
    assert (ledger.stat().chunks, ledger.stat().bytes) == (1, 8192)


def test_spares_are_taken_by_length() -> None:
    spares = Spares()
    for path, num_bytes in (("a", 10), ("b", 20), ("c", 20), ("d", 5)):
        spares.add(path, num_bytes)
    assert spares.bytes == 55
    assert spares.take(10) == "a"
    assert spares.take(7) in {"b", "c"}, "none of that length: the longest, which needs no new room"
    assert spares.take_large(21) is None
    assert spares.trim(20) == ["d"]
    assert len(spares.trim(0)) == 1
    assert spares.take(1) is None
    assert spares.bytes == 0
