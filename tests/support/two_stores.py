"""Two store processes that know each other, for tests of what nodes do for each other.

Covers: starting, connecting, emptying and checking them, a client that writes to the first and reads from the second.
Does not cover: Ray (`tests/ray`), data paths without stores (`kvstore.testing.transport`).
"""

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from kvstore.client import NodeStoreClient
from kvstore.interfaces import ChunkMeta, ReadLease, StreamLease, WriteLease
from kvstore.keys import ChunkKey
from kvstore.protocol import PeerStat
from kvstore.settings import StoreSettings
from kvstore.testing.poll import wait_until
from kvstore.testing.process import StoreProcess
from kvstore.testing.samples import sample_key
from kvstore.testing.store_client import SOON_S

SECRET = b"a secret of a test cluster"


class _AnnouncedWrite:
    """A write on one store that is over when another store has heard of it."""

    def __init__(self, inner: WriteLease, reader: NodeStoreClient) -> None:
        self._inner = inner
        self._reader = reader

    @property
    def key(self) -> ChunkKey:
        return self._inner.key

    @property
    def payload(self) -> memoryview:
        return self._inner.payload

    def commit(self, num_bytes: int | None = None) -> bool:
        ok = self._inner.commit() if num_bytes is None else self._inner.commit(num_bytes)
        if ok:
            wait_until(lambda: self._reader.lookup([self.key], deadline_s=1.0) == [True], what="the event to arrive")
        return ok

    def abort(self) -> None:
        self._inner.abort()


class SplitClient:
    """Writes to one node's store, reads from another's."""

    def __init__(self, writes: NodeStoreClient, reads: NodeStoreClient) -> None:
        self._writes = writes
        self._reads = reads

    def lookup(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> list[bool]:
        return self._reads.lookup(keys, deadline_s=deadline_s)

    def wait(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> list[bool]:
        return self._reads.wait(keys, deadline_s=deadline_s)

    def read(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> list[ReadLease | None]:
        # A reader knows nothing of writes on another node: it has to say that it wants to wait for them.
        stop_s = time.monotonic() + deadline_s
        if self._is_being_written():
            self._reads.wait(keys, deadline_s=deadline_s / 2)
        return self._reads.read(keys, deadline_s=max(0.0, stop_s - time.monotonic()))

    def read_into(self, key: ChunkKey, out: memoryview, *, deadline_s: float) -> ChunkMeta | None:
        return self._reads.read_into(key, out, deadline_s=deadline_s)

    def stream(self, key: ChunkKey, *, deadline_s: float) -> StreamLease | None:
        if self._is_being_written():
            self._reads.wait([key], deadline_s=min(1.0, deadline_s / 2))
        return self._reads.stream(key, deadline_s=deadline_s)

    def reserve(self, key: ChunkKey, meta: ChunkMeta, num_bytes: int, *, deadline_s: float) -> WriteLease | None:
        lease = self._writes.reserve(key, meta, num_bytes, deadline_s=deadline_s)
        return None if lease is None else _AnnouncedWrite(lease, self._reads)

    def pin(self, keys: Sequence[ChunkKey], *, seconds: float, deadline_s: float) -> list[bool]:
        return self._writes.pin(keys, seconds=seconds, deadline_s=deadline_s)

    def unpin(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> None:
        self._writes.unpin(keys, deadline_s=deadline_s)

    def close(self) -> None:
        self._writes.close()
        self._reads.close()

    def _is_being_written(self) -> bool:
        """Whether a wait can be of use: a commit returns only when the other store has heard of it."""
        stats = self._writes.stat(deadline_s=SOON_S)
        return stats is None or stats.reservations > 0


class Pair:
    """Two store processes that know each other."""

    def __init__(self, folder: Path, settings: StoreSettings, second: StoreSettings | None = None) -> None:
        self.paths = [str(folder / name) for name in "ab"]
        self.stores = [
            StoreProcess(own, secret=SECRET, socket_path=path, node_id=f"node-{name}")
            for own, path, name in zip((settings, second or settings), self.paths, "ab", strict=True)
        ]
        self.observers = [self.client(number) for number in (0, 1)]
        for store in self.stores:
            store.set_peers([other.endpoint for other in self.stores])
        for observer in self.observers:
            wait_until(lambda o=observer: is_up(o), what="the stores to find each other")

    def client(self, number: int) -> NodeStoreClient:
        return NodeStoreClient(self.paths[number], secret=SECRET, client_name="test")

    def split(self) -> SplitClient:
        return SplitClient(self.client(0), self.client(1))

    def empty(self) -> None:
        for observer in self.observers:
            observer.drop([sample_key(i) for i in range(200)], deadline_s=10.0)
        # The other store forgets what it has heard of when the events arrive.
        for observer in self.observers:
            wait_until(lambda o=observer: num_known(o) == 0, what="the drops to be known")

    def leftovers(self) -> list[str]:
        return self.leftovers_of(0) + self.leftovers_of(1)

    def leftovers_of(self, number: int) -> list[str]:
        stats = self.observers[number].stat(deadline_s=SOON_S)
        assert stats is not None
        counts = {
            "read leases": stats.read_leases,
            "reservations": stats.reservations,
            "pinned bytes": stats.tiers["host"].pinned_bytes,
            "transfers": sum(peer.transfers for peer in stats.peers.values()),
        }
        return [f"{count} {what} on {'ab'[number]}" for what, count in counts.items() if count]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for observer in self.observers:
            observer.close()
        for store in self.stores:
            store.kill()


def is_up(observer: NodeStoreClient) -> bool:
    stats = observer.stat(deadline_s=1.0)
    return stats is not None and [peer.is_up for peer in stats.peers.values()] == [True]


def num_known(observer: NodeStoreClient) -> int:
    stats = observer.stat(deadline_s=1.0)
    assert stats is not None
    return sum(tier.chunks for tier in stats.tiers.values()) + sum(peer.chunks for peer in stats.peers.values())


def peers_of(client: NodeStoreClient) -> dict[str, PeerStat]:
    """The other nodes' stores as this one sees them."""
    stats = client.stat(deadline_s=SOON_S)
    assert stats is not None
    return stats.peers
