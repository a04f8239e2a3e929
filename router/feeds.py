"""One task per node store that keeps the directory up to date.

Covers: starting and stopping feeds as workers report stores, dropping a store's entries when it changes or goes.
Does not cover: the protocol of a feed (`kvstore.events.DirectoryFeed`), the fold (`router.directory`).
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress

from cluster.clock import Clock
from kvstore.events import DirectoryFeed, FeedItem
from kvstore.wire import StoreEndpoint
from router.directory import Directory
from router.metrics import DIRECTORY_CHUNKS, DIRECTORY_RESETS_TOTAL

log = logging.getLogger(__name__)

FeedFactory = Callable[[StoreEndpoint], AsyncGenerator[FeedItem, None]]
"""Opens a store's feed; closing the generator closes its sockets."""
_RESTART_S = 1.0
_BATCH_ITEMS = 512
"""Items folded before other tasks get a turn."""


class Feeds:
    """Feeds of all stores that are reported now."""

    def __init__(self, directory: Directory, *, open_feed: FeedFactory, clock: Clock) -> None:
        self._directory = directory
        self._open_feed = open_feed
        self._clock = clock
        self._running: dict[str, tuple[StoreEndpoint, asyncio.Task[None]]] = {}

    async def follow(self, stores: Mapping[str, StoreEndpoint]) -> None:
        """Make the running feeds those of `stores` (by node)."""
        for node_id, (endpoint, _) in list(self._running.items()):
            wanted = stores.get(node_id)
            if wanted == endpoint:
                continue
            await self._stop(node_id)
            cause = "gone" if wanted is None else "epoch"
            DIRECTORY_RESETS_TOTAL.labels(cause).inc()
            log.warning("store_reset node=%s cause=%s chunks=%d", node_id, cause, self._directory.drop_node(node_id))
        for node_id, endpoint in stores.items():
            if node_id not in self._running:
                task = asyncio.create_task(self._run(endpoint), name=f"feed-{node_id}")
                self._running[node_id] = (endpoint, task)
        DIRECTORY_CHUNKS.set(len(self._directory))

    async def close(self) -> None:
        """Stop every feed."""
        for node_id in list(self._running):
            await self._stop(node_id)

    async def _stop(self, node_id: str) -> None:
        _, task = self._running.pop(node_id)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def _run(self, endpoint: StoreEndpoint) -> None:
        while True:
            try:
                await self._fold(endpoint)
                log.warning("feed_ended node=%s", endpoint.node_id)
            except asyncio.CancelledError:
                raise
            except Exception:
                log.exception("feed_failed node=%s", endpoint.node_id)
            # Without its feed a store's entries go stale: better to know nothing.
            self._directory.drop_node(endpoint.node_id)
            await self._clock.sleep_s(_RESTART_S)

    async def _fold(self, endpoint: StoreEndpoint) -> None:
        feed = self._open_feed(endpoint)
        num_items = 0
        try:
            async for item in feed:
                self._directory.apply(item)
                num_items += 1
                if num_items % _BATCH_ITEMS == 0:
                    await asyncio.sleep(0)
        finally:
            await feed.aclose()


def store_feeds(secret: bytes) -> FeedFactory:
    """Feeds of real stores."""

    async def open_feed(endpoint: StoreEndpoint) -> AsyncGenerator[FeedItem, None]:
        async with DirectoryFeed(endpoint, secret=secret) as feed:
            async for item in feed.items():
                yield item

    return open_feed
