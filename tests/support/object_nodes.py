"""Tiers of several nodes that share a bucket on our S3 server, for fault tests; checked for leaks at the end."""

import threading
import time
import uuid

import obstore
import psutil
from obstore.store import ObjectStore, from_url

from cluster.clock import ManualClock
from kvstore.keys import ChunkKey
from kvstore.settings import ObjectSettings
from kvstore.testing.poll import wait_until
from kvstore.testing.s3 import S3Process
from kvstore.testing.samples import sample_key
from kvstore.tiers.object import ObjectTier, open_bucket

PAUSE_S = 5.0
QUICK = {"timeout_s": 0.3, "deadline_s": 1.2}
"""For tests that wait for a deadline. What must succeed has more time: the machine may be busy."""
SCHEDULING_S = 1.0
"""What a machine that is busy with other things may add to a deadline."""
PAYLOAD_BYTES = 3_000_000
"""Large enough to be read in pieces."""
SECRET = "very-secret-value"


class Nodes:
    """Tiers of several nodes that share a bucket, closed and checked at the end of a test."""

    def __init__(self, server: S3Process) -> None:
        self.url = f"{server.url}/{uuid.uuid4().hex}"
        self.options = {**server.options, "secret_access_key": SECRET}
        self.clock = ManualClock()
        self.changed: list[ChunkKey] = []
        self._tiers: list[ObjectTier] = []
        self._ports = {server.port}

    def open(self, *, endpoint: str | None = None, **changes: object) -> ObjectTier:
        options = self.options if endpoint is None else {**self.options, "endpoint": endpoint}
        if endpoint is not None:
            self._ports.add(int(endpoint.rpartition(":")[2]))
        values = {
            "url": self.url,
            "options": options,
            "policy": "lru",
            "refresh_s": 3600.0,
            "connect_timeout_s": 1.0,
            "timeout_s": 5.0,
            "deadline_s": 10.0,
            "breaker_failures": 2,
            "breaker_pause_s": PAUSE_S,
            **changes,
        }
        settings = ObjectSettings.model_validate(values)
        tier = ObjectTier(
            open_bucket(settings),
            settings=settings,
            on_change=self.changed.extend,
            clock=self.clock,
        )
        self._tiers.append(tier)
        return tier

    def ready(self, **changes: object) -> ObjectTier:
        tier = self.open(**changes)
        assert tier.refresh()
        self.changed.clear()
        return tier

    def bare(self) -> ObjectStore:
        """The bucket beside any tier."""
        options = {name: value for name, value in self.options.items() if name != "allow_http"}
        return from_url(self.url, config=options, client_options={"allow_http": True})

    def close(self) -> None:
        for tier in self._tiers:
            start_s = time.monotonic()
            tier.close()
            assert time.monotonic() - start_s < 4 + SCHEDULING_S
        wait_until(lambda: not our_threads(), what="threads of the tier are gone")
        wait_until(lambda: not self._sockets(), what="sockets of the tier are gone")

    def _sockets(self) -> list[object]:
        connections = psutil.Process().net_connections()
        return [c for c in connections if c.raddr and c.raddr.port in self._ports and c.status != "TIME_WAIT"]


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvstore-object")]


def timed_get(tier: ObjectTier, index: int) -> tuple[bytearray | None, float]:
    start_s = time.monotonic()
    return tier.get(sample_key(index)), time.monotonic() - start_s


def longest_s(tier: ObjectTier) -> float:
    """The tier's own deadline for one record, and what the machine may add."""
    settings = tier._settings
    return settings.deadline_s + PAYLOAD_BYTES / settings.min_bytes_per_s + SCHEDULING_S


def list_names(nodes: Nodes) -> list[str]:
    return sorted(meta["path"] for page in obstore.list(nodes.bare()) for meta in page)
