"""The holder's end of the shared-memory data path, without a store around it, for the transport suites.

Covers: an arena, its unix socket on a thread, records laid one behind the other. Does not cover: the data path itself
(`kvstore.transport.shm`), tiers.
"""

import asyncio
import gc
import os
import threading
from collections.abc import Mapping
from typing import Any, Final, cast

from kvstore.desk import Desk, Session
from kvstore.protocol import Stats
from kvstore.requests import StoreService
from kvstore.server import StoreServer, listen_on
from kvstore.settings import StoreSettings
from kvstore.tiers.host import PAGE_BYTES, HostTier
from kvstore.transport import Offer
from kvstore.transport.shm import ShmServer
from kvstore.upkeep import Upkeep

SECRET: Final = b"a secret of a test cluster"
ARENA_BYTES: Final = 512 << 20


class ShmHolder:
    """Serves at once; the arena's memory is taken as records fill it.

    Args:
        socket_path: For the unix socket.
    """

    def __init__(self, socket_path: str) -> None:
        self._host = HostTier(ARENA_BYTES)
        self._next = 0
        self._paths = ShmServer(socket_path, arena=self._host.arena)
        self._is_open = threading.Event()
        self._loop = asyncio.SelectorEventLoop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(socket_path,), name="kvstore-holder", daemon=True)
        self._thread.start()
        self._is_open.wait()

    @property
    def server(self) -> "ShmHolder":
        """Itself: it closes the arena with the data path."""
        return self

    @property
    def name(self) -> str:
        """See `TransportServer`."""
        return self._paths.name

    @property
    def address(self) -> bytes:
        """See `TransportServer`."""
        return self._paths.address

    def offer(self, record: memoryview, *, peer: str, lifetime_s: float) -> Offer | None:
        """See `TransportServer`."""
        return self._paths.offer(record, peer=peer, lifetime_s=lifetime_s)

    def revoke(self, handle: bytes) -> None:
        """See `TransportServer`."""
        self._paths.revoke(handle)

    def place(self, data: bytes) -> memoryview:
        """Memory of the arena with `data`."""
        start = self._next
        self._next += -(-len(data) // PAGE_BYTES) * PAGE_BYTES
        view = self._host.arena[start : start + len(data)]
        view[:] = data
        return view

    def close(self) -> None:
        """See `TransportServer`; the socket goes too."""
        self._paths.close()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()
            os.unlink(os.fsdecode(self.address))
            os.close(self._host.fd)
            # The arena's map goes with the last view of a record, which errors of the tests may still hold in cycles.
            del self._host
            gc.collect()

    def _run(self, socket_path: str) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(socket_path))

    async def _serve(self, socket_path: str) -> None:
        settings = StoreSettings(nvme=None)
        service = StoreService(
            desk=cast("Desk", _NoDesk()),
            settings=settings,
            upkeep=cast("Upkeep", None),
            stats=lambda number: Stats(number, {}, 0, 0, 0, 0),
            redeem=self._paths.redeem,
        )
        server = StoreServer(
            service,
            listen_on(socket_path),
            secret=SECRET,
            epoch="e1",
            arena_fd=self._host.fd,
            arena_bytes=self._host.capacity_bytes,
        )
        self._is_open.set()
        await self._stopping.wait()
        await server.stop()


class _NoDesk:
    """Sessions that hold nothing."""

    def open_session(self, session: Session) -> None:
        pass

    def end_session(self, session: Session) -> None:
        pass


def shm_holder(options: Mapping[str, Any], address: bytes) -> ShmHolder:
    """The factory of the fault suite: the path is an option, and the same in every life."""
    return ShmHolder(options["socket_path"])
