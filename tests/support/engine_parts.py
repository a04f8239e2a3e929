"""What unit tests of the engine's loader and saver share.

Covers: KV that has left the engine, waiting for a loader.
Does not cover: blocks (each test has its own), real engines (`support.engine_harness`).
"""

from collections.abc import Callable

import torch

from kvstore.testing.poll import wait_until


class Host:
    """KV that is already out of the engine."""

    def __init__(self, kv: torch.Tensor) -> None:
        self._kv = kv
        self.num_bytes = kv.numel() * kv.element_size()

    def kv(self) -> torch.Tensor:
        """As it was given."""
        return self._kv


def until(condition: Callable[[], bool]) -> None:
    """Wait for a loader's or saver's threads."""
    wait_until(condition, what="threads of the loader or saver")
