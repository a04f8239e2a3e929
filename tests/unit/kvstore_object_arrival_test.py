"""Arrival: bytes that arrive from another thread are verified, and none after the end; errands that are left behind."""

import threading
import time

import pytest

from cluster.errors import InvariantError
from kvstore.container import ChunkCorruptError, ChunkMismatchError
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_key
from kvstore.testing.tier import record_of
from kvstore.tiers.bucket import Arrival, ArrivalClosedError, BucketError, BucketLateError, BucketTornError
from kvstore.tiers.errands import Errands


def arrive(arrival: Arrival, data: bytes | bytearray, *, piece_bytes: int) -> None:
    arrival.begin(num_bytes=len(data), version=None)
    for start in range(0, len(data), piece_bytes):
        arrival.write(memoryview(data)[start : start + piece_bytes])


@pytest.mark.parametrize("piece_bytes", [1000, 4096, 300_000, 1 << 20])
def test_record_lands_in_pieces_of_any_size(piece_bytes: int) -> None:
    record = record_of(1, 600_000)
    memory = bytearray(len(record))
    told: list[int] = []
    arrival = Arrival(memoryview(memory), key=sample_key(1), on_bytes=told.append)
    arrive(arrival, record, piece_bytes=piece_bytes)
    assert arrival.finish().payload_bytes == 600_000
    assert memory == record
    assert told == sorted(set(told))
    assert told[-1] == len(record)


def test_second_try_starts_again_only_if_nobody_was_told() -> None:
    record = record_of(1, 20_000)
    arrival = Arrival(memoryview(bytearray(len(record))), key=sample_key(1))
    arrival.begin(num_bytes=len(record), version="1")
    arrival.write(memoryview(record)[:8000])
    arrive(arrival, record, piece_bytes=4096)
    arrival.finish()
    told: list[int] = []
    arrival = Arrival(memoryview(bytearray(len(record))), key=sample_key(1), on_bytes=told.append)
    arrival.begin(num_bytes=len(record), version="1")
    arrival.begin(num_bytes=len(record), version="2")
    arrival.write(memoryview(record)[:8000])
    arrival.restart()
    for num_bytes in (len(record), 5):
        with pytest.raises(BucketTornError, match="8000 bytes"):
            arrival.begin(num_bytes=num_bytes, version="2")
    assert told == [8000]


def test_wrong_record_is_refused_as_soon_as_it_shows() -> None:
    record = record_of(2, 20_000)
    arrival = Arrival(memoryview(bytearray(len(record))), key=sample_key(1))
    arrival.begin(num_bytes=len(record), version=None)
    with pytest.raises(ChunkMismatchError):
        arrival.write(memoryview(record)[:4096])


def test_wrong_lengths_are_refused() -> None:
    record = record_of(1, 20_000)
    arrival = Arrival(memoryview(bytearray(len(record))), key=sample_key(1))
    with pytest.raises(InvariantError):
        arrival.write(memoryview(record))
    with pytest.raises(ChunkCorruptError, match="should have"):
        arrival.begin(num_bytes=len(record) - 1, version=None)
    arrival.begin(num_bytes=len(record), version=None)
    arrival.write(memoryview(record)[:8192])
    with pytest.raises(ChunkCorruptError):
        arrival.finish()
    with pytest.raises(ChunkCorruptError, match="goes on"):
        arrival.write(memoryview(record))


def test_nothing_lands_after_the_end_and_the_memory_is_free() -> None:
    record = record_of(1, 20_000)
    memory = bytearray(len(record))
    told: list[int] = []
    arrival = Arrival(memoryview(memory), key=sample_key(1), on_bytes=told.append)
    arrival.begin(num_bytes=len(record), version=None)
    arrival.write(memoryview(record)[:4096])
    arrival.close()
    with pytest.raises(ArrivalClosedError):
        arrival.write(memoryview(record)[4096:])
    with pytest.raises(ArrivalClosedError):
        arrival.begin(num_bytes=len(record), version=None)
    assert told == [4096]
    memory.clear()


def leave_behind(errands: Errands, goes_on: threading.Event) -> None:
    """One call that has begun and is given up. A call that no thread took yet would never run, and be over."""
    begun = threading.Event()

    def work() -> None:
        begun.set()
        goes_on.wait()

    with pytest.raises(BucketLateError):
        errands.call(work, stop_s=time.monotonic() + 1.0)
    assert begun.is_set()


def test_errand_that_is_late_is_left_behind_and_its_thread_replaced() -> None:
    errands = Errands("test-errand", max_threads=4)
    goes_on = threading.Event()
    for _ in range(2):
        leave_behind(errands, goes_on)
    assert errands.num_abandoned == 2
    assert errands.call(lambda: 7, stop_s=time.monotonic() + 10) == 7
    goes_on.set()
    wait_until(lambda: errands.num_abandoned == 0, what="both ended")
    assert errands.close(wait_s=10) == 0
    with pytest.raises(BucketError, match="closed"):
        errands.call(lambda: 7, stop_s=time.monotonic() + 10)


def test_too_many_errands_left_behind_fail_at_once() -> None:
    errands = Errands("test-errand", max_threads=2)
    goes_on = threading.Event()
    for _ in range(2):
        leave_behind(errands, goes_on)
    start_s = time.monotonic()
    with pytest.raises(BucketError, match="2 requests that were given up"):
        errands.call(lambda: 7, stop_s=start_s + 60)
    assert time.monotonic() - start_s < 30
    assert errands.close(wait_s=0.01) == 2
    goes_on.set()
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("test-errand")], what="threads end")


def test_errand_that_waited_too_long_for_a_thread_never_runs() -> None:
    errands = Errands("test-errand", max_threads=3)
    goes_on, ran = threading.Event(), threading.Event()
    callers = [
        threading.Thread(target=errands.call, args=(goes_on.wait,), kwargs={"stop_s": time.monotonic() + 60})
        for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    wait_until(lambda: len([t for t in threading.enumerate() if t.name.startswith("test-errand")]) == 3, what="3 run")
    with pytest.raises(BucketLateError):
        errands.call(ran.set, stop_s=time.monotonic() + 0.01)
    goes_on.set()
    for caller in callers:
        caller.join()
    wait_until(lambda: errands.num_abandoned == 0, what="the queue is empty")
    assert not ran.is_set()
    assert errands.close(wait_s=10) == 0


def test_errors_of_errands_reach_the_caller() -> None:
    errands = Errands("test-errand", max_threads=2)
    with pytest.raises(ZeroDivisionError):
        errands.call(lambda: 1 // 0, stop_s=time.monotonic() + 10)
    assert errands.close(wait_s=10) == 0


def test_errand_for_which_there_is_no_thread_fails_and_the_end_still_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    errands = Errands("test-errand", max_threads=2)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(BucketError, match="can't start new thread"):
            errands.call(lambda: 7, stop_s=time.monotonic() + 10)
    assert errands.call(lambda: 7, stop_s=time.monotonic() + 10) == 7
    assert errands.close(wait_s=10) == 0
