"""Loads under way: store reads on threads, then scattering on the engine's own thread, a bounded piece per step.

Covers: reading leases within a deadline, cutting at the first missing chunk, scattering, what to tell the engine.
Does not cover: when a load starts (`kvstore.engine.scheduler_side`), how KV gets into blocks (`kvstore.engine.paging`).

One load is in exactly one of three places: with a reader thread, staged (leases held), or gone. Reader threads never
touch the engine's blocks, so a load can be dropped at any time: leases that arrive for a dropped load are released.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import torch

from cluster.errors import DataError
from kvstore.codecs import codec_by_name
from kvstore.engine.ops import LoadOp
from kvstore.engine.params import ChunkSpan
from kvstore.engine.tally import LoadFailure, Tally
from kvstore.interfaces import ChunkMeta, ReadLease, StoreClient
from kvstore.keys import ChunkKey

logger = logging.getLogger(__name__)

_LATE_READ_S: Final = 0.5
"""How long a read may outlive its deadline before the engine stops waiting for the thread."""


class Blocks(Protocol):
    """The engine's KV blocks, as loads see them."""

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        ...

    def accepts(self, meta: ChunkMeta) -> bool:
        """Whether a chunk has this engine's layers, heads, head dimension and dtype."""
        ...

    def slots(self, block_ids: Sequence[int], *, start: int, stop: int) -> torch.Tensor:
        """Where tokens `[start, stop)` of a request live."""
        ...

    def scatter(self, kv_L2TNH: torch.Tensor, *, slots: torch.Tensor) -> None:
        """Write all layers' KV of some tokens."""
        ...


class _Piece(NamedTuple):
    """One leased chunk and the tokens of the request that it fills."""

    lease: ReadLease
    kv_L2TNH: torch.Tensor
    start: int
    """Position in the prompt of the first row of `kv_L2TNH`."""


@dataclass(slots=True, eq=False)
class _Load:
    """One load and how far it is."""

    op: LoadOp
    stop_s: float
    """Monotonic time of its deadline."""
    began_s: float
    pieces: deque[_Piece] = field(default_factory=deque)
    position: int = 0
    """Tokens `[op.start, position)` are in the engine's blocks."""
    failure: LoadFailure | None = None
    dropped: bool = False


class LoadResult(NamedTuple):
    """What one engine step has to report."""

    finished: set[str]
    """Requests whose load is over, well or badly."""
    bad_blocks: set[int]
    """Blocks of those requests without valid KV."""


class Loader:
    """Loads of one engine worker.

    Guarantees:
        Every load that is submitted and not dropped is reported once: half a second after its deadline at the latest if
        it is not read by then, otherwise when it is scattered.
        Bad blocks are reported together with the request, and only from the first missing token on.
        When `num_open` is 0, no lease is held.

    Args:
        store: Gives the store client; asked on reader threads only.
        blocks: The engine's blocks.
        tally: Where everything is counted.
        num_threads: Reads at the same time.
        step_bytes: KV bytes scattered in a step that also computes tokens; without computation eight times that.
        now_s: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        store: Callable[[], StoreClient],
        blocks: Blocks,
        tally: Tally,
        num_threads: int,
        step_bytes: int,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._blocks = blocks
        self._tally = tally
        self._step_bytes = step_bytes
        self._now_s = now_s
        self._lock = threading.Lock()
        self._open: dict[str, _Load] = {}
        self._staged: deque[_Load] = deque()
        self._placed_keys: dict[str, set[ChunkKey]] = {}
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="learnonce-load")

    @property
    def num_open(self) -> int:
        """Loads that are neither reported nor dropped."""
        with self._lock:
            return len(self._open)

    def submit(self, op: LoadOp) -> None:
        """Start a load."""
        now_s = self._now_s()
        load = _Load(op, stop_s=now_s + op.deadline_s, began_s=now_s, position=op.start)
        with self._lock:
            self._open[op.request_id] = load
        self._threads.submit(self._read, load)

    def drop(self, request_id: str) -> bool:
        """Forget a request that ended. Whether its load was open: the engine then waits to hear that it is over."""
        self._placed_keys.pop(request_id, None)
        with self._lock:
            load = self._open.pop(request_id, None)
            if load is None:
                return False
            load.dropped = True
            self._release(load)
        self._tally.add("loads_dropped")
        return True

    def was_loaded(self, request_id: str, key: ChunkKey) -> bool:
        """Whether this chunk was loaded, whole or in part, for this request."""
        return key in self._placed_keys.get(request_id, ())

    def advance(self, *, busy: bool) -> LoadResult:
        """Scatter staged KV within the step's bound, and report what is over. Call on the engine's thread."""
        result = LoadResult(set(), set())
        budget_bytes = self._step_bytes * (1 if busy else 8)
        while budget_bytes > 0 and (load := self._next_staged()) is not None:
            budget_bytes -= self._place(load, budget_bytes)
            if not load.pieces:
                self._report(load, result)
        for load in self._overdue():
            self._report(load, result)
        return result

    def close(self) -> None:
        """Drop every load and stop the threads; waits at most for reads under way, which their deadlines bound."""
        for request_id in list(self._open):
            self.drop(request_id)
        self._threads.shutdown(wait=True, cancel_futures=True)

    # Reader threads.

    def _read(self, load: _Load) -> None:
        began_s = self._now_s()
        leases: Sequence[ReadLease | None] = ()
        try:
            left_s = load.stop_s - began_s
            if left_s > 0 and not load.dropped:
                leases = self._store().read([span.key for span in load.op.spans], deadline_s=left_s)
            pieces, failure = self._check(load, leases)
        except Exception:
            # A store client that breaks its promise must not cost more than the recomputation.
            logger.exception("event=load_read_failed request_id=%s", load.op.request_id)
            pieces, failure = [], "store_error"
        kept = {id(piece.lease) for piece in pieces}
        _release_all([lease for lease in leases if lease is not None and id(lease) not in kept])
        self._tally.observe("read_s", self._now_s() - began_s)
        with self._lock:
            load.pieces.extend(pieces)
            load.failure = failure
            if load.dropped:
                self._release(load)
            else:
                self._staged.append(load)

    def _check(self, load: _Load, leases: Sequence[ReadLease | None]) -> tuple[list[_Piece], LoadFailure | None]:
        pieces: list[_Piece] = []
        for span, lease in zip(load.op.spans, leases, strict=False):
            if lease is None:
                return pieces, "deadline" if self._now_s() >= load.stop_s else "missing"
            try:
                pieces.append(self._piece(load.op, span, lease))
            except DataError as error:
                logger.warning("event=chunk_mismatch request_id=%s reason=%r", load.op.request_id, str(error))
                return pieces, "mismatch"
        return pieces, None if len(pieces) == len(load.op.spans) else "deadline"

    def _piece(self, op: LoadOp, span: ChunkSpan, lease: ReadLease) -> _Piece:
        meta = lease.meta
        if meta.num_tokens != span.stop - span.start or meta.base_position != span.start:
            raise DataError(
                f"chunk of {meta.num_tokens} tokens at {meta.base_position} is not span [{span.start}, {span.stop})"
            )
        if not self._blocks.accepts(meta):
            raise DataError(f"chunk {meta.shape} of {meta.dtype} does not fit this engine")
        kv = codec_by_name(meta.codec).decode(lease.payload, meta=meta)
        first, last = max(op.start, span.start), min(op.stop, span.stop)
        return _Piece(lease, kv[:, :, first - span.start : last - span.start], first)

    # The engine's thread.

    def _next_staged(self) -> _Load | None:
        with self._lock:
            while self._staged:
                if not self._staged[0].dropped:
                    return self._staged[0]
                self._staged.popleft()
            return None

    def _place(self, load: _Load, budget_bytes: int) -> int:
        """Scatter what fits of the first piece; bytes scattered, at least 1 so that the caller's loop ends."""
        if not load.pieces:
            return 1
        piece = load.pieces[0]
        kv = piece.kv_L2TNH
        done = load.position - piece.start
        token_bytes = kv.element_size() * kv.shape[0] * 2 * kv.shape[3] * kv.shape[4]
        num_tokens = min(kv.shape[2] - done, max(1, budget_bytes // token_bytes))
        began_s = self._now_s()
        try:
            stop = load.position + num_tokens
            slots = self._blocks.slots(load.op.block_ids, start=load.position, stop=stop)
            self._blocks.scatter(kv[:, :, done : done + num_tokens], slots=slots)
        except Exception:
            logger.exception("event=scatter_failed request_id=%s", load.op.request_id)
            load.failure = "scatter_error"
            self._release(load)
            return 1
        load.position += num_tokens
        self._placed_keys.setdefault(load.op.request_id, set()).add(piece.lease.key)
        self._tally.observe("scatter_s", self._now_s() - began_s)
        self._tally.add("loaded_tokens", num_tokens)
        self._tally.add("loaded_bytes", num_tokens * token_bytes)
        if done + num_tokens == kv.shape[2]:
            load.pieces.popleft()
            _release_all([piece.lease])
        return num_tokens * token_bytes

    def _overdue(self) -> list[_Load]:
        limit_s = self._now_s() - _LATE_READ_S
        with self._lock:
            staged = {id(load) for load in self._staged}
            late = [load for load in self._open.values() if load.stop_s < limit_s and id(load) not in staged]
            for load in late:
                load.dropped = True
                load.failure = "deadline"
            return late

    def _report(self, load: _Load, result: LoadResult) -> None:
        op = load.op
        with self._lock:
            self._open.pop(op.request_id, None)
            if self._staged and self._staged[0] is load:
                self._staged.popleft()
        result.finished.add(op.request_id)
        self._tally.observe("load_s", self._now_s() - load.began_s)
        if load.position >= op.stop:
            self._tally.add("loads_complete")
            return
        result.bad_blocks.update(op.block_ids[load.position // self._blocks.block_size :])
        self._tally.load_failed(load.failure or "missing", num_tokens=op.stop - load.position)

    def _release(self, load: _Load) -> None:
        _release_all([piece.lease for piece in load.pieces])
        load.pieces.clear()


def _release_all(leases: Sequence[ReadLease]) -> None:
    for lease in leases:
        try:
            lease.release()
        except Exception:
            logger.exception("event=lease_release_failed")
