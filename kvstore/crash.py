"""Named places at which a store can be made to die, so that tests can kill it in the middle of every step.

Covers: the names, arming one of them, the hook that production code calls. Does not cover: other ways to die
(`StoreProcess.kill`), other processes than the one that is armed.

Only `kvstore.testing.process` arms points, in store processes that it starts: no setting and no environment
variable reaches it. A hook that is not armed compares one global with None.
"""

import itertools
import os
import signal
from collections.abc import Mapping
from typing import Final

from cluster.errors import CallerError

CRASH_POINTS: Final[Mapping[str, str]] = {
    "reserved": "room is reserved for a writer, and the writer has not been told",
    "header_written": "the writer says that header and payload are in the arena; nothing is readable yet",
    "committed_before_announce": "the chunk is readable, no event has said so",
    "announced_before_reply": "the event is out, the writer waits for its answer",
    "write_behind_opened": "the temporary file exists, without a byte",
    "write_behind_half": "half of the record is in the temporary file",
    "write_behind_before_rename": "the temporary file is whole",
    "after_rename": "the file has its final name, no index knows it",
    "write_behind_stored": "the tier has the record, the directory has not been told",
    "promotion_opened": "room in the arena is reserved for a chunk of a lower tier, nothing is read yet",
    "promotion_half": "half of the record is in the arena",
    "promotion_before_commit": "the record is in the arena, and not readable",
    "promoted": "the record is readable in the arena, readers that wait have not been told",
    "dropped_before_unlink": "the chunk is forgotten in memory, its file is still there",
    "evicted_before_unlink": "a file has left the index for room, and is still there",
}
"""Every point, and what is true of the chunk there."""

_armed: str | None = None
_hits = itertools.count(1)
_fatal_hit = 1


class UnknownCrashPointError(CallerError):
    """A name that no code announces."""


def arm(name: str, *, hit: int = 1) -> None:
    """Die by SIGKILL when `name` is reached for the `hit`-th time in this process.

    Raises:
        UnknownCrashPointError: Not one of `CRASH_POINTS`.
    """
    global _armed, _hits, _fatal_hit
    if name not in CRASH_POINTS:
        raise UnknownCrashPointError(f"unknown crash point {name!r}; there are {', '.join(CRASH_POINTS)}")
    _armed, _hits, _fatal_hit = name, itertools.count(1), hit


def is_armed(name: str) -> bool:
    """Whether `name` is the armed point: for code that must split a step in two to have a middle."""
    return _armed == name


def crash_point(name: str) -> None:
    """Here a test may kill the process. Any thread; costs one comparison."""
    if _armed is not None and _armed == name and next(_hits) == _fatal_hit:
        os.kill(os.getpid(), signal.SIGKILL)
