"""How long the engine's steps take, for the speed of prefill.

Covers: engines whose work is over when their calls return, and CUDA, where work is timed by events in the stream.
Does not cover: what is made of it (`kvstore.engine.speeds`), other devices: there nothing is computed again by choice.

Nothing waits for a device: events are read once they have passed, at the end of some later step.
"""

import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol, Self, cast

import torch

from kvstore.engine.speeds import MIN_PREFILL_TOKENS

_MAX_OPEN: Final = 16
"""Steps whose end has not been seen; further ones are not timed."""


class Mark(Protocol):
    """A place in the engine's work, as `torch.cuda.Event` is."""

    def record(self) -> None:
        """The place is here, behind all work that was given out so far."""
        ...

    def query(self) -> bool:
        """Whether the work before it is over."""
        ...

    def elapsed_time(self, end: Self) -> float:
        """Milliseconds from here to `end`, both being over."""
        ...


class TimedStep(NamedTuple):
    """One step that is over."""

    num_tokens: int
    seconds: float


class _OpenStep(NamedTuple):
    num_tokens: int
    began: Mark
    ended: Mark


class StepClock:
    """Times steps that prefill. For the engine's own thread.

    Args:
        make_mark: Makes a mark, see `marks_of`; None: nothing is timed.
    """

    def __init__(self, make_mark: Callable[[], Mark] | None) -> None:
        self._make_mark = make_mark
        self._begun: tuple[int, Mark] | None = None
        self._open: deque[_OpenStep] = deque()

    def begin(self, num_tokens: int) -> None:
        """A step of so many tokens begins."""
        self._begun = None
        if self._make_mark is not None and num_tokens >= MIN_PREFILL_TOKENS and len(self._open) < _MAX_OPEN:
            self._begun = num_tokens, self._mark(self._make_mark)

    def end(self) -> list[TimedStep]:
        """The step ends, as far as giving out its work goes; steps of which the work itself is over by now."""
        if self._begun is not None and self._make_mark is not None:
            num_tokens, began = self._begun
            self._begun = None
            self._open.append(_OpenStep(num_tokens, began, self._mark(self._make_mark)))
        over: list[TimedStep] = []
        while self._open and self._open[0].ended.query():
            step = self._open.popleft()
            over.append(TimedStep(step.num_tokens, step.began.elapsed_time(step.ended) / 1e3))
        return over

    @staticmethod
    def _mark(make: Callable[[], Mark]) -> Mark:
        mark = make()
        mark.record()
        return mark


def marks_of(device: torch.device) -> Callable[[], Mark] | None:
    """How work on a device is timed; None where this module does not know."""
    if device.type == "cpu":
        return _HostMark
    if device.type == "cuda":
        return cast("Callable[[], Mark]", functools.partial(torch.cuda.Event, enable_timing=True))
    return None


class _HostMark:
    """For work that is over when its call returns."""

    def __init__(self) -> None:
        self._at_s = 0.0

    def record(self) -> None:
        self._at_s = time.monotonic()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_HostMark") -> float:
        return 1e3 * (end._at_s - self._at_s)
