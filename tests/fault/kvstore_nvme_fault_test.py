"""The NVMe pool and its devices when one of them fails, is slow, or does not answer at all."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.clock import ManualClock
from kvstore.container import MAGIC
from kvstore.policy import Quotas
from kvstore.settings import NvmeSettings
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_key
from kvstore.testing.tier import put_record, record_of
from kvstore.tiers.file import FileTier
from kvstore.tiers.folder import FolderBusyError, FolderUnusableError
from kvstore.tiers.nvme import NvmePool

PAUSE_S = 5.0
SLOW_S = 1.0
PAYLOAD_BYTES = 100_000
NUM_RECORDS = 24


class Devices:
    """Reads and writes below a folder fail, take time on the clock, or hang until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clock: ManualClock) -> None:
        self.clock = clock
        self.failing: dict[tuple[str, str], int] = {}
        """Error numbers by call ("preadv", "pwrite") and folder."""
        self.slow: dict[tuple[str, str], float] = {}
        """Seconds by call and folder."""
        self.hanging: set[tuple[str, str]] = set()
        self.thawed = threading.Event()
        self.attempts = 0
        for name in ("preadv", "pwrite"):
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., int]) -> Callable[..., int]:
        def call(fd: int, *arguments: object) -> int:
            path = os.readlink(f"/proc/self/fd/{fd}")
            self.attempts += 1
            for at, folder in [*self.failing, *self.slow, *self.hanging]:
                if at != name or not path.startswith(folder):
                    continue
                if (at, folder) in self.failing:
                    number = self.failing[at, folder]
                    raise OSError(number, os.strerror(number))
                if (at, folder) in self.hanging:
                    assert self.thawed.wait(30.0)
                else:
                    self.clock.advance_s(self.slow[at, folder])
            return real(fd, *arguments)

        return call


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch, clock: ManualClock) -> Devices:
    return Devices(monkeypatch, clock)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    return [str(tmp_path / name) for name in "abc"]


def settings_of(folders: list[str]) -> NvmeSettings:
    return NvmeSettings(
        folders=tuple(folders),
        capacity_bytes=1 << 28,
        policy="lru",
        lock_wait_s=0.0,
        breaker_failures=2,
        breaker_pause_s=PAUSE_S,
        slow_read_s=SLOW_S,
    )


@pytest.fixture
def pool(folders: list[str], clock: ManualClock) -> Iterator[NvmePool]:
    pool = NvmePool(settings_of(folders), clock=clock)
    assert pool.wait_scanned(10.0)
    for index in range(NUM_RECORDS):
        put_record(pool, index, PAYLOAD_BYTES)
    yield pool
    pool.close()


def on_device(folder: str, indices: range = range(NUM_RECORDS)) -> set[int]:
    names = {path.stem for path in Path(folder).rglob("*.rec")}
    return {index for index in indices if sample_key(index).hex() in names}


def readable(pool: NvmePool, indices: range = range(NUM_RECORDS)) -> set[int]:
    """Which records can be read; all of them right."""
    held = set()
    for index in indices:
        record = pool.get(sample_key(index))
        assert record is None or record == record_of(index, PAYLOAD_BYTES)
        if record is not None:
            held.add(index)
    return held


def test_records_are_striped(pool: NvmePool, folders: list[str]) -> None:
    shares = [on_device(folder) for folder in folders]
    assert sum(len(share) for share in shares) == NUM_RECORDS
    assert all(len(share) >= 3 for share in shares)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_writes_go_on_elsewhere_while_a_device_refuses_them(
    pool: NvmePool, folders: list[str], devices: Devices, clock: ManualClock, number: int
) -> None:
    """No write is lost to a device that refuses it; its records stay readable, and later it takes writes again."""
    before = on_device(folders[0])
    devices.failing["pwrite", folders[0]] = number
    later = range(NUM_RECORDS, 2 * NUM_RECORDS)
    for index in later:
        put_record(pool, index, PAYLOAD_BYTES)
    assert on_device(folders[0], later) == set()
    assert on_device(folders[0]) == before
    assert readable(pool, range(2 * NUM_RECORDS)) == set(range(2 * NUM_RECORDS))
    devices.failing.clear()
    clock.advance_s(PAUSE_S)
    last = range(2 * NUM_RECORDS, 3 * NUM_RECORDS)
    for index in last:
        put_record(pool, index, PAYLOAD_BYTES)
    assert on_device(folders[0], last), "it is used again"
    assert not [path for folder in folders for path in Path(folder).rglob("*.tmp")]


def test_device_that_cannot_be_read_costs_its_own_keys_for_a_while(
    pool: NvmePool, folders: list[str], devices: Devices, clock: ManualClock
) -> None:
    """EMFILE says nothing about a record, so the files stay: after the pause everything is there again."""
    lost = on_device(folders[0])
    devices.failing["preadv", folders[0]] = errno.EMFILE
    assert readable(pool) == set(range(NUM_RECORDS)) - lost
    index = min(lost)
    assert not pool.contains(sample_key(index)), "a lookup knows of the pause"
    put_record(pool, index, PAYLOAD_BYTES)
    assert pool.get(sample_key(index)) == record_of(index, PAYLOAD_BYTES), "learned again, it is elsewhere"
    devices.failing.clear()
    clock.advance_s(PAUSE_S)
    assert readable(pool) == set(range(NUM_RECORDS))
    assert len(dict(pool.keys())) == NUM_RECORDS
    assert pool.drop(sample_key(index)), "from both devices"
    assert pool.get(sample_key(index)) is None
    assert not [folder for folder in folders if index in on_device(folder)]


def test_slow_device_pauses_though_its_bytes_are_right(
    pool: NvmePool, folders: list[str], devices: Devices, clock: ManualClock
) -> None:
    slow = sorted(on_device(folders[0]))
    devices.slow["preadv", folders[0]] = 2 * SLOW_S
    for index in slow[:2]:
        assert pool.get(sample_key(index)) == record_of(index, PAYLOAD_BYTES)
    attempts = devices.attempts
    assert pool.get(sample_key(slow[2])) is None
    assert devices.attempts == attempts, "a paused device is not asked"
    clock.advance_s(PAUSE_S)
    devices.slow.clear()
    assert readable(pool) == set(range(NUM_RECORDS))


def test_hanging_device_takes_one_thread_and_no_more(
    pool: NvmePool, folders: list[str], devices: Devices, clock: ManualClock
) -> None:
    """A read that never ends: others of that device are misses at once, other devices are served."""
    stuck = sorted(on_device(folders[0]))
    devices.hanging.add(("preadv", folders[0]))
    answers: list[bytearray | None] = []
    reader = threading.Thread(target=lambda: answers.append(pool.get(sample_key(stuck[0]))))
    attempts = devices.attempts
    reader.start()
    wait_until(lambda: devices.attempts > attempts, what="the read hangs")
    clock.advance_s(2 * SLOW_S)
    assert readable(pool) == set(range(NUM_RECORDS)) - set(stuck)
    devices.hanging.clear()
    devices.thawed.set()
    reader.join(10.0)
    assert answers == [record_of(stuck[0], PAYLOAD_BYTES)]
    assert readable(pool) == set(range(NUM_RECORDS))


def test_copy_on_another_device_is_not_read_under_bytes_that_were_told_of(pool: NvmePool) -> None:
    """Its checksum would vouch for what somebody has used already; who asks again gets it."""
    key, record = sample_key(100), record_of(100, 5 << 20)
    first, second, _ = pool._order(key)
    assert first.tier.put(key, memoryview(record))
    assert second.tier.put(key, memoryview(record))
    (path,) = Path(first.tier.folder).rglob(f"{key.hex()}.rec")
    damaged = bytearray(record)
    damaged[100_000] ^= 1
    path.write_bytes(damaged)
    told: list[int] = []
    view = memoryview(bytearray(len(record)))
    assert pool.read_into(key, view, on_bytes=told.append) is None
    assert told
    assert pool.read_into(key, view, on_bytes=told.append) is not None
    assert view == record
    assert first.tier.put(key, memoryview(record))
    path.write_bytes(damaged)
    assert pool.get(key) == record, "nobody was told: the next device at once"


def test_late_read_ends_between_pieces(tmp_path: Path, devices: Devices, clock: ManualClock) -> None:
    """The deadline holds in the middle of a record; nobody is blamed, and the record stays."""
    tier = FileTier(tmp_path / "tier", capacity_bytes=1 << 28, slow_read_s=100.0, clock=clock)
    assert tier.wait_scanned(10.0)
    record = put_record(tier, 1, 5 << 20)
    view = memoryview(bytearray(len(record)))
    devices.slow["preadv", str(tmp_path)] = 1.0
    told: list[int] = []
    assert tier.read_into(sample_key(1), view, stop_s=clock.now_s() + 1.5, on_bytes=told.append) is None
    assert len(told) == 2
    assert told[-1] < len(record)
    assert tier.read_into(sample_key(1), view, stop_s=clock.now_s() + 100.0, on_bytes=told.append) is not None
    assert view == record
    assert told[2:] == sorted(told[2:])
    assert told[-1] == len(record)
    tier.close()


def test_folder_that_cannot_be_used_is_left_out(
    folders: list[str], clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The rest serves, the log names the folder and why, and at the next start its records are there again."""
    pool = NvmePool(settings_of(folders), clock=clock)
    for index in range(NUM_RECORDS):
        put_record(pool, index, PAYLOAD_BYTES)
    pool.close()
    lost = on_device(folders[1])
    Path(folders[1]).chmod(0o777)
    pool = NvmePool(settings_of(folders), clock=clock)
    assert pool.wait_scanned(10.0)
    assert list(pool.unusable) == [folders[1]]
    assert folders[1] in caplog.text
    assert readable(pool) == set(range(NUM_RECORDS)) - lost
    pool.close()
    Path(folders[1]).chmod(0o700)
    pool = NvmePool(settings_of(folders), clock=clock)
    assert pool.wait_scanned(10.0)
    assert readable(pool) == set(range(NUM_RECORDS))
    pool.close()


def test_no_usable_folder_says_why_for_each(folders: list[str]) -> None:
    for folder in folders:
        Path(folder).write_text("")
    with pytest.raises(FolderUnusableError, match=r"a cannot be made.*b cannot be made.*c cannot be made"):
        NvmePool(settings_of(folders))


def test_folder_of_another_store_refuses_the_start_and_frees_the_others(folders: list[str]) -> None:
    owner = FileTier(folders[2], capacity_bytes=1 << 20)
    with pytest.raises(FolderBusyError, match=f"process {os.getpid()}"):
        NvmePool(settings_of(folders))
    FileTier(folders[0], capacity_bytes=1 << 20).close()
    owner.close()
    NvmePool(settings_of(folders)).close()


def test_folder_that_is_taken_away_leaves_the_others_where_they_are(folders: list[str]) -> None:
    """Nothing is moved: only what the removed device held is missing."""
    pool = NvmePool(settings_of(folders))
    for index in range(NUM_RECORDS):
        put_record(pool, index, PAYLOAD_BYTES)
    pool.close()
    lost = on_device(folders[2])
    pool = NvmePool(settings_of(folders[:2]))
    assert pool.wait_scanned(10.0)
    assert readable(pool) == set(range(NUM_RECORDS)) - lost
    pool.close()


def test_quota_holds_over_all_devices(folders: list[str]) -> None:
    """Each device keeps its share of it."""
    limit_bytes = 12 * len(record_of(0, PAYLOAD_BYTES))
    pool = NvmePool(settings_of(folders), quotas=Quotas(by_tenant={"": limit_bytes}))
    for index in range(60):
        put_record(pool, index, PAYLOAD_BYTES)
    assert limit_bytes / 2 < pool.stat().bytes <= limit_bytes
    assert pool.contains(sample_key(59))
    pool.close()


def test_pinned_records_stay_until_their_time(tmp_path: Path, clock: ManualClock) -> None:
    record_bytes = len(record_of(0, PAYLOAD_BYTES))
    settings = settings_of([str(tmp_path / "a")]).model_copy(update={"capacity_bytes": 4 * record_bytes})
    pool = NvmePool(settings, clock=clock)
    put_record(pool, 0, PAYLOAD_BYTES)
    assert pool.pin(sample_key(0), until_s=10.0)
    assert not pool.pin(sample_key(99), until_s=10.0)
    for index in range(1, 10):
        put_record(pool, index, PAYLOAD_BYTES)
    assert pool.get(sample_key(0)) is not None
    assert pool.stat().pinned_bytes == record_bytes
    clock.advance_s(11.0)
    for index in range(10, 20):
        put_record(pool, index, PAYLOAD_BYTES)
    assert not pool.contains(sample_key(0))
    assert pool.stat().pinned_bytes == 0
    pool.close()


def test_files_begin_with_the_magic(pool: NvmePool, folders: list[str]) -> None:
    """What lies on the disk is the record itself: readable without the store."""
    path = next(Path(folders[0]).rglob("*.rec"))
    assert path.read_bytes().startswith(MAGIC)
    assert pool.contains(sample_key(min(on_device(folders[0]))))
