"""Counts of what the connector did, taken by engine step.

Covers: a thread-safe tally that threads add to and the engine drains. Imports neither torch nor vLLM.
Does not cover: their way into Prometheus (`kvstore.engine.stats`).
"""

import threading
from typing import Any, Final, Literal

LoadFailure = Literal["missing", "deadline", "slow", "mismatch", "profile", "store_error", "scatter_error"]
"""Why tokens of a load are computed after all.

missing: the store does not hold a chunk. deadline: chunks came too late. slow: computing is faster than waiting for
them. mismatch: a chunk's metadata or bytes do not fit this engine. profile: nobody has the profile that a chunk needs.
store_error: the store client failed. scatter_error: writing into the engine's blocks failed.
"""
JoinFailure = Literal["refused", "error"]
"""Why a joined request is computed after all. refused: this engine's model cannot be joined. error: a bug, see the log.
"""
SaveOutcome = Literal["stored", "held", "staging_full", "refused", "error"]
"""What became of a save.

stored: committed. held: it was loaded for this very request. staging_full: more waits than may be staged.
refused: the store holds it, somebody writes it, or there is no room. error: the store or the codec failed.
"""
Series = Literal["read_s", "decode_s", "scatter_s", "load_s", "save_s", "encode_s", "prefill_s", "join_s"]
MAX_OBSERVATIONS: Final = 256
"""Per series and drain; more are counted in the sums only."""


class Tally:
    """Numbers since the last drain.

    Example:
        >>> tally = Tally()
        >>> tally.add("loaded_tokens", 300)
        >>> tally.observe("read_s", 0.5)
        >>> tally.drain()
        {'counts': {'loaded_tokens': 300}, 'seconds': {'read_s': [0.5]}}
        >>> tally.drain()
        {}
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._seconds: dict[str, list[float]] = {}

    def add(self, name: str, amount: int = 1) -> None:
        """Count `amount` more of `name`."""
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + amount

    def load_failed(self, reason: LoadFailure, *, num_tokens: int) -> None:
        """A load ended early; `num_tokens` are computed instead."""
        self.add(f"load_failures.{reason}")
        self.add("load_failed_tokens", num_tokens)

    def join_failed(self, reason: JoinFailure) -> None:
        """A join ended early; the request is computed instead."""
        self.add(f"join_failures.{reason}")

    def save_ended(self, outcome: SaveOutcome) -> None:
        """A save ended."""
        self.add(f"saves.{outcome}")

    def observe(self, series: Series, seconds: float) -> None:
        """One duration."""
        with self._lock:
            values = self._seconds.setdefault(series, [])
            if len(values) < MAX_OBSERVATIONS:
                values.append(seconds)

    def drain(self) -> dict[str, Any]:
        """Everything since the last call, as plain data; empty if nothing happened."""
        with self._lock:
            if not self._counts and not self._seconds:
                return {}
            taken = {"counts": self._counts, "seconds": self._seconds}
            self._counts, self._seconds = {}, {}
            return taken
