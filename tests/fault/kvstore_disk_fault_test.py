"""Real disks that fail: power cuts, a full file system, one that becomes read-only.

Every test makes a small ext4 of its own on a loop device, and takes it away again. Asserted: what is read is what was
written, or a miss; the tier goes on, and works again when the disk does.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.keys import ChunkKey
from kvstore.settings import NvmeSettings
from kvstore.testing.samples import sample_key
from kvstore.testing.tier import record_of
from kvstore.tiers.file import FileTier
from kvstore.tiers.nvme import NvmePool
from tests.support.loop_disk import FLUSH_ALL, FLUSH_LOG, FLUSH_NOTHING, LoopDisk, why_not

_REASON = why_not()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

PAYLOAD_BYTES = 100_000
RECORD_BYTES = len(record_of(0, PAYLOAD_BYTES))


@pytest.fixture
def disk() -> Iterator[LoopDisk]:
    with LoopDisk(num_bytes=64 << 20) as disk:
        yield disk


def put_all(tier: FileTier, indices: range) -> None:
    for index in indices:
        assert tier.put(sample_key(index), memoryview(record_of(index, PAYLOAD_BYTES)))


def expect_truth(tier: FileTier | NvmePool, indices: range) -> set[int]:
    """Every record is right or missing, and the books agree with what can be read; which are there."""
    held = set()
    for index in indices:
        said = tier.contains(sample_key(index))
        record = tier.get(sample_key(index))
        assert record is None or record == record_of(index, PAYLOAD_BYTES), f"record {index} lies"
        assert said or record is None
        if record is not None:
            held.add(index)
    assert dict(tier.keys()).keys() == {sample_key(index) for index in held}
    assert tier.stat().bytes == len(held) * RECORD_BYTES
    return held


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("flags", [FLUSH_ALL, FLUSH_LOG, FLUSH_NOTHING], ids=["flush", "log flush", "no flush"])
@pytest.mark.parametrize("written_back", [False, True], ids=["at once", "after a writeback"])
def test_power_cut_loses_but_never_lies(disk: LoopDisk, direct: bool, flags: int, written_back: bool) -> None:
    """Also for records that were written over the files of evicted ones: those have old bytes below new names."""
    folder = disk.path / "tier"
    tier = FileTier(folder, capacity_bytes=20 * RECORD_BYTES, direct=direct)
    put_all(tier, range(30))
    if written_back:
        disk.write_back()
    put_all(tier, range(30, 35))
    disk.cut(flags)
    # The tier does not know yet: writes fail, reads miss, nothing hangs.
    assert not tier.put(sample_key(99), memoryview(record_of(99, PAYLOAD_BYTES)))
    tier.close()
    disk.unmount()
    disk.mount()
    again = FileTier(folder, capacity_bytes=20 * RECORD_BYTES, direct=direct)
    assert again.wait_scanned(10.0)
    held = expect_truth(again, range(35))
    if written_back:
        assert held >= set(range(15, 30)), "what the disk had is found again"
    # And whatever is missing can be stored again.
    put_all(again, range(30, 35))
    assert expect_truth(again, range(35)) >= set(range(30, 35))
    again.close()
    assert not list(folder.rglob("*.tmp"))


def test_full_file_system_makes_room_by_eviction(disk: LoopDisk) -> None:
    """The capacity is more than the disk has: records leave for new ones, and writes go on."""
    dropped: list[ChunkKey] = []
    tier = FileTier(disk.path / "tier", capacity_bytes=1 << 30, on_drop=dropped.append)
    put_all(tier, range(800))
    held = expect_truth(tier, range(800))
    assert 799 in held
    assert len(held) > 400, "most of 64 MiB is used"
    assert {sample_key(index) for index in set(range(800)) - held} == set(dropped), "what left was told"
    tier.close()


def test_disk_filled_by_others_costs_chunks_and_nothing_else(disk: LoopDisk) -> None:
    """Somebody else takes all room: reads go on; writes go on over evicted files; with nothing left they pause."""
    tier = FileTier(disk.path / "tier", capacity_bytes=1 << 30)
    put_all(tier, range(10))
    _fill(disk.path / "ballast")
    assert tier.get(sample_key(0)) == record_of(0, PAYLOAD_BYTES)
    assert tier.put(sample_key(50), memoryview(record_of(50, PAYLOAD_BYTES)))
    assert tier.get(sample_key(50)) == record_of(50, PAYLOAD_BYTES)
    larger = record_of(60, 30 << 20)
    assert not tier.put(sample_key(60), memoryview(larger)), "no eviction can make room for this"
    assert tier.get(sample_key(60)) is None
    (disk.path / "ballast").unlink()
    assert tier.put(sample_key(61), memoryview(record_of(61, 1 << 20)))
    expect_room_is_free(tier, disk)
    tier.close()


def test_read_only_remount_loses_nothing(disk: LoopDisk) -> None:
    """Reads go on, writes and evictions are refused, and the books still have every record."""
    folder = disk.path / "tier"
    tier = FileTier(folder, capacity_bytes=10 * RECORD_BYTES, breaker_failures=2, breaker_pause_s=60.0)
    put_all(tier, range(10))
    assert tier.wait_scanned(10.0)
    disk.write_back()
    disk.make_read_only()
    for index in range(10, 14):
        assert not tier.put(sample_key(index), memoryview(record_of(index, PAYLOAD_BYTES)))
    assert not tier.can_write
    assert tier.can_read
    assert expect_truth(tier, range(14)) == set(range(10))
    tier.close()
    disk.unmount()
    disk.mount()
    again = FileTier(folder, capacity_bytes=10 * RECORD_BYTES)
    assert again.wait_scanned(10.0)
    assert expect_truth(again, range(14)) == set(range(10))
    put_all(again, range(10, 12))
    assert {10, 11} <= expect_truth(again, range(14))
    again.close()


def test_pool_goes_on_when_one_disk_is_gone(disk: LoopDisk) -> None:
    """One of two devices loses its power: its keys are missing, new ones go to the other."""
    with LoopDisk(num_bytes=64 << 20) as other:
        folders = (str(disk.path / "a"), str(other.path / "b"))
        pool = NvmePool(
            NvmeSettings(folders=folders, capacity_bytes=64 << 20, breaker_failures=1, breaker_pause_s=60.0)
        )
        for index in range(40):
            assert pool.put(sample_key(index), memoryview(record_of(index, PAYLOAD_BYTES)))
        lost = {index for index in range(40) if _path(disk.path / "a", index).exists()}
        assert 8 <= len(lost) <= 32, "equal disks get about equal shares"
        disk.cut(FLUSH_NOTHING)
        for index in range(40):
            record = pool.get(sample_key(index))
            assert (record is None) == (index in lost)
            assert record is None or record == record_of(index, PAYLOAD_BYTES)
        for index in range(40, 60):
            assert pool.put(sample_key(index), memoryview(record_of(index, PAYLOAD_BYTES)))
            assert pool.get(sample_key(index)) == record_of(index, PAYLOAD_BYTES)
        pool.close()


def test_loop_disks_leave_nothing() -> None:
    """Neither mounts nor loop devices, also when a test fails in the middle."""
    disk = LoopDisk(num_bytes=8 << 20)
    home = disk.path.parent
    with (disk.path / "open").open("w"), pytest.raises(RuntimeError, match="in the middle"):
        fail_on(disk)
    assert not home.exists()
    assert str(home) not in Path("/proc/mounts").read_text()
    loops = subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=True).stdout
    assert str(home) not in loops


def fail_on(disk: LoopDisk) -> None:
    with disk:
        raise RuntimeError("in the middle")


def expect_room_is_free(tier: FileTier, disk: LoopDisk) -> None:
    room = os.statvfs(disk.path)
    used = sum(path.stat().st_blocks * 512 for path in Path(tier.folder).rglob("*.rec"))
    assert used <= tier.stat().bytes + 4096 * 64
    assert room.f_bavail > 0


def _path(folder: Path, index: int) -> Path:
    name = sample_key(index).hex()
    return folder / name[:2] / f"{name}.rec"


def _fill(path: Path) -> None:
    """Until the file system refuses."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                if file.write(bytes(1 << 16)) < 1 << 16:
                    return
        except OSError:
            return
