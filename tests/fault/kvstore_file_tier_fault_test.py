"""The file tier on a failing device: it pauses, serves what it can, tries again, and leaves nothing behind."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.clock import ManualClock
from kvstore.testing.samples import sample_key
from kvstore.testing.tier import record_of
from kvstore.tiers import file as file_module
from kvstore.tiers import folder as folder_module
from kvstore.tiers.file import FileTier
from kvstore.tiers.folder import FolderBusyError, FolderUnusableError

PAUSE_S = 5.0


class Device:
    """Makes writes or reads of the tier fail with an error number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.write_errno: int | None = None
        self.read_errno: int | None = None
        self.attempts = 0
        self._write, self._read = os.pwrite, os.preadv
        monkeypatch.setattr(file_module.os, "pwrite", self._fail_or(self._write, lambda: self.write_errno))
        monkeypatch.setattr(file_module.os, "preadv", self._fail_or(self._read, lambda: self.read_errno))

    def _fail_or(self, real: Callable[..., int], code: Callable[[], int | None]) -> Callable[..., int]:
        def call(*args: object) -> int:
            self.attempts += 1
            number = code()
            if number is not None:
                raise OSError(number, os.strerror(number))
            return real(*args)

        return call


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_failing_writes_pause_and_recover(tmp_path: Path, device: Device, number: int) -> None:
    clock = ManualClock()
    tier = FileTier(tmp_path, capacity_bytes=1 << 20, breaker_failures=2, breaker_pause_s=PAUSE_S, clock=clock)
    assert tier.put(sample_key(0), memoryview(record_of(0, 100)))
    device.write_errno = number
    for index in (1, 2):
        assert not tier.put(sample_key(index), memoryview(record_of(index, 100)))
    attempts = device.attempts
    assert not tier.put(sample_key(3), memoryview(record_of(3, 100)))
    assert device.attempts == attempts, "a paused tier does not touch the device"
    assert tier.get(sample_key(0)) == record_of(0, 100), "reads go on"
    device.write_errno = None
    clock.advance_s(PAUSE_S)
    assert tier.put(sample_key(3), memoryview(record_of(3, 100)))
    assert not list(tmp_path.rglob("*.tmp"))
    assert tier.stat().bytes == 2 * len(record_of(0, 100))
    tier.close()


def test_unreadable_file_is_forgotten_and_reads_pause(tmp_path: Path, device: Device) -> None:
    clock = ManualClock()
    dropped: list[bytes] = []
    tier = FileTier(
        tmp_path,
        capacity_bytes=1 << 20,
        breaker_failures=1,
        breaker_pause_s=PAUSE_S,
        clock=clock,
        on_drop=dropped.append,
    )
    for index in range(2):
        assert tier.put(sample_key(index), memoryview(record_of(index, 100)))
    device.read_errno = errno.EIO
    assert tier.get(sample_key(0)) is None
    assert dropped == [sample_key(0)]
    device.read_errno = None
    assert not tier.contains(sample_key(1))
    assert tier.get(sample_key(1)) is None
    clock.advance_s(PAUSE_S)
    assert tier.get(sample_key(1)) == record_of(1, 100)
    tier.close()


def test_lack_of_descriptors_does_not_cost_files(tmp_path: Path, device: Device) -> None:
    tier = FileTier(tmp_path, capacity_bytes=1 << 20)
    assert tier.put(sample_key(0), memoryview(record_of(0, 100)))
    device.read_errno = errno.EMFILE
    assert tier.get(sample_key(0)) is None
    device.read_errno = None
    assert tier.get(sample_key(0)) == record_of(0, 100)
    tier.close()


def test_scan_cleans_up_after_a_crash(tmp_path: Path) -> None:
    tier = FileTier(tmp_path, capacity_bytes=1 << 20)
    for index in range(3):
        assert tier.put(sample_key(index), memoryview(record_of(index, 9000)))
    tier.close()
    files = {i: tmp_path / sample_key(i).hex()[:2] / f"{sample_key(i).hex()}.rec" for i in range(3)}
    files[1].write_bytes(b"")
    files[2].write_bytes(files[2].read_bytes()[:4096])
    unfinished = files[0].with_name("x.rec.1.0.tmp")
    unfinished.write_bytes(b"half")
    foreign = files[0].with_name("notes.txt")
    foreign.write_text("somebody else's")
    tier = FileTier(tmp_path, capacity_bytes=1 << 20)
    assert tier.wait_scanned(10.0)
    assert [key for key, _ in tier.keys()] == [sample_key(0)]  # noqa: SIM118 not a dict
    assert not unfinished.exists()
    assert not files[1].exists()
    assert not files[2].exists()
    assert foreign.exists()
    tier.close()


def test_smaller_capacity_after_a_restart_is_kept(tmp_path: Path) -> None:
    tier = FileTier(tmp_path, capacity_bytes=1 << 20)
    for index in range(4):
        assert tier.put(sample_key(index), memoryview(record_of(index, 9000)))
        path = tmp_path / sample_key(index).hex()[:2] / f"{sample_key(index).hex()}.rec"
        os.utime(path, (index, index))
    tier.close()
    tier = FileTier(tmp_path, capacity_bytes=2 * len(record_of(0, 9000)))
    assert tier.wait_scanned(10.0)
    assert {key for key, _ in tier.keys()} == {sample_key(2), sample_key(3)}  # noqa: SIM118 not a dict
    tier.close()


def test_one_store_owns_a_folder(tmp_path: Path) -> None:
    tier = FileTier(tmp_path, capacity_bytes=1 << 20)
    with pytest.raises(FolderBusyError, match=f"process {os.getpid()}"):
        FileTier(tmp_path, capacity_bytes=1 << 20)
    tier.close()
    FileTier(tmp_path, capacity_bytes=1 << 20).close()


def test_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderUnusableError, match="cannot be made"):
        FileTier(tmp_path / "file" / "tier", capacity_bytes=1 << 20)


def test_files_are_for_this_user_only(tmp_path: Path) -> None:
    tier = FileTier(tmp_path / "tier", capacity_bytes=1 << 20)
    assert tier.put(sample_key(0), memoryview(record_of(0, 100)))
    tier.close()
    for path in (tmp_path / "tier").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert (tmp_path / "tier").stat().st_mode & 0o077 == 0


def test_full_disk_at_the_start_is_an_unusable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(folder_module.os, "pwrite", full)
        with pytest.raises(FolderUnusableError, match="cannot be locked"):
            FileTier(tmp_path, capacity_bytes=1 << 20)
    assert len(os.listdir("/proc/self/fd")) == before
    FileTier(tmp_path, capacity_bytes=1 << 20).close()


def test_folder_that_cannot_be_scanned_says_so_and_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "ab").write_text("no folder")
    with pytest.raises(FolderUnusableError, match="cannot be read"):
        FileTier(tmp_path, capacity_bytes=1 << 20)
    (tmp_path / "ab").unlink()
    FileTier(tmp_path, capacity_bytes=1 << 20).close()
