"""The object tier over pyarrow on file systems that hang, refuse, or hold what a crash left."""

import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow
import pytest
from pyarrow import fs

from kvstore.settings import ObjectSettings
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_key
from kvstore.testing.tier import put_record, record_of
from kvstore.tiers import arrow as arrow_module
from kvstore.tiers.arrow import ArrowBucket
from kvstore.tiers.bucket import BucketLateError
from kvstore.tiers.object import ObjectTier, open_object_tier

DEADLINE_S = 0.5
SCHEDULING_S = 1.0


class Mount:
    """A local file system that hangs when told to, like a mount whose server is gone."""

    def __init__(self) -> None:
        self._local = fs.LocalFileSystem()
        self._goes_on = threading.Event()
        self._goes_on.set()
        self.waiting = 0

    def hang(self) -> None:
        self._goes_on.clear()

    def thaw(self) -> None:
        self._goes_on.set()

    def __getattr__(self, name: str) -> object:
        if not self._goes_on.is_set():
            self.waiting += 1
            self._goes_on.wait()
            self.waiting -= 1
        return getattr(self._local, name)


@pytest.fixture
def mount(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mount]:
    mount = Mount()
    monkeypatch.setattr(arrow_module, "_make_file_system", lambda *_: mount)
    yield mount
    mount.thaw()
    wait_until(lambda: not _threads(), what="threads of the tier are gone")


@pytest.fixture
def tier(mount: Mount, tmp_path: Path) -> Iterator[ObjectTier]:
    tier = _open(tmp_path / "bucket")
    assert tier.refresh()
    yield tier
    mount.thaw()
    tier.close()


def _open(folder: Path) -> ObjectTier:
    return open_object_tier(
        ObjectSettings(
            url=f"arrow+file://{folder}",
            io_threads=1,
            refresh_s=3600.0,
            timeout_s=0.3,
            deadline_s=DEADLINE_S,
            breaker_failures=100,
        )
    )


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvstore-object")]


def test_read_from_a_mount_that_hangs_is_late_and_never_lands(mount: Mount, tier: ObjectTier) -> None:
    record = put_record(tier, 0, 500_000)
    mount.hang()
    memory = bytearray(len(record))
    start_s = time.monotonic()
    view = memoryview(memory)
    assert tier.read_into(sample_key(0), view, stop_s=start_s + 60) is None
    assert time.monotonic() - start_s < DEADLINE_S + SCHEDULING_S
    mount.thaw()
    wait_until(lambda: _bucket(tier)._errands.num_abandoned == 0, what="the read ended")
    assert not any(memory)
    view.release()
    memory.clear()
    assert tier.get(sample_key(0)) == record


def test_write_to_a_mount_that_hangs_fails_and_lets_the_memory_go(mount: Mount, tier: ObjectTier) -> None:
    mount.hang()
    record = record_of(0, 500_000)
    expected = bytes(record)
    start_s = time.monotonic()
    with memoryview(record) as view:
        assert not tier.put(sample_key(0), view)
    assert time.monotonic() - start_s < DEADLINE_S + SCHEDULING_S
    record.clear()
    mount.thaw()
    wait_until(lambda: _bucket(tier)._errands.num_abandoned == 0, what="the write ended")
    assert tier.refresh()
    assert tier.get(sample_key(0)) == expected, "what came late came whole"


def test_mount_that_hangs_holds_a_bounded_number_of_threads(mount: Mount, tier: ObjectTier) -> None:
    record = put_record(tier, 0, 5000)
    mount.hang()
    for _ in range(12):
        with memoryview(bytearray(len(record))) as view:
            assert tier.read_into(sample_key(0), view, stop_s=time.monotonic() + 0.02) is None
    assert len([name for name in _threads() if "arrow" in name]) <= 6
    mount.thaw()
    wait_until(lambda: _bucket(tier)._errands.num_abandoned == 0, what="threads are free again")
    assert tier.get(sample_key(0)) == record


def test_deletions_come_to_an_end_though_few_fit_a_deadline(
    tier: ObjectTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other takes its time: each try may not begin with those that are gone."""
    delete = ArrowBucket.delete

    def delete_few(bucket: ArrowBucket, names: Sequence[str], *, stop_s: float) -> None:
        delete(bucket, names[:10], stop_s=stop_s)
        if len(names) > 10:
            raise BucketLateError("no answer in time")

    monkeypatch.setattr(ArrowBucket, "delete", delete_few)
    for index in range(40):
        put_record(tier, index, 100)
    with tier._lock:
        # All at once, and without a word to the tier's own thread.
        for key, entry in list(tier._index.books.items()):
            tier._index.remove(key)
            tier._index.doom(key, entry)
    wait_until(tier._delete_doomed, what="the deletions to end")
    assert not list(tmp_path.rglob("*.rec"))


def test_end_while_the_mount_hangs(mount: Mount, tmp_path: Path) -> None:
    tier = _open(tmp_path / "bucket")
    assert tier.refresh()
    put_record(tier, 0, 5000)
    mount.hang()
    assert tier.drop(sample_key(0))
    wait_until(lambda: mount.waiting, what="the deletion hangs")
    start_s = time.monotonic()
    tier.close()
    assert time.monotonic() - start_s < 5 + SCHEDULING_S


def test_folder_that_cannot_be_made_pauses_the_tier_until_it_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "place").write_text("a file")
    for scheme in ("file", "arrow+file"):
        tier = open_object_tier(ObjectSettings(url=f"{scheme}://{tmp_path}/place/bucket", refresh_s=3600.0))
        assert not tier.refresh()
        assert not tier.put(sample_key(0), memoryview(record_of(0, 100)))
        assert "the store runs without it" in caplog.text
        (tmp_path / "place").unlink()
        assert tier.refresh()
        put_record(tier, 0, 100)
        assert tier.drop(sample_key(0))
        tier.close()
        for path in sorted((tmp_path / "place").rglob("*"), reverse=True):
            path.rmdir()
        (tmp_path / "place").rmdir()
        (tmp_path / "place").write_text("a file again")


def test_what_a_crash_left_is_no_object_and_is_deleted_when_it_is_old(tmp_path: Path) -> None:
    folder = tmp_path / "bucket"
    tier = _open(folder)
    record = put_record(tier, 0, 5000)
    old, new = folder / ".writing" / "1.2.3.tmp", folder / ".writing" / "4.5.6.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    assert tier.refresh()
    assert not old.exists(), "listings delete them, too"
    assert new.exists()
    assert tier.remove_leftovers() == 0
    assert tier.stat().chunks == 1
    assert tier.get(sample_key(0)) == record
    tier.close()


def test_what_a_crash_of_obstore_left_is_deleted_when_it_is_old(tmp_path: Path) -> None:
    tier = open_object_tier(ObjectSettings(url=f"file://{tmp_path}", refresh_s=3600.0))
    assert tier.refresh()
    record = put_record(tier, 0, 5000)
    (path,) = tmp_path.glob("*/*.rec")
    old, new = path.with_name(path.name + "#1"), path.with_name(path.name + "#2")
    for half in (old, new):
        half.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    assert tier.remove_leftovers() == 1
    assert not old.exists()
    assert new.exists()
    assert tier.get(sample_key(0)) == record
    tier.close()


def test_failed_move_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Immovable(Mount):
        def move(self, *_: str) -> None:
            raise pyarrow.ArrowIOError("no space left on device")

    monkeypatch.setattr(arrow_module, "_make_file_system", lambda *_: Immovable())
    tier = _open(tmp_path / "bucket")
    assert tier.refresh()
    assert not tier.put(sample_key(0), memoryview(record_of(0, 5000)))
    assert not [path for path in (tmp_path / "bucket").rglob("*") if path.is_file()]
    tier.close()


def test_good_object_that_replaced_a_damaged_one_during_the_read_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = tmp_path / "good"

    class Replaced(Mount):
        def open_input_file(self, path: str) -> object:
            file = self._local.open_input_file(path)
            if good.exists():
                good.rename(path)
            return file

    monkeypatch.setattr(arrow_module, "_make_file_system", lambda *_: Replaced())
    tier = _open(tmp_path / "bucket")
    assert tier.refresh()
    record = put_record(tier, 0, 5000)
    (path,) = (tmp_path / "bucket").glob("*/*.rec")
    good.write_bytes(record)
    record[-4000] ^= 1
    path.write_bytes(record)
    os.utime(path, (1, 1))
    assert tier.get(sample_key(0)) is None
    wait_until(lambda: not tier._index.doomed, what="the damaged object was looked for")
    assert tier.refresh()
    assert tier.get(sample_key(0)) == record_of(0, 5000)
    tier.close()


def test_folders_that_somebody_deleted_are_made_again(tmp_path: Path) -> None:
    tier = _open(tmp_path / "bucket")
    assert tier.refresh()
    put_record(tier, 0, 5000)
    shutil.rmtree(tmp_path / "bucket")
    assert tier.refresh()
    assert not tier.put(sample_key(0), memoryview(record_of(0, 5000)))
    record = put_record(tier, 0, 5000)
    assert tier.get(sample_key(0)) == record
    tier.close()


def test_folder_is_for_this_user_only(tmp_path: Path) -> None:
    for scheme in ("file", "arrow+file"):
        folder = tmp_path / scheme
        tier = open_object_tier(ObjectSettings(url=f"{scheme}://{folder}", refresh_s=3600.0))
        assert tier.refresh()
        assert folder.stat().st_mode & 0o077 == 0
        tier.close()


def test_hdfs_without_its_library_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tier = open_object_tier(ObjectSettings(url="arrow+hdfs://127.0.0.1:1/chunks", refresh_s=3600.0))
    if not tier.refresh():
        assert "libhdfs" in caplog.text
    tier.close()


def _bucket(tier: ObjectTier) -> ArrowBucket:
    bucket = tier._bucket
    assert isinstance(bucket, ArrowBucket)
    return bucket
