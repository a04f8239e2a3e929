"""One load on its way from the store to decoded KV, chunk by chunk, layer by layer.

Covers: streams opened ahead, waiting for bytes, which level, giving up what is late or silent, decoding on threads.
Does not cover: writing into the engine's blocks (`kvstore.engine.loader`), the decisions (`kvstore.codecs.controller`),
what bytes mean (`kvstore.engine.coding`).

A chunk of a codec with layers is decoded while it arrives: as soon as the bytes of a layer are in place, a decoding
thread takes it, and the reader waits for the next. Every part of such a payload has a checksum of its own, so parts
are used before the chunk is whole. A codec without levels is decoded when the whole chunk is there and true.

When the time is over, or bytes turn out damaged, a layer is decoded at the finest level that is there. Only if the
coarsest one is not does the chunk count as missing, and with it the rest of the load.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import torch

from cluster.errors import DataError
from kvstore.codecs import ProfileMissingError
from kvstore.codecs.controller import Path, Rest, choose, patience_s
from kvstore.codecs.raw import DTYPES
from kvstore.engine.coding import FIRST_BYTES, ChunkFormat, Coding
from kvstore.engine.layers import DecodedLayer, Held, LayeredDecode, NotLoadedError, release
from kvstore.engine.params import ChunkSpan
from kvstore.engine.probing import LinkProbe
from kvstore.engine.speeds import Arrivals, SpeedMeter
from kvstore.engine.staging import StagedMemory, Staging
from kvstore.engine.tally import Tally
from kvstore.interfaces import ChunkMeta, StoreClient, StreamLease
from kvstore.keys import ChunkKey
from kvstore.whole_stream import WholeStream

logger = logging.getLogger(__name__)

AHEAD: Final = 3
"""Chunks that are asked for besides the one that is read, so that the link never waits for the reader."""
_AHEAD_S: Final = 0.02
"""Bound on asking for a chunk ahead of its turn: one that somebody still writes is asked for again when it is due."""
_SLICE_S: Final = 0.25
"""A wait is cut into pieces of this length, to see whether the load is still wanted."""
_CHECK_S: Final = 5.0
"""Bound on comparing the checksum of bytes that are all in place."""


class Piece(NamedTuple):
    """KV of one chunk, ready to be written into the engine's blocks."""

    key: ChunkKey
    kv_L2TNH: torch.Tensor
    start: int
    """Position in the prompt of the first row of `kv_L2TNH`."""
    held: Held
    is_exact: bool = True
    """It stands where it was learned, behind the same tokens."""


class Mover(Protocol):
    """Turns keys to another position in place (`kvstore.engine.join.rotation`)."""

    def __call__(self, kv_L2TNH: torch.Tensor, *, base: int, start: int) -> None:
        """From positions `base` on to positions `start` on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """What all loads of one worker read with."""

    store: Callable[[], StoreClient]
    coding: Coding
    tally: Tally
    meter: SpeedMeter
    probe: LinkProbe
    staging: Staging
    decoders: Executor
    num_decoders: int
    accepts: Callable[[ChunkMeta], bool]
    may_recompute: bool
    move: Mover | None = None
    """Called on this reader's threads, for spans with a base; None: those count as mismatch."""
    now_s: Callable[[], float] = time.monotonic


class ChunkReading:
    """The chunks of one load, in order. For one thread.

    Guarantees:
        Every lease and all memory that it took is given back, or belongs to a piece that it handed out.

    Args:
        reader: What all loads share.
        spans: The chunks.
        stop_s: Time of `reader.now_s` by which they must be there.
        is_dropped: Whether nobody wants the load any more.
        queue_s: Seconds until the engine could begin to compute instead.
    """

    def __init__(
        self,
        reader: Reader,
        spans: Sequence[ChunkSpan],
        *,
        stop_s: float,
        is_dropped: Callable[[], bool],
        queue_s: float,
    ) -> None:
        self._reader = reader
        self._spans = spans
        self._stop_s = stop_s
        self._is_dropped = is_dropped
        self._queue_s = queue_s
        self._next = 0
        self._ahead: deque[StreamLease | None] = deque()
        self._arrivals = Arrivals(reader.meter, path="remote", now_s=reader.now_s)
        self._is_link_watched = False
        self._passed_bytes = 0
        """Encoded bytes of chunks that were read already, as many as had arrived."""
        self._found_bytes = 0
        """Encoded bytes that were in place when their chunk was opened: no link has brought them."""

    def read_next(self) -> Piece | None:
        """The next chunk; None behind the last.

        Raises:
            NotLoadedError: It is not there in time, or cannot be used.
        """
        if self._next >= len(self._spans):
            return None
        span = self._spans[self._next]
        self._open_ahead()
        stream = self._ahead.popleft()
        self._next += 1
        if stream is None:
            stream = self._read_whole(span)
        is_kept = False
        try:
            piece = self._at_its_place(span, self._read_stream(span, stream))
            is_kept = piece.held is stream
        except NotLoadedError as error:
            if error.reason == "slow":
                self._reader.tally.add("recompute_chosen")
                is_kept = True
                self._ahead.appendleft(stream)
                self._give_to_probe()
            raise
        else:
            return piece
        finally:
            if not is_kept:
                release(stream)

    def close(self) -> None:
        """Give back what was opened ahead."""
        while self._ahead:
            stream = self._ahead.popleft()
            if stream is not None:
                release(stream)

    def _give_to_probe(self) -> None:
        """Whether the link is still slow is seen from what was asked for already."""
        streams = [stream for stream in self._ahead if stream is not None]
        self._ahead.clear()
        self._reader.probe.take(streams)

    # Opening.

    def _open_ahead(self) -> None:
        if self._ahead and self._ahead[0] is None:
            # It could not be had ahead of its turn. Now it is due.
            self._ahead.clear()
        client = self._reader.store()
        while len(self._ahead) <= AHEAD and self._next + len(self._ahead) < len(self._spans):
            if self._ahead and self._ahead[-1] is None:
                # Whether this is a gap, behind which only a join has use for more, shows when it is due.
                break
            span, left_s = self._spans[self._next + len(self._ahead)], self._left_s()
            stream = client.stream(span.key, deadline_s=min(_AHEAD_S, left_s) if self._ahead else left_s)
            if not self._ahead:
                # Waiting for a chunk to be written says nothing about the link.
                self._is_link_watched = False
            self._ahead.append(stream)
            self._found_bytes += _arrived(stream)

    def _read_whole(self, span: ChunkSpan) -> StreamLease:
        """A chunk that no stream could be had of: perhaps other nodes are about to tell that they hold it."""
        (lease,) = self._reader.store().read([span.key], deadline_s=self._left_s())
        if lease is None:
            raise NotLoadedError("deadline" if self._left_s() <= 0 else "missing")
        self._found_bytes += len(lease.payload)
        return WholeStream(lease)

    # One chunk.

    def _read_stream(self, span: ChunkSpan, stream: StreamLease) -> Piece:
        path: Path = "local" if _arrived(stream) >= len(stream.payload) else "remote"
        if path == "remote":
            if not self._is_link_watched:
                self._is_link_watched = True
                self._arrivals.restart(self._brought(stream))
            self._wait(stream, FIRST_BYTES, expected_s=0.0, recompute_s=self._recompute_s())
        meta = self._checked_meta(span, stream)
        chunk_format = self._format(meta)
        if chunk_format is None:
            return self._decode_whole(span, stream, meta, path)
        return self._decode_levels(span, stream, meta, chunk_format, path)

    def _checked_meta(self, span: ChunkSpan, stream: StreamLease) -> ChunkMeta:
        meta = stream.meta
        if meta is None:
            raise NotLoadedError("deadline" if self._left_s() <= 0 else "missing")
        base = span.start if span.base is None else span.base
        if meta.num_tokens != span.stop - span.start or meta.base_position != base:
            logger.warning(
                "event=chunk_mismatch chunk of %d tokens at %d is not span [%d, %d) learned at %d",
                *(meta.num_tokens, meta.base_position, span.start, span.stop, base),
            )
            raise NotLoadedError("mismatch")
        if not self._reader.accepts(meta):
            logger.warning("event=chunk_mismatch chunk %s of %s does not fit this engine", meta.shape, meta.dtype)
            raise NotLoadedError("mismatch")
        return meta

    def _format(self, meta: ChunkMeta) -> ChunkFormat | None:
        try:
            return self._reader.coding.format_of(meta, deadline_s=self._left_s())
        except ProfileMissingError as error:
            logger.warning("event=profile_missing reason=%r", str(error))
            raise NotLoadedError("profile") from error
        except DataError as error:
            logger.warning("event=chunk_unreadable reason=%r", str(error))
            raise NotLoadedError("mismatch") from error

    def _decode_whole(self, span: ChunkSpan, stream: StreamLease, meta: ChunkMeta, path: Path) -> Piece:
        num_bytes = len(stream.payload)
        if path == "remote":
            self._await(stream, num_bytes, meta)
        if not stream.finish(deadline_s=min(_CHECK_S, max(0.0, self._left_s()))):
            raise NotLoadedError("deadline" if self._left_s() <= 0 else "missing")
        self._passed_bytes += num_bytes
        self._reader.tally.add("loaded_encoded_bytes", num_bytes)
        try:
            if meta.codec == "raw":
                kv = self._reader.coding.raw_kv(stream.payload, meta=meta)
                return Piece(span.key, kv, span.start, stream)
            memory = self._take_memory(meta)
            try:
                kv = memory.tensor(meta.shape, DTYPES[meta.dtype])
                self._decode_layers(stream.payload, meta, kv)
            except BaseException:
                memory.release()
                raise
            return Piece(span.key, kv, span.start, memory)
        except NotLoadedError:
            raise
        except DataError as error:
            logger.warning("event=chunk_mismatch reason=%r", str(error))
            raise NotLoadedError("mismatch") from error

    def _at_its_place(self, span: ChunkSpan, piece: Piece) -> Piece:
        """A piece of a joined chunk with its keys turned, in memory of this reader's own."""
        if span.base is None:
            return piece
        if self._reader.move is None:
            release(piece.held)
            raise NotLoadedError("mismatch")
        if span.base == span.start:
            return piece._replace(is_exact=False)
        kv = piece.kv_L2TNH
        memory = piece.held if isinstance(piece.held, StagedMemory) else self._take_bytes(kv.nbytes)
        try:
            if memory is not piece.held:
                kv = memory.tensor(tuple(kv.shape), kv.dtype)
                kv.copy_(piece.kv_L2TNH)
            self._reader.move(kv, base=span.base, start=span.start)
        except BaseException:
            memory.release()
            raise
        return piece._replace(kv_L2TNH=kv, held=memory, is_exact=False)

    def _decode_layers(self, payload: memoryview, meta: ChunkMeta, kv_L2TNH: torch.Tensor) -> None:
        """All layers of a whole chunk of a codec without levels, on all decoding threads."""
        share = -(-meta.num_layers // self._reader.num_decoders)

        def decode(start: int) -> float:
            began_s = time.thread_time()
            layers = range(start, min(start + share, meta.num_layers))
            out = kv_L2TNH[layers.start : layers.stop]
            self._reader.coding.decode_layers(payload, meta=meta, layers=layers, out=out)
            return time.thread_time() - began_s

        futures: list[Future[float]] = []
        try:
            for start in range(0, meta.num_layers, share):
                # One by one: those that were submitted are waited for when a later one cannot be.
                futures.append(self._reader.decoders.submit(decode, start))  # noqa: PERF401
        finally:
            # Nobody may write to the memory once it is given back.
            wait(futures)
        thread_s = sum(future.result() for future in futures)
        self._note_decode(kv_L2TNH.numel() * kv_L2TNH.element_size(), thread_s)

    def _decode_levels(
        self, span: ChunkSpan, stream: StreamLease, meta: ChunkMeta, chunk_format: ChunkFormat, path: Path
    ) -> Piece:
        try:
            head_bytes = chunk_format.head_bytes(stream.payload, meta=meta)
            self._wait(stream, head_bytes, expected_s=0.0, recompute_s=self._recompute_s())
            chunk = chunk_format.open(stream.payload, meta=meta)
        except NotLoadedError:
            raise
        except DataError as error:
            logger.warning("event=chunk_damaged reason=%r", str(error))
            raise NotLoadedError("mismatch") from error
        last = meta.num_layers - 1
        stops = tuple(chunk.stop_bytes(level=level, layer=last) for level in range(chunk.num_levels))
        level = len(stops) - 1
        if path == "remote":
            level = self._level(stream, stops, meta)

        def may_wait() -> None:
            self._level(stream, stops, meta)

        memory = self._take_memory(meta)
        try:
            kv = memory.tensor(meta.shape, DTYPES[meta.dtype])
            worst = LayeredDecode(self, stream, chunk, kv, level=level, may_wait=may_wait).run()
            arrived_bytes = _arrived(stream)
            if arrived_bytes == len(stream.payload):
                # What is damaged is reported with the lease, so that nobody reads it again.
                stream.finish(deadline_s=min(_CHECK_S, max(0.0, self._left_s())))
        except BaseException:
            memory.release()
            raise
        self._passed_bytes += arrived_bytes
        self._reader.tally.add(f"loaded_levels.{worst}")
        self._reader.tally.add("loaded_encoded_bytes", min(stops[level], len(stream.payload)))
        return Piece(span.key, kv, span.start, memory)

    def _take_memory(self, meta: ChunkMeta) -> StagedMemory:
        return self._take_bytes(math.prod(meta.shape) * DTYPES[meta.dtype].itemsize)

    def _take_bytes(self, num_bytes: int) -> StagedMemory:
        while not self._is_dropped():
            memory = self._reader.staging.take(num_bytes, deadline_s=min(_SLICE_S, max(0.0, self._left_s())))
            if memory is not None:
                return memory
            if self._left_s() <= 0:
                break
        raise NotLoadedError("deadline")

    # Decisions.

    def _level(self, stream: StreamLease, stops: Sequence[int], meta: ChunkMeta) -> int:
        """The level to wait for, by what the whole rest of the load would take at each.

        A lower level saves bytes at the last chunk only: sources send whole chunks, whoever reads how much of them.
        Asked only while bytes are missing. So it is the remote path's speed that counts: what is in place costs none.

        Raises:
            NotLoadedError: Computing is faster.
        """
        spans = self._spans[self._next :]
        num_tokens = meta.num_tokens + sum(span.stop - span.start for span in spans)
        token_output = meta.num_layers * 2 * meta.num_kv_heads * meta.head_dim * DTYPES[meta.dtype].itemsize
        needed: Sequence[float] = stops
        if spans:
            token_bytes = len(stream.payload) / meta.num_tokens
            last_tokens = spans[-1].stop - spans[-1].start
            between = (num_tokens - last_tokens) * token_bytes
            needed = [between + last_tokens / meta.num_tokens * stop for stop in stops]
        in_place = self._in_place(stream)
        choice = choose(
            Rest(
                bytes_by_level=tuple(max(0, int(num_bytes) - in_place) for num_bytes in needed),
                output_bytes=num_tokens * token_output,
                tokens=num_tokens,
                target_s=max(0.0, self._left_s()),
                queue_s=self._queue_s,
            ),
            speeds=self._reader.meter.speeds,
            path="remote",
            may_recompute=self._reader.may_recompute,
        )
        if choice.level is None:
            raise NotLoadedError("slow")
        return choice.level

    def _recompute_s(self) -> float | None:
        """What computing this chunk and the rest would take; None where that is no choice."""
        prefill = self._reader.meter.speeds.prefill
        if prefill is None or not self._reader.may_recompute:
            return None
        first = self._spans[self._next - 1].start
        return self._queue_s + (self._spans[-1].stop - first) / max(prefill.per_s, 1e-9)

    # Waiting.

    def _await(self, stream: StreamLease, num_bytes: int, meta: ChunkMeta) -> None:
        """Wait for a chunk that must be whole, and choose again whenever more is known."""
        while (arrived := _arrived(stream)) < num_bytes:
            self._level(stream, (num_bytes,), meta)
            # In parts, or the first look back would come when all is over.
            self.wait_part(stream, min(num_bytes, arrived + max(1, num_bytes // 8)))

    def wait_part(self, stream: StreamLease, num_bytes: int) -> None:
        """Wait for the first bytes of a chunk that is arriving.

        Raises:
            NotLoadedError: They do not come in time.
        """
        link = self._reader.meter.speeds.link["remote"].per_s
        missing = num_bytes - stream.wait_bytes(num_bytes, deadline_s=0.0)
        if missing > 0:
            self._wait(stream, num_bytes, expected_s=missing / max(link, 1e-9), recompute_s=self._recompute_s())

    def _wait(self, stream: StreamLease, num_bytes: int, *, expected_s: float, recompute_s: float | None) -> None:
        num_bytes = min(num_bytes, len(stream.payload))
        patience = patience_s(expected_s, recompute_s=recompute_s)
        seen, seen_s = stream.wait_bytes(num_bytes, deadline_s=0.0), self._reader.now_s()
        is_waiting = seen < num_bytes
        while seen < num_bytes:
            began_s = self._reader.now_s()
            slice_s = min(_SLICE_S, self._left_s(), *([patience] if patience is not None else []))
            arrived = stream.wait_bytes(num_bytes, deadline_s=slice_s)
            now_s = self._reader.now_s()
            if self._left_s() <= 0 or self._is_dropped():
                raise NotLoadedError("deadline")
            if arrived > seen:
                seen, seen_s = arrived, now_s
            elif patience is not None and now_s - seen_s >= patience:
                self._arrivals.note(self._brought(stream))
                raise NotLoadedError("slow")
            elif now_s - began_s < 0.5 * slice_s:
                # It does not wait though bytes are missing: the source has broken off.
                raise NotLoadedError("missing")
        if is_waiting:
            self._arrivals.note(self._brought(stream))

    def _in_place(self, stream: StreamLease) -> int:
        """Bytes that have arrived of the chunk that is read and of those that were opened behind it."""
        return _arrived(stream) + sum(map(_arrived, self._ahead))

    def _brought(self, stream: StreamLease) -> int:
        """Bytes of this load that links have brought since its chunks were opened."""
        return self._passed_bytes + self._in_place(stream) - self._found_bytes

    def _left_s(self) -> float:
        return max(0.0, self._stop_s - self._reader.now_s())

    def _note_decode(self, output_bytes: int, thread_s: float) -> None:
        self._reader.tally.observe("decode_s", thread_s)
        self._reader.meter.note_decode(output_bytes, seconds=thread_s / self._reader.num_decoders)

    # What the layers' threads need.

    def submit(self, work: Callable[[], DecodedLayer]) -> "Future[DecodedLayer]":
        """Run on a decoding thread."""
        return self._reader.decoders.submit(work)

    def note_layers(self, output_bytes: int, thread_s: float, *, damaged: int) -> None:
        """Layers of one chunk were decoded; `damaged` parts of it were not what their checksums say."""
        self._note_decode(output_bytes, thread_s)
        if damaged:
            self._reader.tally.add("damaged_parts", damaged)


def _arrived(stream: StreamLease | None) -> int:
    """Bytes that are in place, from the payload's start."""
    return 0 if stream is None else stream.wait_bytes(len(stream.payload), deadline_s=0.0)
