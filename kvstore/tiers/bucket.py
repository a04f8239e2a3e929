"""What the object tier asks of a bucket, and how bytes arrive in memory that the caller may take back at any time.

Covers: the protocol, its errors, `Arrival`. Does not cover: buckets themselves (`kvstore.tiers.obs`, `.arrow`), names
of objects (`kvstore.tiers.object_names`), which objects there are (`kvstore.tiers.object_index`).
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

import msgspec

from cluster.errors import DataError, InvariantError, UnavailableError
from kvstore.container import ChunkCorruptError, Header, RecordVerifier
from kvstore.interfaces import OnBytes
from kvstore.keys import ChunkKey

_STEP_BYTES: Final = 256 << 10
"""Small enough that what was copied is still in the cache when it is hashed."""
STALE_S: Final = 3600.0
"""Age at which a write that was never finished is nobody's any more."""


class BucketError(UnavailableError):
    """The bucket did not do what it was asked; says nothing about the object."""


class BucketLateError(BucketError):
    """The bucket did not answer in time."""


class BucketRefusedError(BucketError):
    """The bucket is missing or does not let us in: a person has to act."""


class BucketTornError(BucketError):
    """A read would have to start again after somebody was told of its first bytes; not tried again in place."""


class WrongLengthError(ChunkCorruptError):
    """More or fewer bytes arrived than the record has: perhaps the fault of what is between us and the bucket."""


class ArrivalClosedError(DataError):
    """Bytes arrived that nobody waits for any more."""


class Listed(msgspec.Struct, frozen=True):
    """One object of a listing. Its name is hostile until parsed."""

    name: str
    num_bytes: int
    modified_unix_s: float


class Arrival:
    """The caller's memory while a thread of a bucket fills it.

    Guarantees:
        Bytes are hashed as they arrive. After `close` nothing is written, nobody is told of bytes, and nothing here
        refers to the memory any more, however long the thread goes on.

    Args:
        view: Of the record's length.
        key: The chunk that must arrive.
        sealed: Whether its payload must be ciphertext.
        on_bytes: Told of the bytes in place, from the thread that fills.
    """

    def __init__(
        self, view: memoryview, *, key: ChunkKey, sealed: bool = False, on_bytes: OnBytes | None = None
    ) -> None:
        self.num_bytes = len(view)
        self.version: str | None = None
        """What the bucket calls the object's state that is being read; None where it has no name for it."""
        self._key = key
        self._sealed = sealed
        self._view: memoryview | None = view
        self._verifier: RecordVerifier | None = None
        self._on_bytes = on_bytes
        self._at = 0
        self._told = 0
        self._lock = threading.Lock()

    @property
    def num_arrived(self) -> int:
        """Bytes in place."""
        return self._at

    def begin(self, *, num_bytes: int, version: str | None) -> None:
        """The object was found; what follows are its bytes from the start, also of a second try.

        Raises:
            BucketTornError: Somebody was told of bytes of another try, which may be those of another object.
            WrongLengthError: It has another length than the record.
            ArrivalClosedError: Nobody waits any more.
        """
        with self._lock:
            view = self._open()
            if self._told:
                raise BucketTornError(f"the read broke off after {self._told} bytes that are in use")
            self.version = version
            if num_bytes != self.num_bytes:
                raise WrongLengthError(f"object should have {self.num_bytes} bytes, has {num_bytes}")
            self._verifier = RecordVerifier(view, expected_key=self._key, expected_sealed=self._sealed)
            self._at = 0

    def write(self, piece: memoryview) -> None:
        """The next bytes of the object.

        Raises:
            DataError: They cannot belong to the record.
            ArrivalClosedError: Nobody waits any more.
        """
        with self._lock:
            view = self._open()
            start, stop = self._at, self._at + len(piece)
            if stop > self.num_bytes:
                raise WrongLengthError(f"object goes on after {self.num_bytes} bytes")
            for at in range(start, stop, _STEP_BYTES):
                step = min(stop, at + _STEP_BYTES)
                view[at:step] = piece[at - start : step - start]
                self._note(step)
            self._tell()

    def fill(self, receive: Callable[[memoryview], int]) -> int:
        """Let the caller's own thread put the next bytes in place itself; how many.

        Args:
            receive: Given room for at least one byte; returns how many it filled, from the start.

        Raises:
            DataError, ArrivalClosedError: As `write`.
        """
        view = self._open()
        count = receive(view[self._at : self._at + _STEP_BYTES])
        with self._lock:
            self._open()
            self._note(self._at + count)
            self._tell()
        return count

    def restart(self) -> None:
        """What arrived belongs to no object any more."""
        with self._lock:
            self._at = 0
            self.version = None

    def finish(self) -> Header:
        """The header of the record that arrived.

        Raises:
            ChunkCorruptError: Bytes are missing or wrong.
        """
        with self._lock:
            self._open()
            if self._verifier is None:
                raise ChunkCorruptError("no bytes arrived")
            if self._at < self.num_bytes:
                raise WrongLengthError(f"object ends after {self._at} of {self.num_bytes} bytes")
            return self._verifier.finish()

    def close(self) -> None:
        """The caller takes its memory back."""
        with self._lock:
            self._view = None
            self._verifier = None
            self._on_bytes = None

    def _note(self, stop: int) -> None:
        if self._verifier is None:
            raise InvariantError("bytes of an object arrived before its length")
        self._at = stop
        self._verifier(stop)

    def _tell(self) -> None:
        if self._on_bytes is not None and self._at > self._told:
            self._told = self._at
            self._on_bytes(self._at)

    def _open(self) -> memoryview:
        if self._view is None:
            raise ArrivalClosedError("the read was given up")
        return self._view


class Bucket(Protocol):
    """Whole objects by name, for any number of threads.

    Guarantees:
        No call outlives its `stop_s` (monotonic) by more than scheduling delay, whatever the other side does.
        After `put` returned or raised, nothing reads `record`.
        A failure raises `BucketError`; that an object is not there is a value.
    """

    @property
    def address(self) -> str:
        """Where it is, without secrets, for messages."""
        ...

    def get(self, name: str, arrival: Arrival, *, stop_s: float) -> bool:
        """Let the bytes of one object arrive; False if there is no such object.

        Raises:
            BucketError: As above.
            DataError: What `arrival` raised.
        """
        ...

    def put(self, name: str, record: memoryview, *, only_new: bool, stop_s: float) -> bool:
        """Store one object, whole or not at all.

        Args:
            name: Of the object.
            record: Its bytes.
            only_new: Leave an object of that name as it is. A bucket that cannot promise this overwrites.
            stop_s: Monotonic time.

        Returns:
            False if there was one already, and it was left.
        """
        ...

    def delete(self, names: Sequence[str], *, stop_s: float) -> None:
        """Delete objects; those that are not there are no error."""
        ...

    def delete_version(self, name: str, *, version: str | None, stop_s: float) -> None:
        """Delete one object unless it was replaced since it was read; None deletes it as it is.

        Between the look and the deletion another node may replace it: its record is then lost, which costs a miss.
        """
        ...

    def pages(self, *, page_s: float) -> Iterator[Sequence[Listed]]:
        """All objects, in pages, each within `page_s` seconds."""
        ...

    def remove_leftovers(self, *, stop_s: float) -> int:
        """Delete what writers that died left, if it is at least `STALE_S` old; how many pieces."""
        ...

    def close(self) -> None:
        """End threads and connections."""
        ...
