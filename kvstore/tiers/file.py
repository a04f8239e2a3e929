"""The file tier: one file per record in one folder, verified on every read.

Covers: reads, writes and evictions in their right order, device errors. Does not cover: who may touch a file now
(`kvstore.tiers.ledger`), system calls (`kvstore.tiers.records`), finding records again (`kvstore.tiers.scan`), several
devices (`kvstore.tiers.nvme`).

Truth is in the record: the books in memory are a hint that a scan rebuilds. Nothing is synced, so a power cut may lose
records, leave empty files under their final names, or a name with another record's bytes; the scan and the checksums
turn those into misses.

    folder/.lock            held with flock by the one store that owns the folder
    folder/ab/abcd....rec   the record of the chunk whose key starts with ab
    folder/ab/*.tmp         a write under way, or a spare; those of a former life are deleted by the scan
"""

import errno
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Final, Literal

import msgspec

from cluster.clock import Clock, SystemClock
from cluster.errors import DataError
from cluster.telemetry import short
from kvstore import metrics
from kvstore.container import ALIGN, Header, RecordVerifier, entry_of, parse_header
from kvstore.crash import crash_point
from kvstore.interfaces import OnBytes, TierEntry, TierStat
from kvstore.keys import ChunkKey
from kvstore.policy import Quotas, make_policy
from kvstore.settings import PolicyName
from kvstore.tiers.books import TierBooks
from kvstore.tiers.buffers import AlignedBuffers
from kvstore.tiers.folder import FolderLock, FolderUnusableError, prepare_folder, supports_direct_io
from kvstore.tiers.gate import Gate
from kvstore.tiers.ledger import Ledger
from kvstore.tiers.records import ForeignFileError, RecordFiles, remove
from kvstore.tiers.scan import Scan

log = logging.getLogger(__name__)

_BROKEN_FILE_ERRNOS: Final = frozenset({errno.EIO, errno.ENODATA, errno.EBADMSG})
"""Errors that mean this file is lost; others (no descriptors, no memory) say nothing about it."""
_HASHERS: Final = 2
"""Threads that verify one piece while the next is read: one is enough for 10 GB/s."""
_SCAN_THREADS: Final = 8
"""Headers that are read at the same time: a device answers one in 0.1 ms or more."""

Outcome = Literal["stored", "full", "paused", "error", "refused"]
"""Of one write: there now; no room; the device pauses; the device failed; no record of that key."""


class FileTier:
    """Records as files in one folder, for any number of threads.

    Works at once: what a former life left is found by a scan in the background (`wait_scanned`), and a key that is
    asked for meanwhile is looked for by its path.

    Args:
        folder: Made with mode 0700 if missing.
        capacity_bytes: Bytes of records kept.
        policy: Which records leave first.
        quotas: Bytes per tenant.
        high_ratio: Share of the capacity above which records leave.
        low_ratio: Share of the capacity down to which one eviction goes.
        max_pinned_ratio: Share of the capacity that pins may hold.
        lock_wait_s: Seconds to wait for a former owner to go.
        breaker_failures: Device errors in a row after which reads (or writes) pause.
        breaker_pause_s: First pause.
        slow_read_s: A read or write that takes longer counts as a device error.
        scan_threads: Threads of the scan.
        direct: Whether to bypass the page cache; None finds out what the file system can do.
        sealed: Whether records are sealed ones (`kvstore.tiers.sealed`); files of the other kind are deleted.
        on_drop: Told of every record that left by eviction or damage, from whatever thread found out.
        on_found: Told of records of a former life, some at a time, from the scan's threads and from readers.
        clock: For pauses and deadlines.

    Raises:
        FolderBusyError: Another store owns the folder.
        FolderUnusableError: The folder cannot be made, read or written, or others can write to it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        capacity_bytes: int,
        policy: PolicyName = "lru",
        quotas: Quotas | None = None,
        high_ratio: float = 1.0,
        low_ratio: float = 1.0,
        max_pinned_ratio: float = 0.5,
        lock_wait_s: float = 0.0,
        breaker_failures: int = 3,
        breaker_pause_s: float = 5.0,
        slow_read_s: float = 10.0,
        scan_threads: int = _SCAN_THREADS,
        direct: bool | None = None,
        sealed: bool = False,
        on_drop: Callable[[ChunkKey], None] | None = None,
        on_found: Callable[[Sequence[ChunkKey]], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.folder = os.fspath(folder)
        self.capacity_bytes = capacity_bytes
        self._is_sealed = sealed
        self._clock = clock or SystemClock()
        self._on_drop = on_drop or (lambda key: None)
        self._on_found = on_found or (lambda keys: None)
        gate = {"failures": breaker_failures, "pause_s": breaker_pause_s, "slow_s": slow_read_s, "clock": self._clock}
        self._reads, self._writes = Gate(**gate), Gate(**gate)  # type: ignore[arg-type]
        books = TierBooks(
            capacity_bytes=capacity_bytes,
            policy=make_policy(policy),
            quotas=quotas or Quotas(),
            high_ratio=high_ratio,
            low_ratio=low_ratio,
            max_pinned_ratio=max_pinned_ratio,
        )
        self._ledger = Ledger(books, capacity_bytes=capacity_bytes, clock=self._clock)
        self._buffers = AlignedBuffers()
        self._hashers = ThreadPoolExecutor(_HASHERS, thread_name_prefix="kvstore-hash")
        self._is_closed = False
        self._is_disk_full = False
        prepare_folder(self.folder)
        self._owner = FolderLock(self.folder, wait_s=lock_wait_s)
        try:
            self.is_direct = supports_direct_io(self.folder) if direct is None else direct
        except FolderUnusableError:
            self._owner.release()
            raise
        self._files = RecordFiles(self.folder, is_direct=self.is_direct, buffers=self._buffers)
        self._scan = Scan(
            self._files,
            self._ledger,
            buffers=self._buffers,
            threads=scan_threads,
            read_header=self._read_header,
            retire=self._retire_for_good,
            on_found=self._on_found,
        )
        self._scanned = threading.Event()
        self._scanner = threading.Thread(target=self._run_scan, name="kvstore-scan", daemon=True)
        self._scanner.start()

    @property
    def name(self) -> str:
        """As in metrics."""
        return "nvme"

    # Reading

    def entry(self, key: ChunkKey) -> TierEntry | None:
        """What is known about a key; while the scan runs, at the price of a short read for some."""
        entry, may_be_found = self._ledger.find(key)
        return self._probe(key) if may_be_found else entry

    def contains(self, key: ChunkKey) -> bool:
        """Whether a record is there and reads are not paused."""
        if not self._reads.allows():
            return False
        entry, may_be_found = self._ledger.find(key)
        return entry is not None or (may_be_found and self._probe(key) is not None)

    def get(self, key: ChunkKey) -> bytearray | None:
        """One record's bytes, or None; a damaged file is deleted."""
        if (entry := self.entry(key)) is None:
            metrics.TIER_READS.labels(self.name, "miss").inc()
            return None
        with self._buffers.take(entry.stored_bytes) as view:
            return bytearray(view) if self.read_into(key, view) is not None else None

    def read_into(
        self, key: ChunkKey, view: memoryview, *, stop_s: float = math.inf, on_bytes: OnBytes | None = None
    ) -> Header | None:
        """Read and verify one record into the caller's memory.

        Args:
            key: The chunk.
            view: Exactly the record's stored length; on a page for speed.
            stop_s: Monotonic time after which it is not gone on with. One system call may be under way then.
            on_bytes: Told of bytes in place, every few MiB. They are proven only when this returns.

        Returns:
            The record's header, or None: `view` then holds anything.
        """
        header, outcome = self.load(key, view, stop_s=stop_s, on_bytes=on_bytes)
        metrics.TIER_READS.labels(self.name, outcome).inc()
        return header

    def load(
        self, key: ChunkKey, view: memoryview, *, stop_s: float, on_bytes: OnBytes | None
    ) -> tuple[Header | None, str]:
        """`read_into` without counting, with the outcome's name."""
        if self._is_closed or not self._reads.allows() or self.entry(key) is None:
            return None, "miss"
        if (entry := self._ledger.begin_read(key, len(view))) is None:
            return None, "miss"
        try:
            with self._reads.watch():
                header = self._read_verified(key, view, stop_s=stop_s, on_bytes=on_bytes)
        except (DataError, OSError) as error:
            return None, self._note_failed_read(key, entry, error)
        finally:
            self._ledger.end_read(key)
        if header is None:
            return None, "late"
        self._ledger.touch(key)
        return header, "hit"

    # Writing

    def put(self, key: ChunkKey, record: memoryview) -> bool:
        """Write one record; it appears whole or not at all."""
        outcome = self.store(key, record)
        metrics.TIER_WRITES.labels(self.name, "error" if outcome == "refused" else outcome).inc()
        return outcome == "stored"

    def store(self, key: ChunkKey, record: memoryview) -> Outcome:
        """`put` without counting, with the outcome's name."""
        try:
            header = parse_header(record, expected_key=key, expected_sealed=self._is_sealed)
        except DataError:
            return "refused"
        if len(record) != header.stored_bytes or self._is_closed:
            return "refused"
        if self.entry(key) is not None:
            self._ledger.touch(key)
            return "stored"
        if not self._writes.allows():
            return "paused"
        if (room := self._ledger.begin_write(key, _compact(entry_of(header)))) is None:
            return "full"
        is_there, victims = room
        if is_there:
            return "stored"
        outcome: Outcome = "error"
        try:
            if self._retire(victims):
                outcome = self._write(key, record, tenant=header.meta.tenant)
        finally:
            is_unwanted = self._ledger.end_write(key, stored=outcome == "stored")
            self._remove_surplus()
        if is_unwanted:
            self.drop(key)
        return outcome

    def drop(self, key: ChunkKey) -> bool:
        """Delete one record; one that is being written goes when it is."""
        is_ours, was_known = self._ledger.begin_drop(key)
        return is_ours and (self._delete(key) or was_known)

    # Books

    def keys(self) -> Iterator[tuple[ChunkKey, int]]:
        """Keys known and the bytes of their files, in no order."""
        return iter([(key, entry.stored_bytes) for key, entry in self.entries()])

    def entries(self) -> list[tuple[ChunkKey, TierEntry]]:
        """All that is known, in no order."""
        return self._ledger.entries()

    def uses(self, key: ChunkKey) -> int:
        """How often a record was read in this life."""
        return self._ledger.uses(key)

    def pin(self, key: ChunkKey, *, until_s: float) -> bool:
        """Keep a record from being evicted until a monotonic time; False if it is not here, or pins hold too much."""
        return self.entry(key) is not None and self._ledger.pin(key, until_s=until_s)

    def unpin(self, key: ChunkKey) -> None:
        """End a pin; a key without one is ignored."""
        self._ledger.unpin(key)

    def stat(self) -> TierStat:
        """Counts now, with what the scan has listed so far."""
        return self._ledger.stat()

    def remove_leftovers(self) -> int:
        """Delete temporary files that former lives left and the scan has missed; how many."""
        return self._files.remove_leftovers()

    @property
    def can_read(self) -> bool:
        """Whether the device answers reads: it did not fail often, and does not hang."""
        return self._reads.allows()

    @property
    def can_write(self) -> bool:
        """Whether the device takes writes."""
        return self._writes.allows()

    def wait_scanned(self, timeout_s: float | None = None) -> bool:
        """Wait until all records of former lives are found; whether they are."""
        return self._scanned.wait(timeout_s)

    def close(self) -> None:
        """Give the folder up; records stay. Repeating it is harmless."""
        if self._is_closed:
            return
        self._is_closed = True
        self._scan.is_stopping = True
        self._scanner.join()
        for path in self._ledger.all_spares():
            remove(path)
        self._hashers.shutdown()
        self._buffers.close()
        self._owner.release()

    # Room

    def _retire(self, victims: list[ChunkKey]) -> bool:
        """Turn the files of evicted records into spares; False if the device refuses: what is left is taken back."""
        for index, key in enumerate(victims):
            spare: tuple[str, int] | None = None
            crash_point("evicted_before_unlink")
            try:
                spare = self._files.set_aside(key)
            except FileNotFoundError:
                pass
            except OSError as error:
                self._writes.note_error()
                log.warning("file_tier_evict_failed key=%s error=%s", short(key), str(error))
                self._take_back(victims[index:])
                return False
            self._ledger.end_leave(key, spare=spare)
            metrics.EVICTIONS.labels(self.name).inc()
            self._on_drop(key)
        return True

    def _retire_for_good(self, victims: list[ChunkKey]) -> None:
        self._retire(victims)
        self._remove_surplus()

    def _remove_surplus(self) -> None:
        """Delete the spares that the capacity has no room for: not before the write that they were made for."""
        for path in self._ledger.surplus_spares():
            remove(path)

    def _take_back(self, keys: list[ChunkKey]) -> None:
        """Records that could not be deleted are still there: nothing is lost on a disk that became read-only."""
        for key in keys:
            entry = None
            with suppress(DataError, OSError), self._buffers.take(ALIGN) as page:
                entry = self._read_entry(key, page)
            self._ledger.end_leave(key, back=entry)
            if entry is None:
                self._on_drop(key)

    def _free_disk(self, missing_bytes: int, *, need_bytes: int, tenant: str) -> bool:
        """Make room on a full file system by eviction; whether it was enough."""
        victims, is_enough = self._ledger.pick_for_disk(missing_bytes, tenant=tenant)
        if not self._retire(victims):
            return False
        for path in self._ledger.all_spares(but_one_of_bytes=need_bytes):
            remove(path)
        return is_enough

    # Files

    def _write(self, key: ChunkKey, record: memoryview, *, tenant: str) -> Outcome:
        """Write the file, over a spare if there is one; on a full disk evict and try once more."""
        for is_last in (False, True):
            spare = self._ledger.take_spare(len(record))
            try:
                missing_bytes = 0 if spare else self._files.missing_bytes(len(record))
                if not missing_bytes:
                    with self._writes.watch():
                        self._files.write(key, record, spare=spare)
                    self._is_disk_full = False
                    return "stored"
            except OSError as error:
                missing_bytes = self._files.missing_after(error, len(record))
                if is_last or not missing_bytes:
                    self._writes.note_error()
                    log.warning("file_tier_write_failed key=%s error=%s", short(key), str(error))
                    return "error"
            if is_last or not self._free_disk(missing_bytes, need_bytes=len(record), tenant=tenant):
                break
        if not self._is_disk_full:
            self._is_disk_full = True
            log.warning("file_tier_disk_full folder=%s need_bytes=%d", self.folder, len(record))
        return "full"

    def _read_verified(
        self, key: ChunkKey, view: memoryview, *, stop_s: float, on_bytes: OnBytes | None
    ) -> Header | None:
        verifier = RecordVerifier(view, expected_key=key, expected_sealed=self._is_sealed)
        hashing: Future[None] | None = None

        def note(num_bytes: int) -> None:
            nonlocal hashing
            if hashing is not None:
                hashing.result()
            # The last piece here: there is nothing to overlap it with.
            hashing = self._hashers.submit(verifier, num_bytes) if num_bytes < len(view) else None
            if on_bytes is not None:
                on_bytes(num_bytes)

        try:
            if not self._files.read(key, view, on_bytes=note, is_late=lambda: self._clock.now_s() >= stop_s):
                return None
        finally:
            # Nobody may look at the view after this returned.
            if hashing is not None:
                wait([hashing])
        verifier(len(view))
        return verifier.finish()

    def _note_failed_read(self, key: ChunkKey, seen: TierEntry, error: DataError | OSError) -> str:
        """What a failed read means for the record and the device; the outcome's name."""
        # Not the error itself: its traceback holds views of the buffer, and a log handler may keep it.
        log.warning("file_tier_read_failed key=%s error=%s", short(key), str(error))
        number = error.errno if isinstance(error, OSError) else None
        is_foreign = isinstance(error, ForeignFileError)
        is_gone = number == errno.ENOENT
        is_bad = isinstance(error, DataError)
        if not is_gone and not is_bad:
            self._reads.note_error()
        if (is_gone or is_bad or number in _BROKEN_FILE_ERRNOS) and self._ledger.begin_discard(key, seen=seen):
            self._delete(key, keep_file=is_foreign)
            self._on_drop(key)
        return "miss" if is_gone else "corrupt" if is_bad else "error"

    def _delete(self, key: ChunkKey, *, keep_file: bool = False) -> bool:
        """Delete the file of a key that is leaving; whether there was one."""
        crash_point("dropped_before_unlink")
        was_there = not keep_file and remove(self._files.path(key))
        self._ledger.end_leave(key)
        return was_there

    # The scan

    def _run_scan(self) -> None:
        try:
            if self._scan.run():
                self._scanned.set()
        except Exception:
            log.exception("file_tier_scan_failed folder=%s", self.folder)

    def _probe(self, key: ChunkKey) -> TierEntry | None:
        """Look for one record by its path, before the scan has come to it."""
        started_s = time.monotonic()
        with self._buffers.take(ALIGN) as page:
            is_news = self._read_header(key, page)
        if is_news:
            self._on_found([key])
        with self._ledger.lock:
            self._ledger.findings.note_probe(time.monotonic() - started_s)
        if self._scanned.is_set():
            # Of a part that could not be listed: nobody else enters it in the books.
            self._scan.enter_some()
        return self._ledger.find(key)[0]

    def _read_header(self, key: ChunkKey, page: memoryview) -> bool:
        """Learn of one record of a former life; whether it is news. What is no record is deleted."""
        if not self._ledger.begin_look(key):
            return False
        try:
            return self._ledger.note_header(key, self._read_entry(key, page))
        except FileNotFoundError:
            return False
        except (ForeignFileError, OSError) as error:
            log.warning("file_tier_scan_skipped key=%s error=%s", short(key), str(error))
            return False
        except DataError as error:
            if self._ledger.begin_discard(key, seen=None):
                metrics.TIER_READS.labels(self.name, "corrupt").inc()
                log.warning("file_tier_scan_dropped key=%s error=%s", short(key), str(error))
                self._delete(key)
            return False
        finally:
            self._ledger.end_read(key)

    def _read_entry(self, key: ChunkKey, page: memoryview) -> TierEntry:
        num_bytes = self._files.read_start(key, page)
        header = parse_header(page, expected_key=key, expected_sealed=self._is_sealed)
        if num_bytes != header.stored_bytes:
            raise DataError(f"file should have {header.stored_bytes} bytes, has {num_bytes}")
        return _compact(entry_of(header))


def _compact(entry: TierEntry) -> TierEntry:
    """The entry with strings that all entries share."""
    return msgspec.structs.replace(entry, codec=sys.intern(entry.codec), tenant=sys.intern(entry.tenant))
