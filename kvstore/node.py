"""One node's store, on a thread of its own.

Covers: starting and stopping it, what happens by time alone. Does not cover: what it consists of (`kvstore.assembly`),
the process that it runs in (`kvstore.actor`).
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Final

from cluster.errors import CallerError, InvariantError
from kvstore import metrics
from kvstore.assembly import Identity, Parts, available_memory_bytes, open_store
from kvstore.settings import StoreSettings
from kvstore.wire import StoreEndpoint

log = logging.getLogger(__name__)

__all__ = ["MIN_SECRET_BYTES", "NodeStore", "WeakSecretError", "available_memory_bytes"]

MIN_SECRET_BYTES: Final = 16
_TICK_S: Final = 0.25


class WeakSecretError(CallerError):
    """A cluster secret that is too short to protect anything."""


class NodeStore:
    """The store of one node; `start` it once, in the process that is to hold the arena.

    Args:
        settings: Sizes and bounds.
        secret: The cluster's.
        node_id: Names the node in events.
        socket_path: Unix socket for the node's workers; replaced if it exists.
        bind_host: Interface of the ports for events and other nodes.
        advertise_host: What others connect to, where `bind_host` means every interface.
    """

    def __init__(
        self,
        settings: StoreSettings,
        *,
        secret: bytes,
        node_id: str,
        socket_path: str,
        bind_host: str,
        advertise_host: str | None = None,
    ) -> None:
        if len(secret) < MIN_SECRET_BYTES:
            raise WeakSecretError(f"the cluster secret needs {MIN_SECRET_BYTES} bytes, has {len(secret)}")
        self.settings = settings
        self._identity = Identity(
            node_id=node_id,
            secret=secret,
            socket_path=socket_path,
            bind_host=bind_host,
            advertise_host=advertise_host,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping: asyncio.Event | None = None
        self._drain_s = 0.0
        self._parts: Parts | None = None

    def start(self) -> StoreEndpoint:
        """Open everything and serve.

        Raises:
            SocketPathError, PortTakenError, FolderBusyError, SettingsError: What to change is in the message.
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
            drain_s: Seconds for chunks that still wait to be written to lower tiers.
        """
        if self._thread is None:
            return
        self._drain_s = drain_s
        if self._loop is not None and self._stopping is not None:
            # The loop may have ended by itself.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def set_peers(self, endpoints: Sequence[StoreEndpoint]) -> None:
        """The stores of the cluster as they are now, ours among them or not. Any thread; no effect without peers."""
        parts = self._parts
        if parts is not None and parts.peers is not None:
            parts.peers.set_peers(endpoints)

    def unreachable_peers(self) -> set[str]:
        """Nodes whose store does not answer this one, by id. Any thread."""
        parts = self._parts
        return parts.peers.unreachable() if parts is not None and parts.peers is not None else set()

    async def _run(self, on_open: Callable[[StoreEndpoint | BaseException], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        async with AsyncExitStack() as stack:
            try:
                parts = self._parts = await open_store(stack, self.settings, self._identity)
            except BaseException as error:
                # Close first: whoever sees the error may try the same folder again.
                await stack.aclose()
                on_open(error)
                return
            on_open(parts.endpoint)
            log.info(
                "store_started node=%s epoch=%s bytes=%d tiers=%s",
                parts.endpoint.node_id,
                parts.endpoint.epoch,
                parts.host.capacity_bytes,
                ",".join(parts.stat()),
            )
            loops = [asyncio.create_task(self._tick(parts)), asyncio.create_task(self._sweep(parts))]
            await self._stopping.wait()
            for task in loops:
                task.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            self._parts = None
            if parts.peers is not None:
                # Before the mover: what peers are sending ends now, and need not be waited for.
                await parts.peers.stop()
            await parts.mover.stop(drain_s=self._drain_s)

    async def _tick(self, parts: Parts) -> None:
        """What happens by time alone."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                parts.desk.expire(now_s=loop.time())
                for name, stat in parts.stat().items():
                    metrics.TIER_BYTES.labels(name).set(stat.bytes)
                    metrics.TIER_CHUNKS.labels(name).set(stat.chunks)
                metrics.PINNED_BYTES.set(parts.host.stat().pinned_bytes)
            except Exception:
                # A tier that cannot be counted must not keep reservations from ending.
                log.exception("tick_failed")
            await asyncio.sleep(_TICK_S)

    async def _sweep(self, parts: Parts) -> None:
        """Forget what is too old, where there is a TTL."""
        interval_s = parts.upkeep.sweep_interval_s
        while interval_s is not None:
            await asyncio.sleep(interval_s)
            try:
                if parts.time.tick():
                    await parts.upkeep.announce_again()
                await parts.upkeep.sweep()
            except Exception:
                # A tier that fails here must not stop the others from ageing.
                log.exception("sweep_failed")
