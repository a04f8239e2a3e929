"""When a device may be asked: after errors, slow answers, and while it does not answer."""

import pytest

from cluster.clock import ManualClock
from kvstore.tiers.gate import Gate


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def gate(clock: ManualClock) -> Gate:
    return Gate(failures=2, pause_s=5.0, slow_s=1.0, clock=clock)


def ask(gate: Gate, clock: ManualClock, *, seconds: float) -> None:
    with gate.watch():
        clock.advance_s(seconds)


def fail(gate: Gate) -> None:
    with gate.watch():
        raise OSError


def test_errors_in_a_row_pause(gate: Gate, clock: ManualClock) -> None:
    gate.note_error()
    assert gate.allows()
    gate.note_error()
    assert not gate.allows()
    clock.advance_s(5.0)
    assert gate.allows()


def test_success_between_errors_starts_anew(gate: Gate, clock: ManualClock) -> None:
    for _ in range(5):
        gate.note_error()
        ask(gate, clock, seconds=0.5)
    assert gate.allows()


def test_error_inside_is_no_success(gate: Gate) -> None:
    """The caller says what it was: a damaged record is not the device's error, and no good sign either."""
    gate.note_error()
    with pytest.raises(OSError):
        fail(gate)
    gate.note_error()
    assert not gate.allows()


def test_slow_answers_are_errors(gate: Gate, clock: ManualClock) -> None:
    ask(gate, clock, seconds=1.5)
    assert gate.allows()
    ask(gate, clock, seconds=1.5)
    assert not gate.allows()


def test_nothing_passes_while_an_old_operation_is_under_way(gate: Gate, clock: ManualClock) -> None:
    with gate.watch():
        clock.advance_s(0.9)
        with gate.watch():
            assert gate.allows()
            clock.advance_s(0.9)
            assert not gate.allows(), "the first has not come back"
    assert gate.allows(), "one slow answer is not yet a pause"
