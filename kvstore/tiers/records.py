"""The files of one folder of records: their names, whole writes, reads in pieces.

Covers: system calls on record files, direct or buffered. Does not cover: which records there are and which leave
(`kvstore.tiers.file`), the folder itself (`kvstore.tiers.folder`).

A name is only ever taken by a whole file: records are written under a temporary name and renamed. Temporary names carry
a token of this life, so that what a former life left behind can be told from a write under way.
"""

import errno
import itertools
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from cluster.errors import DataError
from kvstore.container import ALIGN
from kvstore.crash import crash_point, is_armed
from kvstore.interfaces import OnBytes
from kvstore.keys import ChunkKey, parse_key
from kvstore.tiers.buffers import AlignedBuffers, is_aligned

SUFFIX: Final = ".rec"
TEMPORARY: Final = ".tmp"
_MIN_PIECE_BYTES: Final = 1 << 20
_MAX_PIECE_BYTES: Final = 4 << 20
_PIECES: Final = 8
"""A record is read in about so many calls: enough that hashing hides behind reading, few enough that the device is kept
busy. Measured on the reference machine: 16 MiB in pieces of 2 MiB reads as fast as fio, in pieces of 4 MiB 0.86 times;
4 MiB in pieces of 1, 2 and 4 MiB 0.85, 0.68 and 0.60 times (one thread)."""
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""Not to be kept waiting by a named pipe that somebody planted; plain files do not mind."""
_MAX_SPARES: Final = 256
_RESERVE_RATIO: Final = 0.01
_MAX_RESERVE_BYTES: Final = 256 << 20
"""Room left on a file system that others write to as well: this share of it, at most this much."""


class ForeignFileError(DataError):
    """A file that this store cannot have written: a link, no plain file, of another user, or writable by others."""


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file with the name of a record."""

    key: ChunkKey
    num_bytes: int
    mtime_ns: int


class RecordFiles:
    """Record files below one folder, for any number of threads.

    Args:
        folder: Has its 256 parts already.
        is_direct: Whether to bypass the page cache.
        buffers: For callers whose memory is not aligned.
    """

    def __init__(self, folder: str, *, is_direct: bool, buffers: AlignedBuffers) -> None:
        self.folder = folder
        self._is_direct = is_direct
        self._buffers = buffers
        self._token = secrets.token_hex(4)
        self._numbers = itertools.count()
        self._user = os.geteuid()
        self._direct_flag = os.O_DIRECT if is_direct else 0

    def path(self, key: ChunkKey) -> str:
        """Where the record of a key is."""
        name = key.hex()
        return f"{self.folder}/{name[:2]}/{name}{SUFFIX}"

    def write(self, key: ChunkKey, record: memoryview, *, spare: str | None = None) -> None:
        """Write one record; it appears under its name whole or not at all.

        Args:
            key: Its key.
            record: All of it.
            spare: A file from `set_aside` to write over: its blocks are there already, so nothing is allocated,
                nothing is freed, and a full disk does not matter. Used up in any case.

        Raises:
            OSError: Of the device; no file is left.
        """
        temporary = spare or self._temporary(key)
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | self._direct_flag
        try:
            fd = os.open(temporary, flags if spare else flags | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                crash_point("write_behind_opened")
                if is_armed("write_behind_half"):
                    self._write_all(fd, record[: len(record) // 2 // ALIGN * ALIGN])
                    crash_point("write_behind_half")
                self._write_all(fd, record)
                if spare and os.fstat(fd).st_size != len(record):
                    os.ftruncate(fd, len(record))
            finally:
                os.close(fd)
            crash_point("write_behind_before_rename")
            os.rename(temporary, self.path(key))
            crash_point("after_rename")
        except OSError:
            remove(temporary)
            raise

    def read(self, key: ChunkKey, view: memoryview, *, on_bytes: OnBytes, is_late: Callable[[], bool]) -> bool:
        """Fill `view` with a whole file, piece by piece.

        Args:
            key: The record's key.
            view: As long as the file must be.
            on_bytes: Told of the bytes in place after each piece.
            is_late: Asked before each piece; after True the read ends.

        Returns:
            Whether all of it is there.

        Raises:
            OSError: Of the device.
            DataError: The file is foreign or has another length.
        """
        fd, num_bytes = self._open_own(key)
        try:
            if num_bytes != len(view):
                raise DataError(f"file should have {len(view)} bytes, has {num_bytes}")
            if self._is_direct and not is_aligned(view):
                return self._read_bounced(fd, view, on_bytes=on_bytes, is_late=is_late)
            done, piece_bytes = 0, _piece_bytes(num_bytes)
            while done < num_bytes:
                if is_late():
                    return False
                done += _read_piece(fd, view[done : done + piece_bytes], done)
                on_bytes(done)
            if not self._is_direct:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        return True

    def read_start(self, key: ChunkKey, page: memoryview) -> int:
        """Fill an aligned page with the start of a file; the length of the file.

        Raises:
            OSError, DataError: As `read`.
        """
        fd, num_bytes = self._open_own(key)
        try:
            if not self._is_direct:
                # No read-ahead: of a record that nobody asked for, the header is enough.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            count = os.preadv(fd, [page], 0)
            if count != len(page):
                raise DataError(f"file has {num_bytes} bytes, only {count} of its header")
            return num_bytes
        finally:
            os.close(fd)

    def set_aside(self, key: ChunkKey) -> tuple[str, int]:
        """Take the name from a record: the path under which its file is a spare now, and the file's length.

        Raises:
            OSError: Of the device; FileNotFoundError if there is no such record.
        """
        temporary = self._temporary(key)
        os.rename(self.path(key), temporary)
        with suppress(OSError):
            seen = os.stat(temporary, follow_symlinks=False)
            if stat.S_ISREG(seen.st_mode):
                return temporary, seen.st_size
        return temporary, 0

    def listing(self, part: int) -> Iterator[ListedFile]:
        """Files with names of records in one of the 256 parts; leftovers of former lives are deleted on the way.

        Raises:
            OSError: The part cannot be listed.
        """
        name = f"{part:02x}"
        with os.scandir(f"{self.folder}/{name}") as files:
            for file in files:
                if file.name.endswith(TEMPORARY) and not file.name.startswith(self._token):
                    remove(file.path)
                elif file.name.endswith(SUFFIX) and file.name.startswith(name):
                    with suppress(FileNotFoundError, ValueError):
                        seen = file.stat(follow_symlinks=False)
                        key = parse_key(file.name.removesuffix(SUFFIX))
                        yield ListedFile(key, seen.st_size, seen.st_mtime_ns)

    def remove_leftovers(self) -> int:
        """Delete what former lives left under temporary names; how many files. Parts that cannot be listed are left."""
        num_removed = 0
        for part in range(256):
            with suppress(OSError), os.scandir(f"{self.folder}/{part:02x}") as files:
                for file in files:
                    if file.name.endswith(TEMPORARY) and not file.name.startswith(self._token):
                        num_removed += remove(file.path)
        return num_removed

    def missing_bytes(self, need_bytes: int) -> int:
        """What the file system lacks to take one more file and keep some room for others; 0: nothing.

        Raises:
            OSError: It is read-only, or gone.
        """
        room = os.statvfs(self.folder)
        if room.f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), self.folder)
        if room.f_files and not room.f_favail:
            return need_bytes
        reserve_bytes = min(_MAX_RESERVE_BYTES, int(_RESERVE_RATIO * room.f_blocks * room.f_frsize))
        return max(0, need_bytes + reserve_bytes - room.f_bavail * room.f_frsize)

    def missing_after(self, error: OSError, need_bytes: int) -> int:
        """What eviction could do about a write that failed: bytes to free; 0: nothing."""
        if error.errno == errno.EDQUOT:
            return need_bytes
        if error.errno == errno.ENOSPC:
            with suppress(OSError):
                return self.missing_bytes(need_bytes)
        return 0

    def _temporary(self, key: ChunkKey) -> str:
        return f"{self.folder}/{key[0]:02x}/{self._token}-{next(self._numbers)}{TEMPORARY}"

    def _open_own(self, key: ChunkKey) -> tuple[int, int]:
        """A descriptor of a record's file and the file's length, if this store can have written it."""
        path = self.path(key)
        try:
            fd = os.open(path, _READ | self._direct_flag)
        except OSError as error:
            # A link, a pipe and a folder each refuse in a way of their own.
            if error.errno != errno.ENOENT and not stat.S_ISREG(os.lstat(path).st_mode):
                raise ForeignFileError(f"no plain file: {error.strerror}") from None
            raise
        seen = os.fstat(fd)
        if not stat.S_ISREG(seen.st_mode) or seen.st_uid != self._user or seen.st_mode & 0o022:
            os.close(fd)
            raise ForeignFileError(f"not this store's file: owner {seen.st_uid}, mode {seen.st_mode:o}")
        return fd, seen.st_size

    def _write_all(self, fd: int, record: memoryview) -> None:
        if self._is_direct and not is_aligned(record):
            with self._buffers.take(min(_MAX_PIECE_BYTES, len(record))) as buffer:
                for start in range(0, len(record), _MAX_PIECE_BYTES):
                    piece = buffer[: min(_MAX_PIECE_BYTES, len(record) - start)]
                    piece[:] = record[start : start + _MAX_PIECE_BYTES]
                    self._write_piece(fd, piece, start)
            return
        self._write_piece(fd, record, 0)
        if not self._is_direct:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _write_piece(self, fd: int, piece: memoryview, start: int) -> None:
        done = 0
        while done < len(piece):
            done += os.pwrite(fd, piece[done:], start + done)
            if self._is_direct and done % ALIGN:
                raise OSError(errno.ENOSPC, "short direct write")

    def _read_bounced(self, fd: int, view: memoryview, *, on_bytes: OnBytes, is_late: Callable[[], bool]) -> bool:
        piece_bytes = _piece_bytes(len(view))
        with self._buffers.take(piece_bytes) as buffer:
            done = 0
            while done < len(view):
                if is_late():
                    return False
                count = _read_piece(fd, buffer[: min(piece_bytes, len(view) - done)], done)
                view[done : done + count] = buffer[:count]
                done += count
                on_bytes(done)
        return True


class Spares:
    """Files of evicted records, to be written over by the next ones. Not safe for several threads.

    Writing over a file of the same length costs no allocation, no journal entry and no discard: 1.2 to 1.8 times the
    speed of a new file on the reference machine, beside the 5 ms that deleting one takes there.
    """

    def __init__(self) -> None:
        self._paths: dict[int, list[str]] = {}
        self._count = 0
        self.bytes = 0
        """Room that they take on the disk."""

    def add(self, path: str, num_bytes: int) -> None:
        """One more."""
        self._paths.setdefault(num_bytes, []).append(path)
        self._count += 1
        self.bytes += num_bytes

    def take(self, num_bytes: int) -> str | None:
        """The best file for a record: of its length, else any."""
        if not self._paths:
            return None
        return self._pop(num_bytes if num_bytes in self._paths else max(self._paths))

    def take_large(self, num_bytes: int) -> tuple[str, int] | None:
        """The longest file, with its length, if it has at least `num_bytes`."""
        longest = max(self._paths, default=-1)
        return (self._pop(longest), longest) if longest >= num_bytes else None

    def trim(self, max_bytes: int) -> list[str]:
        """Files that are too much, to be deleted; with 0 all of them, empty ones too."""
        out: list[str] = []
        while self._paths and (self.bytes > max_bytes or self._count > _MAX_SPARES or not max_bytes):
            out.append(self._pop(min(self._paths)))
        return out

    def _pop(self, num_bytes: int) -> str:
        paths = self._paths[num_bytes]
        path = paths.pop()
        if not paths:
            del self._paths[num_bytes]
        self._count -= 1
        self.bytes -= num_bytes
        return path


def remove(path: str) -> bool:
    """Delete a file; whether it was there and went. On a read-only disk it stays: what is read is verified anyway."""
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def _piece_bytes(num_bytes: int) -> int:
    return min(_MAX_PIECE_BYTES, max(_MIN_PIECE_BYTES, num_bytes // _PIECES // ALIGN * ALIGN))


def _read_piece(fd: int, piece: memoryview, start: int) -> int:
    """Bytes read: whole pages, as a short direct read at an odd offset cannot be continued."""
    count = os.preadv(fd, [piece], start)
    if count == 0 or count % ALIGN:
        raise DataError(f"file ends after {start + count} bytes")
    return count
