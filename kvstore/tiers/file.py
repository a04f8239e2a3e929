"""The file tier: one file per record, verified on every read.

Covers: writing, reading, scanning and evicting files in one folder, device errors. Does not cover: when a chunk goes
to files (`kvstore.node`).

Truth is in the record: the index in memory is a hint that a scan rebuilds. Nothing is synced, so a power cut may lose
records or leave empty files under their final names; the scan and the checksum turn those into misses.

    folder/.lock            held with flock by the one store that owns the folder
    folder/ab/abcd....rec   the record of the chunk whose key starts with ab
    folder/ab/*.tmp         a write under way; deleted by the next scan
"""

import errno
import itertools
import logging
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import numpy as np

from cluster.clock import Clock, SystemClock
from cluster.errors import DataError
from cluster.telemetry import short
from kvstore import metrics
from kvstore.breaker import Breaker
from kvstore.container import ALIGN, Header, parse_header, parse_record
from kvstore.interfaces import TierStat
from kvstore.keys import ChunkKey, parse_key
from kvstore.policy import Resident, lru_victims
from kvstore.tiers.folder import FolderLock, FolderUnusableError, prepare_folder, supports_direct_io

log = logging.getLogger(__name__)

_SUFFIX: Final = ".rec"
_TEMPORARY: Final = ".tmp"
_BROKEN_FILE_ERRNOS: Final = frozenset({errno.EIO, errno.ENODATA, errno.EBADMSG})
"""Errors that mean this file is lost; others (no descriptors, no memory) say nothing about it."""
_MAX_PAUSES: Final = 12


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What the index knows about one file."""

    header: Header

    @property
    def stored_bytes(self) -> int:
        """Size of the file."""
        return self.header.stored_bytes


class FileTier:
    """Records as files, for any number of threads.

    Args:
        folder: Made with mode 0700 if missing.
        capacity_bytes: Bytes of records kept; the least recently used leave first.
        lock_wait_s: Seconds to wait for a former owner to go.
        breaker_failures: Device errors in a row after which reads (or writes) pause.
        breaker_pause_s: First pause.
        direct: Whether to bypass the page cache; None finds out what the file system can do.
        on_drop: Told of every record that left by eviction or damage after the scan, from whatever thread found out.
        clock: For the pauses.

    Raises:
        FolderBusyError: Another store owns the folder.
        FolderUnusableError: The folder cannot be made, read or written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        capacity_bytes: int,
        lock_wait_s: float = 0.0,
        breaker_failures: int = 3,
        breaker_pause_s: float = 5.0,
        direct: bool | None = None,
        on_drop: Callable[[ChunkKey], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.folder = os.fspath(folder)
        self.capacity_bytes = capacity_bytes
        self._clock = clock or SystemClock()
        self._on_drop: Callable[[ChunkKey], None] = lambda key: None
        pauses = {"first_pause_s": breaker_pause_s, "max_pause_s": _MAX_PAUSES * breaker_pause_s}
        self._write_breaker = Breaker(failures=breaker_failures, **pauses)
        self._read_breaker = Breaker(failures=breaker_failures, **pauses)
        self._lock = threading.Lock()
        self._files: OrderedDict[ChunkKey, FileEntry] = OrderedDict()
        self._used_bytes = 0
        self._writing_bytes = 0
        self._names = itertools.count()
        prepare_folder(self.folder)
        self._owner = FolderLock(self.folder, wait_s=lock_wait_s)
        try:
            self.is_direct = supports_direct_io(self.folder) if direct is None else direct
            self._scan()
            # Only now: what the scan deletes or evicts was never announced, and its owner is still being made.
            self._on_drop = on_drop or self._on_drop
        except OSError as error:
            self._owner.release()
            raise FolderUnusableError(f"file tier folder {self.folder} cannot be read: {error}") from error
        except BaseException:
            self._owner.release()
            raise

    @property
    def name(self) -> str:
        """The tier's name."""
        return "file"

    def put(self, key: ChunkKey, record: memoryview) -> bool:
        """Write one record; it appears whole or not at all."""
        outcome = self._put(key, record)
        metrics.TIER_WRITES.labels(self.name, outcome).inc()
        return outcome == "stored"

    def get(self, key: ChunkKey) -> bytearray | None:
        """One record's bytes, or None; a damaged file is deleted."""
        entry = self.entry(key)
        if entry is None:
            metrics.TIER_READS.labels(self.name, "miss").inc()
            return None
        with _AlignedBuffer(entry.stored_bytes) as view:
            return bytearray(view) if self.read_into(key, view) else None

    def read_into(self, key: ChunkKey, view: memoryview) -> Header | None:
        """Read and verify one record into the caller's memory.

        Args:
            key: The chunk.
            view: Exactly the record's stored length, starting on a page for direct I/O.

        Returns:
            The record's header, or None: `view` then holds anything.
        """
        if self.entry(key) is None or not self._read_breaker.allows(now_s=self._clock.now_s()):
            metrics.TIER_READS.labels(self.name, "miss").inc()
            return None
        try:
            self._read_file(self._path(key), view)
            header, _ = parse_record(view, expected_key=key)
        except (DataError, OSError) as error:
            self._note_failed_read(key, error)
            return None
        self._read_breaker.record_success()
        self._touch(key)
        metrics.TIER_READS.labels(self.name, "hit").inc()
        return header

    def entry(self, key: ChunkKey) -> FileEntry | None:
        """What the index knows about a key; a hint."""
        with self._lock:
            return self._files.get(key)

    def contains(self, key: ChunkKey) -> bool:
        """Whether a file is there and reads are not paused."""
        return key in self._files and self._read_breaker.allows(now_s=self._clock.now_s())

    def drop(self, key: ChunkKey) -> bool:
        """Delete one record."""
        if not self._forget(key):
            return False
        self._unlink(self._path(key))
        return True

    def keys(self) -> Iterator[tuple[ChunkKey, int]]:
        """Keys in the index and the bytes of their files, least recently used first."""
        return iter([(key, entry.stored_bytes) for key, entry in self.entries()])

    def entries(self) -> list[tuple[ChunkKey, FileEntry]]:
        """The index, least recently used first."""
        with self._lock:
            return list(self._files.items())

    def stat(self) -> TierStat:
        """Counts now."""
        with self._lock:
            return TierStat(chunks=len(self._files), bytes=self._used_bytes, capacity_bytes=self.capacity_bytes)

    def close(self) -> None:
        """Give the folder up; files stay."""
        self._owner.release()

    def _put(self, key: ChunkKey, record: memoryview) -> str:
        try:
            header = parse_header(record, expected_key=key)
        except DataError:
            return "error"
        if len(record) != header.stored_bytes:
            return "error"
        with self._lock:
            if key in self._files:
                self._files.move_to_end(key)
                return "stored"
        if not self._write_breaker.allows(now_s=self._clock.now_s()):
            return "paused"
        if not self._make_room(header.stored_bytes):
            return "full"
        try:
            self._write_file(self._path(key), record)
        except OSError as error:
            self._write_breaker.record_failure(now_s=self._clock.now_s())
            log.warning("file_tier_write_failed key=%s error=%s", short(key), str(error))
            with self._lock:
                self._writing_bytes -= header.stored_bytes
            return "error"
        self._write_breaker.record_success()
        with self._lock:
            self._writing_bytes -= header.stored_bytes
            self._insert(key, FileEntry(header))
        return "stored"

    def _make_room(self, need_bytes: int) -> bool:
        """Evict until `need_bytes` fit, and count them as being written."""
        with self._lock:
            over = self._used_bytes + self._writing_bytes + need_bytes - self.capacity_bytes
            oldest_first = (Resident(key=k, start=0, units=entry.stored_bytes) for k, entry in self._files.items())
            victims = lru_victims(oldest_first, need_units=over)
            if victims is None:
                return False
            for victim in victims:
                self._used_bytes -= self._files.pop(victim).stored_bytes
            self._writing_bytes += need_bytes
        for victim in victims:
            self._unlink(self._path(victim))
            metrics.EVICTIONS.labels(self.name).inc()
            self._on_drop(victim)
        return True

    def _insert(self, key: ChunkKey, entry: FileEntry) -> None:
        before = self._files.pop(key, None)
        self._used_bytes += entry.stored_bytes - (before.stored_bytes if before else 0)
        self._files[key] = entry

    def _touch(self, key: ChunkKey) -> None:
        with self._lock:
            if key in self._files:
                self._files.move_to_end(key)

    def _forget(self, key: ChunkKey) -> bool:
        with self._lock:
            entry = self._files.pop(key, None)
            if entry is not None:
                self._used_bytes -= entry.stored_bytes
            return entry is not None

    def _note_failed_read(self, key: ChunkKey, error: Exception) -> None:
        # Not the error itself: its traceback holds views of the buffer, and a log handler may keep it.
        log.warning("file_tier_read_failed key=%s error=%s", short(key), str(error))
        is_gone = isinstance(error, FileNotFoundError)
        is_broken = isinstance(error, DataError) or (isinstance(error, OSError) and error.errno in _BROKEN_FILE_ERRNOS)
        if isinstance(error, OSError) and not is_gone:
            self._read_breaker.record_failure(now_s=self._clock.now_s())
        outcome = "miss" if is_gone else "corrupt" if isinstance(error, DataError) else "error"
        metrics.TIER_READS.labels(self.name, outcome).inc()
        if is_gone or is_broken:
            self._unlink(self._path(key))
            if self._forget(key):
                self._on_drop(key)

    def _path(self, key: ChunkKey) -> str:
        name = key.hex()
        return f"{self.folder}/{name[:2]}/{name}{_SUFFIX}"

    def _write_file(self, path: str, record: memoryview) -> None:
        temporary = f"{path}.{os.getpid()}.{next(self._names)}{_TEMPORARY}"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | (os.O_DIRECT if self.is_direct else 0)
        fd = os.open(temporary, flags, 0o600)
        try:
            try:
                _write_all(fd, record, is_direct=self.is_direct)
            finally:
                os.close(fd)
            os.rename(temporary, path)
        except OSError:
            self._unlink(temporary)
            raise

    def _read_file(self, path: str, view: memoryview) -> None:
        """Fill `view` with the whole file; a file of another size raises DataError."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_DIRECT if self.is_direct else 0)
        fd = os.open(path, flags)
        try:
            size = os.fstat(fd).st_size
            if size != len(view):
                raise DataError(f"file should have {len(view)} bytes, has {size}")
            done = 0
            while done < size:
                # A short read at an odd offset cannot be continued with direct I/O: refuse it.
                count = os.preadv(fd, [view[done:]], done)
                if count == 0 or count % ALIGN:
                    raise DataError(f"read {done + count} of {size} bytes")
                done += count
            if not self.is_direct:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    def _scan(self) -> None:
        """Rebuild the index from the files' headers, oldest first; delete what is no record."""
        found: list[tuple[float, ChunkKey, FileEntry]] = []
        for first_byte in range(256):
            with os.scandir(f"{self.folder}/{first_byte:02x}") as files:
                for file in files:
                    if file.name.endswith(_TEMPORARY):
                        self._unlink(file.path)
                    elif file.name.endswith(_SUFFIX) and (entry := self._scan_file(file)) is not None:
                        found.append((file.stat().st_mtime, entry.header.key, entry))
        for _, key, entry in sorted(found, key=lambda item: item[:2]):
            self._insert(key, entry)
        self._make_room(0)

    def _scan_file(self, file: "os.DirEntry[str]") -> FileEntry | None:
        """The index entry of one file; a file that is no record of its name is deleted."""
        try:
            key = parse_key(file.name.removesuffix(_SUFFIX))
            header = parse_header(_read_start(file.path), expected_key=key)
            size = file.stat(follow_symlinks=False).st_size
        except OSError as error:
            log.warning("file_tier_scan_skipped file=%s error=%s", file.name, error)
            return None
        except (DataError, ValueError) as error:
            metrics.TIER_READS.labels(self.name, "corrupt").inc()
            log.warning("file_tier_scan_dropped file=%s error=%s", file.name, error)
            self._unlink(file.path)
            return None
        if size != header.stored_bytes:
            metrics.TIER_READS.labels(self.name, "corrupt").inc()
            self._unlink(file.path)
            return None
        return FileEntry(header)

    @staticmethod
    def _unlink(path: str) -> None:
        # On a read-only disk the file stays; its record is verified whenever it is read.
        with suppress(OSError):
            os.unlink(path)


class _AlignedBuffer:
    """Anonymous pages as a writable view, unmapped at the end of a `with` block."""

    def __init__(self, size: int) -> None:
        self._pages = mmap.mmap(-1, size)
        self._view = memoryview(self._pages)

    def __enter__(self) -> memoryview:
        return self._view

    def __exit__(self, *_: object) -> None:
        self._view.release()
        # An error on its way up still refers to slices of the view: the pages go with it.
        with suppress(BufferError):
            self._pages.close()


def _write_all(fd: int, record: memoryview, *, is_direct: bool) -> None:
    if is_direct and _address(record) % ALIGN:
        with _AlignedBuffer(len(record)) as view:
            view[:] = record
            _write_all(fd, view, is_direct=is_direct)
        return
    done = 0
    while done < len(record):
        done += os.pwrite(fd, record[done:], done)
        if is_direct and done % ALIGN:
            raise OSError(errno.EIO, "short direct write")
    if not is_direct:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _read_start(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return os.pread(fd, ALIGN, 0)
    finally:
        os.close(fd)


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]
    return address
