"""Which tier holds which chunk, as the cluster was told, and how often each is used.

Covers: the fastest tier per chunk over all tiers of a node, the events when it changes, uses.
Does not cover: the tiers' own books, how events travel (`kvstore.events`), chunks of other nodes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.container import Header, entry_of
from kvstore.events import ChunkChange, HeldChunk
from kvstore.interfaces import TierEntry
from kvstore.keys import ChunkKey
from kvstore.tiers.host import HostTier


class Holder(Protocol):
    """A tier below the arena, as far as the index asks it."""

    @property
    def name(self) -> str:
        """The tier's name."""
        ...

    def entry(self, key: ChunkKey) -> TierEntry | None:
        """What it knows about a key that may be read."""
        ...


@dataclass(slots=True)
class Known:
    """What was announced of one chunk, and its use on this node."""

    chunk: HeldChunk
    uses: int = 0
    last_used_s: float | None = None


class ChunkIndex:
    """What was announced, compared with the tiers whenever something may have changed.

    Args:
        host: The arena.
        holders: The tiers below it, fastest first.
        announce: Told of every change, in order.
        has_expired: Whether a chunk of that date is a miss.
    """

    def __init__(
        self,
        host: HostTier,
        holders: Sequence[Holder],
        *,
        announce: Callable[[ChunkChange, HeldChunk], None],
        has_expired: Callable[[float], bool] = lambda learned_unix_s: False,
    ) -> None:
        self._host = host
        self._holders = tuple(holders)
        self._announce = announce
        self._has_expired = has_expired
        self._known: dict[ChunkKey, Known] = {}

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._known

    def __len__(self) -> int:
        return len(self._known)

    def keys(self) -> list[ChunkKey]:
        """Keys of all chunks on this node now."""
        return list(self._known)

    def find(self, key: ChunkKey) -> Known | None:
        """What is known of one chunk."""
        return self._known.get(key)

    def snapshot(self) -> tuple[HeldChunk, ...]:
        """Everything announced and not dropped since."""
        return tuple(known.chunk for known in self._known.values())

    def note_use(self, key: ChunkKey, *, now_s: float) -> None:
        """A chunk was read; unknown keys are ignored."""
        known = self._known.get(key)
        if known is not None:
            known.uses += 1
            known.last_used_s = now_s

    def refresh(self, key: ChunkKey) -> None:
        """Compare one key with the tiers, and announce the difference. Harmless when nothing changed."""
        before = self._known.get(key)
        now = self._held(key)
        if before is None:
            if now is not None:
                self._known[key] = Known(now)
                self._announce(ChunkChange.ADDED, now)
        elif now is None:
            del self._known[key]
            self._announce(ChunkChange.DROPPED, before.chunk)
        elif now != before.chunk:
            before.chunk = now
            self._announce(ChunkChange.MOVED, now)

    def _held(self, key: ChunkKey) -> HeldChunk | None:
        slot = self._host.find(key)
        if slot and slot.header is not None and not self._has_expired(slot.header.meta.learned_unix_s):
            return held_chunk(slot.header, self._host.name)
        for holder in self._holders:
            entry = holder.entry(key)
            if entry is not None:
                return _held_chunk(key, entry, holder.name)
        return None


def held_chunk(header: Header, tier: str) -> HeldChunk:
    """What is announced of a record."""
    return _held_chunk(header.key, entry_of(header), tier)


def _held_chunk(key: ChunkKey, entry: TierEntry, tier: str) -> HeldChunk:
    return HeldChunk(
        key=key,
        tier=tier,
        num_bytes=entry.payload_bytes,
        num_tokens=entry.num_tokens,
        codec=entry.codec,
        base_position=entry.base_position,
        tenant=entry.tenant,
        learned_unix_s=entry.learned_unix_s,
    )
