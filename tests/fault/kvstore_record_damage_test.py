"""Damaged, foreign and hostile files below the tier: a miss, found by a read and by the scan of the next start.

Covers: bit flips in every region of a record on the disk, files of a wrong length, planted links, pipes and folders,
files of other users, times in the future. Does not cover: failing devices (`kvstore_file_tier_fault_test`).
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstore.container import ALIGN
from kvstore.testing.samples import sample_key
from kvstore.testing.tier import record_of
from kvstore.tiers.file import FileTier
from kvstore.tiers.folder import FolderUnusableError
from kvstore.tiers.records import RecordFiles

PAYLOAD_BYTES = 3 * ALIGN - 100
RECORD = bytes(record_of(1, PAYLOAD_BYTES))
KEY = sample_key(1)

REGIONS = {
    "magic": range(8),
    "version": range(8, 10),
    "flags": range(10, 12),
    "metadata length": range(12, 16),
    "checksum name": range(16, 24),
    "header checksum": range(24, 32),
    "key": range(32, 64),
    "payload length": range(64, 72),
    "stored length": range(72, 80),
    "payload checksum": range(80, 88),
    "metadata": range(88, 120),
    "header's zeros": range(3000, ALIGN),
    "payload's first": range(ALIGN, ALIGN + 1),
    "payload's middle": range(ALIGN + 6000, ALIGN + 6001),
    "payload's last": range(ALIGN + PAYLOAD_BYTES - 1, ALIGN + PAYLOAD_BYTES),
    "padding": range(ALIGN + PAYLOAD_BYTES, len(RECORD)),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tier"


def open_tier(folder: Path) -> FileTier:
    return FileTier(folder, capacity_bytes=1 << 20)


def path_of(folder: Path, index: int = 1) -> Path:
    name = sample_key(index).hex()
    return folder / name[:2] / f"{name}.rec"


def stored(folder: Path) -> FileTier:
    """A scanned tier with two records; the first will be damaged."""
    tier = open_tier(folder)
    assert tier.wait_scanned(10.0)
    for index in (1, 2):
        assert tier.put(sample_key(index), memoryview(record_of(index, PAYLOAD_BYTES)))
    return tier


def expect_one_miss(tier: FileTier, folder: Path) -> None:
    """The damaged record is missing and can be stored again; the other one is there."""
    assert tier.get(KEY) is None
    assert not tier.contains(KEY)
    assert tier.get(sample_key(2)) == record_of(2, PAYLOAD_BYTES)
    assert tier.stat().chunks == 1
    assert tier.put(KEY, memoryview(bytearray(RECORD)))
    assert tier.get(KEY) == RECORD
    assert path_of(folder).stat().st_size == len(RECORD)
    tier.close()


@pytest.mark.parametrize("bit", [0x01, 0x80], ids=["low bit", "high bit"])
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("found_by", ["read", "restart"])
def test_flipped_bit_is_a_miss(folder: Path, region: str, bit: int, found_by: str) -> None:
    positions = REGIONS[region]
    damaged = bytearray(RECORD)
    damaged[positions[len(positions) // 2]] ^= bit
    damage(folder, lambda path: path.write_bytes(damaged), found_by=found_by)


@pytest.mark.parametrize(
    "length",
    [0, 1, ALIGN - 1, ALIGN, ALIGN + 1, len(RECORD) - ALIGN, len(RECORD) - 1, len(RECORD) + 1, len(RECORD) + ALIGN],
)
@pytest.mark.parametrize("found_by", ["read", "restart"])
def test_file_of_another_length_is_a_miss(folder: Path, length: int, found_by: str) -> None:
    damage(folder, lambda path: os.truncate(path, length), found_by=found_by)


@pytest.mark.parametrize("found_by", ["read", "restart"])
def test_all_zeros_are_a_miss(folder: Path, found_by: str) -> None:
    """What some file systems make of a file after a power cut."""
    damage(folder, lambda path: path.write_bytes(bytes(len(RECORD))), found_by=found_by)


@pytest.mark.parametrize("found_by", ["read", "restart"])
def test_deleted_file_is_a_miss(folder: Path, found_by: str) -> None:
    damage(folder, Path.unlink, found_by=found_by)


@pytest.mark.parametrize("found_by", ["read", "restart"])
@pytest.mark.parametrize("what", ["link", "dangling link", "pipe", "writable by others", "of another user"])
def test_foreign_file_is_not_believed(folder: Path, tmp_path: Path, what: str, found_by: str) -> None:
    """Though what it leads to is a sound record of that key. It is not deleted; a new record takes its name."""
    if what == "of another user" and os.geteuid() != 0:
        pytest.skip("needs root, to give a file away")
    outside = tmp_path / "outside.rec"
    outside.write_bytes(RECORD)

    def plant(path: Path) -> None:
        if what == "writable by others":
            path.chmod(0o666)
        elif what == "of another user":
            os.chown(path, 12345, 12345)
        else:
            path.unlink()
            if what == "pipe":
                os.mkfifo(path, 0o600)
            else:
                path.symlink_to(outside if what == "link" else tmp_path / "nowhere")

    damage(folder, plant, found_by=found_by)
    assert outside.read_bytes() == RECORD


def damage(folder: Path, change: Callable[[Path], object], *, found_by: str) -> None:
    tier = stored(folder)
    if found_by == "read":
        change(path_of(folder))
    else:
        tier.close()
        change(path_of(folder))
        tier = open_tier(folder)
        assert tier.wait_scanned(10.0)
    expect_one_miss(tier, folder)


def test_late_news_of_damage_do_not_cost_the_new_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two readers see the damage; when the second one says so, the record has been written again."""
    tier = stored(folder)
    path_of(folder).write_bytes(bytes(len(RECORD)))
    seen, go_on = threading.Event(), threading.Event()
    real = RecordFiles.read

    def read(files: RecordFiles, *arguments: Any, **more: Any) -> bool:
        if threading.current_thread() is not reader:
            return real(files, *arguments, **more)
        try:
            return real(files, *arguments, **more)
        finally:
            seen.set()
            assert go_on.wait(30.0)

    monkeypatch.setattr(RecordFiles, "read", read)
    answers: list[bytearray | None] = []
    reader = threading.Thread(target=lambda: answers.append(tier.get(KEY)))
    reader.start()
    assert seen.wait(30.0)
    assert tier.get(KEY) is None
    assert tier.put(KEY, memoryview(bytearray(RECORD)))
    go_on.set()
    reader.join(30.0)
    assert answers == [None]
    assert tier.get(KEY) == RECORD
    tier.close()


def test_record_under_anothers_name_is_a_miss(folder: Path) -> None:
    """As after a power cut between writing over a file and renaming it."""
    damage(folder, lambda path: path.write_bytes(path_of(folder, 2).read_bytes()), found_by="restart")


def test_times_in_the_future_change_nothing_but_the_order(folder: Path) -> None:
    """A clock that jumped: the records are found, and the oldest by name leaves first."""
    tier = stored(folder)
    tier.close()
    os.utime(path_of(folder, 1), (2**33, 2**33))
    os.utime(path_of(folder, 2), (0, 0))
    tier = FileTier(folder, capacity_bytes=2 * len(RECORD))
    assert tier.wait_scanned(10.0)
    assert tier.get(KEY) == RECORD
    assert tier.put(sample_key(3), memoryview(record_of(3, PAYLOAD_BYTES)))
    assert not tier.contains(sample_key(2))
    tier.close()


@pytest.mark.parametrize("which", ["the folder", "a part"])
def test_folder_that_others_can_write_to_is_refused(folder: Path, which: str) -> None:
    """Checksums find accidents, not attackers: who can plant files can plant KV."""
    stored(folder).close()
    target = folder if which == "the folder" else folder / "ab"
    target.chmod(0o777)
    with pytest.raises(FolderUnusableError, match="writable by nobody else"):
        open_tier(folder)
    target.chmod(0o700)
    open_tier(folder).close()


def test_part_that_is_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    stored(folder).close()
    part = folder / "00"
    for path in part.iterdir():
        path.unlink()
    part.rmdir()
    part.symlink_to(tmp_path)
    with pytest.raises(FolderUnusableError, match="it is no folder"):
        open_tier(folder)
