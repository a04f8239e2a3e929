"""A small disk of its own for fault tests: an ext4 image on a loop device, with a switch for the power.

Covers: making, mounting, cutting, mounting again, and taking all of it away whatever happened. Does not cover: machines
where this is not allowed: `why_not` says so, and tests skip.
"""

import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_SHUTDOWN: Final = 0x8004587D
"""EXT4_IOC_SHUTDOWN: the file system writes nothing any more, as if the power had gone."""
FLUSH_ALL, FLUSH_LOG, FLUSH_NOTHING = 0, 1, 2
_TOOLS: Final = ("mkfs.ext4", "mount", "umount", "losetup")


def why_not() -> str | None:
    """Why there can be no loop-mounted disk here; None: there can."""
    if os.geteuid() != 0:
        return "needs root, to mount an image"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    try:
        with LoopDisk(num_bytes=4 << 20):
            return None
    except (subprocess.CalledProcessError, OSError) as error:
        return f"no image can be mounted here: {error}"


class LoopDisk:
    """An ext4 file system in an image file, mounted at `path`. Use it in a `with` block."""

    def __init__(self, *, num_bytes: int) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="learnonce-disk-"))
        self._image = self._home / "image"
        self.path = self._home / "mount"
        self.path.mkdir()
        try:
            with self._image.open("wb") as image:
                image.truncate(num_bytes)
            _run("mkfs.ext4", "-q", "-F", str(self._image))
            self.mount()
        except BaseException:
            self.close()
            raise

    def mount(self, *options: str) -> None:
        """Mount the image; after a cut this replays the journal."""
        _run("mount", "-o", ",".join(("loop", *options)), str(self._image), str(self.path))

    def unmount(self) -> None:
        """Unmount; the loop device of `mount` goes with it."""
        _run("umount", str(self.path))

    def make_read_only(self) -> None:
        """As the kernel does after an error of its own; until it is mounted again."""
        _run("mount", "-o", "remount,abort", str(self.path))

    def write_back(self) -> None:
        """What the kernel does by itself after some seconds: data and journal reach the disk."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.sync()
        finally:
            os.close(fd)

    def cut(self, flags: int) -> None:
        """Cut the power: what is not on the disk now never will be."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", flags))
        finally:
            os.close(fd)

    def close(self) -> None:
        """Take everything away."""
        if os.path.ismount(self.path):
            done = subprocess.run(["umount", str(self.path)], capture_output=True, check=False)
            if done.returncode:
                # Somebody still has a file open: gone from the tree now, freed with the last descriptor.
                _run("umount", "-l", str(self.path))
        shutil.rmtree(self._home)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)
