"""The NVMe pool: records striped over the folders of several devices.

Covers: which device a record goes to, what happens when one fails. Does not cover: one device (`kvstore.tiers.file`).

Every key has an order of devices (weighted rendezvous hashing): it is written to the first that takes writes, and read
from whichever has it. So a device that pauses leaves the others serving: its keys are missing, new ones go elsewhere,
and when it is back both are found. Nothing is moved when folders are added or removed; what a removed folder held is
missing, the rest stays where it is.
"""

import hashlib
import itertools
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from cluster.clock import Clock
from cluster.telemetry import short
from kvstore import metrics
from kvstore.container import Header
from kvstore.interfaces import OnBytes, TierEntry, TierStat
from kvstore.keys import ChunkKey
from kvstore.policy import Quotas
from kvstore.settings import NvmeSettings
from kvstore.tiers.buffers import AlignedBuffers
from kvstore.tiers.file import FileTier, Outcome
from kvstore.tiers.folder import FolderUnusableError

log = logging.getLogger(__name__)


class NvmePool:
    """Records on the devices of one node, for any number of threads.

    Each device has the share of the capacity, and of every quota, that its file system has of all of them. A device
    that cannot be used at the start is left out until the next one: its share stays its own.

    Args:
        settings: Folders and bounds.
        quotas: Bytes per tenant over all devices.
        max_pinned_ratio: Share of each device that pins may hold.
        sealed: Whether records are sealed ones (`kvstore.tiers.sealed`).
        direct: Whether to bypass the page cache; None finds out per folder.
        on_drop: Told of every record that left a device by eviction or damage, from any thread.
        on_found: Told of records of a former life, some at a time, from any thread, also before this object is made.
        clock: For pauses and deadlines.

    Raises:
        FolderBusyError: Another store owns one of the folders.
        FolderUnusableError: No folder can be used.
    """

    def __init__(
        self,
        settings: NvmeSettings,
        *,
        quotas: Quotas | None = None,
        max_pinned_ratio: float = 0.5,
        sealed: bool = False,
        direct: bool | None = None,
        on_drop: Callable[[ChunkKey], None] | None = None,
        on_found: Callable[[Sequence[ChunkKey]], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._buffers = AlignedBuffers()
        self._devices: list[_Device] = []
        self._tiers: list[FileTier] = []
        self.unusable: dict[str, str] = {}
        """Folders that are left out, and why."""
        quotas = quotas or Quotas()

        def open_device(folder: str, weight: float) -> FileTier:
            return FileTier(
                folder,
                capacity_bytes=max(1, int(weight * settings.capacity_bytes)),
                policy=settings.policy,
                quotas=_share(quotas, weight),
                high_ratio=settings.high_ratio,
                low_ratio=settings.low_ratio,
                max_pinned_ratio=max_pinned_ratio,
                lock_wait_s=settings.lock_wait_s,
                breaker_failures=settings.breaker_failures,
                breaker_pause_s=settings.breaker_pause_s,
                slow_read_s=settings.slow_read_s,
                direct=direct,
                sealed=sealed,
                on_drop=on_drop,
                on_found=on_found,
                clock=clock,
            )

        try:
            self._open_all(settings.folders, open_device)
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The tier's name."""
        return "nvme"

    # Reading

    def entry(self, key: ChunkKey) -> TierEntry | None:
        """What is known about a key, from a device that can be read if there is one."""
        known: TierEntry | None = None
        for device in self._devices:
            entry = device.tier.entry(key)
            if entry is not None and device.tier.can_read:
                return entry
            known = known or entry
        return known

    def contains(self, key: ChunkKey) -> bool:
        """Whether a device that can be read has the record."""
        for tier in self._tiers:  # noqa: SIM110 asked for every key of every lookup: a generator costs as much again
            if tier.contains(key):
                return True
        return False

    def get(self, key: ChunkKey) -> bytearray | None:
        """One record's bytes, or None."""
        entry = self.entry(key)
        if entry is None:
            metrics.TIER_READS.labels(self.name, "miss").inc()
            return None
        with self._buffers.take(entry.stored_bytes) as view:
            return bytearray(view) if self.read_into(key, view) is not None else None

    def read_into(
        self, key: ChunkKey, view: memoryview, *, stop_s: float = math.inf, on_bytes: OnBytes | None = None
    ) -> Header | None:
        """As `FileTier.read_into`, from the first device that has it; after a failure from the next.

        Not after `on_bytes` was told: somebody may use those bytes, which another copy's checksum says nothing about.
        """
        outcome = "miss"
        was_told = False

        def note(num_bytes: int) -> None:
            nonlocal was_told
            if on_bytes is not None:
                was_told = True
                on_bytes(num_bytes)

        for device in self._order(key):
            if not device.tier.contains(key):
                continue
            header, outcome = device.tier.load(key, view, stop_s=stop_s, on_bytes=note)
            if header is not None or outcome == "late" or was_told:
                metrics.TIER_READS.labels(self.name, outcome).inc()
                return header
        metrics.TIER_READS.labels(self.name, outcome).inc()
        return None

    # Writing

    def put(self, key: ChunkKey, record: memoryview) -> bool:
        """Write one record to the first device of its key's order that takes it."""
        outcome = self._store(key, record)
        metrics.TIER_WRITES.labels(self.name, "error" if outcome == "refused" else outcome).inc()
        return outcome == "stored"

    def drop(self, key: ChunkKey) -> bool:
        """Delete one record from every device."""
        return any([device.tier.drop(key) for device in self._devices])

    def remove_leftovers(self) -> int:
        """Delete temporary files that former lives left and the scans have missed; how many."""
        return sum(device.tier.remove_leftovers() for device in self._devices)

    # Books

    def keys(self) -> Iterator[tuple[ChunkKey, int]]:
        """Keys known and the bytes of their files, in no order."""
        return iter([(key, entry.stored_bytes) for key, entry in self.entries()])

    def entries(self) -> list[tuple[ChunkKey, TierEntry]]:
        """All that is known, in no order; a record on two devices once."""
        if len(self._devices) == 1:
            return self._devices[0].tier.entries()
        return list(dict(itertools.chain.from_iterable(device.tier.entries() for device in self._devices)).items())

    def uses(self, key: ChunkKey) -> int:
        """How often a record was read in this life."""
        return sum(device.tier.uses(key) for device in self._devices)

    def pin(self, key: ChunkKey, *, until_s: float) -> bool:
        """Keep a record from being evicted until a monotonic time; False if it is not here, or pins hold too much."""
        return any([device.tier.pin(key, until_s=until_s) for device in self._devices])

    def unpin(self, key: ChunkKey) -> None:
        """End a pin; a key without one is ignored."""
        for device in self._devices:
            device.tier.unpin(key)

    def stat(self) -> TierStat:
        """Counts now, over all devices; also tells the metrics how the devices are."""
        stats = [device.tier.stat() for device in self._devices]
        states = Counter(device.state for device in self._devices)
        for state in ("serving", "read_only", "paused"):
            metrics.NVME_DEVICES.labels(state).set(states[state])
        metrics.NVME_DEVICES.labels("unusable").set(len(self.unusable))
        return TierStat(
            chunks=sum(stat.chunks for stat in stats),
            bytes=sum(stat.bytes for stat in stats),
            capacity_bytes=sum(device.tier.capacity_bytes for device in self._devices),
            pinned_bytes=sum(stat.pinned_bytes for stat in stats),
        )

    def wait_scanned(self, timeout_s: float | None = None) -> bool:
        """Wait until all records of former lives are found, each device for at most that long; whether they are."""
        return all(device.tier.wait_scanned(timeout_s) for device in self._devices)

    def close(self) -> None:
        """Give the folders up; records stay. Repeating it is harmless."""
        for device in self._devices:
            device.tier.close()
        self._buffers.close()

    def _open_all(self, folders: Sequence[str], open_device: Callable[[str, float], FileTier]) -> None:
        weights = _weights([os.path.abspath(os.path.expanduser(folder)) for folder in folders])
        for folder, weight in weights.items():
            try:
                self._devices.append(_Device(open_device(folder, weight), weight))
            except FolderUnusableError as error:
                self.unusable[folder] = str(error)
                log.error("nvme_folder_unusable folder=%s error=%s", folder, error)  # noqa: TRY400 the message is the cause
        self._tiers = [device.tier for device in self._devices]
        if not self._devices:
            reasons = "; ".join(self.unusable.values()) or "settings name none"
            raise FolderUnusableError(f"no folder of the NVMe pool can be used: {reasons}")

    def _store(self, key: ChunkKey, record: memoryview) -> Outcome:
        outcome: Outcome = "full"
        order = self._order(key)
        if any(device.tier.contains(key) for device in order[1:]):
            # Written there while the device before it paused.
            return "stored"
        for device in order:
            if device.tier.entry(key) is not None and not device.tier.can_read:
                # It has the record, but cannot give it now.
                outcome = "paused"
                continue
            outcome = device.tier.store(key, record)
            if outcome in ("stored", "refused"):
                break
            log.debug("nvme_device_passed folder=%s key=%s outcome=%s", device.tier.folder, short(key), outcome)
        return outcome

    def _order(self, key: ChunkKey) -> "list[_Device]":
        if len(self._devices) == 1:
            return self._devices
        return sorted(self._devices, key=lambda device: device.score(key), reverse=True)


class _Device:
    """One folder of the pool."""

    def __init__(self, tier: FileTier, weight: float) -> None:
        self.tier = tier
        self.weight = weight
        self._salt = hashlib.blake2b(tier.folder.encode(), digest_size=16).digest()

    @property
    def state(self) -> str:
        """For the metric."""
        if not self.tier.can_read:
            return "paused"
        return "serving" if self.tier.can_write else "read_only"

    def score(self, key: ChunkKey) -> float:
        """Of weighted rendezvous hashing: highest for a share of the keys that is the device's share of the weight.

        Source:
            Schindelhauer, Schomaker: "Weighted Distributed Hash Tables", SPAA 2005 (the logarithmic method).
        """
        digest = hashlib.blake2b(key, digest_size=8, salt=self._salt).digest()
        uniform = (int.from_bytes(digest, "little") + 1) / (2**64 + 2)
        return -self.weight / math.log(uniform)


def _weights(folders: Sequence[str]) -> dict[str, float]:
    """Share of each folder: by the size of its file system, which folders on the same one divide among them."""
    seen: dict[str, tuple[int, int]] = {}
    for folder in folders:
        seen[folder] = _file_system(folder)
    sharing = Counter(device for device, _ in seen.values())
    sizes = {folder: size / sharing[device] for folder, (device, size) in seen.items()}
    total = sum(sizes.values())
    return {folder: size / total if total else 1 / len(sizes) for folder, size in sizes.items()}


def _file_system(folder: str) -> tuple[int, int]:
    """Number and bytes of the file system that a folder is, or will be, on; zeros if it cannot be told."""
    while not os.path.exists(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    try:
        room = os.statvfs(folder)
        return os.stat(folder).st_dev, room.f_blocks * room.f_frsize
    except OSError:
        return 0, 0


def _share(quotas: Quotas, weight: float) -> Quotas:
    """A device's share of quotas that hold for all devices together."""
    return Quotas(
        by_tenant={tenant: max(1, int(weight * limit)) for tenant, limit in quotas.by_tenant.items()},
        default=None if quotas.default is None else max(1, int(weight * quotas.default)),
    )
