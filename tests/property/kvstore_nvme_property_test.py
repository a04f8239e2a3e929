"""The NVMe pool against a dict: any history of puts, reads, drops, damage and restarts; and many threads at once."""

import random
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore import metrics
from kvstore.container import encode_record, stored_bytes
from kvstore.keys import ChunkKey
from kvstore.settings import NvmeSettings
from kvstore.testing.samples import sample_key, sample_meta, sample_payload
from kvstore.tiers.file import FileTier
from kvstore.tiers.nvme import NvmePool

NUM_KEYS = 10


def record_of(index: int) -> bytearray:
    """Lengths differ per key, so that spares are too short, too long, and right."""
    return encode_record(sample_key(index), sample_meta(), sample_payload(index, 3000 + 9000 * (index % 4)))


class NvmePoolMachine(RuleBasedStateMachine):
    """What is read was put under that key; what the books say is on the disk; capacity holds; nothing is left over."""

    keys = st.integers(0, NUM_KEYS - 1)

    @initialize(low_ratio=st.sampled_from([0.5, 1.0]), policy=st.sampled_from(["lru", "cost", "s3fifo", "arc"]))
    def start(self, low_ratio: float, policy: str) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="learnonce-test-"))
        self.settings = NvmeSettings.model_validate(
            {
                "folders": (str(self.home / "a"), str(self.home / "b")),
                "capacity_bytes": 2 * 3 * len(record_of(3)),
                "low_ratio": low_ratio,
                "policy": policy,
            }
        )
        self.stored: set[int] = set()
        """Keys that may be there: put, and not dropped, damaged or told to have left since."""
        self.open()

    def open(self) -> None:
        self.pool = NvmePool(self.settings, on_drop=self.note_drop)
        assert self.pool.wait_scanned(10.0)

    def note_drop(self, key: ChunkKey) -> None:
        self.stored.discard(next(index for index in range(NUM_KEYS) if sample_key(index) == key))

    @rule(index=keys)
    def put(self, index: int) -> None:
        assert self.pool.put(sample_key(index), memoryview(record_of(index)))
        self.stored.add(index)
        assert self.pool.get(sample_key(index)) == record_of(index), "what was just put is not what leaves"

    @rule(index=keys)
    def get(self, index: int) -> None:
        found = self.pool.get(sample_key(index))
        assert (found == record_of(index)) if index in self.stored else (found is None)

    @rule(index=keys)
    def drop(self, index: int) -> None:
        assert self.pool.drop(sample_key(index)) == (index in self.stored)
        self.stored.discard(index)

    @rule(index=keys, at_byte=st.integers(0), flip=st.integers(1, 255))
    def damage(self, index: int, at_byte: int, flip: int) -> None:
        for path in self.paths(index):
            data = bytearray(path.read_bytes())
            data[at_byte % len(data)] ^= flip
            path.write_bytes(data)
            assert self.pool.get(sample_key(index)) is None
            assert index not in self.stored, "damage was told"

    @rule(index=keys, length=st.integers(0, 40_000))
    def cut(self, index: int, length: int) -> None:
        for path in self.paths(index):
            if length == path.stat().st_size:
                continue
            with path.open("r+b") as file:
                file.truncate(length)
            assert self.pool.get(sample_key(index)) is None

    @rule()
    def restart(self) -> None:
        self.pool.close()
        self.open()

    @invariant()
    def books_are_those_of_the_disk(self) -> None:
        if not hasattr(self, "pool"):
            return
        held = dict(self.pool.keys())
        assert held.keys() == {sample_key(index) for index in self.stored}
        on_disk = {ChunkKey(bytes.fromhex(path.stem)): path.stat().st_size for path in self.home.rglob("*.rec")}
        assert held == on_disk
        stat = self.pool.stat()
        assert (stat.chunks, stat.bytes) == (len(held), sum(held.values()))
        spares = sum(path.stat().st_size for path in self.home.rglob("*.tmp"))
        assert stat.bytes + spares <= self.settings.capacity_bytes

    def paths(self, index: int) -> list[Path]:
        return list(self.home.rglob(f"{sample_key(index).hex()}.rec"))

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.close()
            assert not list(self.home.rglob("*.tmp"))
            shutil.rmtree(self.home)


TestNvmePool = NvmePoolMachine.TestCase
TestNvmePool.settings = settings(
    max_examples=6,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("seed", range(3))
def test_threads_during_a_scan_at_the_capacity_limit(tmp_path: Path, seed: int, direct: bool) -> None:
    """Files are evicted, written over, dropped and read at once, while the scan goes through them: no wrong byte."""
    num_keys, num_threads, num_steps = 40, 6, 120
    records = [record_of(index) for index in range(num_keys)]
    room = 12 * stored_bytes(30_000)
    first = FileTier(tmp_path, capacity_bytes=room, direct=direct)
    for index in range(num_keys):
        assert first.put(sample_key(index), memoryview(records[index]))
    first.close()
    tier = FileTier(tmp_path, capacity_bytes=room, low_ratio=0.8, direct=direct)
    wrong: list[str] = []
    corrupt = metrics.TIER_READS.labels("nvme", "corrupt")
    corrupt_before = corrupt._value.get()

    def work(number: int) -> None:
        draw = random.Random(f"{seed}/{number}")
        for _ in range(num_steps):
            index = draw.randrange(num_keys)
            step: Callable[[int], str | None] = draw.choice([put, get, get, drop])
            said = step(index)
            if said:
                wrong.append(f"{said} {index}")

    def put(index: int) -> str | None:
        return None if tier.put(sample_key(index), memoryview(records[index])) else "refused"

    def get(index: int) -> str | None:
        found = tier.get(sample_key(index))
        return None if found is None or found == records[index] else "wrong bytes of"

    def drop(index: int) -> str | None:
        tier.drop(sample_key(index))
        return None

    threads = [threading.Thread(target=work, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert not wrong
    assert corrupt._value.get() == corrupt_before, "a file was written over while it was read"
    assert tier.wait_scanned(10.0)
    on_disk = {ChunkKey(bytes.fromhex(path.stem)): path.stat().st_size for path in tmp_path.rglob("*.rec")}
    assert dict(tier.keys()) == on_disk
    assert tier.stat().bytes == sum(on_disk.values()) <= room
    assert all(tier.get(key) is not None for key in on_disk)
    tier.close()
    assert not list(tmp_path.rglob("*.tmp"))


def test_spares_and_records_together_keep_the_capacity(tmp_path: Path) -> None:
    """Also when a long record is written over a short spare."""
    short, long = (encode_record(sample_key(n), sample_meta(), bytes(size)) for n, size in ((0, 100), (99, 20_000)))
    tier = FileTier(tmp_path, capacity_bytes=10 * len(short), low_ratio=0.6)
    for index in range(10):
        record = encode_record(sample_key(index), sample_meta(), bytes(100))
        assert tier.put(sample_key(index), memoryview(record))
    assert tier.put(sample_key(99), memoryview(long))
    files = [path.stat().st_size for path in tmp_path.rglob("*") if path.suffix in (".rec", ".tmp")]
    assert sum(files) <= tier.capacity_bytes
    assert any(tmp_path.rglob("*.tmp")), "the case is about spares"
    tier.close()
