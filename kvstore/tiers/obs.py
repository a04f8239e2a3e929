"""Buckets by way of obstore: S3, GCS, Azure, and folders of this machine.

Covers: requests, tries, deadlines. Does not cover: clients and their errors (`kvstore.tiers.obs_clients`), which
objects there are (`kvstore.tiers.object`), file systems that obstore does not speak (`kvstore.tiers.arrow`).

Everything runs in the caller's thread, with clients whose timeouts end before the deadline: obstore's asyncio functions
took 1.4 times as long to read 10 MB, another thread costs a fifth at 1 MB (measured). Folders know no timeouts: their
calls run on threads that may be left behind (`kvstore.tiers.errands`), and what is written there is a copy.

A body of S3 is read past obstore, from the socket into its place (`kvstore.tiers.direct`), where nothing is configured
that only obstore can do: obstore signs the URL then, and reads itself what that reader does not understand.
"""

import glob
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final, TypeVar
from urllib.request import getproxies

import obstore
from obstore import exceptions
from obstore.store import ObjectStore

from cluster.errors import UnavailableError
from kvstore.object_url import S3_SCHEMES
from kvstore.settings import ObjectSettings
from kvstore.tiers.bucket import (
    STALE_S,
    Arrival,
    BucketError,
    BucketLateError,
    BucketRefusedError,
    BucketTornError,
    Listed,
)
from kvstore.tiers.direct import DirectReader, NotDirectError
from kvstore.tiers.errands import Errands
from kvstore.tiers.obs_clients import (
    BACKOFF_S,
    MAX_BACKOFF_S,
    SHORTEST_S,
    Clients,
    brief,
    is_about_bucket,
    missing_bucket,
    our_errors,
    refused_by,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

_PIECE_BYTES: Final = 128 << 10
"""Of obstore's stream: copied and hashed while it is in the cache; larger ones were slower (measured)."""
_PAGE_OBJECTS: Final = 1000
_DELETIONS: Final = 256
"""In one request."""
_CLOSE_S: Final = 1.0
_SIGNED_S: Final = 900.0
"""How long a signed URL holds; it is used at once, by clocks that may differ."""
_NOT_IMPLEMENTED: Final = re.compile(r"501 Not Implemented|<Code>NotImplemented</Code>")
_CODE: Final = re.compile(r"<Code>(\w{1,64})</Code>", re.ASCII)
_DIRECT_OPTIONS: Final = frozenset(
    {
        "access_key_id", "secret_access_key", "session_token", "token", "region", "default_region", "endpoint",
        "endpoint_url", "bucket", "bucket_name", "virtual_hosted_style_request", "unsigned_payload", "allow_http",
        "conditional_put", "disable_bulk_delete", "disable_tagging", "imdsv1_fallback", "metadata_endpoint",
    }
)  # fmt: skip
"""Options under which a plain GET of a signed URL is all that a read is."""
_OBSTORE_ONLY_VARIABLES: Final = (
    "AWS_SKIP_SIGNATURE", "AWS_S3_EXPRESS", "AWS_REQUEST_PAYER", "AWS_SSE_CUSTOMER_KEY_BASE64",
    "AWS_SERVER_SIDE_ENCRYPTION",
)  # fmt: skip


class ObstoreBucket:
    """One bucket, or one folder in it, by URL.

    Args:
        settings: The URL, options, times.

    Raises:
        SettingsError: The URL or an option is not understood. Nothing was asked of the bucket yet.
    """

    def __init__(self, settings: ObjectSettings) -> None:
        self._settings = settings
        self._clients = Clients(settings)
        self.address = self._clients.address
        self._can_condition = True
        self._errands = Errands("kvstore-object-io", max_threads=2 * settings.io_threads + 2)
        self._has_keys = "AWS_ACCESS_KEY_ID" in os.environ or "access_key_id" in self._clients.options
        """Whether signing needs no credentials from the network."""
        self._direct: DirectReader | None = None
        if _can_read_directly(self._clients):
            self._direct = DirectReader(
                connect_timeout_s=settings.connect_timeout_s,
                silence_s=settings.timeout_s,
                max_idle=settings.io_threads,
                errands=self._errands,
            )

    def get(self, name: str, arrival: Arrival, *, stop_s: float) -> bool:
        """Let the bytes of one object arrive; False if there is no such object."""
        if self._clients.is_local:
            return self._errands.call(lambda: self._fetch(name, arrival, stop_s=stop_s), stop_s=stop_s)
        return self._tries(lambda: self._read(name, arrival, stop_s=stop_s), stop_s=stop_s)

    def put(self, name: str, record: memoryview, *, only_new: bool, stop_s: float) -> bool:
        """Store one object in one request."""
        if self._clients.is_local:
            copy = memoryview(bytes(record))
            return self._errands.call(lambda: self._send(name, copy, only_new, stop_s=stop_s), stop_s=stop_s)
        return self._tries(lambda: self._send(name, record, only_new, stop_s=stop_s), stop_s=stop_s)

    def delete(self, names: Sequence[str], *, stop_s: float) -> None:
        """Delete objects; those that are not there are no error."""
        if self._clients.scheme not in S3_SCHEMES:
            for name in names:
                self._call(lambda name=name: self._delete(name), stop_s=stop_s)  # type: ignore[misc]
            return
        for start in range(0, len(names), _DELETIONS):
            batch = list(names[start : start + _DELETIONS])
            self._call(lambda batch=batch: self._delete_all(batch), stop_s=stop_s)  # type: ignore[misc]

    def delete_version(self, name: str, *, version: str | None, stop_s: float) -> None:
        """Delete one object unless it was replaced since it was read."""
        self._call(lambda: self._delete(name, version=version), stop_s=stop_s)

    def pages(self, *, page_s: float) -> Iterator[Sequence[Listed]]:
        """All objects, in pages, each within `page_s` seconds."""
        stream: Any = None

        def next_page() -> list[Listed] | None:
            nonlocal stream
            with our_errors(self.address):
                try:
                    stream = stream or obstore.list(self._clients.patient(), chunk_size=_PAGE_OBJECTS)
                    found = next(stream, None)
                except FileNotFoundError:
                    raise missing_bucket(self.address) from None
            if found is None:
                return None
            return [Listed(meta["path"], meta["size"], meta["last_modified"].timestamp()) for meta in found]

        while (page := self._call(next_page, stop_s=time.monotonic() + page_s)) is not None:
            yield page

    def remove_leftovers(self, *, stop_s: float) -> int:
        """Delete old files that obstore was writing; object stores keep nothing of a request that did not end."""
        if not self._clients.is_local:
            return 0
        return self._call(lambda: _delete_stale(self._clients.folder), stop_s=stop_s)

    def close(self) -> None:
        """End threads and connections; calls under way end with their own timeouts."""
        self._errands.close(wait_s=_CLOSE_S)
        self._clients.close()
        if self._direct is not None:
            self._direct.close()

    def _call(self, work: Callable[[], T], *, stop_s: float) -> T:
        """Something short: a client bounds it, and for folders a thread that may be left behind.

        Raises:
            BucketLateError: It is too late to begin, or a folder did not answer in time.
        """
        if self._clients.is_local:
            return self._errands.call(work, stop_s=stop_s)
        if time.monotonic() >= stop_s:
            raise BucketLateError(f"no time is left to ask {self.address}")
        return work()

    def _tries(self, once: Callable[[], T], *, stop_s: float) -> T:
        """Try, and try again after failures that may pass, within the deadline."""
        num_failures = 0
        while True:
            try:
                return once()
            except (BucketRefusedError, BucketTornError):
                raise
            except BucketError as error:
                num_failures += 1
                pause_s = min(MAX_BACKOFF_S, BACKOFF_S * 2**num_failures) * random.uniform(0.5, 1.0)
                if time.monotonic() + pause_s + SHORTEST_S >= stop_s:
                    raise BucketLateError(f"{self.address} did not answer in time: {error}") from None
                if num_failures > self._settings.max_retries:
                    raise
            time.sleep(pause_s)

    # One try each.

    def _read(self, name: str, arrival: Arrival, *, stop_s: float) -> bool:
        direct = self._direct
        if direct is None:
            return self._fetch(name, arrival, stop_s=stop_s)
        try:
            return self._read_directly(direct, name, arrival, stop_s=stop_s)
        except NotDirectError as error:
            log.warning("object_tier_reads_by_client bucket=%s reason=%s", self.address, brief(error))
            self._direct = None
            direct.close()
            arrival.restart()
            return self._fetch(name, arrival, stop_s=stop_s)

    def _read_directly(self, direct: DirectReader, name: str, arrival: Arrival, *, stop_s: float) -> bool:
        url = self._sign(name, stop_s=stop_s)
        answer = direct.get(url, arrival, stop_s=min(stop_s, time.monotonic() + self._try_s(arrival.num_bytes)))
        if answer is None:
            return True
        code = _CODE.search(answer.text)
        what = f"status {answer.status} {code[1] if code else ''}".strip()
        if answer.status == 404:
            if is_about_bucket(answer.text):
                raise missing_bucket(self.address)
            return False
        if answer.status in (401, 403):
            raise refused_by(self.address, what)
        if answer.status in (412, 416):
            # Replaced since the first part of it arrived.
            arrival.restart()
        raise BucketError(f"{self.address}: {what}")

    def _sign(self, name: str, *, stop_s: float) -> str:
        def sign() -> str:
            client: Any = self._clients.patient()
            with our_errors(self.address):
                url: str = obstore.sign(client, "GET", name, timedelta(seconds=_SIGNED_S))
            return url

        return sign() if self._has_keys else self._errands.call(sign, stop_s=stop_s)

    def _fetch(self, name: str, arrival: Arrival, *, stop_s: float) -> bool:
        client = self._clients.for_one_try(self._try_s(arrival.num_bytes), stop_s=stop_s, has_answer_body=True)
        at, version = arrival.num_arrived, arrival.version
        options: Any = {"range": {"offset": at}, "if_match": version} if at and version else {}
        try:
            with our_errors(self.address):
                try:
                    result = obstore.get(client, name, options=options)
                except exceptions.PreconditionError:
                    # Replaced since the first part of it arrived.
                    options = {}
                    result = obstore.get(client, name)
                if not options or result.range[0] != at:
                    arrival.begin(num_bytes=result.meta["size"], version=result.meta["e_tag"])
                for piece in result.stream(min_chunk_size=_PIECE_BYTES):
                    arrival.write(memoryview(piece))
        except FileNotFoundError:
            return False
        return True

    def _send(self, name: str, body: memoryview, only_new: bool, *, stop_s: float) -> bool:
        client = self._clients.for_one_try(self._try_s(len(body)), stop_s=stop_s, has_answer_body=False)
        if only_new and self._can_condition:
            try:
                return self._put(client, name, body, mode="create")
            except _ConditionError:
                self._can_condition = False
                log.warning(
                    "object_tier_no_conditional_put bucket=%s: the server does not know If-None-Match, so nodes that "
                    "write one chunk at the same time all send it",
                    self.address,
                )
        return self._put(client, name, body, mode="overwrite")

    def _put(self, client: ObjectStore, name: str, body: memoryview, *, mode: Any) -> bool:
        with our_errors(self.address):
            try:
                obstore.put(client, name, body, mode=mode, use_multipart=False)
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                return False
            except exceptions.NotSupportedError as error:
                raise _ConditionError(brief(error)) from None
            except exceptions.BaseError as error:
                if mode == "create" and _NOT_IMPLEMENTED.search(str(error)):
                    raise _ConditionError(brief(error)) from None
                raise
        return True

    def _delete(self, name: str, *, version: str | None = None) -> None:
        client = self._clients.patient()
        with suppress(FileNotFoundError), our_errors(self.address):
            if version is None or obstore.head(client, name)["e_tag"] == version:
                obstore.delete(client, name)

    def _delete_all(self, names: list[str]) -> None:
        """In one request, which does not complain of missing ones."""
        with our_errors(self.address):
            obstore.delete(self._clients.patient(), names)

    def _try_s(self, num_bytes: int) -> float:
        """How long one try with so many bytes may take."""
        return self._settings.timeout_s + num_bytes / self._settings.min_bytes_per_s


class _ConditionError(UnavailableError):
    """The server does not know conditional writes."""


def _can_read_directly(clients: Clients) -> bool:
    """Whether a read is a plain GET of a signed URL: no proxy, no other authorities, nothing in extra headers."""
    options = {name.removeprefix("aws_") for name in clients.options}
    needs_obstore = any(name in os.environ for name in _OBSTORE_ONLY_VARIABLES) or bool(getproxies())
    return clients.scheme in S3_SCHEMES and options <= _DIRECT_OPTIONS and not needs_obstore


def _delete_stale(folder: str) -> int:
    """Files under the names that obstore writes to before it moves them: the final name, `#` and a number."""
    num_deleted = 0
    for path in glob.iglob(f"{glob.escape(folder)}/??/*.rec#*"):
        with suppress(OSError):
            if os.stat(path).st_mtime < time.time() - STALE_S:
                os.unlink(path)
                num_deleted += 1
    return num_deleted
