"""Which tier holds which chunk, as the cluster was told.

Covers: the fastest tier per chunk over all tiers of a node, and the events when it changes.
Does not cover: the tiers' own books, how events travel (`kvstore.events`).
"""

from collections.abc import Callable

from kvstore.container import Header
from kvstore.events import ChunkChange, HeldChunk
from kvstore.keys import ChunkKey
from kvstore.tiers.file import FileTier
from kvstore.tiers.host import HostTier


class ChunkIndex:
    """What was announced, compared with the tiers whenever something may have changed.

    Args:
        host: The arena.
        file: The files below it, if there are any.
        announce: Told of every change, in order.
    """

    def __init__(
        self, host: HostTier, file: FileTier | None, *, announce: Callable[[ChunkChange, HeldChunk], None]
    ) -> None:
        self._host = host
        self._file = file
        self._announce = announce
        self._announced: dict[ChunkKey, HeldChunk] = {}

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._announced

    def snapshot(self) -> tuple[HeldChunk, ...]:
        """Everything announced and not dropped since."""
        return tuple(self._announced.values())

    def refresh(self, key: ChunkKey) -> None:
        """Compare one key with the tiers, and announce the difference. Harmless when nothing changed."""
        before = self._announced.get(key)
        now = self._held(key)
        if now == before:
            return
        if now is None:
            assert before is not None
            del self._announced[key]
            self._announce(ChunkChange.DROPPED, before)
            return
        self._announced[key] = now
        self._announce(ChunkChange.MOVED if before else ChunkChange.ADDED, now)

    def _held(self, key: ChunkKey) -> HeldChunk | None:
        slot = self._host.find(key)
        if slot is not None and slot.header is not None:
            return _held_chunk(slot.header, self._host.name)
        entry = self._file.entry(key) if self._file else None
        return _held_chunk(entry.header, "file") if entry else None


def _held_chunk(header: Header, tier: str) -> HeldChunk:
    return HeldChunk(
        key=header.key,
        tier=tier,
        num_bytes=header.payload_bytes,
        num_tokens=header.meta.num_tokens,
        codec=header.meta.codec,
    )
