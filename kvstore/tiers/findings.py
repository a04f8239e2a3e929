"""Records of a former life that are not in the books yet: listed ones, and those whose headers were read.

Covers: what is known of them, and what changed since the start. Does not cover: how they are found
(`kvstore.tiers.scan`). Not safe for several threads: the ledger locks.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from kvstore.interfaces import TierEntry
from kvstore.keys import ChunkKey
from kvstore.tiers.records import ListedFile

NUM_PARTS: Final = 256
_PROBE_S: Final = 0.05
_PROBE_RATIO: Final = 0.25
"""Time that looks out of turn may take: this much at once, and this share of the time since the start."""


class Findings:
    """Everything is unlisted at first; `finish` ends it."""

    def __init__(self) -> None:
        self.bytes = 0
        """Bytes of the listed and found records."""
        self.is_done = False
        self._unlisted = set(range(NUM_PARTS))
        self._listed: dict[ChunkKey, int] = {}
        self._found: dict[ChunkKey, TierEntry] = {}
        self._times: list[tuple[int, ChunkKey]] = []
        self._order: deque[ChunkKey] = deque()
        """Keys that are not in the books yet, oldest first, once all are listed; some may be gone."""
        self._changed: set[ChunkKey] = set()
        """Keys that were written or dropped since the start: what the scan saw of them may be old."""
        self._used: dict[ChunkKey, None] = {}
        self._num_entered = 0
        self._started_s = time.monotonic()
        self._probed_s = 0.0

    def __len__(self) -> int:
        return len(self._listed) + len(self._found)

    # What others ask

    def find(self, key: ChunkKey) -> TierEntry | None:
        """A record whose header was read."""
        return self._found.get(key)

    def items(self) -> list[tuple[ChunkKey, TierEntry]]:
        """Records whose headers were read."""
        return list(self._found.items())

    def may_have(self, key: ChunkKey) -> bool:
        """Whether a key that is not found may have a file all the same."""
        return (key in self._listed or key[0] in self._unlisted) and key not in self._changed

    def may_probe(self) -> bool:
        """Whether looks out of turn have time left: lookups must not wait for a disk one by one."""
        return self._probed_s <= _PROBE_S + _PROBE_RATIO * (time.monotonic() - self._started_s)

    def note_probe(self, seconds: float) -> None:
        """Time of one look out of turn."""
        self._probed_s += seconds

    def note_use(self, key: ChunkKey) -> None:
        """A record was read or written: the books must see it as younger than the scanned ones."""
        if not self.is_done:
            self._used.pop(key, None)
            self._used[key] = None

    def forget(self, key: ChunkKey) -> bool:
        """A key is being written or dropped: whatever the scan sees of it from now on is old. Whether it was here."""
        if not self.is_done:
            self._changed.add(key)
        was_here = key in self._listed or key in self._found
        self._remove(key)
        return was_here

    def take_oldest(self, over_bytes: int, *, is_busy: Callable[[ChunkKey], bool]) -> list[ChunkKey]:
        """Take the longest written records out until `over_bytes` are gone, or none is left."""
        taken: list[ChunkKey] = []
        busy: list[ChunkKey] = []
        stop_bytes = self.bytes - over_bytes
        while self.bytes > stop_bytes and self._order:
            key = self._order.popleft()
            if is_busy(key):
                busy.append(key)
            elif self.forget(key):
                taken.append(key)
        self._order.extendleft(reversed(busy))
        return taken

    # What the scan tells

    def note_listed(self, part: int, files: Sequence[ListedFile]) -> None:
        """All names of one part."""
        self._unlisted.discard(part)
        for file in files:
            if file.key in self._changed:
                continue
            self._times.append((file.mtime_ns, file.key))
            if file.key not in self._found:
                self._listed[file.key] = file.num_bytes
                self.bytes += file.num_bytes

    def note_all_listed(self) -> None:
        """Every part that can be listed was."""
        self._times.sort()
        self._order.extend(key for _, key in self._times)
        self._times.clear()

    def unread(self) -> list[ChunkKey]:
        """Keys whose headers are to be read, youngest first."""
        return [key for key in reversed(self._order) if key in self._listed]

    def is_unread(self, key: ChunkKey) -> bool:
        """Whether a key's header is still to be read."""
        return key in self._listed

    def note_header(self, key: ChunkKey, entry: TierEntry) -> bool:
        """A header was read and is sound; whether that is news and still true."""
        if key in self._found or not self.may_have(key):
            return False
        self.bytes += entry.stored_bytes - self._listed.pop(key, 0)
        self._found[key] = entry
        if self.is_done or key[0] in self._unlisted:
            self._order.append(key)
        return True

    def take(self, key: ChunkKey) -> TierEntry | None:
        """A found record, on its way into the books."""
        entry = self._found.get(key)
        self._remove(key)
        self._num_entered += entry is not None
        return entry

    def put_off(self, key: ChunkKey, entry: TierEntry) -> None:
        """A taken record stays here for now: behind all others."""
        self._found[key] = entry
        self.bytes += entry.stored_bytes
        self._num_entered -= 1
        self._order.append(key)

    def next_to_enter(self, count: int) -> list[ChunkKey]:
        """Keys for `take`, oldest first; none: all are in the books."""
        return [self._order.popleft() for _ in range(min(count, len(self._order)))]

    @property
    def is_complete(self) -> bool:
        """Whether everything was found: what is not in the books is nowhere."""
        return self.is_done and not self._unlisted and not self._found

    def finish(self) -> list[ChunkKey]:
        """All found records were entered; keys that were used meanwhile, in order, if they are to count as younger.

        What could not be read stays on the disk, for the next start to try.
        """
        self.is_done = True
        self._listed.clear()
        self._changed.clear()
        self.bytes = sum(entry.stored_bytes for entry in self._found.values())
        used, self._used = list(self._used), {}
        return used if self._num_entered else []

    def _remove(self, key: ChunkKey) -> None:
        self.bytes -= self._listed.pop(key, 0)
        entry = self._found.pop(key, None)
        if entry is not None:
            self.bytes -= entry.stored_bytes
