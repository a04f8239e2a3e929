"""The folder of a file tier: made, owned by one store, and probed for direct I/O.

Covers: everything about the folder that is not a record. Does not cover: records (`kvstore.tiers.file`).
"""

import errno
import fcntl
import mmap
import os
import stat
import time
from contextlib import suppress
from typing import Final

from cluster.errors import CallerError, UnavailableError
from kvstore.container import ALIGN

_POLL_S: Final = 0.05


class FolderBusyError(CallerError):
    """Another store owns the folder."""


class FolderUnusableError(UnavailableError):
    """The folder cannot be made, read or written now."""


def prepare_folder(folder: str) -> None:
    """Make the folder and its 256 parts, for this user only.

    Raises:
        FolderUnusableError: The file system refuses.
    """
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        # The folder itself may be reached by a link; what is in it may not.
        _expect_own(folder, os.stat(folder))
        for first_byte in range(256):
            part = f"{folder}/{first_byte:02x}"
            with suppress(FileExistsError):
                os.mkdir(part, mode=0o700)
            _expect_own(part, os.lstat(part))
    except OSError as error:
        raise FolderUnusableError(f"file tier folder {folder} cannot be made: {error}") from error


def _expect_own(folder: str, seen: os.stat_result) -> None:
    """Refuse a folder in which others could plant records: checksums find accidents, not attackers."""
    if not stat.S_ISDIR(seen.st_mode):
        raise FolderUnusableError(f"file tier folder {folder} cannot be read: it is no folder")
    if seen.st_uid != os.geteuid() or seen.st_mode & 0o022:
        raise FolderUnusableError(
            f"file tier folder {folder} must belong to user {os.geteuid()} and be writable by nobody else; "
            f"it belongs to {seen.st_uid} and has mode {stat.S_IMODE(seen.st_mode):o}"
        )


class FolderLock:
    """Ownership of a folder, ended by `release` or by the end of the process, however it ends.

    Raises:
        FolderBusyError: Still owned by another after `wait_s`.
        FolderUnusableError: The lock file cannot be made.
    """

    def __init__(self, folder: str, *, wait_s: float) -> None:
        path = f"{folder}/.lock"
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise FolderUnusableError(f"file tier folder {folder} cannot be locked: {error}") from error
        try:
            self._lock(folder, wait_s)
        except OSError as error:
            self.release()
            raise FolderUnusableError(f"file tier folder {folder} cannot be locked: {error}") from error
        except FolderBusyError:
            self.release()
            raise

    def release(self) -> None:
        """Give the folder up. Repeating it is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _lock(self, folder: str, wait_s: float) -> None:
        stop_s = time.monotonic() + wait_s
        while not self._try_lock():
            if time.monotonic() >= stop_s:
                owner = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip()
                raise FolderBusyError(f"file tier folder {folder} is owned by process {owner or '?'}: one store each")
            time.sleep(_POLL_S)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def supports_direct_io(folder: str) -> bool:
    """Whether files here can be written and read past the page cache: tmpfs and some overlays cannot.

    Raises:
        FolderUnusableError: The folder cannot be written at all.
    """
    path = f"{folder}/.probe"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise FolderUnusableError(f"file tier folder {folder} cannot be written: {error}") from error
    try:
        with mmap.mmap(-1, ALIGN) as page:
            return os.pwrite(fd, page, 0) == ALIGN and os.preadv(fd, [page], 0) == ALIGN
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTSUP):
            return False
        raise FolderUnusableError(f"file tier folder {folder} cannot be written: {error}") from error
    finally:
        os.close(fd)
        with suppress(OSError):
            os.unlink(path)
