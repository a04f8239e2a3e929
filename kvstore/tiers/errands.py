"""Calls that are waited for until a time and no longer, on threads that may be left behind.

Covers: running foreign blocking calls that cannot be cancelled. Does not cover: undoing what such a call still does
after nobody waits (`kvstore.tiers.bucket.Arrival`).

A call that is given up keeps its thread until it ends by itself; another thread takes its place. When too many wait
for calls that nobody waits for, new calls fail at once.
"""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from kvstore.tiers.bucket import BucketError, BucketLateError

T = TypeVar("T")


class _Errand(Generic[T]):
    """One call."""

    __slots__ = ("done", "error", "is_abandoned", "is_finished", "result", "work")

    def __init__(self, work: Callable[[], T]) -> None:
        self.work: Callable[[], T] | None = work
        self.result: T | None = None
        self.error: BaseException | None = None
        self.is_finished = False
        self.is_abandoned = False
        self.done = threading.Lock()
        self.done.acquire()


class Errands:
    """Runs calls on daemon threads that are started as needed.

    Args:
        name: Of the threads.
        max_threads: More calls wait; half of them may be left behind before calls fail at once.

    Example:
        >>> errands = Errands("doc", max_threads=2)
        >>> errands.call(lambda: 6 * 7, stop_s=time.monotonic() + 10)
        42
        >>> errands.close(wait_s=1.0)
        0
    """

    def __init__(self, name: str, *, max_threads: int) -> None:
        self._name = name
        self._max_threads = max_threads
        self._queue: SimpleQueue[_Errand[Any] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._num_idle = 0
        self._num_waiting = 0
        self._num_abandoned = 0
        self._is_closed = False

    @property
    def num_abandoned(self) -> int:
        """Calls that go on although nobody waits for them."""
        return self._num_abandoned

    def call(self, work: Callable[[], T], *, stop_s: float) -> T:
        """What `work` returns or raises.

        Raises:
            BucketLateError: It had not ended by monotonic time `stop_s`; it goes on.
            BucketError: Too many calls go on already, or there can be no more threads.
        """
        errand = _Errand(work)
        self._enqueue(errand)
        if not errand.done.acquire(timeout=max(0.0, stop_s - time.monotonic())):
            self._abandon(errand)
        try:
            if errand.error is not None:
                raise errand.error
            return errand.result  # type: ignore[return-value]  # set, as there is no error
        finally:
            # An error refers to this frame: a circle would keep what it holds until the next garbage collection.
            del errand

    def close(self, *, wait_s: float) -> int:
        """Take no more calls and wait for the threads; how many are left behind."""
        with self._lock:
            self._is_closed = True
            threads = list(self._threads)
        for _ in threads:
            self._queue.put(None)
        stop_s = time.monotonic() + wait_s
        for thread in threads:
            thread.join(timeout=max(0.0, stop_s - time.monotonic()))
        return sum(thread.is_alive() for thread in threads)

    def _enqueue(self, errand: _Errand[Any]) -> None:
        with self._lock:
            if self._is_closed:
                raise BucketError("the tier is closed")
            if self._num_idle:
                self._num_idle -= 1
            elif len(self._threads) < self._max_threads:
                number = len(self._threads)
                thread = threading.Thread(target=self._run, name=f"{self._name}-{number}", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    raise BucketError(f"no thread for it: {error}") from error
                self._threads.append(thread)
            elif 2 * self._num_abandoned >= self._max_threads:
                raise BucketError(f"{self._num_abandoned} requests that were given up have not ended yet")
            else:
                self._num_waiting += 1
            self._queue.put(errand)

    def _abandon(self, errand: _Errand[Any]) -> None:
        with self._lock:
            if errand.is_finished:
                return
            errand.is_abandoned = True
            self._num_abandoned += 1
        raise BucketLateError("no answer in time")

    def _run(self) -> None:
        while (errand := self._queue.get()) is not None:
            if errand.is_abandoned:
                self._note_end(errand)
                continue
            assert errand.work is not None, "runs once"
            try:
                errand.result = errand.work()
            except BaseException as error:
                # Raised again where the errand is waited for.
                errand.error = error
            errand.work = None
            self._note_end(errand)
            # What it refers to goes now, not when the next one comes.
            del errand

    def _note_end(self, errand: _Errand[Any]) -> None:
        with self._lock:
            errand.is_finished = True
            if errand.is_abandoned:
                self._num_abandoned -= 1
            if self._num_waiting:
                self._num_waiting -= 1
            else:
                self._num_idle += 1
        errand.done.release()
