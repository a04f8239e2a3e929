"""Which node holds which chunk: a fold over what the stores say.

Covers: events and snapshots in, lookups out, bounded memory; what replicas said before the event came.
Does not cover: sockets, gaps and replays (`kvstore.events.DirectoryFeed`), when feeds run (`router.feeds`).
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from kvstore.events import ChunkChange, ChunkEvent, FeedItem, StoreLost, StoreSnapshot
from kvstore.keys import ChunkKey

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Location:
    """One node's copy of a chunk."""

    tier: str
    num_bytes: int
    num_tokens: int


class Directory:
    """Chunk locations of all nodes.

    Guarantees:
        The same items in the same order give the same contents.
        Entries of another epoch of the same node are dropped before anything of the new epoch is kept.
        Never more than `max_entries` locations; the oldest are forgotten, which costs only misses.
    """

    def __init__(self, *, max_entries: int) -> None:
        self._max_entries = max_entries
        self._locations: OrderedDict[tuple[str, bytes], Location] = OrderedDict()
        self._nodes_by_key: dict[bytes, set[str]] = {}
        self._keys_by_node: dict[str, set[bytes]] = {}
        self._epochs: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._locations)

    def apply(self, item: FeedItem) -> None:
        """Fold one item of a store's feed."""
        match item:
            case ChunkEvent():
                self._enter_epoch(item.node_id, item.epoch)
                if item.change is ChunkChange.DROPPED:
                    self._drop(item.node_id, item.key)
                else:
                    self._put(item.node_id, item.key, Location(item.tier, item.num_bytes, item.num_tokens))
            case StoreSnapshot():
                self.drop_node(item.node_id)
                self._epochs[item.node_id] = item.epoch
                for chunk in item.chunks:
                    self._put(item.node_id, chunk.key, Location(chunk.tier, chunk.num_bytes, chunk.num_tokens))
            case StoreLost():
                if self._epochs.get(item.node_id) == item.epoch:
                    self.drop_node(item.node_id)

    def drop_node(self, node_id: str) -> int:
        """Forget everything about one node; how many locations that were."""
        keys = list(self._keys_by_node.get(node_id, ()))
        for key in keys:
            self._drop(node_id, key)
        self._epochs.pop(node_id, None)
        return len(keys)

    def locations(self, key: ChunkKey) -> dict[str, Location]:
        """Copies of one chunk by node."""
        return {node_id: self._locations[node_id, key] for node_id in sorted(self._nodes_by_key.get(key, ()))}

    def nodes_by_key(self, keys: Iterable[ChunkKey]) -> dict[ChunkKey, frozenset[str]]:
        """For a view: nodes that hold each key; keys held nowhere are left out."""
        return {key: frozenset(nodes) for key in keys if (nodes := self._nodes_by_key.get(key))}

    def num_chunks(self, node_id: str) -> int:
        """Chunks known on one node."""
        return len(self._keys_by_node.get(node_id, ()))

    def _enter_epoch(self, node_id: str, epoch: str) -> None:
        if self._epochs.get(node_id) != epoch:
            self.drop_node(node_id)
            self._epochs[node_id] = epoch

    def _put(self, node_id: str, key: bytes, location: Location) -> None:
        self._locations.pop((node_id, key), None)
        self._locations[node_id, key] = location
        self._nodes_by_key.setdefault(key, set()).add(node_id)
        self._keys_by_node.setdefault(node_id, set()).add(key)
        if len(self._locations) > self._max_entries:
            (oldest_node, oldest_key), _ = next(iter(self._locations.items()))
            self._drop(oldest_node, oldest_key)

    def _drop(self, node_id: str, key: bytes) -> None:
        if self._locations.pop((node_id, key), None) is None:
            return
        _discard(self._nodes_by_key, key, node_id)
        _discard(self._keys_by_node, node_id, key)


class FreshChunks:
    """Chunks that a prefill replica has just called readable, until the store's own event must have arrived.

    Without it, whoever asks right after a passage was learned would have it learned again.
    """

    def __init__(self, *, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._entries: OrderedDict[ChunkKey, tuple[str, float]] = OrderedDict()

    def add(self, keys: Iterable[ChunkKey], *, node_id: str, now_s: float) -> None:
        """Believe that `node_id` holds `keys`, from `now_s` on for the time to live."""
        self._expire(now_s)
        for key in keys:
            self._entries[key] = (node_id, now_s + self._ttl_s)
            self._entries.move_to_end(key)

    def node_of(self, key: ChunkKey, *, now_s: float) -> frozenset[str]:
        """The node that was last believed to hold `key`, if it still is."""
        node_id, until_s = self._entries.get(key, ("", now_s))
        return frozenset({node_id} if until_s > now_s else ())

    def _expire(self, now_s: float) -> None:
        while self._entries and next(iter(self._entries.values()))[1] <= now_s:
            self._entries.popitem(last=False)


def _discard(index: dict[K, set[V]], name: K, value: V) -> None:
    values = index[name]
    values.discard(value)
    if not values:
        del index[name]
