"""Parts of a load that is being read: one chunk's layers as they arrive, what is given back.

Covers: decoding on threads with falling back to coarser levels.
Does not cover: which chunks and how long (`kvstore.engine.reading`), bytes (`kvstore.codecs`).
"""

import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import NamedTuple, Protocol, cast

import torch

from cluster.errors import DataError
from kvstore.engine.coding import OpenChunk
from kvstore.engine.tally import LoadFailure
from kvstore.interfaces import StreamLease

logger = logging.getLogger(__name__)


class Held(Protocol):
    """Whatever keeps a piece's memory: a lease, or staged memory."""

    def release(self) -> None:
        """Give it back."""
        ...


class NotLoadedError(DataError):
    """A chunk that is not loaded, for one of the reasons that are counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = cast(LoadFailure, reason)


class DecodedLayer(NamedTuple):
    """What a decoding thread did with one layer."""

    level: int
    thread_s: float
    damaged: int
    """Finer levels that were there and did not match their checksums."""


class Waiting(Protocol):
    """What decoding needs of the load that it belongs to."""

    def wait_part(self, stream: StreamLease, num_bytes: int) -> None:
        """Wait for the first bytes of a chunk; raises `NotLoadedError` if they do not come in time."""
        ...

    def submit(self, work: Callable[[], DecodedLayer]) -> "Future[DecodedLayer]":
        """Run on a decoding thread."""
        ...

    def note_layers(self, output_bytes: int, thread_s: float, *, damaged: int) -> None:
        """Layers of one chunk were decoded."""
        ...


class LayeredDecode:
    """Decodes one chunk's layers as they arrive."""

    def __init__(
        self,
        reading: Waiting,
        stream: StreamLease,
        chunk: OpenChunk,
        kv_L2TNH: torch.Tensor,
        *,
        level: int,
        may_wait: Callable[[], None],
    ) -> None:
        self._reading = reading
        self._stream = stream
        self._chunk = chunk
        self._kv = kv_L2TNH
        self._level = level
        self._may_wait = may_wait

    def run(self) -> int:
        """Decode all layers; the coarsest level that any of them has.

        Raises:
            NotLoadedError: A layer is not there at any level.
        """
        futures: list[Future[DecodedLayer]] = []
        late: NotLoadedError | None = None
        try:
            for layer in range(self._kv.shape[0]):
                needed = self._chunk.stop_bytes(level=self._level, layer=layer)
                arrived = self._stream.wait_bytes(len(self._stream.payload), deadline_s=0.0)
                if late is None and arrived < min(needed, len(self._stream.payload)):
                    try:
                        self._may_wait()
                        self._reading.wait_part(self._stream, needed)
                    except NotLoadedError as error:
                        late = error
                    arrived = self._stream.wait_bytes(len(self._stream.payload), deadline_s=0.0)
                futures.append(self._reading.submit(functools.partial(self._decode, layer, arrived)))
        finally:
            # Nobody may write to the memory once it is given back.
            wait(futures)
        try:
            layers = [future.result() for future in futures]
        except DataError as error:
            raise late or NotLoadedError("mismatch") from error
        self._reading.note_layers(
            self._kv.numel() * self._kv.element_size(),
            sum(layer.thread_s for layer in layers),
            damaged=sum(layer.damaged for layer in layers),
        )
        return min(layer.level for layer in layers)

    def _decode(self, layer: int, arrived_bytes: int) -> DecodedLayer:
        """On a decoding thread: the finest level up to the wanted one that is there and sound."""
        began_s = time.thread_time()
        damaged = 0
        failure: DataError = NotLoadedError("missing")
        for level in range(self._level, -1, -1):
            if self._chunk.stop_bytes(level=level, layer=layer) > arrived_bytes:
                continue
            try:
                self._chunk.decode(layer, level=level, out_2TNH=self._kv[layer])
            except DataError as error:
                logger.warning("event=chunk_damaged layer=%d level=%d reason=%r", layer, level, str(error))
                damaged += 1
                failure = error
                continue
            return DecodedLayer(level, time.thread_time() - began_s, damaged)
        raise failure


def release(held: Held) -> None:
    """Give something back, whatever its owner says."""
    try:
        held.release()
    except Exception:
        logger.exception("event=lease_release_failed")
