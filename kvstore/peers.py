"""Chunks from the stores of other nodes: who they are, what they hold, and copying from them.

Covers: `Peers`, a source of records beside the tiers; the choice of the holder; lending our own chunks.
Does not cover: one peer (`kvstore.peer_node`), the messages (`kvstore.peer_protocol`), finding peers (`kvstore.actor`).

Links and feeds run on an event loop and a thread of their own, so that a flood of events does not delay the store's
clients. Lending runs on the store's own loop, where the desk is.
"""

import asyncio
import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from cluster.errors import SettingsError
from kvstore import metrics
from kvstore.container import Header
from kvstore.interfaces import OnBytes, TierEntry
from kvstore.keys import ChunkKey
from kvstore.peer_directory import Holder, PeerDirectory, order_holders
from kvstore.peer_node import PeerContext, PeerNode
from kvstore.peer_paths import Paths
from kvstore.peer_server import LendingDesk, PeerServer, listen_for_peers
from kvstore.protocol import PeerStat, Place
from kvstore.settings import PeerSettings, StoreSettings
from kvstore.wire import StoreEndpoint

log = logging.getLogger(__name__)

NAME: Final = "peer"
_MAX_HOLDERS: Final = 3
"""Holders asked for one chunk."""
_TOLD_KEYS: Final = 4096
"""Keys told to the store's loop in one turn."""
_GAUGES_S: Final = 1.0


class Peers:
    """The stores of other nodes as a source of records. Implements `kvstore.interfaces.Source`.

    Opened by `open_peers`. `set_peers`, `entry`, `read_into` and `stat` may be called on any thread.
    """

    def __init__(
        self,
        settings: PeerSettings,
        *,
        node_id: str,
        secret: bytes,
        paths: Paths,
        server: PeerServer,
        address: str,
        on_change: Callable[[ChunkKey], None],
    ) -> None:
        self.address = address
        self.boot_id = paths.reach.boot_id
        self._settings = settings
        self._node_id = node_id
        self._paths = paths
        self._server = server
        self._on_change = on_change
        self._store_loop = asyncio.get_running_loop()
        self._directory = PeerDirectory(max_keys=settings.max_known_chunks)
        self._turns = itertools.count()
        self._nodes: Mapping[str, PeerNode] = {}
        """Replaced as a whole, so that any thread may look."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._loop = asyncio.SelectorEventLoop()
        self._wanted: tuple[StoreEndpoint, ...] = ()
        self._changed = asyncio.Event()
        self._is_stopping = False
        self._context = PeerContext(
            settings=settings,
            node_id=node_id,
            secret=secret,
            paths=paths,
            directory=self._directory,
            loop=self._loop,
            tls=paths.client_tls,
            on_readable=self._tell,
        )
        self._thread = threading.Thread(target=self._run, name="kvstore-peers", daemon=True)
        self._thread.start()

    # The source.

    @property
    def name(self) -> str:
        """The source's name."""
        return NAME

    def entry(self, key: ChunkKey) -> TierEntry | None:
        """What a peer that answers has told about a chunk."""
        nodes = self._nodes
        for copy in self._directory.copies(key):
            node = nodes.get(copy.node_id)
            if node is not None and node.is_usable:
                return copy.entry()
        return None

    def read_into(
        self, key: ChunkKey, view: memoryview, *, stop_s: float, on_bytes: OnBytes | None = None
    ) -> Header | None:
        """Copy a record from the best holder, or from the next one if that fails."""
        progress = _Progress(on_bytes)
        holders = self._holders(key, len(view))[:_MAX_HOLDERS]
        for number, node in enumerate(holders):
            # A holder that does not even answer leaves time for the others.
            answer_s = (stop_s - time.monotonic()) / (len(holders) - number)
            header = node.pull(key, view, stop_s=stop_s, answer_s=answer_s, on_bytes=progress.note)
            if header is not None:
                return header
            if progress.was_told or time.monotonic() >= stop_s:
                # Another holder's record may have other bytes than those that somebody already uses.
                return None
        return None

    # The other nodes.

    def set_peers(self, endpoints: Sequence[StoreEndpoint]) -> None:
        """The stores that there are now, ours among them or not. An endpoint with a new epoch is another life."""
        self._wanted = tuple(endpoints)
        with suppress(RuntimeError):  # stopped
            self._loop.call_soon_threadsafe(self._changed.set)

    def stat(self) -> dict[str, PeerStat]:
        """Every peer, by node."""
        return {node_id: node.stat() for node_id, node in self._nodes.items()}

    def unreachable(self) -> set[str]:
        """Peers whose control plane does not answer now, by node."""
        return {node_id for node_id, node in self._nodes.items() if not node.is_connected}

    def news_s(self) -> float:
        """Seconds for which it is worth to wait for news of a chunk; 0 while no peer could bring any."""
        return self._settings.news_s if any(node.is_connected for node in self._nodes.values()) else 0.0

    def redeem(self, handle: bytes) -> Place | None:
        """Where a record lies that a store of this machine was offered."""
        return self._paths.shm.redeem(handle)

    async def stop(self) -> None:
        """End loans, links, feeds and paths. Transfers under way raise, and are misses."""
        await self._server.stop()
        self._is_stopping = True
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._changed.set)
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._paths.close)

    def _holders(self, key: ChunkKey, num_bytes: int) -> list[PeerNode]:
        nodes = self._nodes
        holders = [
            Holder(node_id=node.node_id, same_machine=node.same_machine, transfers=node.transfers)
            for copy in self._directory.copies(key)
            if copy.stored_bytes == num_bytes and (node := nodes.get(copy.node_id)) is not None and node.is_usable
        ]
        return [nodes[node_id] for node_id in order_holders(holders, turn=next(self._turns))]

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._keep_peers())

    async def _keep_peers(self) -> None:
        try:
            while not self._is_stopping:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_GAUGES_S):
                        await self._changed.wait()
                self._changed.clear()
                await self._follow(
                    {e.node_id: e for e in self._wanted if e.peer_address and e.node_id != self._node_id}
                )
                up = sum(node.is_connected for node in self._nodes.values())
                metrics.PEERS.labels("up").set(up)
                metrics.PEERS.labels("down").set(len(self._nodes) - up)
                metrics.PEER_CHUNKS.set(len(self._directory))
        finally:
            await self._follow({})
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _follow(self, wanted: Mapping[str, StoreEndpoint]) -> None:
        """Make the followed peers those of `wanted`."""
        gone = [node for node in self._nodes.values() if wanted.get(node.node_id) != node.endpoint]
        # First of all: nobody asks them any more.
        self._nodes = {node_id: node for node_id, node in self._nodes.items() if node not in gone}
        for node in gone:
            self._tasks[node.node_id].cancel()
        new = [PeerNode(e, self._context) for node_id, e in wanted.items() if node_id not in self._nodes]
        self._nodes = {**self._nodes, **{node.node_id: node for node in new}}
        for node in new:
            work = _after(self._tasks.get(node.node_id), node.run())
            self._tasks[node.node_id] = asyncio.create_task(work, name=f"peer-{node.node_id}")
        self._tasks = {n: task for n, task in self._tasks.items() if n in self._nodes or not task.done()}

    def _tell(self, keys: Sequence[ChunkKey]) -> None:
        """On the peers' loop: tell the store's loop what may have become readable."""
        for start in range(0, len(keys), _TOLD_KEYS):
            part = keys[start : start + _TOLD_KEYS]
            with suppress(RuntimeError):  # the store stops
                self._store_loop.call_soon_threadsafe(self._note, part)

    def _note(self, keys: Sequence[ChunkKey]) -> None:
        for key in keys:
            self._on_change(key)


async def _after(former: "asyncio.Task[None] | None", work: Coroutine[Any, Any, None]) -> None:
    """Begin when the node's former life has been wound up: what it leaves behind has the same name."""
    try:
        if former is not None:
            await asyncio.wait({former})
        await work
    finally:
        # Harmless if it has run; else it would complain that nobody ever awaited it.
        work.close()


class _Progress:
    """Passes on how many bytes are in place, over several tries."""

    def __init__(self, on_bytes: OnBytes | None) -> None:
        self._on_bytes = on_bytes
        self.was_told = False

    def note(self, num_bytes: int) -> None:
        """See `OnBytes`."""
        if self._on_bytes is not None:
            self.was_told = True
            self._on_bytes(num_bytes)


def open_peers(
    settings: StoreSettings,
    *,
    desk: Callable[[], LendingDesk],
    arena: memoryview,
    secret: bytes,
    node_id: str,
    epoch: str,
    socket_path: str,
    bind_host: str,
    advertise_host: str | None = None,
    on_change: Callable[[ChunkKey], None],
) -> Peers:
    """Lend our chunks to other nodes, and be ready to take theirs; on the store's running event loop.

    Args:
        settings: The store's; `settings.peers` must be set.
        desk: Pins what is lent; asked for when the first peer comes.
        arena: Where it lies.
        secret: The cluster's.
        node_id: Ours.
        epoch: This life of the store.
        socket_path: The store's unix socket.
        bind_host: Interface to listen on, and only there.
        advertise_host: What others connect to, where `bind_host` means every interface.
        on_change: Told on the store's loop of keys that may have become readable from a peer.

    Raises:
        SettingsError: TLS files that cannot be used, or an address that nobody could connect to.
        PortTakenError: A configured port is taken.
    """
    peers = settings.peers
    if peers is None:
        raise SettingsError("peers are off (store.peers is null)")
    _check_advertised(bind_host, advertise_host)
    paths = Paths(
        settings,
        peers,
        secret=secret,
        node_id=node_id,
        epoch=epoch,
        socket_path=socket_path,
        arena=arena,
        bind_host=bind_host,
        advertise_host=advertise_host,
    )
    listener = _listen(bind_host, peers.port, paths)
    server = PeerServer(
        desk,
        listener,
        settings=settings,
        peers=peers,
        secret=secret,
        epoch=epoch,
        reach=lambda: paths.reach,
        paths=paths.servers,
        tls=paths.server_tls,
    )
    return Peers(
        peers,
        node_id=node_id,
        secret=secret,
        paths=paths,
        server=server,
        address=_address_of(listener, advertise_host),
        on_change=on_change,
    )


def _listen(bind_host: str, port: int | None, paths: Paths) -> socket.socket:
    try:
        return listen_for_peers(bind_host, port)
    except BaseException:
        paths.close()
        raise


def _check_advertised(bind_host: str, advertise_host: str | None) -> None:
    if advertise_host is None and bind_host in ("0.0.0.0", "::", ""):
        raise SettingsError(f"peers cannot connect to {bind_host or 'an empty address'}: bind to one interface")


def _address_of(listener: socket.socket, advertise_host: str | None) -> str:
    host, port = listener.getsockname()[:2]
    shown = advertise_host or host
    return f"[{shown}]:{port}" if ":" in shown else f"{shown}:{port}"
