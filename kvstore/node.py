"""One node's store: arena, files, desk, server and events, on a thread of their own.

Covers: putting the parts together, starting and stopping them. Does not cover: the parts, or the process that it runs
in (`kvstore.actor`).
"""

import asyncio
import logging
import os
import secrets
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from typing import Final

import psutil

from cluster.errors import CallerError, InvariantError
from kvstore import metrics
from kvstore.container import ALIGN
from kvstore.desk import Desk
from kvstore.events import EventPublisher, HeldChunk
from kvstore.index import ChunkIndex
from kvstore.interfaces import TierStat
from kvstore.keys import ChunkKey
from kvstore.mover import Mover
from kvstore.server import StoreServer, check_socket_path, listen_on
from kvstore.settings import FileTierSettings, StoreSettings, resolve_host_bytes
from kvstore.tiers.file import FileTier
from kvstore.tiers.folder import FolderUnusableError
from kvstore.tiers.host import HostTier
from kvstore.wire import StoreEndpoint

log = logging.getLogger(__name__)

MIN_SECRET_BYTES: Final = 16
_TICK_S: Final = 0.25
_CGROUP_LIMIT: Final = "/sys/fs/cgroup/memory.max"


class WeakSecretError(CallerError):
    """A cluster secret that is too short to protect anything."""


class NodeStore:
    """The store of one node; `start` it once, in the process that is to hold the arena.

    Args:
        settings: Sizes and bounds.
        secret: The cluster's.
        node_id: Names the node in events.
        socket_path: Unix socket for the node's workers; replaced if it exists.
        bind_host: Interface of the event sockets.
    """

    def __init__(
        self, settings: StoreSettings, *, secret: bytes, node_id: str, socket_path: str, bind_host: str
    ) -> None:
        if len(secret) < MIN_SECRET_BYTES:
            raise WeakSecretError(f"the cluster secret needs {MIN_SECRET_BYTES} bytes, has {len(secret)}")
        self.settings = settings
        self._secret = secret
        self._node_id = node_id
        self._socket_path = socket_path
        self._bind_host = bind_host
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping: asyncio.Event | None = None
        self._drain_s = 0.0
        self._parts: _Parts | None = None

    def start(self) -> StoreEndpoint:
        """Open everything and serve.

        Raises:
            SocketPathError, PortTakenError, FolderBusyError: What to change is in the message.
            OSError: The socket's folder, or memory for the arena, is missing.
        """
        if self._thread is not None:
            raise InvariantError("a store is started once")
        opened = threading.Event()
        outcome: list[StoreEndpoint | BaseException] = []

        def on_open(result: StoreEndpoint | BaseException) -> None:
            outcome.append(result)
            opened.set()

        def serve() -> None:
            # The plain loop, whatever policy the process has: sockets and descriptors are passed by hand here.
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                runner.run(self._run(on_open))

        self._thread = threading.Thread(target=serve, name="kvstore-node", daemon=True)
        self._thread.start()
        opened.wait()
        if isinstance(outcome[0], BaseException):
            self._thread.join()
            raise outcome[0]
        return outcome[0]

    def stop(self, *, drain_s: float = 5.0) -> None:
        """End every session and close everything; repeating it is harmless.

        Args:
            drain_s: Seconds for chunks that still wait to be written to files.
        """
        if self._thread is None:
            return
        self._drain_s = drain_s
        if self._loop is not None and self._stopping is not None:
            # The loop may have ended by itself.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def damage(self, key: ChunkKey, *, at_byte: int = 0) -> bool:
        """Flip one payload byte of a chunk in the arena: the hook of the fault tests. Whether it was there."""
        parts = self._parts
        slot = parts.host.find(key) if parts else None
        if parts is None or slot is None:
            return False
        parts.host.view(slot)[ALIGN + at_byte] ^= 0xFF
        return True

    async def _run(self, on_open: Callable[[StoreEndpoint | BaseException], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        async with AsyncExitStack() as stack:
            try:
                parts = self._parts = await self._open(stack)
            except BaseException as error:
                # Close first: whoever sees the error may try the same folder again.
                await stack.aclose()
                on_open(error)
                return
            on_open(parts.endpoint)
            log.info(
                "store_started node=%s epoch=%s bytes=%d",
                self._node_id,
                parts.endpoint.epoch,
                parts.host.capacity_bytes,
            )
            ticks = asyncio.create_task(self._tick(parts))
            await self._stopping.wait()
            ticks.cancel()
            await asyncio.gather(ticks, return_exceptions=True)
            self._parts = None
            if parts.mover is not None:
                await parts.mover.stop(drain_s=self._drain_s)

    async def _open(self, stack: AsyncExitStack) -> "_Parts":
        """Open the parts in order; each is closed by the stack, in reverse."""
        settings = self.settings
        epoch = secrets.token_hex(8)
        check_socket_path(self._socket_path)
        host = HostTier(
            resolve_host_bytes(settings, memory_bytes=available_memory_bytes()),
            on_evict=lambda slot: index.refresh(slot.key),
        )
        stack.callback(host.close)
        loop = asyncio.get_running_loop()

        def on_file_drop(key: ChunkKey) -> None:
            # From an I/O thread; a store that is being closed has nobody to tell.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(index.refresh, key)

        file = _open_file_tier(settings.file, on_drop=on_file_drop) if settings.file else None
        if file is not None:
            stack.callback(file.close)
        publisher = self._open_publisher(epoch, lambda: index.snapshot())
        stack.push_async_callback(publisher.stop)
        index = ChunkIndex(host, file, announce=publisher.publish)
        for key, _ in file.entries() if file else ():
            index.refresh(key)
        mover = None
        if file is not None and settings.file is not None:
            mover = Mover(
                host,
                file,
                io_threads=settings.file.io_threads,
                max_queued=settings.file.write_behind_chunks,
                on_moved=index.refresh,
                on_settled=lambda key: desk.note_settled(key),
            )
        desk = Desk(
            host,
            file,
            index,
            promote=mover.promote if mover else _ignore,
            on_commit=mover.write_behind if mover else _ignore,
            on_drop=mover.forget if mover else _ignore,
            max_leases=settings.max_leases_per_session,
            reservation_s=settings.reservation_s,
        )
        endpoint = StoreEndpoint(
            node_id=self._node_id,
            epoch=epoch,
            socket_path=self._socket_path,
            events_address=publisher.events_address,
            snapshot_address=publisher.snapshot_address,
        )
        parts = _Parts(endpoint, host, file, desk, mover)
        # Last: it takes the place of another store's socket, which must keep it if the folder is that store's too.
        listener = listen_on(self._socket_path)
        stack.callback(listener.close)
        stack.callback(_unlink_socket, self._socket_path, os.stat(self._socket_path).st_ino)
        server = StoreServer(
            desk,
            listener,
            settings=settings,
            secret=self._secret,
            epoch=epoch,
            arena_fd=host.fd,
            arena_bytes=host.capacity_bytes,
            tiers=parts.stat,
            queued_chunks=lambda: mover.queued_chunks if mover else 0,
        )
        stack.push_async_callback(server.stop)
        return parts

    def _open_publisher(self, epoch: str, snapshot: Callable[[], tuple[HeldChunk, ...]]) -> EventPublisher:
        settings = self.settings
        return EventPublisher(
            node_id=self._node_id,
            epoch=epoch,
            secret=self._secret,
            bind_host=self._bind_host,
            events_port=settings.events_port,
            snapshot_port=settings.snapshot_port,
            ring_events=settings.max_event_ring,
            heartbeat_s=settings.heartbeat_s,
            snapshot=snapshot,
        )

    async def _tick(self, parts: "_Parts") -> None:
        """What happens by time alone."""
        loop = asyncio.get_running_loop()
        while True:
            parts.desk.expire(now_s=loop.time())
            for name, stat in parts.stat().items():
                metrics.TIER_BYTES.labels(name).set(stat.bytes)
                metrics.TIER_CHUNKS.labels(name).set(stat.chunks)
            metrics.PINNED_BYTES.set(parts.host.stat().pinned_bytes)
            await asyncio.sleep(_TICK_S)


class _Parts:
    """What a running store consists of."""

    def __init__(
        self, endpoint: StoreEndpoint, host: HostTier, file: FileTier | None, desk: Desk, mover: Mover | None
    ) -> None:
        self.endpoint = endpoint
        self.host = host
        self.file = file
        self.desk = desk
        self.mover = mover

    def stat(self) -> dict[str, TierStat]:
        """Counts per tier."""
        stats = {self.host.name: self.host.stat()}
        if self.file is not None:
            stats[self.file.name] = self.file.stat()
        return stats


def available_memory_bytes() -> int:
    """The machine's memory, or the container's limit where it is smaller."""
    total: int = psutil.virtual_memory().total
    try:
        with open(_CGROUP_LIMIT, encoding="ascii") as file:
            limit = file.read().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _open_file_tier(settings: FileTierSettings, *, on_drop: Callable[[ChunkKey], None]) -> FileTier | None:
    """The file tier, or None if its device fails: a store without files is better than no store."""
    try:
        return FileTier(
            os.path.expanduser(settings.folder),
            capacity_bytes=settings.capacity_bytes,
            lock_wait_s=settings.lock_wait_s,
            breaker_failures=settings.breaker_failures,
            breaker_pause_s=settings.breaker_pause_s,
            on_drop=on_drop,
        )
    except FolderUnusableError as error:
        metrics.TIER_WRITES.labels("file", "error").inc()
        log.error("file_tier_unusable error=%s", error)  # noqa: TRY400 the message is the cause
        return None


def _unlink_socket(path: str, inode: int) -> None:
    """Remove our socket, but not that of a successor."""
    with suppress(OSError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)


def _ignore(_: ChunkKey) -> None:
    pass
