"""Streams that a load gave up, and what is learnt from them.

Covers: the last bytes that come between two looks, a source that breaks off, leases.
Does not cover: when streams are given up (`tests/unit/engine_coded_transfers_test.py`).
"""

import threading
from collections.abc import Sequence
from typing import Any

from kvstore.engine.probing import LinkProbe
from kvstore.engine.speeds import SpeedMeter

NUM_BYTES = 1 << 30


class Stepping:
    """A stream of which each look sees the next amount; behind the last, always that one."""

    payload = range(NUM_BYTES)

    def __init__(self, looks: Sequence[int]) -> None:
        self.looks = list(looks)
        self.released = threading.Event()

    def wait_bytes(self, num_bytes: int, *, deadline_s: float) -> int:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    def release(self) -> None:
        self.released.set()


def probed(looks: Sequence[int]) -> float:
    """Bytes per second of the link after one probe of a dead link's stream."""
    meter = SpeedMeter()
    for _ in range(200):
        meter.note_link("remote", 0, seconds=5.0)
    probe, stream = LinkProbe(meter), Stepping(looks)
    streams: list[Any] = [stream]
    probe.take(streams)
    assert stream.released.wait(30.0)
    probe.close()
    return meter.speeds.link["remote"].per_s


def test_the_last_bytes_may_come_between_two_looks() -> None:
    assert probed([100, NUM_BYTES]) > 1e6


def test_a_source_that_breaks_off_is_a_dead_link() -> None:
    assert probed([100]) < 1e6
