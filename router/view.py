"""What the router believed when it decided: frozen, so that a recorded view replays to the same plan.

Covers: spans with keys, replicas with their booked load, who holds the chunks of one request.
Does not cover: how it is gathered (`router.directory`, `router.membership`, `router.bookings`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvstore.keys import ChunkKey
from kvstore.wire import Peer, SpanKind


@dataclass(frozen=True, slots=True)
class KeyedSpan:
    """One future chunk: half-open `[start, stop)` of the prompt, chained behind everything before it."""

    key: ChunkKey
    start: int
    stop: int
    kind: SpanKind
    document: int | None = None
    """Index into the request's documents, for passages."""
    passage_key: ChunkKey | None = None
    """Of the same tokens behind the anchor alone, for passages; behind it directly both keys are equal."""
    base: int = 0
    """Where the chunk called `passage_key` starts in the prompt that is the anchor and this passage alone."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the span."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """One replica that may take requests."""

    peer: Peer
    node_id: str
    booked_tokens: int
    """Tokens promised to it and not yet done: this router's bookings, or what it reports if that is more."""
    has_store: bool = True
    """Whether its node has a store, so that it can load and save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Everything that a placement may depend on."""

    decode: tuple[ReplicaView, ...] = ()
    prefill: tuple[ReplicaView, ...] = ()
    nodes_by_key: Mapping[ChunkKey, frozenset[str]] = field(default_factory=dict)
    """Nodes whose store holds each of the request's chunks; keys held nowhere are absent."""

    sharing_nodes: frozenset[str] = frozenset()
    """Nodes whose stores read from each other: a chunk on one of them can be read on all of them."""

    def is_local(self, key: ChunkKey, *, node_id: str) -> bool:
        """Whether the node's own store holds the chunk."""
        return node_id in self.nodes_by_key.get(key, frozenset())

    def holds(self, key: ChunkKey, *, node_id: str) -> bool:
        """Whether the chunk can be read on `node_id`, from its own store or from another node's."""
        nodes = self.nodes_by_key.get(key, frozenset())
        return node_id in nodes or (node_id in self.sharing_nodes and bool(nodes & self.sharing_nodes))

    def share(self, one: str, other: str) -> bool:
        """Whether what is saved on one node can be read on the other."""
        return one == other or {one, other} <= self.sharing_nodes

    def held_prefix_tokens(self, spans: Sequence[KeyedSpan], *, node_id: str) -> int:
        """Tokens from position 0 that can be read on `node_id` without a gap."""
        stop = 0
        for span in spans:
            if not self.holds(span.key, node_id=node_id):
                break
            stop = span.stop
        return stop

    def local_tokens(self, spans: Sequence[KeyedSpan], *, node_id: str) -> int:
        """Those of `held_prefix_tokens` that the node's own store holds."""
        stop = self.held_prefix_tokens(spans, node_id=node_id)
        return sum(s.num_tokens for s in spans if s.stop <= stop and self.is_local(s.key, node_id=node_id))
