"""Saves under way: KV gathered on the engine's thread, encoded and committed on others.

Covers: the bound on staged bytes, reserve, encode and commit, what becomes of each save.
Does not cover: when a span is complete (`kvstore.engine.scheduler_side`), reading blocks (`kvstore.engine.paging`), in
which form a chunk is stored (`kvstore.engine.coding`).

A save is best effort: whatever goes wrong costs a later request a miss, and is counted.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import msgspec

from kvstore.engine.coding import Coding, Form
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
        coding: In which form chunks are stored.
        tally: Where everything is counted.
        staging_bytes: Bound on KV that waits to be written.
        deadline_s: Seconds that the store may take to give room.
        num_threads: Encodings and writes at the same time.
        initializer: Run first on every thread.
    """

    def __init__(
        self,
        *,
        store: Callable[[], StoreClient],
        blocks: ReadableBlocks,
        coding: Coding,
        tally: Tally,
        staging_bytes: int,
        deadline_s: float,
        num_threads: int = 1,
        initializer: Callable[[], None] | None = None,
    ) -> None:
        self._store = store
        self._blocks = blocks
        self._coding = coding
        self._tally = tally
        self._staging_bytes = staging_bytes
        self._deadline_s = deadline_s
        self._changed = threading.Condition()
        self._staged_bytes = 0
        self._closed = False
        self._threads = ThreadPoolExecutor(num_threads, "learnonce-save", initializer)

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
            self._threads.submit(self._write, op, meta, gathered, need_bytes)
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

    def _write(self, op: SaveOp, meta: ChunkMeta, gathered: Gathered, staged_bytes: int) -> None:
        began_s = time.monotonic()
        outcome: SaveOutcome = "error"
        try:
            form = self._coding.form_of(meta, handoff=op.handoff)
            # Before the chunk can be read: who misses the profile does not ask for it again for a while.
            self._coding.publish(form)
            outcome = self._reserve_and_commit(op.span.key, form, gathered)
        except Exception:
            logger.exception("event=save_failed key=%s", op.span.key.hex()[:12])
        finally:
            self._tally.save_ended(outcome)
            self._tally.observe("save_s", time.monotonic() - began_s)
            del gathered
            self._unstage(staged_bytes)

    def _reserve_and_commit(self, key: ChunkKey, form: Form, gathered: Gathered) -> SaveOutcome:
        lease = self._store().reserve(key, form.meta, self._coding.encoded_bytes(form), deadline_s=self._deadline_s)
        if lease is None:
            return "refused"
        try:
            kv = gathered.kv()
            began_s = time.monotonic()
            num_bytes = self._coding.encode(form, kv, out=lease.payload)
            self._tally.observe("encode_s", time.monotonic() - began_s)
            # A codec that compresses needs less than it asked room for.
            if not lease.commit(num_bytes if num_bytes < len(lease.payload) else None):
                return "refused"
        except BaseException:
            lease.abort()
            raise
        self._tally.add("saved_tokens", form.meta.num_tokens)
        self._tally.add("saved_bytes", num_bytes)
        self._tally.add("saved_kv_bytes", kv.numel() * kv.element_size())
        self._tally.add(f"saved_chunks.{form.meta.codec}")
        return "stored"

    def _unstage(self, num_bytes: int) -> None:
        with self._changed:
            self._staged_bytes -= num_bytes
            self._changed.notify_all()
