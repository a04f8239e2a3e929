"""Buckets by way of pyarrow.fs: mounted folders (NFS), HDFS, and S3 or GCS with Arrow's clients.

Covers: `arrow+file://`, `arrow+hdfs://`, `arrow+s3://`, `arrow+gs://`; whole objects by a temporary file and a move
where the file system moves in one step. Does not cover: what obstore speaks better (`kvstore.tiers.obs`).

A call to a file system cannot be cancelled, a mount that hangs keeps its thread for as long as it hangs. So every call
runs on a thread that may be left behind (`kvstore.tiers.errands`), reads come through memory of their own
(`kvstore.tiers.bucket.Arrival`), and writes send a copy: nothing touches the caller's memory after the deadline.

    folder/ab/<name>.rec      an object
    folder/.writing/*.tmp     a write under way; deleted by listings when it is an hour old
"""

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import pyarrow
from pyarrow import fs

from cluster.errors import LearnonceError, SettingsError
from kvstore.object_url import split_object_url
from kvstore.settings import ObjectSettings
from kvstore.tiers.bucket import STALE_S, Arrival, BucketError, BucketRefusedError, Listed
from kvstore.tiers.errands import Errands

_PIECE_BYTES: Final = 1 << 20
_WRITING: Final = ".writing"
_TEMPORARY: Final = ".tmp"
_PAGE_OBJECTS: Final = 1000
_CLOSE_S: Final = 1.0
_FOLDERS: Final = 256
_MAX_MESSAGE_CHARS: Final = 300
_S3_OPTIONS: Final = frozenset(
    {
        "access_key", "allow_bucket_creation", "anonymous", "endpoint_override", "external_id", "region", "role_arn",
        "force_virtual_addressing", "proxy_options", "scheme", "secret_key", "session_name", "session_token",
        "tls_ca_file_path",
    }
)  # fmt: skip
_HDFS_OPTIONS: Final = frozenset({"user", "replication", "kerb_ticket"})
_BOOLEANS: Final = {"true": True, "false": False}


class ArrowBucket:
    """One folder of a file system, by URL.

    Args:
        settings: The URL (`arrow+…`), options by the names of pyarrow's constructors, times.

    Raises:
        SettingsError: The URL or an option is not understood. Nothing was asked of the file system yet.
    """

    def __init__(self, settings: ObjectSettings) -> None:
        self._settings = settings
        parts = split_object_url(settings.url)
        self._scheme = parts.scheme
        self.address = f"arrow+{parts.scheme}://{parts.netloc}{parts.path}"
        _check_options(parts.scheme, settings.options)
        self._root = os.path.expanduser(parts.path) if parts.scheme in ("file", "hdfs") else parts.netloc + parts.path
        self._root = self._root.rstrip("/")
        self._netloc = parts.netloc
        self._fs: fs.FileSystem | None = None
        self._can_move = parts.scheme in ("file", "hdfs")
        """Whether a move is one step; elsewhere an object appears when it is complete, by itself."""
        self._folders: set[str] = set()
        self._numbers = itertools.count()
        self._errands = Errands("kvstore-object-arrow", max_threads=2 * settings.io_threads + 4)

    def get(self, name: str, arrival: Arrival, *, stop_s: float) -> bool:
        """Let the bytes of one object arrive; False if there is no such object."""
        return self._errands.call(lambda: self._get(name, arrival), stop_s=stop_s)

    def put(self, name: str, record: memoryview, *, only_new: bool, stop_s: float) -> bool:
        """Store one object; `only_new` looks first, so that two writers at the same time may both write."""
        copy = pyarrow.py_buffer(bytes(record))

        def send() -> bool:
            try:
                return self._put(name, copy, only_new=only_new)
            except FileNotFoundError as error:
                # Folders that we made were deleted: the next write makes them again.
                self._folders.clear()
                raise BucketError(f"{self.address}: a folder of the bucket is gone") from error

        return self._errands.call(send, stop_s=stop_s)

    def delete(self, names: Sequence[str], *, stop_s: float) -> None:
        """Delete objects; those that are not there are no error."""
        for name in names:
            self._errands.call(lambda name=name: self._delete(name), stop_s=stop_s)  # type: ignore[misc]

    def delete_version(self, name: str, *, version: str | None, stop_s: float) -> None:
        """Delete one object unless it was replaced since it was read."""
        self._errands.call(lambda: self._delete(name, version=version), stop_s=stop_s)

    def pages(self, *, page_s: float) -> Iterator[Sequence[Listed]]:
        """All objects, a folder per page; where folders are no things of their own, in one go."""
        if not self._can_move:
            self._errands.call(self._check_bucket, stop_s=time.monotonic() + page_s)
            found = self._errands.call(lambda: self._list("", recursive=True), stop_s=time.monotonic() + page_s)
            for start in range(0, len(found), _PAGE_OBJECTS):
                yield found[start : start + _PAGE_OBJECTS]
            return
        self._errands.call(self._delete_stale, stop_s=time.monotonic() + page_s)
        for first_byte in range(_FOLDERS):
            folder = f"{first_byte:02x}"
            yield self._errands.call(
                lambda folder=folder: self._list(folder),  # type: ignore[misc]
                stop_s=time.monotonic() + page_s,
            )

    def remove_leftovers(self, *, stop_s: float) -> int:
        """Delete old temporary files; Arrow's clients of object stores leave none that they can name."""
        return self._errands.call(self._delete_stale, stop_s=stop_s) if self._can_move else 0

    def close(self) -> None:
        """End threads; those that hang in the file system are left behind."""
        self._errands.close(wait_s=_CLOSE_S)
        self._fs = None

    # On threads that may be left behind.

    def _get(self, name: str, arrival: Arrival) -> bool:
        try:
            with self._our_errors() as system:
                # Before it is opened: else it could be that of a good object which replaced the damaged one we read.
                version = self._version(system, name)
                # An open file keeps its object, also if another is moved over its name meanwhile.
                with system.open_input_file(self._path(name)) as file:
                    arrival.begin(num_bytes=file.size(), version=version)
                    while (piece := file.read_buffer(_PIECE_BYTES)).size:
                        arrival.write(memoryview(piece).cast("B"))
        except FileNotFoundError:
            return False
        return True

    def _put(self, name: str, record: pyarrow.Buffer, *, only_new: bool) -> bool:
        with self._our_errors() as system:
            path = self._path(name)
            if only_new and system.get_file_info(path).size == record.size:
                return False
            if not self._can_move:
                with system.open_output_stream(path) as stream:
                    stream.write(record)
                return True
            temporary = self._path(f"{_WRITING}/{os.getpid()}.{id(self):x}.{next(self._numbers)}{_TEMPORARY}")
            self._make_folder(system, _WRITING)
            self._make_folder(system, name.rpartition("/")[0])
            try:
                with system.open_output_stream(temporary) as stream:
                    stream.write(record)
                if self._scheme == "hdfs":
                    # Its move refuses to replace; between the two steps the object is missing, which is a miss.
                    self._unlink(system, path)
                system.move(temporary, path)
            except BaseException:
                self._unlink(system, temporary)
                raise
            return True

    def _delete(self, name: str, *, version: str | None = None) -> None:
        with self._our_errors() as system:
            if version is None or self._version(system, name) == version:
                self._unlink(system, self._path(name))

    def _list(self, folder: str, *, recursive: bool = False) -> list[Listed]:
        with self._our_errors() as system:
            base = self._path(folder) if folder else self._root
            found = system.get_file_info(fs.FileSelector(base, allow_not_found=True, recursive=recursive))
            start = len(self._root) + 1
            return [
                Listed(info.path[start:], info.size, (info.mtime_ns or 0) / 1e9)
                for info in found
                if info.type == fs.FileType.File
            ]

    def _check_bucket(self) -> None:
        """An empty listing looks like that of a bucket which is not there."""
        with self._our_errors() as system:
            if system.get_file_info(self._root.partition("/")[0]).type == fs.FileType.NotFound:
                raise BucketRefusedError(f"{self.address} does not exist: create it, or correct store.object.url")

    def _delete_stale(self) -> int:
        """Temporary files of writers that died; and the check that the folder can be used at all."""
        num_deleted = 0
        with self._our_errors() as system:
            self._make_folder(system, _WRITING)
            oldest_ns = (time.time() - STALE_S) * 1e9
            for info in system.get_file_info(fs.FileSelector(self._path(_WRITING), allow_not_found=True)):
                if info.type == fs.FileType.File and (info.mtime_ns or 0) < oldest_ns:
                    self._unlink(system, info.path)
                    num_deleted += 1
        return num_deleted

    def _version(self, system: fs.FileSystem, name: str) -> str | None:
        info = system.get_file_info(self._path(name))
        return None if info.mtime_ns is None else f"{info.size}.{info.mtime_ns}"

    def _make_folder(self, system: fs.FileSystem, folder: str) -> None:
        if folder in self._folders:
            return
        if self._scheme == "file":
            os.makedirs(self._root, mode=0o700, exist_ok=True)
        system.create_dir(self._path(folder), recursive=True)
        self._folders.add(folder)

    def _unlink(self, system: fs.FileSystem, path: str) -> None:
        try:
            system.delete_file(path)
        except OSError:
            # Gone already, or a failure: then it is still there.
            if system.get_file_info(path).type != fs.FileType.NotFound:
                raise

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _system(self) -> fs.FileSystem:
        """The file system; made at the first call, as some connect when they are made."""
        if self._fs is None:
            self._fs = _make_file_system(self._settings, self._scheme, self._netloc)
        return self._fs

    @contextmanager
    def _our_errors(self) -> Iterator[fs.FileSystem]:
        """The file system, with its errors in our words; that an object is missing stays `FileNotFoundError`."""
        try:
            yield self._system()
        except (LearnonceError, FileNotFoundError):
            raise
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0][:_MAX_MESSAGE_CHARS]
            if isinstance(error, PermissionError) or "ACCESS_DENIED" in text or "NO_SUCH_BUCKET" in text:
                raise BucketRefusedError(
                    f"{self.address} is missing or refuses us: check store.object.url, the credentials in the "
                    f"environment of the store's process, and their rights: {text}"
                ) from error
            raise BucketError(f"{self.address}: {text}") from error


def _make_file_system(settings: ObjectSettings, scheme: str, netloc: str) -> fs.FileSystem:
    if scheme == "file":
        return fs.LocalFileSystem()
    options: dict[str, Any] = {name: _BOOLEANS.get(value, value) for name, value in settings.options.items()}
    if scheme == "s3":
        endpoint = str(options.get("endpoint_override", ""))
        if "://" in endpoint:
            options["scheme"], _, options["endpoint_override"] = endpoint.partition("://")
        return fs.S3FileSystem(
            connect_timeout=settings.connect_timeout_s,
            request_timeout=settings.timeout_s,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1 + settings.max_retries),
            **options,
        )
    if scheme == "gs":
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=settings.deadline_s))
    host, _, port = netloc.partition(":")
    try:
        return fs.HadoopFileSystem(host or "default", int(port or 0), **options)
    except OSError as error:
        raise BucketRefusedError(
            f"HDFS cannot be used here: it needs libhdfs, Java and Hadoop's CLASSPATH (ARROW_LIBHDFS_DIR, JAVA_HOME): "
            f"{str(error).splitlines()[0]}"
        ) from error


def _check_options(scheme: str, options: dict[str, str]) -> None:
    known = {"s3": _S3_OPTIONS, "hdfs": _HDFS_OPTIONS}.get(scheme, frozenset[str]())
    unknown = sorted(options.keys() - known)
    if unknown:
        raise SettingsError(
            f"store.object.options: {', '.join(unknown)} is not known for arrow+{scheme}; known are "
            f"{', '.join(sorted(known)) or 'none'}"
        )
