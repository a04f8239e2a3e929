"""Waiting in tests: until something is true, never for a fixed time.

Covers: threads and processes. Does not cover: code that takes a `Clock` (`cluster.clock.ManualClock`).
"""

import threading
import time
from collections.abc import Callable

_STEP_S = 0.005


def wait_until(is_true: Callable[[], object], *, what: str, deadline_s: float = 30.0) -> None:
    """Return as soon as `is_true()`.

    Raises:
        AssertionError: Still not true after `deadline_s`.
    """
    stop_s = time.monotonic() + deadline_s
    pause = threading.Event()
    while not is_true():
        if time.monotonic() >= stop_s:
            raise AssertionError(f"after {deadline_s} s still waiting for: {what}")
        pause.wait(_STEP_S)
