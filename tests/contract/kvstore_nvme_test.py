"""The NVMe pool keeps the tier contract, on one device and on three."""

import os
import threading
from pathlib import Path

import pytest

from kvstore.interfaces import Tier
from kvstore.keys import ChunkKey
from kvstore.settings import NvmeSettings
from kvstore.testing.samples import sample_key
from kvstore.testing.tier import CAPACITY_BYTES, DurableTierContract, put_record
from kvstore.tiers.nvme import NvmePool


class _NvmePoolContract(DurableTierContract):
    num_folders: int
    direct: bool | None = None

    @pytest.fixture(autouse=True)
    def _folders(self, tmp_path: Path) -> None:
        self.folders = [tmp_path / f"device-{index}" for index in range(self.num_folders)]

    def make(self, *, capacity_bytes: int) -> Tier:
        # Each device has its share, and the suite counts in whole tiers.
        return self._open(capacity_bytes * self.num_folders)

    def reopen(self, tier: Tier) -> Tier:
        capacity_bytes = tier.stat().capacity_bytes or 0
        tier.close()
        again = self._open(capacity_bytes)
        assert again.wait_scanned(10.0)
        return again

    def raw_write(self, tier: Tier, key: ChunkKey, data: bytes) -> None:
        name = f"{key.hex()[:2]}/{key.hex()}.rec"
        (path,) = [folder / name for folder in self.folders if (folder / name).exists()]
        path.write_bytes(data)

    def leftovers(self, tier: Tier) -> list[str]:
        links = [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if os.path.lexists(fd)]
        roots = tuple(str(folder) for folder in self.folders)
        open_files = [f"open {link}" for link in links if link.startswith(roots)]
        temporary = [str(path) for folder in self.folders for path in folder.rglob("*.tmp")]
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("kvstore")]
        return open_files + temporary + threads

    def _open(self, capacity_bytes: int) -> NvmePool:
        settings = NvmeSettings(
            folders=tuple(str(folder) for folder in self.folders),
            capacity_bytes=capacity_bytes,
            low_ratio=1.0,
            policy="lru",
        )
        return NvmePool(settings, direct=self.direct)


class TestNvmePoolOfOne(_NvmePoolContract):
    num_folders = 1


class TestNvmePoolOfThree(_NvmePoolContract):
    num_folders = 3

    def test_least_recently_used_leaves_first(self, tier: Tier) -> None:
        """On each device by itself, which is what keeps the capacity of each."""
        for index in range(40):
            put_record(tier, index, 100_000)
            assert tier.get(sample_key(0)) is not None, "what is used stays"
        assert (tier.stat().capacity_bytes or 0) >= tier.stat().bytes > 2 * CAPACITY_BYTES
        for folder in self.folders:
            files = [path.stat().st_size for path in folder.rglob("*.rec")]
            assert sum(files) <= CAPACITY_BYTES
            assert len(files) >= 5, "records are striped over all devices"
        assert tier.contains(sample_key(39))


class TestNvmePoolOfThreeBuffered(TestNvmePoolOfThree):
    direct = False
