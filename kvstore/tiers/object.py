"""The object tier: one object per record in a bucket that all nodes share, verified on every read.

Covers: the tier protocol over a `Bucket`, deadlines, breakers, eviction, deletions, listings in the background.
Does not cover: clients (`kvstore.tiers.obs`, `.arrow`), what a listing means (`kvstore.tiers.object_index`), when a
chunk goes to the bucket (`kvstore.mover`).

Truth is in the record, its name says what it is, and the index is a hint: a listing at the start and every
`refresh_s` finds what other nodes wrote and forgets what is gone. Opening does no I/O: a bucket that is missing or
refuses us pauses the tier, and the listing tries again.

One thread keeps the tier: it lists, and it deletes what was dropped, evicted or damaged. A deletion that
fails is tried again with the next listing, until this process ends.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Final

import msgspec

from cluster.clock import Clock, SystemClock
from cluster.errors import DataError
from cluster.telemetry import short
from kvstore import metrics
from kvstore.breaker import Breaker
from kvstore.container import Header, entry_of, parse_header
from kvstore.interfaces import OnBytes, TierEntry, TierStat
from kvstore.keys import ChunkKey
from kvstore.policy import make_policy
from kvstore.policy.quota import Quotas
from kvstore.settings import ObjectSettings
from kvstore.tiers.books import TierBooks
from kvstore.tiers.bucket import Arrival, Bucket, BucketError, BucketLateError, BucketRefusedError, WrongLengthError
from kvstore.tiers.object_index import ObjectIndex, order_by_age
from kvstore.tiers.object_names import MAX_NAME_CHARS, object_name

log = logging.getLogger(__name__)

_MAX_PAUSES: Final = 12
_MAX_DELETIONS: Final = 256
_CLOSE_S: Final = 2.0
"""How long an end waits for deletions that are due, and for the keeping thread."""


class ObjectTier:
    """Records as objects, for any number of threads.

    Args:
        bucket: Closed with this tier.
        settings: Times and bounds.
        quotas: Bytes per tenant, of what this node knows of the bucket.
        max_pinned_ratio: Share of the capacity that pins may hold.
        sealed: Whether records are sealed ones (`kvstore.tiers.sealed`).
        on_change: Told of keys that came or went by themselves: found by a listing, gone, evicted or damaged. From
            whatever thread found out.
        clock: For breakers and pins.
        unix_s: The date of records that have none of their own.
    """

    def __init__(
        self,
        bucket: Bucket,
        *,
        settings: ObjectSettings,
        quotas: Quotas | None = None,
        max_pinned_ratio: float = 0.5,
        sealed: bool = False,
        on_change: Callable[[Sequence[ChunkKey]], None] | None = None,
        clock: Clock | None = None,
        unix_s: Callable[[], float] = time.time,
    ) -> None:
        self._bucket = bucket
        self._settings = settings
        self._is_sealed = sealed
        self._on_change = on_change or (lambda keys: None)
        self._clock = clock or SystemClock()
        self._unix_s = unix_s
        self._read_breaker = _breaker(settings)
        self._write_breaker = _breaker(settings)
        self._index = ObjectIndex(
            TierBooks(
                capacity_bytes=settings.capacity_bytes,
                policy=make_policy(settings.policy),
                quotas=quotas or Quotas(),
                max_pinned_ratio=max_pinned_ratio,
            )
        )
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        """Told when a write or a deletion ends, when there is something to delete, and at the end."""
        self._writing: dict[ChunkKey, bool] = {}
        """Keys in the books whose object is on its way; whether it is still wanted."""
        self._deleting: set[str] = set()
        self._num_deletions = _MAX_DELETIONS
        """In one call: fewer where more were late, as that of a call which is late is begun anew."""
        self._listing = threading.Lock()
        self._is_closing = False
        self._was_refused = False
        self._keeper = threading.Thread(target=self._keep, name="kvstore-object", daemon=True)
        self._keeper.start()

    @property
    def name(self) -> str:
        """The tier's name."""
        return "object"

    @property
    def has_listed(self) -> bool:
        """Whether the index knows the whole bucket, as of some time after the start."""
        return self._index.has_listed

    def entry(self, key: ChunkKey) -> TierEntry | None:
        """What the index knows about a key; a hint."""
        with self._lock:
            entry = self._index.books.find(key)
            return None if key in self._writing else entry

    def contains(self, key: ChunkKey) -> bool:
        """Whether the index knows the key and reads are not paused."""
        return self.entry(key) is not None and self._read_breaker.allows(now_s=self._clock.now_s())

    def read_into(
        self, key: ChunkKey, view: memoryview, *, stop_s: float, on_bytes: OnBytes | None = None
    ) -> Header | None:
        """Fetch and verify one record; the tier's own deadline holds as well as `stop_s`."""
        outcome, header = self._read(key, view, stop_s=stop_s, on_bytes=on_bytes)
        metrics.TIER_READS.labels(self.name, outcome).inc()
        return header

    def get(self, key: ChunkKey) -> bytearray | None:
        """One record's bytes, or None."""
        entry = self.entry(key)
        record = bytearray(entry.stored_bytes if entry else 0)
        with memoryview(record) as view:
            return record if self.read_into(key, view, stop_s=inf) else None

    def put(self, key: ChunkKey, record: memoryview) -> bool:
        """Store one record, unless another node has stored it already: its bytes are the same."""
        outcome = self._put(key, record)
        metrics.TIER_WRITES.labels(self.name, outcome).inc()
        return outcome == "stored"

    def drop(self, key: ChunkKey) -> bool:
        """Forget one record now, and delete its object soon after."""
        with self._changed:
            if key in self._writing:
                was_wanted, self._writing[key] = self._writing[key], False
                return was_wanted
            entry = self._index.remove(key)
            if entry is None:
                return False
            self._index.doom(key, entry)
            self._changed.notify_all()
            return True

    def pin(self, key: ChunkKey, *, until_s: float) -> bool:
        """Keep a record from eviction by this node until a time on the clock; False if it may not or is not here."""
        with self._lock:
            return self._index.books.pin(key, until_s=until_s, now_s=self._clock.now_s())

    def unpin(self, key: ChunkKey) -> None:
        """End a pin; a key without one is ignored."""
        with self._lock:
            self._index.books.unpin(key)

    def keys(self) -> Iterator[tuple[ChunkKey, int]]:
        """Keys in the index and the bytes of their objects."""
        return iter([(key, entry.stored_bytes) for key, entry in self.entries()])

    def entries(self) -> list[tuple[ChunkKey, TierEntry]]:
        """The index."""
        with self._lock:
            return [(key, entry) for key, entry in self._index.books.items() if key not in self._writing]

    def stat(self) -> TierStat:
        """Counts now, of what the index knows; writes under way included."""
        with self._lock:
            return self._index.books.stat()

    def remove_leftovers(self) -> int:
        """Delete what writers that died left in the bucket, if it is an hour old; how many pieces. Blocks."""
        try:
            return self._bucket.remove_leftovers(stop_s=self._stop_s(0))
        except BucketError as error:
            log.warning("object_leftovers_failed error=%s", _told(error))
            return 0

    def refresh(self) -> bool:
        """List the bucket now; False if it did not answer. The keeping thread does this by itself."""
        with self._listing:
            try:
                self._list()
            except BucketError as error:
                self._note_failed_listing(error)
                return False
        if self._was_refused:
            self._was_refused = False
            log.info("object_tier_back bucket=%s", self._bucket.address)
        return True

    def close(self) -> None:
        """Delete what is due, within two seconds, and end threads and connections; objects stay."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._keeper.join(timeout=_CLOSE_S)
        self._bucket.close()
        # Its calls end with the bucket.
        self._keeper.join(timeout=_CLOSE_S)

    # Reading

    def _read(
        self, key: ChunkKey, view: memoryview, *, stop_s: float, on_bytes: OnBytes | None
    ) -> tuple[str, Header | None]:
        entry = self.entry(key)
        if entry is None or len(view) != entry.stored_bytes or not self._allows(self._read_breaker):
            return "miss", None
        name = object_name(key, entry)
        start_s = time.monotonic()
        arrival = Arrival(view, key=key, sealed=self._is_sealed, on_bytes=on_bytes)
        try:
            is_there = self._bucket.get(name, arrival, stop_s=min(stop_s, self._stop_s(entry.stored_bytes)))
            header = arrival.finish() if is_there else None
        except DataError as error:
            self._note_damaged(key, entry, version=arrival.version, error=error)
            return "corrupt", None
        except BucketError as error:
            is_late = isinstance(error, BucketLateError)
            # A caller in a hurry says nothing about the bucket.
            if not is_late or time.monotonic() - start_s >= self._settings.timeout_s:
                self._read_breaker.record_failure(now_s=self._clock.now_s())
            log.warning("object_read_failed key=%s error=%s", short(key), _told(error))
            return "late" if is_late else "error", None
        finally:
            arrival.close()
        self._read_breaker.record_success()
        if header is None:
            self._note_gone(key, entry)
            return "miss", None
        with self._lock:
            self._index.books.touch(key)
        return "hit", header

    def _note_damaged(self, key: ChunkKey, entry: TierEntry, *, version: str | None, error: DataError) -> None:
        log.warning("object_damaged key=%s error=%s", short(key), _told(error))
        self._read_breaker.record_success()
        with self._changed:
            # In one step: a write in between would be taken for the damaged object, and deleted.
            is_out = self._remove_same(key, entry)
            # A wrong length of no known version may be an answer that somebody between us and the bucket has cut.
            if is_out and not (version is None and isinstance(error, WrongLengthError)):
                self._index.doom(key, entry, version=version)
                self._changed.notify_all()
        if is_out:
            self._tell([key])

    def _note_gone(self, key: ChunkKey, entry: TierEntry) -> None:
        with self._lock:
            is_out = self._remove_same(key, entry)
        if is_out:
            self._tell([key])

    def _remove_same(self, key: ChunkKey, entry: TierEntry) -> bool:
        """Take a record out of the books if it is still the one that was read."""
        found = self._index.books.find(key)
        is_same = found is not None and object_name(key, found) == object_name(key, entry)
        if is_same and key not in self._writing:
            self._index.remove(key)
            return True
        return False

    # Writing

    def _put(self, key: ChunkKey, record: memoryview) -> str:
        try:
            header = parse_header(record, expected_key=key, expected_sealed=self._is_sealed)
        except DataError:
            return "error"
        entry = entry_of(header)
        if not entry.learned_unix_s:
            entry = msgspec.structs.replace(entry, learned_unix_s=self._unix_s())
        name = object_name(key, entry)
        if len(record) != header.stored_bytes or len(name) > MAX_NAME_CHARS:
            return "error"
        stop_s = self._stop_s(len(record))
        outcome, is_replaced, victims = self._begin_write(key, entry, name, stop_s=stop_s)
        metrics.EVICTIONS.labels(self.name).inc(len(victims))
        self._tell(victims)
        if outcome is not None:
            return outcome
        is_stored = False
        try:
            self._bucket.put(name, record, only_new=not is_replaced, stop_s=stop_s)
            is_stored = True
        except BucketError as error:
            self._write_breaker.record_failure(now_s=self._clock.now_s())
            log.warning("object_write_failed key=%s error=%s", short(key), _told(error))
            return "error"
        finally:
            self._end_write(key, entry, is_stored=is_stored, is_replaced=is_replaced)
        self._write_breaker.record_success()
        return "stored"

    def _begin_write(
        self, key: ChunkKey, entry: TierEntry, name: str, *, stop_s: float
    ) -> tuple[str | None, bool, list[ChunkKey]]:
        """Room for a record: an outcome if there is nothing to write, whether its object was to be deleted, victims."""
        books = self._index.books
        with self._changed:
            # A deletion under way would hit what is written meanwhile.
            self._changed.wait_for(
                lambda: key not in self._writing and name not in self._deleting,
                timeout=max(0.0, stop_s - time.monotonic()),
            )
            if key in self._writing or name in self._deleting:
                return "error", False, []
            if key in books:
                return "stored", False, []
            if not self._allows(self._write_breaker):
                return "paused", False, []
            victims = self._index.make_room(entry, now_s=self._clock.now_s(), is_busy=self._writing.__contains__)
            if victims is None:
                return "full", False, []
            is_replaced = self._index.reprieve(name)
            self._index.admit(key, entry)
            self._writing[key] = True
            self._changed.notify_all()
        return None, is_replaced, victims

    def _end_write(self, key: ChunkKey, entry: TierEntry, *, is_stored: bool, is_replaced: bool) -> None:
        with self._changed:
            is_wanted = self._writing.pop(key)
            if not (is_wanted and is_stored):
                # A write that failed may have reached the bucket all the same: then a listing finds it.
                self._index.remove(key)
                if not is_wanted and not is_stored:
                    self._index.doom_late(key, entry)
                elif not is_wanted or is_replaced:
                    self._index.doom(key, entry)
            self._changed.notify_all()

    # Keeping

    def _keep(self) -> None:
        """List and delete until the end."""
        settings = self._settings
        next_listing_s = time.monotonic()
        num_failures = 0
        while True:
            if time.monotonic() >= next_listing_s:
                num_failures = 0 if self._guarded(self.refresh) else num_failures + 1
                pause_s = settings.breaker_pause_s * min(2 ** (num_failures - 1), _MAX_PAUSES) if num_failures else inf
                next_listing_s = time.monotonic() + min(settings.refresh_s, pause_s)
            is_done = self._guarded(self._delete_doomed)
            with self._changed:
                # After a failed deletion the next listing is the next try.
                self._changed.wait_for(
                    lambda: self._is_closing or (is_done and self._index.doomed),  # noqa: B023 called here only
                    timeout=max(0.0, next_listing_s - time.monotonic()),
                )
                if self._is_closing:
                    break
        self._guarded(self._delete_doomed)

    @staticmethod
    def _guarded(work: Callable[[], bool]) -> bool:
        """Whether it went well: a bug must not end the keeping."""
        try:
            return work()
        except Exception:
            log.exception("object_tier_keeping_failed")
            return False

    def _list(self) -> None:
        with self._lock:
            self._index.begin_listing(own=self._writing)
        for page in self._bucket.pages(page_s=self._settings.deadline_s):
            with self._lock:
                if self._is_closing:
                    return
                changed = self._index.take_page(page)
            self._tell(changed)
        with self._lock:
            is_first = not self._index.has_listed
            gone, num_foreign = self._index.end_listing()
        if is_first:
            order_by_age(self._index, make_policy(self._settings.policy), lock=self._lock)
        self._tell(gone)
        log.debug("object_tier_listed objects=%d gone=%d foreign=%d", len(self._index.books), len(gone), num_foreign)

    def _note_failed_listing(self, error: BucketError) -> None:
        metrics.TIER_READS.labels(self.name, "error").inc()
        level = logging.DEBUG if self._was_refused or self._is_closing else logging.WARNING
        self._was_refused = True
        what = "needs you" if isinstance(error, BucketRefusedError) else "is tried again"
        text = "object_tier_unusable bucket=%s, the store runs without it and it %s: %s"
        log.log(level, text, self._bucket.address, what, _told(error))

    def _delete_doomed(self) -> bool:
        """Delete what is due; False if the bucket did not do it."""
        while True:
            with self._lock:
                due = list(self._index.doomed.items())[: self._num_deletions]
                if not due:
                    return True
                self._deleting.update(name for name, _ in due)
            is_done = False
            try:
                self._delete(due)
                is_done = True
                self._num_deletions = min(_MAX_DELETIONS, self._num_deletions + 1)
            except BucketError as error:
                log.warning("object_deletion_failed objects=%d error=%s", len(due), _told(error))
                if isinstance(error, BucketLateError):
                    self._num_deletions = max(1, self._num_deletions // 2)
                return False
            finally:
                with self._changed:
                    self._deleting.difference_update(name for name, _ in due)
                    for name, version in due if is_done else ():
                        if self._index.doomed.get(name, "") == version:
                            del self._index.doomed[name]
                    self._changed.notify_all()

    def _delete(self, due: list[tuple[str, str | None]]) -> None:
        stop_s = self._stop_s(0)
        for name, version in due:
            if version is not None:
                self._bucket.delete_version(name, version=version, stop_s=stop_s)
        self._bucket.delete([name for name, version in due if version is None], stop_s=stop_s)

    # Small things

    def _tell(self, keys: Sequence[ChunkKey]) -> None:
        if keys:
            self._on_change(keys)

    def _stop_s(self, num_bytes: int) -> float:
        """When an operation on so many bytes must have ended."""
        return time.monotonic() + self._settings.deadline_s + num_bytes / self._settings.min_bytes_per_s

    def _allows(self, breaker: Breaker) -> bool:
        return breaker.allows(now_s=self._clock.now_s())


def _told(error: Exception) -> str:
    """For a log line: the error's traceback holds buffers and connections, and a handler may keep its arguments."""
    return str(error)


def _breaker(settings: ObjectSettings) -> Breaker:
    return Breaker(
        failures=settings.breaker_failures,
        first_pause_s=settings.breaker_pause_s,
        max_pause_s=_MAX_PAUSES * settings.breaker_pause_s,
    )


def open_bucket(settings: ObjectSettings) -> Bucket:
    """The bucket of a URL: pyarrow's where it begins with `arrow+`, else obstore's.

    Raises:
        SettingsError: The URL or an option is not understood.
    """
    # Each client library loads in a fifth of a second or more: only the one that is used.
    if settings.url.startswith("arrow+"):
        from kvstore.tiers.arrow import ArrowBucket

        return ArrowBucket(settings)
    from kvstore.tiers.obs import ObstoreBucket

    return ObstoreBucket(settings)


def open_object_tier(
    settings: ObjectSettings,
    *,
    quotas: Quotas | None = None,
    max_pinned_ratio: float = 0.5,
    sealed: bool = False,
    on_change: Callable[[Sequence[ChunkKey]], None] | None = None,
) -> ObjectTier:
    """The object tier of the settings; arguments as those of `ObjectTier`.

    Raises:
        SettingsError: The URL or an option is not understood.
    """
    return ObjectTier(
        open_bucket(settings),
        settings=settings,
        quotas=quotas,
        max_pinned_ratio=max_pinned_ratio,
        sealed=sealed,
        on_change=on_change,
    )
