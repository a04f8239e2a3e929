"""`learnonce bench store`: one module per part of the store, each beside the floor that physics or the system sets.

Covers: what every part returns. Does not cover: the measuring (the modules), the command line (`loadtest.cli`).
"""

from dataclasses import dataclass, field
from typing import Any, Final

STORE_PARTS: Final = ("shm", "index", "tcp", "shaped", "nvme", "objects", "nixl")
"""Modules of this package, in the order in which they run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Figures of one part."""

    figures: dict[str, float]
    """Flat, by the names of the result file."""
    detail: dict[str, Any] = field(default_factory=dict)
    """Floors, samples, sizes, what was skipped and why."""
