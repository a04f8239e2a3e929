"""Measured speeds of one worker, for `kvstore.codecs.controller`.

Covers: a thread-safe holder of `Speeds`, how arrivals of one load become a rate.
Does not cover: decisions (`kvstore.codecs.controller`), metrics (`kvstore.engine.tally`). Imports neither torch nor
vLLM.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from kvstore.codecs.controller import PRIORS, Path, Rate, Speeds, with_link

MIN_PREFILL_TOKENS: Final = 64
"""Steps of fewer tokens say nothing about prefill: they are as long for one token."""


class SpeedMeter:
    """What this worker has measured so far. Safe for several threads."""

    def __init__(self, speeds: Speeds = PRIORS) -> None:
        self._lock = threading.Lock()
        self._speeds = speeds

    @property
    def speeds(self) -> Speeds:
        """What is known now."""
        with self._lock:
            return self._speeds

    def note_link(self, path: Path, num_bytes: int, *, seconds: float) -> None:
        """Encoded bytes that arrived while somebody waited for them, or did not."""
        with self._lock:
            self._speeds = with_link(self._speeds, path, num_bytes, seconds=seconds)

    def note_decode(self, output_bytes: int, *, seconds: float) -> None:
        """KV bytes that were decoded; seconds of all threads, divided by their number."""
        with self._lock:
            self._speeds = replace(self._speeds, decode=self._speeds.decode.after(output_bytes, seconds=seconds))

    def note_encode(self, kv_bytes: int, *, seconds: float) -> None:
        """KV bytes that were encoded."""
        with self._lock:
            self._speeds = replace(self._speeds, encode=self._speeds.encode.after(kv_bytes, seconds=seconds))

    def note_prefill(self, num_tokens: int, *, seconds: float) -> None:
        """An engine step that computed so many tokens."""
        if num_tokens < MIN_PREFILL_TOKENS or seconds <= 0:
            return
        with self._lock:
            # The first step says more than any prior could: models differ by a factor of a thousand.
            known = self._speeds.prefill or Rate(num_tokens / seconds, 0.0)
            self._speeds = replace(self._speeds, prefill=known.after(num_tokens, seconds=seconds))


class Arrivals:
    """Turns what one load sees of its chunks into observations of the link.

    Bytes that come while the load decodes are the link's merit, and so is that time: an observation is made where the
    load had to wait, over everything since the one before.

    Args:
        meter: Told of every observation.
        path: Where the bytes come from.
        now_s: Monotonic seconds.
    """

    def __init__(self, meter: SpeedMeter, *, path: Path, now_s: Callable[[], float]) -> None:
        self._meter = meter
        self._path = path
        self._now_s = now_s
        self._since_s = now_s()
        self._noted_bytes = 0

    def restart(self, arrived_bytes: int) -> None:
        """The link begins anew: time before, and bytes that were there, say nothing."""
        self._since_s = self._now_s()
        self._noted_bytes = arrived_bytes

    def note(self, arrived_bytes: int) -> None:
        """The load has waited, and so many bytes of all of its chunks are in place."""
        now_s = self._now_s()
        self._meter.note_link(self._path, arrived_bytes - self._noted_bytes, seconds=now_s - self._since_s)
        self._since_s, self._noted_bytes = now_s, arrived_bytes
