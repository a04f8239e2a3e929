"""What becomes of streams that a load gave up: they say how fast the link is now.

Covers: one thread that watches the arrival of what was asked for anyway, so that a link that recovered is used again.
Does not cover: loads (`kvstore.engine.reading`).

Whoever computes because a link is slow learns nothing more about it. The chunks that were asked for keep arriving, and
nobody waits for them: watching them costs no request anything.
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from kvstore.engine.speeds import SpeedMeter
from kvstore.interfaces import StreamLease

logger = logging.getLogger(__name__)

WATCH_S: Final = 2.0
"""How long a probe lasts at most."""
_SLICE_S: Final = 0.1


class LinkProbe:
    """Safe for several threads. At most one probe at a time: streams that come meanwhile are released at once.

    Args:
        meter: Told how fast bytes arrived.
        watch_s: How long a probe lasts at most.
    """

    def __init__(self, meter: SpeedMeter, *, watch_s: float = WATCH_S) -> None:
        self._meter = meter
        self._watch_s = watch_s
        self._lock = threading.Lock()
        self._is_busy = False
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1, "learnonce-probe")

    def take(self, streams: Sequence[StreamLease]) -> None:
        """Own these streams from now on; returns at once."""
        with self._lock:
            if streams and not self._is_busy and not self._stop.is_set():
                self._is_busy = True
                self._thread.submit(self._watch, list(streams))
                return
        _release(streams)

    def close(self) -> None:
        """End the probe under way."""
        with self._lock:
            self._stop.set()
        self._thread.shutdown(wait=True)

    def _watch(self, streams: list[StreamLease]) -> None:
        try:
            total_bytes = sum(len(stream.payload) for stream in streams)
            began_s, seen = time.monotonic(), _arrived(streams)
            first = seen
            while seen < total_bytes and not self._stop.is_set() and time.monotonic() - began_s < self._watch_s:
                missing = (s for s in streams if s.wait_bytes(len(s.payload), deadline_s=0.0) < len(s.payload))
                current = next(missing, None)
                if current is None:
                    # The last bytes came since they were counted.
                    seen = total_bytes
                    break
                slice_s = time.monotonic()
                current.wait_bytes(len(current.payload), deadline_s=_SLICE_S)
                if time.monotonic() - slice_s < _SLICE_S / 2 and _arrived(streams) == seen:
                    break  # the source has broken off
                seen = _arrived(streams)
            self._meter.note_link("remote", seen - first, seconds=time.monotonic() - began_s)
        except Exception:
            logger.exception("event=probe_failed")
        finally:
            _release(streams)
            with self._lock:
                self._is_busy = False


def _arrived(streams: Sequence[StreamLease]) -> int:
    return sum(stream.wait_bytes(len(stream.payload), deadline_s=0.0) for stream in streams)


def _release(streams: Sequence[StreamLease]) -> None:
    for stream in streams:
        try:
            stream.release()
        except Exception:
            logger.exception("event=lease_release_failed")
