"""Whether a device may be asked now: it pauses after errors, after slow answers, and while it does not answer at all.

Covers: reads or writes of one device (one gate each). Does not cover: which errors are the device's (the caller).
"""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.clock import Clock
from kvstore.breaker import Breaker

_MAX_PAUSES = 12


class Gate:
    """A circuit breaker that also sees operations that have not come back. Safe for several threads.

    Args:
        failures: Errors in a row after which the device pauses.
        pause_s: First pause; doubles up to twelve times this while errors go on.
        slow_s: An operation that takes longer is an error; while one that is older has not ended, nothing passes, so
            that a hanging device cannot take thread after thread.
        clock: For all of that.
    """

    def __init__(self, *, failures: int, pause_s: float, slow_s: float, clock: Clock) -> None:
        self._breaker = Breaker(failures=failures, first_pause_s=pause_s, max_pause_s=_MAX_PAUSES * pause_s)
        self._slow_s = slow_s
        self._clock = clock
        self._lock = threading.Lock()
        self._is_open = False
        """As the breaker's; kept here for those who ask all the time."""
        self._tickets = itertools.count()
        self._under_way: dict[int, float] = {}
        """Start of each operation that has not ended, oldest first."""

    def allows(self) -> bool:
        """Whether the device may be asked now."""
        if not self._is_open and not self._under_way:
            # Nearly always, and asked for every key of every lookup.
            return True
        now_s = self._clock.now_s()
        with self._lock:
            oldest_s = next(iter(self._under_way.values()), now_s)
            return now_s - oldest_s <= self._slow_s and self._breaker.allows(now_s=now_s)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Time one operation. Ending well, but late, is an error; other errors the caller reports by `note_error`."""
        with self._lock:
            ticket = next(self._tickets)
            started_s = self._under_way[ticket] = self._clock.now_s()
        has_ended = False
        try:
            yield
            has_ended = True
        finally:
            now_s = self._clock.now_s()
            with self._lock:
                del self._under_way[ticket]
                if now_s - started_s > self._slow_s:
                    self._breaker.record_failure(now_s=now_s)
                elif has_ended:
                    self._breaker.record_success()
                self._is_open = self._breaker.is_open

    def note_error(self) -> None:
        """The device failed."""
        with self._lock:
            self._breaker.record_failure(now_s=self._clock.now_s())
            self._is_open = self._breaker.is_open
