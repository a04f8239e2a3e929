"""Puts one node's store together: arena, tiers below it, peers, desk, server and events.

Covers: which part is made from which settings, what they tell each other, in which order they close.
Does not cover: the thread and loop they run on (`kvstore.node`), the parts themselves.
"""

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Final

import psutil

from kvstore import metrics
from kvstore.desk import Desk
from kvstore.events import EventPublisher, HeldChunk
from kvstore.index import ChunkIndex
from kvstore.interfaces import Tier, TierStat
from kvstore.keys import ChunkKey
from kvstore.mover import Mover
from kvstore.peers import Peers, open_peers
from kvstore.policy import Quotas, make_policy
from kvstore.protocol import Place, Stats
from kvstore.requests import StoreService
from kvstore.sealing import Sealer, store_keys
from kvstore.server import StoreServer, check_socket_path, listen_on
from kvstore.settings import NvmeSettings, ObjectSettings, PeerSettings, StoreSettings, resolve_host_bytes
from kvstore.shelf import Patience, Shelf, Supply
from kvstore.store_time import StoreTime
from kvstore.tiers.folder import FolderUnusableError
from kvstore.tiers.host import HostTier, Slot
from kvstore.tiers.nvme import NvmePool
from kvstore.tiers.sealed import SealedTier
from kvstore.upkeep import Upkeep
from kvstore.wire import StoreEndpoint

log = logging.getLogger(__name__)

_NOTED_KEYS: Final = 256
_CGROUP_LIMIT: Final = "/sys/fs/cgroup/memory.max"
_DISK_BYTES_PER_S: Final = 50e6
"""A disk that is slower serves nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a store is, and where it can be reached."""

    node_id: str
    secret: bytes
    """The cluster's."""
    socket_path: str
    """Unix socket for the node's workers."""
    bind_host: str
    """Interface of the ports."""
    advertise_host: str | None = None
    """What others connect to, where `bind_host` means every interface."""
    epoch: str = field(default_factory=lambda: secrets.token_hex(8))
    """This life of the store."""


@dataclass(slots=True, kw_only=True)
class Parts:
    """What a running store consists of."""

    endpoint: StoreEndpoint
    host: HostTier
    mover: Mover
    desk: Desk
    upkeep: Upkeep
    time: StoreTime
    peers: Peers | None

    def stat(self) -> dict[str, TierStat]:
        """Counts per tier."""
        return {self.host.name: self.host.stat()} | {shelf.name: shelf.tier.stat() for shelf in self.mover.shelves}


class _Wiring:
    """Calls between parts that are made one after the other.

    Tiers, mover and desk tell each other of changes, from threads too; what comes before all are there, or after the
    loop has ended, has nobody to tell.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.index: ChunkIndex | None = None
        self.mover: Mover | None = None
        self.desk: Desk | None = None

    def refresh(self, key: ChunkKey) -> None:
        """On the loop: a key's tiers may have changed."""
        if self.index is not None:
            self.index.refresh(key)

    def settled(self, key: ChunkKey) -> None:
        """On the loop: a chunk may have become readable."""
        if self.desk is not None:
            self.desk.note_settled(key)

    def is_awaited(self, key: ChunkKey) -> bool:
        """On the loop: whether somebody waits for a chunk."""
        return self.desk is None or self.desk.is_awaited(key)

    def evicted(self, slot: Slot) -> None:
        """On the loop: a chunk left the arena for room."""
        if self.mover is not None:
            self.mover.note_evicted(slot.key)
        self.refresh(slot.key)

    def changed(self, key: ChunkKey) -> None:
        """From any thread: a tier lost or found a record."""
        self.changed_many([key])

    def changed_many(self, keys: Sequence[ChunkKey]) -> None:
        """From any thread: a tier lost or found records."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._note, list(keys))

    def _note(self, keys: Sequence[ChunkKey]) -> None:
        for key in keys[:_NOTED_KEYS]:
            self.refresh(key)
            self.settled(key)
        if len(keys) > _NOTED_KEYS:
            # Clients have their turn: a tier may find a hundred thousand records when it opens.
            self._loop.call_soon(self._note, keys[_NOTED_KEYS:])


async def open_store(stack: AsyncExitStack, settings: StoreSettings, identity: Identity) -> Parts:
    """Open the parts in order; each is closed by the stack, in reverse. On the loop that they are to run on.

    Raises:
        SocketPathError, PortTakenError, FolderBusyError, SettingsError: What to change is in the message.
        OSError: The socket's folder, or memory for the arena, is missing.
    """
    check_socket_path(identity.socket_path)
    wiring = _Wiring()
    quotas = Quotas(by_tenant=settings.quota_bytes_by_tenant, default=settings.default_quota_bytes)
    time = StoreTime(ttl_s=settings.ttl_s)
    host = HostTier(
        resolve_host_bytes(settings, memory_bytes=available_memory_bytes()),
        policy=make_policy(settings.host_policy),
        quotas=quotas,
        max_pinned_ratio=settings.max_pinned_ratio,
        on_evict=wiring.evicted,
    )
    stack.callback(host.close)
    shelves = _open_shelves(stack, settings, host, quotas=quotas, time=time, wiring=wiring)
    publisher = _open_publisher(settings, identity, lambda: index.snapshot())
    stack.push_async_callback(publisher.stop)
    index = wiring.index = ChunkIndex(host, shelves, announce=publisher.publish, has_expired=time.has_expired)
    # What tiers found before there was an index.
    for shelf in shelves:
        for key, _ in shelf.tier.keys():  # noqa: SIM118 not a dict
            index.refresh(key)
    peers = _open_peers(stack, settings, identity, host, wiring)
    supply = _peer_supply(peers, settings.peers, time) if peers is not None and settings.peers is not None else None
    mover = wiring.mover = Mover(
        host,
        shelves,
        peers=supply,
        on_moved=wiring.refresh,
        on_settled=wiring.settled,
        is_wanted=wiring.is_awaited,
        has_expired=time.has_expired,
    )
    desk = wiring.desk = Desk(
        host,
        index,
        mover,
        time=time,
        quotas=quotas,
        max_leases=settings.max_leases_per_session,
        reservation_s=settings.reservation_s,
        max_pin_s=settings.max_pin_s,
    )
    parts = Parts(
        endpoint=StoreEndpoint(
            node_id=identity.node_id,
            epoch=identity.epoch,
            socket_path=identity.socket_path,
            events_address=publisher.events_address,
            snapshot_address=publisher.snapshot_address,
            peer_address=peers.address if peers else "",
            boot_id=peers.boot_id if peers else "",
        ),
        host=host,
        mover=mover,
        desk=desk,
        upkeep=Upkeep(host, shelves, index, time=time, quotas=quotas, on_gone=mover.note_evicted),
        time=time,
        peers=peers,
    )
    _open_server(stack, settings, identity, parts, quotas)
    return parts


def available_memory_bytes() -> int:
    """The machine's memory, or the container's limit where it is smaller."""
    total: int = psutil.virtual_memory().total
    try:
        with open(_CGROUP_LIMIT, encoding="ascii") as file:
            limit = file.read().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _open_shelves(
    stack: AsyncExitStack,
    settings: StoreSettings,
    host: HostTier,
    *,
    quotas: Quotas,
    time: StoreTime,
    wiring: _Wiring,
) -> list[Shelf]:
    """The tiers below the arena, fastest first."""
    # Before anything is opened: a missing key must not leave records in the clear.
    sealer = Sealer(store_keys()) if settings.encrypt_at_rest else None
    shelves: list[Shelf] = []

    def add(medium: Tier, parts: NvmeSettings | ObjectSettings, patience: Patience) -> None:
        tier = SealedTier(medium, sealer=sealer) if sealer is not None else medium
        stack.callback(tier.close)
        shelves.append(
            Shelf(
                tier,
                host,
                medium=medium,
                admit=parts.admit,
                max_queued=parts.write_behind_chunks,
                threads=parts.io_threads,
                patience=patience,
                on_moved=wiring.refresh,
                has_expired=time.has_expired,
            )
        )

    if settings.nvme is not None:
        pool = _open_nvme(settings, settings.nvme, quotas, wiring)
        if pool is not None:
            patience = Patience(base_s=settings.nvme.slow_read_s, min_bytes_per_s=_DISK_BYTES_PER_S)
            add(pool, settings.nvme, patience)
    if settings.object is not None:
        # Imported here: its clients load slowly, and most nodes do without.
        from kvstore.tiers.object import open_object_tier

        bucket = open_object_tier(
            settings.object,
            quotas=quotas,
            max_pinned_ratio=settings.max_pinned_ratio,
            sealed=settings.encrypt_at_rest,
            on_change=wiring.changed_many,
        )
        patience = Patience(base_s=settings.object.deadline_s, min_bytes_per_s=settings.object.min_bytes_per_s)
        add(bucket, settings.object, patience)
    return shelves


def _open_nvme(settings: StoreSettings, nvme: NvmeSettings, quotas: Quotas, wiring: _Wiring) -> NvmePool | None:
    """The pool, or None if its devices fail: a store without disks is better than no store."""
    try:
        return NvmePool(
            nvme.model_copy(update={"folders": tuple(os.path.expanduser(folder) for folder in nvme.folders)}),
            quotas=quotas,
            max_pinned_ratio=settings.max_pinned_ratio,
            sealed=settings.encrypt_at_rest,
            on_drop=wiring.changed,
            on_found=wiring.changed_many,
        )
    except FolderUnusableError as error:
        metrics.TIER_WRITES.labels("nvme", "error").inc()
        log.error("nvme_unusable error=%s", error)  # noqa: TRY400 the message is the cause
        return None


def _open_publisher(
    settings: StoreSettings, identity: Identity, snapshot: Callable[[], tuple[HeldChunk, ...]]
) -> EventPublisher:
    return EventPublisher(
        node_id=identity.node_id,
        epoch=identity.epoch,
        secret=identity.secret,
        bind_host=identity.bind_host,
        advertise_host=identity.advertise_host,
        events_port=settings.events_port,
        snapshot_port=settings.snapshot_port,
        ring_events=settings.max_event_ring,
        heartbeat_s=settings.heartbeat_s,
        snapshot=snapshot,
    )


def _open_peers(
    stack: AsyncExitStack, settings: StoreSettings, identity: Identity, host: HostTier, wiring: _Wiring
) -> Peers | None:
    if settings.peers is None:
        return None

    def desk() -> Desk:
        assert wiring.desk is not None, "peers come when the store is open"
        return wiring.desk

    peers = open_peers(
        settings,
        desk=desk,
        arena=host.arena,
        secret=identity.secret,
        node_id=identity.node_id,
        epoch=identity.epoch,
        socket_path=identity.socket_path,
        bind_host=identity.bind_host,
        advertise_host=identity.advertise_host,
        on_change=wiring.settled,
    )
    stack.push_async_callback(peers.stop)
    return peers


def _peer_supply(peers: Peers, settings: PeerSettings, time: StoreTime) -> Supply:
    patience = Patience(base_s=settings.transfer_s, min_bytes_per_s=settings.min_bytes_per_s)
    return Supply(peers, threads=settings.max_transfers, patience=patience, has_expired=time.has_expired)


def _open_server(
    stack: AsyncExitStack, settings: StoreSettings, identity: Identity, parts: Parts, quotas: Quotas
) -> None:
    # Last: it takes the place of another store's socket, which must keep it if the folder is that store's too.
    listener = listen_on(identity.socket_path)
    stack.callback(listener.close)
    stack.callback(_unlink_socket, identity.socket_path, os.stat(identity.socket_path).st_ino)
    service = StoreService(
        desk=parts.desk,
        settings=settings,
        upkeep=parts.upkeep,
        stats=lambda number: _stats(number, settings, parts, quotas),
        redeem=parts.peers.redeem if parts.peers else _no_handle,
        news_s=parts.peers.news_s if parts.peers else _no_news,
    )
    server = StoreServer(
        service,
        listener,
        secret=identity.secret,
        epoch=identity.epoch,
        arena_fd=parts.host.fd,
        arena_bytes=parts.host.capacity_bytes,
    )
    stack.push_async_callback(server.stop)


def _stats(number: int, settings: StoreSettings, parts: Parts, quotas: Quotas) -> Stats:
    books = parts.host.books
    return Stats(
        number=number,
        tiers=parts.stat(),
        sessions=len(parts.desk.sessions),
        read_leases=parts.desk.num_reads,
        reservations=parts.desk.num_writes,
        write_behind_chunks=parts.mover.queued_chunks,
        hits={parts.host.name: parts.desk.num_granted, **parts.mover.fetched},
        host_bytes_by_tenant={tenant: books.used_by(tenant) for tenant in quotas.by_tenant},
        quota_bytes_by_tenant=dict(quotas.by_tenant),
        default_quota_bytes=quotas.default,
        ttl_s=settings.ttl_s,
        peers=parts.peers.stat() if parts.peers else {},
    )


def _no_handle(_: bytes) -> Place | None:
    return None


def _no_news() -> float:
    return 0.0


def _unlink_socket(path: str, inode: int) -> None:
    """Remove our socket, but not that of a successor."""
    with suppress(OSError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)
