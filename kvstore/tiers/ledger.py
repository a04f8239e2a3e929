"""Who may touch which record file now, and which files make room: the state of a file tier, without any I/O.

Covers: books, records that a scan found but that are not in the books yet, spares, and the rules below; for any number
of threads. Does not cover: the files (`kvstore.tiers.records`), what order they come in (`kvstore.tiers.file`).

- A key that is *being written* or is *leaving* belongs to the one thread that writes or deletes its file. For all
  others it is missing; a writer of the same key waits.
- A key that is *being read*, be it only its header by the scan, is not evicted: its file would be written over.
- Room is taken in the books before a byte is written, so that writes under way are counted.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Final

import msgspec

from cluster.clock import Clock
from kvstore.interfaces import TierEntry, TierStat
from kvstore.keys import ChunkKey
from kvstore.tiers.books import TierBooks
from kvstore.tiers.findings import Findings
from kvstore.tiers.records import Spares


class Ledger:
    """Records of one folder.

    Args:
        books: Owned by this ledger from now on.
        capacity_bytes: As the books have it.
        clock: For pins.
    """

    def __init__(self, books: TierBooks, *, capacity_bytes: int, clock: Clock) -> None:
        self.lock: Final = threading.Lock()
        self.findings = Findings()
        self._settled = threading.Condition(self.lock)
        self._books = books
        self._entry_of = books.find
        self._capacity_bytes = capacity_bytes
        self._clock = clock
        self._spares = Spares()
        self._writing: set[ChunkKey] = set()
        self._leaving: set[ChunkKey] = set()
        self._reading: Counter[ChunkKey] = Counter()
        self._unwanted: set[ChunkKey] = set()
        """Keys that were dropped while they were being written."""

    # Looking

    def find(self, key: ChunkKey) -> tuple[TierEntry | None, bool]:
        """What is known of a key; and, if nothing is, whether there may be a file that is worth a look.

        Cost:
            0.3 us once the scan is over: without the lock, as each step is atomic and the answer is a hint.
        """
        entry = self._entry_of(key)
        if entry is not None and key not in self._writing and key not in self._leaving:
            return entry, False
        if self.findings.is_complete:
            return None, False
        with self.lock:
            entry = self._find(key)
            if entry is not None:
                return entry, False
            return None, key not in self._leaving and self.findings.may_have(key) and self.findings.may_probe()

    def entries(self) -> list[tuple[ChunkKey, TierEntry]]:
        """All that is known, in no order."""
        with self.lock:
            held = [(key, entry) for key, entry in self._books.items() if key not in self._writing]
            return held + self.findings.items()

    def uses(self, key: ChunkKey) -> int:
        """How often a record was used in this life."""
        with self.lock:
            return self._books.uses(key)

    def stat(self) -> TierStat:
        """Counts now, with what a scan has listed so far."""
        with self.lock:
            stat = self._books.stat()
            return msgspec.structs.replace(
                stat,
                chunks=stat.chunks - len(self._writing) + len(self.findings),
                bytes=stat.bytes + self.findings.bytes,
            )

    # Pins and uses

    def pin(self, key: ChunkKey, *, until_s: float) -> bool:
        """Keep a record until a time; False if it is not here, or pins hold too much."""
        with self.lock:
            entry = self._find(key)
            if entry is None:
                return False
            if key not in self._books:
                self.findings.forget(key)
                self._books.admit(key, entry)
            return self._books.pin(key, until_s=until_s, now_s=self._clock.now_s())

    def unpin(self, key: ChunkKey) -> None:
        """End a pin; a key without one is ignored."""
        with self.lock:
            self._books.unpin(key)

    def touch(self, key: ChunkKey) -> None:
        """Count a use."""
        with self.lock:
            self._books.touch(key)
            self.findings.note_use(key)

    # Reading

    def begin_read(self, key: ChunkKey, stored_bytes: int) -> TierEntry | None:
        """Keep a record of that length from being evicted until `end_read`; None if it is not here."""
        with self.lock:
            entry = self._find(key)
            if entry is None or entry.stored_bytes != stored_bytes:
                return None
            self._reading[key] += 1
            return entry

    def begin_look(self, key: ChunkKey) -> bool:
        """As `begin_read`, for the header of a record that is not in the books; whether that is still worth it."""
        with self.lock:
            is_owned = key in self._writing or key in self._leaving
            if is_owned or key in self._books or not self.findings.may_have(key):
                return False
            self._reading[key] += 1
            return True

    def note_header(self, key: ChunkKey, entry: TierEntry) -> bool:
        """The header of a key that is being looked at is sound; whether that is news and still true."""
        with self.lock:
            return key not in self._books and self.findings.note_header(key, entry)

    def end_read(self, key: ChunkKey) -> None:
        """The file is not being read any more."""
        with self.lock:
            self._reading[key] -= 1
            if not self._reading[key]:
                del self._reading[key]

    # Writing

    def begin_write(self, key: ChunkKey, entry: TierEntry) -> tuple[bool, list[ChunkKey]] | None:
        """Take room for a record and its key for the caller.

        Returns:
            Whether the record is there already (then nothing is taken), and who leaves for it; None: there cannot be
            room.
        """
        with self.lock:
            self._settled.wait_for(lambda: key not in self._writing and key not in self._leaving)
            if self._find(key) is not None:
                return True, []
            self.findings.forget(key)
            victims = self._books.make_room(
                entry.stored_bytes, tenant=entry.tenant, now_s=self._clock.now_s(), is_busy=self._is_busy
            )
            if victims is None:
                return None
            # In this order: `find` looks without the lock.
            self._writing.add(key)
            self._books.admit(key, entry)
            self.findings.note_use(key)
            victims += self.findings.take_oldest(self._over_bytes, is_busy=self._is_busy)
            self._leaving.update(victims)
            return False, victims

    def end_write(self, key: ChunkKey, *, stored: bool) -> bool:
        """The caller is done with the key; whether somebody wanted it dropped meanwhile."""
        with self.lock:
            if not stored:
                self._books.remove(key)
            self._writing.discard(key)
            self._settled.notify_all()
            was_unwanted = key in self._unwanted
            self._unwanted.discard(key)
            return was_unwanted

    # Leaving

    def begin_drop(self, key: ChunkKey) -> tuple[bool, bool]:
        """Take a record out, and its key for the caller.

        Returns:
            Whether the caller is to delete the file (and then to call `end_leave`), and whether the record was known.
            A record that is being written will be dropped by its writer.
        """
        with self.lock:
            if key in self._writing:
                self._unwanted.add(key)
                return False, False
            may_have = self.findings.may_have(key)
            was_known = self._take_out(key)
            if key in self._leaving or not (was_known or may_have):
                return False, False
            self._leaving.add(key)
            return True, was_known

    def begin_discard(self, key: ChunkKey, *, seen: TierEntry | None) -> bool:
        """As `begin_drop`, if all that is known of the key is still what the caller saw before its file disappointed.

        Args:
            key: The record's key.
            seen: Its entry; None: only the scan had seen the file.
        """
        with self.lock:
            # Somebody else may have found out before, and another may have written the record again since.
            is_same = self._find(key) is seen and (seen is not None or self.findings.may_have(key))
            if not is_same or key in self._leaving or key in self._writing:
                return False
            self._take_out(key)
            self._leaving.add(key)
            return True

    def end_leave(self, key: ChunkKey, *, spare: tuple[str, int] | None = None, back: TierEntry | None = None) -> None:
        """The caller is done with a leaving key: its file is gone, a spare (path and length), or could not be moved."""
        with self.lock:
            if spare is not None:
                self._spares.add(*spare)
            if back is not None:
                self._books.admit(key, back)
            self._leaving.discard(key)
            self._settled.notify_all()

    def pick_for_disk(self, missing_bytes: int, *, tenant: str) -> tuple[list[ChunkKey], bool]:
        """Who leaves when the file system lacks room, and whether that is enough; spares count as room."""
        with self.lock:
            missing_bytes -= self._spares.bytes
            before_bytes = self.findings.bytes
            victims = self.findings.take_oldest(missing_bytes, is_busy=self._is_busy)
            missing_bytes -= before_bytes - self.findings.bytes
            order = self._books.victims(tenant=tenant, now_s=self._clock.now_s(), is_busy=self._is_busy)
            chosen: list[ChunkKey] = []
            while missing_bytes > 0 and (key := next(order, None)) is not None:
                entry = self._books.find(key)
                missing_bytes -= entry.stored_bytes if entry is not None else 0
                chosen.append(key)
            for key in chosen:
                self._books.remove(key, evicted=True)
            self._leaving.update(chosen)
            return victims + chosen, missing_bytes <= 0

    # Spares

    def take_spare(self, num_bytes: int) -> str | None:
        """A file to write over."""
        with self.lock:
            return self._spares.take(num_bytes)

    def surplus_spares(self) -> list[str]:
        """Spares that the capacity has no room for, to be deleted."""
        with self.lock:
            return self._spares.trim(max(0, -self._over_bytes))

    def all_spares(self, *, but_one_of_bytes: int | None = None) -> list[str]:
        """Spares, to be deleted: all of them, or all but one that has at least that length."""
        with self.lock:
            kept = self._spares.take_large(but_one_of_bytes) if but_one_of_bytes is not None else None
            rest = self._spares.trim(0)
            if kept is not None:
                self._spares.add(*kept)
            return rest

    # The scan

    def enter(self, keys: Sequence[ChunkKey]) -> list[ChunkKey]:
        """Move found records into the books; who leaves for them, perhaps they themselves, unless they are read."""
        leaving: list[ChunkKey] = []
        with self.lock:
            for key in keys:
                entry = self.findings.take(key)
                if entry is None:
                    continue
                victims = self._books.make_room(
                    entry.stored_bytes, tenant=entry.tenant, now_s=self._clock.now_s(), is_busy=self._is_busy
                )
                if victims is None and self._is_busy(key):
                    self.findings.put_off(key, entry)
                    continue
                if victims is None:
                    victims = [key]
                else:
                    self._books.admit(key, entry)
                self._leaving.update(victims)
                leaving += victims
        return leaving

    def trim(self) -> list[ChunkKey]:
        """Who leaves because what the scan has listed exceeds the capacity."""
        with self.lock:
            victims = self.findings.take_oldest(self._over_bytes, is_busy=self._is_busy)
            self._leaving.update(victims)
            return victims

    def end_scan(self) -> None:
        """All that could be found is in the books: what was used meanwhile is younger than what was found."""
        with self.lock:
            for key in self.findings.finish():
                self._books.touch(key)

    # With the lock held

    @property
    def _over_bytes(self) -> int:
        return self._books.used_bytes + self.findings.bytes - self._capacity_bytes

    def _find(self, key: ChunkKey) -> TierEntry | None:
        if key in self._writing or key in self._leaving:
            return None
        return self._books.find(key) or self.findings.find(key)

    def _take_out(self, key: ChunkKey) -> bool:
        was_found = self.findings.forget(key)
        return self._books.remove(key) is not None or was_found

    def _is_busy(self, key: ChunkKey) -> bool:
        return key in self._reading or key in self._writing
