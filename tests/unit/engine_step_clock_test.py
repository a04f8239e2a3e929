"""Steps that prefill are timed, on devices that finish when their calls return and on those that do not.

Covers: events that have passed only at a later step, bounds on those that have not, what is not timed.
Does not cover: CUDA's own events, what speeds are used for (`tests/unit/engine_reading_test.py`).
"""

import time

import pytest
import torch

from kvstore.codecs.controller import Rate
from kvstore.engine.ops import StepOps
from kvstore.engine.settings import ConnectorSettings
from kvstore.engine.speeds import MIN_PREFILL_TOKENS
from kvstore.engine.step_clock import StepClock, TimedStep, marks_of
from kvstore.engine.tally import Tally
from kvstore.engine.worker_side import WorkerSide


class Stream:
    """A device's queue of work, as far as time goes."""

    def __init__(self) -> None:
        self.given_ms = 0.0
        self.done_ms = 0.0
        self.made = 0

    def make(self) -> "Event":
        self.made += 1
        return Event(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._at_ms: float | None = None

    def record(self) -> None:
        self._at_ms = self._stream.given_ms

    def query(self) -> bool:
        assert self._at_ms is not None, "it was not recorded"
        return self._at_ms <= self._stream.done_ms

    def elapsed_time(self, end: "Event") -> float:
        assert self.query(), "torch raises here"
        assert end.query(), "torch raises here"
        assert self._at_ms is not None
        assert end._at_ms is not None
        return end._at_ms - self._at_ms


def step(clock: StepClock, stream: Stream, *, num_tokens: int, takes_ms: float) -> list[TimedStep]:
    clock.begin(num_tokens)
    stream.given_ms += takes_ms
    return clock.end()


def test_a_step_is_timed_when_the_device_has_done_it() -> None:
    stream = Stream()
    clock = StepClock(stream.make)
    assert step(clock, stream, num_tokens=512, takes_ms=80.0) == []
    assert step(clock, stream, num_tokens=1024, takes_ms=150.0) == []
    stream.done_ms = 100.0
    assert step(clock, stream, num_tokens=1, takes_ms=10.0) == [TimedStep(512, 0.08)]
    stream.done_ms = 230.0
    assert step(clock, stream, num_tokens=1, takes_ms=10.0) == [TimedStep(1024, 0.15)]
    assert step(clock, stream, num_tokens=1, takes_ms=10.0) == []
    assert stream.made == 4, "steps that say nothing about prefill cost no events"


def test_events_of_a_device_that_stands_still_are_bounded() -> None:
    stream = Stream()
    clock = StepClock(stream.make)
    for _ in range(1000):
        assert step(clock, stream, num_tokens=512, takes_ms=1.0) == []
    bound = stream.made
    assert bound < 100
    stream.done_ms = stream.given_ms
    assert len(step(clock, stream, num_tokens=1, takes_ms=1.0)) == bound // 2
    step(clock, stream, num_tokens=512, takes_ms=1.0)
    assert stream.made == bound + 2, "then steps are timed again"


def test_a_step_that_does_not_end_is_forgotten() -> None:
    stream = Stream()
    clock = StepClock(stream.make)
    clock.begin(512)
    stream.given_ms = stream.done_ms = 1000.0
    assert step(clock, stream, num_tokens=1, takes_ms=0.0) == []


def test_work_on_the_host_is_over_when_its_call_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StepClock(marks_of(torch.device("cpu")))
    now_s = 10.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    clock.begin(MIN_PREFILL_TOKENS)
    now_s = 10.25
    (timed,) = clock.end()
    assert timed == TimedStep(MIN_PREFILL_TOKENS, pytest.approx(0.25))
    clock.begin(MIN_PREFILL_TOKENS - 1)
    assert clock.end() == []


def test_an_unknown_device_is_not_timed() -> None:
    assert marks_of(torch.device("meta")) is None
    clock = StepClock(None)
    clock.begin(512)
    assert clock.end() == []


def test_a_worker_learns_prefill_when_its_device_has_done_it() -> None:
    stream, tally = Stream(), Tally()
    worker = WorkerSide(settings=ConnectorSettings(), extra={}, block_size=16, tally=tally)
    worker._clock = StepClock(stream.make)
    for num_tokens, takes_ms in ((512, 80.0), (1, 10.0), (1, 10.0)):
        assert worker._meter.speeds.prefill is None
        worker.begin_step(StepOps(num_tokens=num_tokens))
        stream.done_ms = stream.given_ms
        stream.given_ms += takes_ms
        worker.save(StepOps())
        if worker._meter.speeds.prefill is not None:
            break
    assert stream.done_ms == 80.0, "not before"
    assert worker._meter.speeds.prefill == Rate(pytest.approx(6400.0), pytest.approx(0.08))
    assert tally.drain()["counts"]["prefill_tokens"] == 512


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_steps_are_timed_without_waiting() -> None:
    device = torch.device("cuda")
    clock, square = StepClock(marks_of(device)), torch.randn(8192, 8192, device=device)
    square = square @ square
    torch.cuda.synchronize()
    clock.begin(512)
    began_s = time.monotonic()
    for _ in range(20):
        square = square @ square
    timed = clock.end()
    assert timed == [], "the device cannot be done yet"
    torch.cuda.synchronize()
    seconds = time.monotonic() - began_s
    clock.begin(1)
    ((num_tokens, device_s),) = clock.end()
    assert num_tokens == 512
    assert 0 < device_s <= 1.01 * seconds
