"""obstore's clients for one bucket, by how long a request may take; its errors in our words.

Covers: options, timeouts, retries, errors. Does not cover: URLs (`kvstore.object_url`), requests (`kvstore.tiers.obs`).

A blocking call of obstore cannot be cancelled, but its client has a timeout for a request as a whole, body included.
So there is a client for every doubling of the time that one try may take, made when it is first needed (a tenth of a
second: it loads the authorities for TLS), and a try takes the largest that ends before the deadline.
"""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

from obstore import exceptions
from obstore.store import LocalStore, ObjectStore, from_url

from cluster.errors import LearnonceError, SettingsError
from kvstore.object_url import S3_SCHEMES, split_object_url
from kvstore.settings import ObjectSettings
from kvstore.tiers.bucket import BucketError, BucketLateError, BucketRefusedError

BACKOFF_S: Final = 0.05
MAX_BACKOFF_S: Final = 1.0
SHORTEST_S: Final = 0.05
"""A try of less is not worth making."""
_CLIENT_OPTIONS: Final = frozenset(
    {
        "allow_http", "allow_invalid_certificates", "default_content_type", "http1_only", "http2_only",
        "pool_idle_timeout", "pool_max_idle_per_host", "proxy_url", "proxy_ca_certificate", "proxy_excludes",
        "randomize_addresses", "root_certificate", "user_agent",
    }
)  # fmt: skip
_OWN_OPTIONS: Final = frozenset({"timeout", "connect_timeout", "read_timeout"})
_MAX_MESSAGE_CHARS: Final = 300
_URL: Final = re.compile(r"\b[a-z][a-z0-9+.-]*://\S+\s?", re.IGNORECASE)
_MISSING: Final = "{} does not exist: create it, or correct store.object.url"
_REFUSED: Final = (
    "{} refuses us: check the credentials in the environment of the store's process (for S3 AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY), and their rights to list, read, write and delete: {}"
)
_NO_BUCKET: Final = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist", re.IGNORECASE)


class Clients:
    """For any number of threads.

    Args:
        settings: The URL, options, times.

    Raises:
        SettingsError: The URL or an option is not understood. Nothing was asked of the bucket yet.
    """

    def __init__(self, settings: ObjectSettings) -> None:
        self._settings = settings
        self._parts = split_object_url(settings.url)
        self.scheme = self._parts.scheme
        self.address = f"{self._parts.scheme}://{self._parts.netloc}{self._parts.path}"
        """For messages."""
        self.is_local = self.scheme == "file"
        self.folder = _folder(self._parts.path) if self.is_local else ""
        self.options = {name.lower(): value for name, value in settings.options.items()}
        self._made: dict[str, ObjectStore] = {}
        if not self.is_local:
            self.patient()

    def patient(self) -> ObjectStore:
        """For requests without a body to speak of: tries again by itself, all within the tier's deadline."""
        settings = self._settings
        timeout_s = min(settings.timeout_s, settings.deadline_s)
        return self._cached(
            "patient",
            client=self._timeouts(timeout_s),
            retries=settings.max_retries,
            # No try begins that could outlive the deadline.
            retry_s=settings.deadline_s - timeout_s,
        )

    def for_one_try(self, wanted_s: float, *, stop_s: float, has_answer_body: bool) -> ObjectStore:
        """For one try of at least so many seconds, or of fewer if there are fewer until `stop_s`.

        Args:
            wanted_s: What the try may take.
            stop_s: Monotonic time.
            has_answer_body: Whether silence ends the try early. While a body is sent, nothing comes back.

        Raises:
            BucketLateError: There is no time for a try.
        """
        if self.is_local:
            return self.patient()
        limit_s = SHORTEST_S
        while limit_s < wanted_s:
            limit_s *= 2
        while limit_s >= SHORTEST_S:
            if limit_s <= stop_s - time.monotonic():
                client = self._timeouts(limit_s)
                if has_answer_body:
                    client["read_timeout"] = f"{max(1, round(1000 * min(limit_s, self._settings.timeout_s)))}ms"
                made = self._cached(f"{limit_s} s {has_answer_body}", client=client, retries=0, retry_s=0.0)
                # Making one takes its time.
                if limit_s <= stop_s - time.monotonic():
                    return made
            limit_s /= 2
        raise BucketLateError(f"no time is left to ask {self.address}")

    def close(self) -> None:
        """Forget the clients, and with them their connections."""
        self._made.clear()

    def _timeouts(self, limit_s: float) -> dict[str, Any]:
        connect_s = min(self._settings.connect_timeout_s, limit_s)
        return {"timeout": timedelta(seconds=limit_s), "connect_timeout": timedelta(seconds=connect_s)}

    def _cached(self, kind: str, *, client: dict[str, Any], retries: int, retry_s: float) -> ObjectStore:
        # Without a lock: making one takes long, and one too many does no harm.
        found = self._made.get(kind)
        return found or self._made.setdefault(kind, self._make(client, retries=retries, retry_s=retry_s))

    def _make(self, client: dict[str, Any], *, retries: int, retry_s: float) -> ObjectStore:
        if self.is_local:
            return _local_store(self.folder)
        backoff = {"init_backoff": timedelta(seconds=BACKOFF_S), "max_backoff": timedelta(seconds=MAX_BACKOFF_S)}
        retry: Any = {"max_retries": retries, "retry_timeout": timedelta(seconds=retry_s), "backoff": backoff}
        options = self.options
        refused = sorted(_OWN_OPTIONS & options.keys())
        if refused:
            raise SettingsError(
                f"store.object.options: {', '.join(refused)}: use timeout_s, connect_timeout_s and min_bytes_per_s"
            )
        client = client | {name: value for name, value in options.items() if name in _CLIENT_OPTIONS}
        config: Any = {name: value for name, value in options.items() if name not in _CLIENT_OPTIONS}
        if self.scheme in S3_SCHEMES:
            # Signing hashes every body: 0.13 GB/s (measured). Records have checksums, and TLS protects them on the way.
            config.setdefault("unsigned_payload", "true")
        client_options: Any = client
        try:
            return from_url(self._settings.url, config=config, client_options=client_options, retry_config=retry)
        except BaseException as error:
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            given = ", ".join(sorted(options)) or "none"
            raise SettingsError(
                f"store.object: {self.address} cannot be opened (options given: {given}): {brief(error)}"
            ) from None


@contextmanager
def our_errors(address: str) -> Iterator[None]:
    """Foreign errors in our words; that an object is missing stays `FileNotFoundError`."""
    try:
        yield
    except LearnonceError:
        raise
    except BaseException as error:
        # A panic in obstore's Rust is no `Exception`; it costs this request only.
        if not isinstance(error, exceptions.BaseError | OSError | ValueError) and not _is_panic(error):
            raise
        if _NO_BUCKET.search(str(error)):
            raise missing_bucket(address) from error
        if isinstance(error, FileNotFoundError):
            raise
        if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
            raise refused_by(address, brief(error)) from error
        raise BucketError(f"{address}: {brief(error)}") from error


def missing_bucket(address: str) -> BucketRefusedError:
    """The error for a bucket that is not there."""
    return BucketRefusedError(_MISSING.format(address))


def refused_by(address: str, why: str) -> BucketRefusedError:
    """The error for a bucket that does not let us in."""
    return BucketRefusedError(_REFUSED.format(address, why))


def is_about_bucket(text: str) -> bool:
    """Whether an answer says that the bucket is missing, not the object."""
    return _NO_BUCKET.search(text) is not None


def brief(error: BaseException) -> str:
    """The first line of a foreign error, without URLs, which may carry signatures."""
    lines = str(error).splitlines() or [type(error).__name__]
    return _URL.sub("", lines[0])[:_MAX_MESSAGE_CHARS]


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


def _folder(path: str) -> str:
    return os.path.expanduser(path.removeprefix("/") if path.startswith("/~") else path)


def _local_store(folder: str) -> ObjectStore:
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        return LocalStore(folder)
    except (OSError, exceptions.BaseError) as error:
        raise BucketRefusedError(f"folder {folder} of store.object.url cannot be made: {error}") from error
