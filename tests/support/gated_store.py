"""A store in this process, with its real desk, server and socket, over tiers that the test holds in its hands."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from support.gated_tier import GatedTier

from kvstore.client import NodeStoreClient
from kvstore.desk import Desk
from kvstore.events import ChunkChange, HeldChunk
from kvstore.index import ChunkIndex
from kvstore.keys import ChunkKey
from kvstore.mover import Mover
from kvstore.policy import Quotas
from kvstore.protocol import Stats
from kvstore.requests import StoreService
from kvstore.server import StoreServer, listen_on
from kvstore.settings import StoreSettings
from kvstore.shelf import Patience, Shelf, Supply
from kvstore.store_time import StoreTime
from kvstore.tiers.host import HostTier
from kvstore.upkeep import Upkeep

SECRET = b"a secret of a test cluster"
T = TypeVar("T")


class FakeTime:
    """A wall clock and a steady one, moved by hand."""

    def __init__(self) -> None:
        self.wall_s = 1.7e9
        self.steady_s = 5000.0

    def pass_s(self, seconds: float) -> None:
        """Time goes on."""
        self.wall_s += seconds
        self.steady_s += seconds


class GatedStore:
    """Serves from the moment that it is made; two tiers "nvme" and "object", and "peer"."""

    def __init__(
        self, folder: Path, *, host_bytes: int = 4 << 20, ttl_s: float | None = None, quotas: Quotas | None = None
    ) -> None:
        self.path = str(folder / "s")
        self.nvme, self.bucket, self.peer = (GatedTier(name) for name in ("nvme", "object", "peer"))
        self.clock = FakeTime()
        self.events: list[tuple[ChunkChange, HeldChunk]] = []
        self._host_bytes, self._ttl_s, self._quotas = host_bytes, ttl_s, quotas or Quotas()
        self._opened = threading.Event()
        self._stop: asyncio.Event | None = None
        self._clients: list[NodeStoreClient] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="gated-store")
        self._thread.start()
        assert self._opened.wait(30)

    def client(self) -> NodeStoreClient:
        """Closed with the store."""
        client = NodeStoreClient(self.path, secret=SECRET, client_name="test")
        self._clients.append(client)
        return client

    def run(self, work: Callable[[], T]) -> T:
        """Something on the store's loop; its result."""

        async def call() -> T:
            return work()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(30)

    def run_async(self, work: Any) -> Any:
        """A coroutine on the store's loop; its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients:
            client.close()
        for tier in (self.nvme, self.bucket, self.peer):
            for what in ("put", "read", "drop"):
                tier.open_gate(what)
        assert self._stop is not None
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        settings = StoreSettings(nvme=None, peers=None, reservation_s=30.0)
        self.host = HostTier(self._host_bytes, quotas=self._quotas, on_evict=lambda slot: self._note_evicted(slot.key))
        self.time = StoreTime(ttl_s=self._ttl_s, wall_s=lambda: self.clock.wall_s, steady=lambda: self.clock.steady_s)
        shelves = [self._shelf(tier) for tier in (self.nvme, self.bucket)]
        self.index = ChunkIndex(
            self.host,
            shelves,
            announce=lambda change, chunk: self.events.append((change, chunk)),
            has_expired=self.time.has_expired,
        )
        self.mover = Mover(
            self.host,
            shelves,
            peers=Supply(self.peer, threads=2, patience=_PATIENCE),
            on_moved=self.index.refresh,
            on_settled=lambda key: self.desk.note_settled(key),
            is_wanted=lambda key: self.desk.is_awaited(key),
            has_expired=self.time.has_expired,
        )
        self.desk = Desk(
            self.host,
            self.index,
            self.mover,
            time=self.time,
            quotas=self._quotas,
            max_leases=100,
            reservation_s=30.0,
            max_pin_s=600.0,
        )
        self.upkeep = Upkeep(
            self.host,
            shelves,
            self.index,
            time=self.time,
            quotas=self._quotas,
            on_gone=self.mover.note_evicted,
        )
        service = StoreService(desk=self.desk, settings=settings, upkeep=self.upkeep, stats=self._stats)
        server = StoreServer(
            service,
            listen_on(self.path),
            secret=SECRET,
            epoch="e",
            arena_fd=self.host.fd,
            arena_bytes=self.host.capacity_bytes,
        )
        self._opened.set()
        await self._stop.wait()
        await server.stop()
        await self.mover.stop(drain_s=0.0)
        assert self.host.stat().pinned_bytes == 0
        self.host.close()

    def _shelf(self, tier: GatedTier) -> Shelf:
        return Shelf(
            tier,
            self.host,
            admit="all",
            max_queued=100,
            threads=2,
            patience=_PATIENCE,
            on_moved=lambda key: self.index.refresh(key),
            has_expired=self.time.has_expired,
        )

    def _note_evicted(self, key: ChunkKey) -> None:
        self.mover.note_evicted(key)
        self.index.refresh(key)

    def _stats(self, number: int) -> Stats:
        return Stats(
            number,
            {self.host.name: self.host.stat()},
            len(self.desk.sessions),
            self.desk.num_reads,
            self.desk.num_writes,
            self.mover.queued_chunks,
        )


_PATIENCE = Patience(base_s=20.0, min_bytes_per_s=1e6)
