"""Loads under way: read and decoded on threads, written on the engine's own thread, a bounded piece per step.

Covers: threads, deadlines, scattering, what to tell the engine.
Does not cover: when a load starts (`kvstore.engine.scheduler_side`), how a chunk is read and decoded
(`kvstore.engine.reading`), how KV gets into blocks (`kvstore.engine.paging`).

Of a joined load a chunk that cannot be had is a hole: the rest is loaded, and the load ends as placed, for
`kvstore.engine.join.run` to go on with it.

A load hands over piece after piece, in order, while its reader is at the next: pieces are written into the engine's
blocks as they come. Reader threads never touch the blocks, so a load can be dropped at any time: pieces that arrive for
a dropped load are released.
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

from kvstore.engine.coding import Coding
from kvstore.engine.layers import NotLoadedError, release
from kvstore.engine.ops import LoadOp, PlacedLoad
from kvstore.engine.probing import LinkProbe
from kvstore.engine.reading import ChunkReading, Mover, Piece, Reader
from kvstore.engine.speeds import SpeedMeter
from kvstore.engine.staging import Staging
from kvstore.engine.tally import LoadFailure, Tally
from kvstore.interfaces import ChunkMeta, StoreClient
from kvstore.keys import ChunkKey

logger = logging.getLogger(__name__)

_LATE_READ_S: Final = 0.5
"""How long a read may outlive its deadline before the engine stops waiting for the thread."""
_HOLES: Final = ("missing", "mismatch", "profile")
"""Failures of one chunk that say nothing about the next one."""


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


@dataclass(slots=True, eq=False)
class _Load:
    """One load and how far it is."""

    op: LoadOp
    stop_s: float
    """Monotonic time of its deadline."""
    began_s: float
    queue_s: float = 0.0
    pieces: deque[Piece] = field(default_factory=deque)
    position: int = 0
    """Tokens `[op.start, position)` are in the engine's blocks, but for the holes of a joined load."""
    ranges: list[tuple[int, int, bool]] = field(default_factory=list)
    """Pieces of a joined load that are in the engine's blocks: first token, token behind the last, whether exact."""
    is_read: bool = False
    """No further piece comes."""
    failure: LoadFailure | None = None
    dropped: bool = False


class LoadResult(NamedTuple):
    """What one engine step has to report."""

    finished: set[str]
    """Requests whose load is over, well or badly."""
    bad_blocks: set[int]
    """Blocks of those requests without valid KV."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadLimits:
    """Bounds of a loader."""

    num_threads: int
    """Loads that are read at the same time."""
    num_decoders: int
    """Threads that decode, of all loads together."""
    step_bytes: int
    """KV bytes scattered in a step that also computes tokens; without computation eight times that."""
    staging_bytes: int
    """Decoded KV that waits to be scattered."""
    initializer: Callable[[], None] | None = None
    """Run first on every thread."""


class Loader:
    """Loads of one engine worker.

    Guarantees:
        Every load that is submitted and not dropped is reported once, joined ones by `take_placed` unless there is
        nothing to join: half a second after its deadline at the latest if
        it is not read by then, otherwise when it is scattered.
        Bad blocks are reported together with the request, and only from the first missing token on.
        When `num_open` is 0 and no thread reads, no lease and no staged memory is held.

    Args:
        store: Gives the store client; asked on reader threads only.
        blocks: The engine's blocks.
        coding: Which codec reads a chunk.
        tally: Where everything is counted.
        limits: Threads and bytes.
        meter: Speeds, measured here and used for decisions.
        may_recompute: Whether loads are given up that are slower than computing.
        move: Turns keys of joined chunks; called on the loader's threads.
        now_s: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        store: Callable[[], StoreClient],
        blocks: Blocks,
        coding: Coding,
        tally: Tally,
        limits: LoadLimits,
        meter: SpeedMeter,
        may_recompute: bool = True,
        move: Mover | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._blocks = blocks
        self._tally = tally
        self._step_bytes = limits.step_bytes
        self._now_s = now_s
        self._lock = threading.Lock()
        self._open: dict[str, _Load] = {}
        self._staged: deque[_Load] = deque()
        self._placed_keys: dict[str, set[ChunkKey]] = {}
        self._placed: list[PlacedLoad] = []
        self._threads = ThreadPoolExecutor(limits.num_threads, "learnonce-load", limits.initializer)
        self._decoders = ThreadPoolExecutor(limits.num_decoders, "learnonce-decode", limits.initializer)
        self._reader = Reader(
            store=store,
            coding=coding,
            tally=tally,
            meter=meter,
            probe=LinkProbe(meter),
            staging=Staging(limits.staging_bytes),
            decoders=self._decoders,
            num_decoders=limits.num_decoders,
            accepts=blocks.accepts,
            may_recompute=may_recompute,
            move=move,
            now_s=now_s,
        )

    @property
    def num_open(self) -> int:
        """Loads that are neither reported nor dropped."""
        with self._lock:
            return len(self._open)

    @property
    def staged_bytes(self) -> int:
        """Decoded KV in memory of this loader's."""
        return self._reader.staging.used_bytes

    def submit(self, op: LoadOp, *, queue_s: float = 0.0) -> None:
        """Start a load.

        Args:
            op: What to load.
            queue_s: Seconds until the engine could begin to compute it instead.
        """
        now_s = self._now_s()
        load = _Load(op, stop_s=now_s + op.deadline_s, began_s=now_s, position=op.start, queue_s=queue_s)
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
            self._unstage_if_empty(load, result)
        for load in self._overdue():
            self._report(load, result)
        return result

    def take_placed(self) -> list[PlacedLoad]:
        """Joined loads that are over since the last call, and of which something is left to join."""
        taken, self._placed = self._placed, []
        return taken

    def close(self) -> None:
        """Drop every load and stop the threads; waits at most for reads under way, which their deadlines bound."""
        for request_id in list(self._open):
            self.drop(request_id)
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._decoders.shutdown(wait=True, cancel_futures=True)
        self._reader.probe.close()

    # Reader threads.

    def _read(self, load: _Load) -> None:
        began_s = self._now_s()
        reading = ChunkReading(
            self._reader,
            load.op.spans,
            stop_s=load.stop_s,
            is_dropped=lambda: load.dropped,
            queue_s=load.queue_s,
        )
        failure: LoadFailure | None = "deadline"
        hole: LoadFailure | None = None
        try:
            while not load.dropped and self._now_s() < load.stop_s:
                try:
                    piece = reading.read_next()
                except NotLoadedError as error:
                    if load.op.join is None or error.reason not in _HOLES:
                        raise
                    hole = hole or error.reason
                    continue
                if piece is None:
                    failure = hole
                    break
                self._hand_over(load, piece)
        except NotLoadedError as error:
            failure = error.reason
        except Exception:
            # A store client that breaks its promise must not cost more than the recomputation.
            logger.exception("event=load_read_failed request_id=%s", load.op.request_id)
            failure = "store_error"
        reading.close()
        self._tally.observe("read_s", self._now_s() - began_s)
        with self._lock:
            load.failure = load.failure or failure
            load.is_read = True
            if not load.dropped and load not in self._staged:
                self._staged.append(load)

    def _hand_over(self, load: _Load, piece: Piece) -> None:
        first, last = max(load.op.start, piece.start), min(load.op.stop, piece.start + piece.kv_L2TNH.shape[2])
        part = piece.kv_L2TNH[:, :, first - piece.start : last - piece.start]
        with self._lock:
            if load.dropped or load.failure is not None:
                release(piece.held)
                return
            load.pieces.append(piece._replace(kv_L2TNH=part, start=first))
            if load not in self._staged:
                self._staged.append(load)

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
        with self._lock:
            if not load.pieces:
                return 1
            piece = load.pieces[0]
        kv = piece.kv_L2TNH
        # Behind a hole of a joined load.
        load.position = max(load.position, piece.start)
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
            with self._lock:
                load.failure = "scatter_error"
                self._release(load)
            return 1
        load.position += num_tokens
        self._placed_keys.setdefault(load.op.request_id, set()).add(piece.key)
        self._tally.observe("scatter_s", self._now_s() - began_s)
        self._tally.add("loaded_tokens", num_tokens)
        self._tally.add("loaded_bytes", num_tokens * token_bytes)
        if done + num_tokens == kv.shape[2]:
            with self._lock:
                load.pieces.popleft()
            release(piece.held)
            load.ranges.append((piece.start, load.position, piece.is_exact))
        return num_tokens * token_bytes

    def _unstage_if_empty(self, load: _Load, result: LoadResult) -> None:
        """Nothing is left to scatter: report the load, or let others come first until its next piece is there."""
        with self._lock:
            if load.pieces:
                return
            is_over = load.is_read or load.failure is not None
            if self._staged and self._staged[0] is load:
                self._staged.popleft()
        if is_over:
            self._report(load, result)

    def _overdue(self) -> list[_Load]:
        limit_s = self._now_s() - _LATE_READ_S
        with self._lock:
            staged = {id(load) for load in self._staged}
            late = [load for load in self._open.values() if load.stop_s < limit_s and id(load) not in staged]
            for load in late:
                load.dropped = True
                load.failure = load.failure or "deadline"
            return late

    def _report(self, load: _Load, result: LoadResult) -> None:
        op = load.op
        with self._lock:
            self._open.pop(op.request_id, None)
            # A reader that is still at it has nobody to hand a piece to.
            load.dropped = True
        self._tally.observe("load_s", self._now_s() - load.began_s)
        if op.join is not None:
            self._report_joined(load, result)
            return
        result.finished.add(op.request_id)
        if load.position >= op.stop:
            self._tally.add("loads_complete")
            return
        result.bad_blocks.update(op.block_ids[load.position // self._blocks.block_size :])
        self._tally.load_failed(load.failure or "missing", num_tokens=op.stop - load.position)

    def _report_joined(self, load: _Load, result: LoadResult) -> None:
        op = load.op
        placed = PlacedLoad(
            op=op,
            exact=tuple((start, stop) for start, stop, is_exact in load.ranges if is_exact),
            joined=tuple((start, stop) for start, stop, is_exact in load.ranges if not is_exact),
        )
        num_missing = sum(span.stop - max(op.start, span.start) for span in op.spans)
        num_missing -= sum(stop - start for start, stop, _ in load.ranges)
        if num_missing == 0:
            self._tally.add("loads_complete")
        else:
            self._tally.load_failed(load.failure or "missing", num_tokens=num_missing)
        if placed.joined and load.failure != "scatter_error":
            self._placed.append(placed)
            return
        # Nothing to join: the engine computes what is missing.
        result.finished.add(op.request_id)
        result.bad_blocks.update(op.block_ids[placed.exact_stop // self._blocks.block_size :])

    @staticmethod
    def _release(load: _Load) -> None:
        for piece in load.pieces:
            release(piece.held)
        load.pieces.clear()
