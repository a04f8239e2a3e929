"""Time as a parameter, so that decisions replay and tests do not wait.

Covers: the `Clock` protocol, the real clock, and a manual one for tests and the simulator.
Does not cover: timeouts of foreign calls (sockets, subprocesses), which take seconds directly.
"""

import asyncio
import heapq
import itertools
import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds, and a way to wait for them."""

    def now_s(self) -> float:
        """Monotonic seconds; only differences mean anything."""
        ...

    async def sleep_s(self, seconds: float) -> None:
        """Wait for at least `seconds`."""
        ...


class SystemClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        """Monotonic seconds of this process' machine."""
        return time.monotonic()

    async def sleep_s(self, seconds: float) -> None:
        """Wait on the running event loop."""
        await asyncio.sleep(seconds)


class ManualClock:
    """A clock that moves only when told to; sleepers wake in order of their deadline.

    Example:
        >>> clock = ManualClock()
        >>> clock.advance_s(2.5)
        >>> clock.now_s()
        2.5
    """

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now_s(self) -> float:
        """Seconds advanced so far, plus the start."""
        return self._now_s

    async def sleep_s(self, seconds: float) -> None:
        """Wait until `advance_s` has moved the clock by `seconds`."""
        waker: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now_s + seconds, next(self._order), waker))
        await waker

    def advance_s(self, seconds: float) -> None:
        """Move the clock and wake every sleeper whose time has come, earliest first."""
        self._now_s += seconds
        while self._sleepers and self._sleepers[0][0] <= self._now_s:
            _, _, waker = heapq.heappop(self._sleepers)
            if not waker.done():
                waker.set_result(None)
