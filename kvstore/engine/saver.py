"""Saves under way: KV gathered on the engine's thread, encoded and committed on others.

Covers: the bound on staged bytes, reserve, encode and commit, what becomes of each save.
Does not cover: when a span is complete (`kvstore.engine.scheduler_side`), reading blocks (`kvstore.engine.paging`).

A save is best effort: whatever goes wrong costs a later request a miss, and is counted.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import msgspec

from kvstore.codecs import codec_by_name
from kvstore.engine.ops import SaveOp
from kvstore.engine.paging import Gathered
from kvstore.engine.tally import SaveOutcome, Tally
from kvstore.interfaces import ChunkMeta, StoreClient
from kvstore.keys import ChunkKey

logger = logging.getLogger(__name__)


class ReadableBlocks(Protocol):
    """The engine's KV blocks, as saves see them."""

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        ...

    @property
    def bytes_per_block(self) -> int:
        """KV bytes of one block over all layers."""
        ...

    def meta(self, *, num_tokens: int, base_position: int) -> ChunkMeta:
        """How a chunk of this engine is described."""
        ...

    def gather(self, block_ids: Sequence[int], *, first: int, num_tokens: int) -> Gathered:
        """Copy KV out of the blocks."""
        ...


class Saver:
    """Saves of one engine worker.

    Guarantees:
        Staged bytes never exceed the bound; a save beyond it is dropped and counted.
        When `save` returns, the engine may reuse the blocks.
        A chunk becomes readable whole or not at all.

    Args:
        store: Gives the store client; asked on saver threads only.
        blocks: The engine's blocks.
        tally: Where everything is counted.
        staging_bytes: Bound on KV that waits to be written.
        deadline_s: Seconds that the store may take to give room.
        num_threads: Writes at the same time.
    """

    def __init__(
        self,
        *,
        store: Callable[[], StoreClient],
        blocks: ReadableBlocks,
        tally: Tally,
        staging_bytes: int,
        deadline_s: float,
        num_threads: int = 1,
    ) -> None:
        self._store = store
        self._blocks = blocks
        self._tally = tally
        self._staging_bytes = staging_bytes
        self._deadline_s = deadline_s
        self._changed = threading.Condition()
        self._staged_bytes = 0
        self._closed = False
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="learnonce-save")

    @property
    def staged_bytes(self) -> int:
        """Bytes waiting to be written; 0 when every save has ended."""
        with self._changed:
            return self._staged_bytes

    def save(self, op: SaveOp) -> None:
        """Take one chunk out of the engine. Call on the engine's thread, after the step that completed it."""
        # Pages as they are, and once more in canonical order.
        need_bytes = 2 * len(op.block_ids) * self._blocks.bytes_per_block
        with self._changed:
            if self._closed or self._staged_bytes + need_bytes > self._staging_bytes:
                self._tally.save_ended("staging_full")
                return
            self._staged_bytes += need_bytes
        try:
            num_tokens = op.span.stop - op.span.start
            first = op.span.start % self._blocks.block_size
            gathered = self._blocks.gather(op.block_ids, first=first, num_tokens=num_tokens)
            meta = msgspec.structs.replace(
                self._blocks.meta(num_tokens=num_tokens, base_position=op.span.start),
                tenant=op.tenant,
                learned_unix_s=time.time(),
            )
            self._threads.submit(self._write, op.span.key, meta, gathered, need_bytes)
        except Exception:
            logger.exception("event=gather_failed request_id=%s", op.request_id)
            self._tally.save_ended("error")
            self._unstage(need_bytes)

    def flush(self, *, deadline_s: float) -> bool:
        """Wait until nothing is staged; whether that came true in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._staged_bytes == 0, timeout=deadline_s)

    def close(self, *, deadline_s: float = 5.0) -> None:
        """Finish what is staged within the deadline, drop the rest, stop the threads."""
        with self._changed:
            self._closed = True
        self.flush(deadline_s=deadline_s)
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _write(self, key: ChunkKey, meta: ChunkMeta, gathered: Gathered, staged_bytes: int) -> None:
        began_s = time.monotonic()
        outcome: SaveOutcome = "error"
        try:
            outcome = self._reserve_and_commit(key, meta, gathered)
        except Exception:
            logger.exception("event=save_failed key=%s", key.hex()[:12])
        finally:
            self._tally.save_ended(outcome)
            self._tally.observe("save_s", time.monotonic() - began_s)
            del gathered
            self._unstage(staged_bytes)

    def _reserve_and_commit(self, key: ChunkKey, meta: ChunkMeta, gathered: Gathered) -> SaveOutcome:
        codec = codec_by_name(meta.codec)
        lease = self._store().reserve(key, meta, codec.encoded_bytes(meta), deadline_s=self._deadline_s)
        if lease is None:
            return "refused"
        try:
            num_bytes = codec.encode(gathered.kv(), out=lease.payload)
            # A codec that compresses needs less than it asked room for.
            if not lease.commit(num_bytes if num_bytes < len(lease.payload) else None):
                return "refused"
        except BaseException:
            lease.abort()
            raise
        self._tally.add("saved_tokens", meta.num_tokens)
        self._tally.add("saved_bytes", num_bytes)
        return "stored"

    def _unstage(self, num_bytes: int) -> None:
        with self._changed:
            self._staged_bytes -= num_bytes
            self._changed.notify_all()
