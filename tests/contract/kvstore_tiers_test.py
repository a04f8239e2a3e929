"""Both tiers keep the tier contract."""

import os
import threading
from pathlib import Path

import pytest

from kvstore.interfaces import Tier
from kvstore.keys import ChunkKey
from kvstore.testing.tier import DurableTierContract, TierContract
from kvstore.tiers.file import FileTier
from kvstore.tiers.host import HostTier


class TestHostTier(TierContract):
    def make(self, *, capacity_bytes: int) -> Tier:
        return HostTier(capacity_bytes)

    def raw_write(self, tier: Tier, key: ChunkKey, data: bytes) -> None:
        assert isinstance(tier, HostTier)
        slot = tier.find(key)
        assert slot is not None
        os.pwrite(tier.fd, data, slot.offset)

    def leftovers(self, tier: Tier) -> list[str]:
        assert isinstance(tier, HostTier)
        return ["arena descriptor"] if tier.fd >= 0 else []


class _FileTierContract(DurableTierContract):
    direct: bool | None

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "tier"

    def make(self, *, capacity_bytes: int) -> Tier:
        return FileTier(self.folder, capacity_bytes=capacity_bytes, direct=self.direct)

    def reopen(self, tier: Tier) -> Tier:
        capacity_bytes = tier.stat().capacity_bytes
        tier.close()
        again = self.make(capacity_bytes=capacity_bytes)
        assert isinstance(again, FileTier)
        assert again.wait_scanned(10.0)
        return again

    def raw_write(self, tier: Tier, key: ChunkKey, data: bytes) -> None:
        (self.folder / key.hex()[:2] / f"{key.hex()}.rec").write_bytes(data)

    def leftovers(self, tier: Tier) -> list[str]:
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd)]
        open_files = [f"open {link}" for link in links if link.startswith(str(self.folder))]
        temporary = [str(path) for path in self.folder.rglob("*.tmp")]
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("kvstore")]
        return open_files + temporary + threads


class TestFileTierDirect(_FileTierContract):
    direct = None


class TestFileTierBuffered(_FileTierContract):
    direct = False


def _exists(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")
