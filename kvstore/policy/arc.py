"""ARC: two LRU lists, of records used once and used again, whose balance follows the misses.

Covers: the order, the ghosts and the balance. Does not cover: values of records (`kvstore.policy.cost`).

Source:
    Megiddo, Modha: "ARC: a self-tuning, low overhead replacement cache", FAST 2003, Figure 4. Ours counts bytes where
    the paper counts pages. A tier makes room before it says for which key, so the balance moves with a miss that
    comes back after its eviction instead of before it: one eviction later than in the paper.
"""

from collections import OrderedDict
from collections.abc import Iterator

from kvstore.interfaces import TierEntry
from kvstore.keys import ChunkKey


class _Sized:
    """A list in order of use that knows its bytes."""

    def __init__(self) -> None:
        self.sizes: OrderedDict[ChunkKey, int] = OrderedDict()
        self.bytes = 0

    def push(self, key: ChunkKey, stored_bytes: int) -> None:
        self.sizes[key] = stored_bytes
        self.bytes += stored_bytes

    def pop(self, key: ChunkKey) -> int:
        stored_bytes = self.sizes.pop(key)
        self.bytes -= stored_bytes
        return stored_bytes

    def pop_oldest(self) -> None:
        self.bytes -= self.sizes.popitem(last=False)[1]


class ArcPolicy:
    """T1, T2 of the paper and their ghosts B1, B2, by bytes.

    Cost:
        O(1) amortised per call; ghosts stand for at most as many bytes as the tier held at most.
    """

    def __init__(self) -> None:
        self._once = _Sized()
        self._again = _Sized()
        self._once_ghosts = _Sized()
        self._again_ghosts = _Sized()
        self._once_target_bytes = 0.0
        """The paper's p: bytes that records used once should have."""
        self._most_bytes = 0
        """The paper's c: as a policy does not know its tier's size, the most that it ever held."""

    def admit(self, key: ChunkKey, entry: TierEntry) -> None:
        """A new record was used once; one that is remembered was used again, and moves the balance."""
        for resident in (self._once, self._again):
            if key in resident.sizes:
                resident.pop(key)
                resident.push(key, entry.stored_bytes)
                return
        once, again = self._once_ghosts, self._again_ghosts
        if key in once.sizes:
            step_bytes = entry.stored_bytes * max(1.0, again.bytes / once.bytes)
            self._once_target_bytes = min(self._most_bytes, self._once_target_bytes + step_bytes)
            once.pop(key)
            self._again.push(key, entry.stored_bytes)
        elif key in again.sizes:
            step_bytes = entry.stored_bytes * max(1.0, once.bytes / again.bytes)
            self._once_target_bytes = max(0.0, self._once_target_bytes - step_bytes)
            again.pop(key)
            self._again.push(key, entry.stored_bytes)
        else:
            self._once.push(key, entry.stored_bytes)
        self._most_bytes = max(self._most_bytes, self._once.bytes + self._again.bytes)
        self._trim_ghosts()

    def touch(self, key: ChunkKey) -> None:
        """A use: the record is the last to leave of those used again."""
        for resident in (self._once, self._again):
            if key in resident.sizes:
                self._again.push(key, resident.pop(key))
                return

    def remove(self, key: ChunkKey, *, evicted: bool) -> None:
        """Take a record out; an evicted one is remembered."""
        for resident, ghosts in ((self._once, self._once_ghosts), (self._again, self._again_ghosts)):
            if key in resident.sizes:
                stored_bytes = resident.pop(key)
                if evicted:
                    ghosts.push(key, stored_bytes)
                    self._trim_ghosts()
                return

    def victims(self) -> Iterator[ChunkKey]:
        """From the records used once while they have more than their target, else from those used again."""
        once, again = iter(self._once.sizes.items()), iter(self._again.sizes.items())
        once_bytes, again_bytes = self._once.bytes, self._again.bytes
        while once_bytes or again_bytes:
            if once_bytes and (once_bytes > self._once_target_bytes or not again_bytes):
                key, stored_bytes = next(once)
                once_bytes -= stored_bytes
            else:
                key, stored_bytes = next(again)
                again_bytes -= stored_bytes
            yield key

    def _trim_ghosts(self) -> None:
        """Once-used records with their ghosts stand for at most c bytes, all four lists for at most 2 c."""
        once, again = self._once_ghosts, self._again_ghosts
        while once.sizes and self._once.bytes + once.bytes > self._most_bytes:
            once.pop_oldest()
        while again.sizes and self._once.bytes + once.bytes + self._again.bytes + again.bytes > 2 * self._most_bytes:
            again.pop_oldest()
