"""Which objects of a bucket a node believes in: rebuilt by listings, kept up by what the node itself does.

Covers: folding pages of listings, own writes and losses into `TierBooks`; objects that have to be deleted.
Does not cover: I/O, threads (`kvstore.tiers.object`).

A listing is as old as its first page, so what happened since it began counts for more: an own write is not taken for
gone, and what was dropped does not come back. Where two objects hold one key (two nodes, two codecs), the newest
counts, and between equals the greater name, so that all nodes agree.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from kvstore.interfaces import EvictionPolicy, TierEntry
from kvstore.keys import ChunkKey
from kvstore.tiers.books import TierBooks
from kvstore.tiers.bucket import Listed
from kvstore.tiers.object_names import object_name, parse_name

MAX_OBJECTS: Final = 1_000_000
"""Bound of the index: further objects of a listing are ignored."""
MAX_TWINS: Final = 10_000
"""Bound of the second objects per key that are remembered, to be deleted with the first."""
_LATE_LISTINGS: Final = 2
"""One may be under way already."""


@dataclass(slots=True)
class _Listing:
    """One listing under way."""

    modified_unix_s: dict[ChunkKey, float] = field(default_factory=dict)
    """Of the object that counts, by key."""
    twins: dict[ChunkKey, set[str]] = field(default_factory=dict)
    """Other objects of a key."""
    num_foreign: int = 0
    """Objects that are none of ours, or of a wrong length."""


class ObjectIndex:
    """Not safe for several threads: the owner locks.

    Args:
        books: Of the tier; changed only through this index from now on, but for pins and touches.
    """

    def __init__(self, books: TierBooks) -> None:
        self.books = books
        self.doomed: dict[str, str | None] = {}
        """Objects to delete, by name; with the version that is meant, or None for any."""
        self.has_listed = False
        """Whether a listing has come to its end."""
        self._twins: dict[ChunkKey, set[str]] = {}
        self._listing: _Listing | None = None
        self._own_keys: set[ChunkKey] = set()
        """Written, or dropped, since the listing began; or being written then."""
        self._late: dict[str, int] = {}
        """Objects that may still appear although nobody wants them, by name; for so many more listings."""

    def admit(self, key: ChunkKey, entry: TierEntry) -> None:
        """This node writes the record."""
        self.books.admit(key, entry)
        self._note_own(key)

    def remove(self, key: ChunkKey, *, evicted: bool = False) -> TierEntry | None:
        """Forget a record whose object is gone."""
        entry = self.books.remove(key, evicted=evicted)
        if entry is not None:
            self._note_own(key)
        return entry

    def make_room(
        self, entry: TierEntry, *, now_s: float, is_busy: Callable[[ChunkKey], bool]
    ) -> list[ChunkKey] | None:
        """As `TierBooks.make_room` for one more record; the objects of those that leave are to be deleted."""
        looked_at: dict[ChunkKey, TierEntry | None] = {}

        def look(key: ChunkKey) -> bool:
            # Every victim is asked for; afterwards the books know nothing of it any more.
            looked_at[key] = self.books.find(key)
            return is_busy(key)

        victims = self.books.make_room(entry.stored_bytes, tenant=entry.tenant, now_s=now_s, is_busy=look)
        for victim in victims or ():
            left = looked_at[victim]
            if left is not None:
                self.doom(victim, left)
        return victims

    def doom(self, key: ChunkKey, entry: TierEntry, *, version: str | None = None) -> None:
        """Delete the object of a record that is out of the books, and its twins."""
        self._note_own(key)
        self.doomed[object_name(key, entry)] = version
        for twin in self._twins.pop(key, ()):
            self.doomed[twin] = None

    def doom_late(self, key: ChunkKey, entry: TierEntry) -> None:
        """As `doom`, for a write that was given up: should its object appear after the deletion, it goes as well."""
        self.doom(key, entry)
        self._late[object_name(key, entry)] = _LATE_LISTINGS

    def reprieve(self, name: str) -> bool:
        """The object is to be written again; whether it was to be deleted."""
        self._late.pop(name, None)
        return self.doomed.pop(name, "") != ""

    def begin_listing(self, *, own: Iterable[ChunkKey] = ()) -> None:
        """A listing starts; one that was under way has failed. `own`: keys that this node is writing now."""
        self._listing = _Listing()
        self._own_keys = set(own)

    def take_page(self, page: Iterable[Listed]) -> list[ChunkKey]:
        """Fold one page in; keys of records that are new here, or changed."""
        listing = self._listing
        assert listing is not None, "begin_listing comes first"
        return [key for listed in page if (key := self._take(listed, listing)) is not None]

    def end_listing(self) -> tuple[list[ChunkKey], int]:
        """All pages were taken: keys of records that are gone, and how many objects were none of ours."""
        listing, self._listing = self._listing, None
        assert listing is not None, "begin_listing comes first"
        gone = [
            key for key, _ in self.books.items() if key not in listing.modified_unix_s and key not in self._own_keys
        ]
        for key in gone:
            self.books.remove(key)
        self._twins = listing.twins
        self._late = {name: num_left - 1 for name, num_left in self._late.items() if num_left > 1}
        self.has_listed = True
        return gone, listing.num_foreign

    def _take(self, listed: Listed, listing: _Listing) -> ChunkKey | None:
        parsed = parse_name(listed.name, learned_unix_s=listed.modified_unix_s)
        if parsed is None or parsed[1].stored_bytes != listed.num_bytes:
            listing.num_foreign += 1
            return None
        key, entry = parsed
        if listed.name in self._late:
            self.doomed[listed.name] = None
        if listed.name in self.doomed or key in self._own_keys:
            return None
        known = self.books.find(key)
        if known is None and len(self.books) >= MAX_OBJECTS:
            return None
        seen_unix_s = listing.modified_unix_s.get(key)
        if known is None or seen_unix_s is None:
            if known is not None and listed.name in self._twins.get(key, ()):
                # Lost against the one in the books before; should that one be gone, the next listing finds this one.
                _note_twin(listing, key, listed.name)
                return None
            listing.modified_unix_s[key] = listed.modified_unix_s
            if known is not None and object_name(key, known) == listed.name:
                return None
            self.books.admit(key, entry)
            return key
        known_name = object_name(key, known)
        is_newer = (listed.modified_unix_s, listed.name) > (seen_unix_s, known_name)
        _note_twin(listing, key, known_name if is_newer else listed.name)
        if not is_newer:
            return None
        listing.modified_unix_s[key] = listed.modified_unix_s
        self.books.admit(key, entry)
        return key

    def _note_own(self, key: ChunkKey) -> None:
        if self._listing is not None:
            self._own_keys.add(key)


def order_by_age(index: ObjectIndex, policy: EvictionPolicy, *, lock: threading.Lock) -> None:
    """Let a new policy see the records in the order in which they were learned.

    A first listing comes in the order of names, which says nothing about which records are old.

    Args:
        index: After its first listing.
        policy: The books' from now on.
        lock: Of the index. Held only for two passes over the keys: lookups wait for it.
    """
    with lock:
        held = list(index.books.items())
    held.sort(key=lambda item: (item[1].learned_unix_s, item[0]))
    for key, entry in held:
        policy.admit(key, entry)
    with lock:
        index.books.change_policy(policy, seen=dict(held))


def _note_twin(listing: _Listing, key: ChunkKey, name: str) -> None:
    if key in listing.twins or len(listing.twins) < MAX_TWINS:
        listing.twins.setdefault(key, set()).add(name)
