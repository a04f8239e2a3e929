"""What the stores of other nodes hold, and whom to ask for a chunk.

Covers: the fold of their event feeds into a bounded table, the order in which holders are tried. Both pure.
Does not cover: feeds (`kvstore.events`), connections (`kvstore.peer_link`), transfers (`kvstore.peers`).

Written by one thread. `copies` may be called on any thread meanwhile: what it returns never changes.
"""

import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final

import msgspec

from kvstore.container import stored_bytes
from kvstore.events import ChunkChange, ChunkEvent, FeedItem, HeldChunk, StoreLost, StoreSnapshot
from kvstore.interfaces import TierEntry
from kvstore.keys import ChunkKey

_FORGET_RATIO: Final = 0.05
"""Share of the table that goes at once when it is full: one pass over it pays for many additions."""


class Copy(msgspec.Struct, frozen=True, gc=False):
    """One node's copy of a chunk, as it said."""

    node_id: str
    tier: str
    payload_bytes: int
    num_tokens: int
    base_position: int
    codec: str
    tenant: str
    learned_unix_s: float

    @property
    def stored_bytes(self) -> int:
        """Length of the record."""
        return stored_bytes(self.payload_bytes)

    def entry(self) -> TierEntry:
        """The copy as a source's entry."""
        return TierEntry(
            payload_bytes=self.payload_bytes,
            stored_bytes=self.stored_bytes,
            num_tokens=self.num_tokens,
            base_position=self.base_position,
            codec=self.codec,
            tenant=self.tenant,
            learned_unix_s=self.learned_unix_s,
        )


class PeerDirectory:
    """Copies by key.

    Guarantees:
        The same items in the same order give the same contents.
        Nothing of one life of a node survives into the next, or its loss.
        Never more than `max_keys` keys: the longest known are forgotten, which costs only misses.

    Args:
        max_keys: Bound.
    """

    def __init__(self, *, max_keys: int) -> None:
        self._max_keys = max_keys
        self._copies: dict[ChunkKey, tuple[Copy, ...]] = {}
        self._keys_by_node: dict[str, set[ChunkKey]] = {}
        self._epochs: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._copies)

    def copies(self, key: ChunkKey) -> tuple[Copy, ...]:
        """Who holds a chunk; empty if nobody is known to."""
        return self._copies.get(key, ())

    def num_chunks(self, node_id: str) -> int:
        """Chunks known on one node."""
        return len(self._keys_by_node.get(node_id, ()))

    def keys_of(self, node_id: str) -> list[ChunkKey]:
        """Chunks known on one node, in no order."""
        return list(self._keys_by_node.get(node_id, ()))

    def apply(self, item: FeedItem) -> Sequence[ChunkKey]:
        """Fold one item of a node's feed; the keys that it added or changed."""
        match item:
            case ChunkEvent():
                if self._epochs.get(item.node_id) != item.epoch:
                    self.drop_node(item.node_id)
                    self._epochs[item.node_id] = item.epoch
                if item.change is ChunkChange.DROPPED:
                    self.drop(item.node_id, ChunkKey(item.key))
                    return ()
                self._put(item.node_id, item)
                return (ChunkKey(item.key),)
            case StoreSnapshot():
                self.drop_node(item.node_id)
                self._epochs[item.node_id] = item.epoch
                for chunk in item.chunks:
                    self._put(item.node_id, chunk)
                return [ChunkKey(chunk.key) for chunk in item.chunks]
            case StoreLost():
                if self._epochs.get(item.node_id) == item.epoch:
                    self.drop_node(item.node_id)
                return ()

    def drop_node(self, node_id: str) -> int:
        """Forget everything about one node; how many chunks that were."""
        keys = list(self._keys_by_node.get(node_id, ()))
        for key in keys:
            self.drop(node_id, key)
        self._epochs.pop(node_id, None)
        return len(keys)

    def drop(self, node_id: str, key: ChunkKey) -> None:
        """Forget one copy, for example because its node said that it has none. Harmless if it is not known."""
        keys = self._keys_by_node.get(node_id)
        if keys is None or key not in keys:
            return
        keys.discard(key)
        if not keys:
            del self._keys_by_node[node_id]
        others = tuple(copy for copy in self._copies[key] if copy.node_id != node_id)
        if others:
            self._copies[key] = others
        else:
            del self._copies[key]

    def _put(self, node_id: str, chunk: ChunkEvent | HeldChunk) -> None:
        key = ChunkKey(chunk.key)
        copy = Copy(
            sys.intern(node_id),
            sys.intern(chunk.tier),
            chunk.num_bytes,
            chunk.num_tokens,
            chunk.base_position,
            sys.intern(chunk.codec),
            sys.intern(chunk.tenant),
            chunk.learned_unix_s,
        )
        others = tuple(other for other in self._copies.get(key, ()) if other.node_id != node_id)
        self._copies[key] = (*others, copy)
        self._keys_by_node.setdefault(node_id, set()).add(key)
        if len(self._copies) > self._max_keys:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        count = max(1, int(_FORGET_RATIO * self._max_keys))
        oldest = [key for _, key in zip(range(count), self._copies, strict=False)]
        for key in oldest:
            for copy in self._copies[key]:
                self.drop(copy.node_id, key)


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """A node that may be asked for one chunk."""

    node_id: str
    same_machine: bool
    transfers: int
    """Transfers from it that are under way."""


def order_holders(holders: Iterable[Holder], *, turn: int) -> list[str]:
    """In which order to ask: same machine first, then the least busy; equals take turns.

    Args:
        holders: In any order.
        turn: Any number; the next one starts with the next of equals.

    Example:
        >>> a, b = (Holder(node_id=n, same_machine=False, transfers=0) for n in "ab")
        >>> near = Holder(node_id="n", same_machine=True, transfers=5)
        >>> order_holders([b, a, near], turn=0), order_holders([b, a, near], turn=1)
        (['n', 'a', 'b'], ['n', 'b', 'a'])
    """

    def rank(holder: Holder) -> tuple[bool, int]:
        return (not holder.same_machine, holder.transfers)

    order: list[str] = []
    for _, group in groupby(sorted(holders, key=lambda h: (rank(h), h.node_id)), key=rank):
        names = [holder.node_id for holder in group]
        start = turn % len(names)
        order += names[start:] + names[:start]
    return order
