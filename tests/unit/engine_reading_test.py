"""One load over sources that a simulated clock drives: when it waits, what it learns, when it gives up.

Covers: slow disks, chunks that are still written, levels that stall, what counts as brought by the link.
Does not cover: threads, blocks, codecs (`tests/unit/engine_coded_transfers_test.py`), a store (`tests/contract`).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import torch
from support.layered_codec import TwoLevels, tiny_profile

from kvstore.codecs import codec_by_name
from kvstore.engine.coding import Coding
from kvstore.engine.layers import NotLoadedError
from kvstore.engine.params import ChunkSpan
from kvstore.engine.profiles import ProfileShelf, Weights
from kvstore.engine.reading import AHEAD, ChunkReading, Reader
from kvstore.engine.settings import ConnectorSettings
from kvstore.engine.speeds import SpeedMeter
from kvstore.engine.staging import Staging
from kvstore.engine.tally import Tally
from kvstore.interfaces import ChunkMeta
from kvstore.testing.samples import sample_key

CHUNK_TOKENS = 256
META = ChunkMeta(
    num_tokens=CHUNK_TOKENS, num_layers=36, num_kv_heads=8, head_dim=128, dtype="bfloat16", base_position=0
)
CHUNK = memoryview(bytes(2 * CHUNK_TOKENS * META.num_layers * 2 * META.num_kv_heads * META.head_dim)).toreadonly()
"""37 MB, as one chunk of a model of 8 billion parameters has."""
DISK = 200e6
SEEK_S = 0.03
SMALL = ChunkMeta(num_tokens=CHUNK_TOKENS, num_layers=3, num_kv_heads=1, head_dim=4, dtype="bfloat16", base_position=0)
PROFILE = tiny_profile(layers=3, heads=1, dim=4)
CODEC = TwoLevels(PROFILE)
BASE_BYTES, WHOLE_BYTES = (8 + sum(3 * CODEC.layer_bytes(SMALL, n) for n in range(top + 1)) for top in range(2))
SLOW = 1e5


def spans(count: int) -> tuple[ChunkSpan, ...]:
    return tuple(ChunkSpan(sample_key(i), i * CHUNK_TOKENS, (i + 1) * CHUNK_TOKENS) for i in range(count))


class Clock:
    now_s = 0.0


@dataclass
class Source:
    """One chunk and how it comes."""

    arrives: Callable[[float], float]
    """Bytes in place at a time; never less than before."""
    payload: memoryview = CHUNK
    meta: ChunkMeta = META
    written_s: float = 0.0
    """Until then, somebody writes it: asking for it waits."""


def disk(*, after_s: float = SEEK_S, per_s: float = DISK) -> Source:
    return Source(lambda now_s: max(0.0, now_s - after_s) * per_s)


def stalling() -> Source:
    """A small chunk of two levels, of which the second does not come."""
    meta = msgspec.structs.replace(SMALL, codec="transform", profile=PROFILE.id)
    payload = bytearray(CODEC.encoded_bytes(meta))
    kv = torch.zeros(meta.shape, dtype=torch.bfloat16)
    assert CODEC.encode(kv, meta=meta, level=None, out=memoryview(payload)) == WHOLE_BYTES
    return Source(lambda now_s: min(BASE_BYTES, now_s * SLOW), memoryview(payload).toreadonly(), meta)


def small(arrives: Callable[[float], float]) -> Source:
    """A small chunk that is not coded."""
    return Source(arrives, memoryview(bytes(2 * CHUNK_TOKENS * 3 * 2 * 4)).toreadonly(), SMALL)


class Stream:
    """Waiting moves the clock, nothing else does."""

    def __init__(self, clock: Clock, source: Source, key: Any) -> None:
        self._clock, self._source, self.key = clock, source, key
        self.payload = source.payload
        self.is_released = False

    def _arrived(self) -> int:
        return int(min(len(self.payload), self._source.arrives(self._clock.now_s)))

    @property
    def meta(self) -> ChunkMeta | None:
        return self._source.meta if self._arrived() else None

    def wait_bytes(self, num_bytes: int, *, deadline_s: float) -> int:
        stop_s = self._clock.now_s + deadline_s
        while self._arrived() < num_bytes and self._clock.now_s < stop_s:
            self._clock.now_s = min(stop_s, self._clock.now_s + 0.001)
        return self._arrived()

    def finish(self, *, deadline_s: float) -> bool:
        return self.wait_bytes(len(self.payload), deadline_s=deadline_s) == len(self.payload)

    def release(self) -> None:
        self.is_released = True


@dataclass
class Store:
    clock: Clock
    sources: dict[Any, Source]
    asked: list[tuple[Any, float]] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)

    def stream(self, key: Any, *, deadline_s: float) -> Stream | None:
        self.asked.append((key, deadline_s))
        source = self.sources[key]
        wait_s = source.written_s - self.clock.now_s
        self.clock.now_s += min(max(0.0, wait_s), deadline_s)
        if wait_s > deadline_s:
            return None
        self.streams.append(Stream(self.clock, source, key))
        return self.streams[-1]

    def read(self, keys: Sequence[Any], *, deadline_s: float) -> list[None]:
        return [None] * len(keys)


class Watched(SpeedMeter):
    """Remembers what it was told of links."""

    def __init__(self) -> None:
        super().__init__()
        self.noted_bytes = 0
        self.noted_s = 0.0

    def note_link(self, path: Any, num_bytes: int, *, seconds: float) -> None:
        super().note_link(path, num_bytes, seconds=seconds)
        self.noted_bytes += num_bytes
        self.noted_s += seconds


class Probe:
    """Takes what is given up."""

    def take(self, streams: Sequence[Any]) -> None:
        for stream in streams:
            stream.release()


class World:
    def __init__(self, decoders: ThreadPoolExecutor) -> None:
        self.clock, self.meter, self.tally = Clock(), Watched(), Tally()
        self.shelf = ProfileShelf(store=lambda: self.store)  # type: ignore[arg-type, return-value]
        self.shelf.add(PROFILE)
        self.store = Store(self.clock, {})
        self.staging = Staging(1 << 30)
        self.is_dropped = False
        self._decoders = decoders

    def reading(
        self, sources: Sequence[Source], *, recompute_s: float | None = None, stop_s: float = 20.0
    ) -> ChunkReading:
        """A load of these chunks, all of which could be computed in `recompute_s`."""
        asked = spans(len(sources))
        if recompute_s is not None:
            self.meter.note_prefill(asked[-1].stop, seconds=recompute_s)
        for span, source in zip(asked, sources, strict=True):
            source.meta = msgspec.structs.replace(source.meta, base_position=span.start)
            self.store.sources[span.key] = source
        coding = Coding(
            ConnectorSettings(),
            shelf=self.shelf,
            meter=self.meter,
            model=META,
            weights=Weights("none", None),
            layered={"transform": TwoLevels},
        )
        probe: Any = Probe()
        store: Any = self.store
        reader = Reader(
            store=lambda: store,
            coding=coding,
            tally=self.tally,
            meter=self.meter,
            probe=probe,
            staging=self.staging,
            decoders=self._decoders,
            num_decoders=2,
            accepts=lambda meta: True,
            may_recompute=True,
            now_s=lambda: self.clock.now_s,
        )
        return ChunkReading(reader, asked, stop_s=stop_s, is_dropped=lambda: self.is_dropped, queue_s=0.0)

    def read_all(self, reading: ChunkReading) -> int:
        """Chunks that were loaded."""
        count = 0
        while (piece := reading.read_next()) is not None:
            piece.held.release()
            count += 1
        reading.close()
        return count

    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = self.tally.drain().get("counts", {})
        return counts


@pytest.fixture
def world() -> Iterator[World]:
    with ThreadPoolExecutor(2) as decoders:
        world = World(decoders)
        yield world
    assert all(stream.is_released for stream in world.store.streams)


def test_a_slow_disk_is_waited_for_where_computing_is_slower(world: World) -> None:
    assert world.read_all(world.reading([disk()], recompute_s=3.0)) == 1
    assert world.clock.now_s == pytest.approx(SEEK_S + len(CHUNK) / DISK, rel=0.02)
    assert "recompute_chosen" not in world.counts()


def test_a_slow_disk_is_not_waited_for_where_computing_is_faster(world: World) -> None:
    with pytest.raises(NotLoadedError, match="slow"):
        world.read_all(world.reading([disk()], recompute_s=0.01))
    assert world.clock.now_s < 2 * SEEK_S, "the choice is made with the first bytes"
    assert world.counts()["recompute_chosen"] == 1


def test_a_chunk_that_is_still_written_holds_up_none_before_it(world: World) -> None:
    late = Source(lambda now_s: len(CHUNK), written_s=5.0)
    reading = world.reading([disk(per_s=1e12), late, disk()])
    first = reading.read_next()
    assert first is not None
    assert world.clock.now_s < 0.2
    first.held.release()
    assert world.read_all(reading) == 2
    assert world.clock.now_s == pytest.approx(5.0, rel=0.02), "it is waited for when it is due"


def there() -> Source:
    return Source(lambda now_s: len(CHUNK))


def test_bytes_that_were_in_place_are_no_merit_of_the_link(world: World) -> None:
    sources = [disk(), *(there() for _ in range(AHEAD + 1)), disk(after_s=0.3)]
    assert world.read_all(world.reading(sources)) == len(sources)
    assert world.meter.noted_bytes == 2 * len(CHUNK)


def test_chunks_behind_that_are_in_place_cost_no_transfer(world: World) -> None:
    assert world.read_all(world.reading([disk(), there(), there(), there()], recompute_s=0.25)) == 4


def test_bytes_that_never_came_are_no_merit_of_the_link(world: World) -> None:
    """The second level of the first chunk stalls: what counts is the first level, and the chunk behind it."""
    behind = small(lambda now_s: max(0.0, now_s - 0.2) * SLOW)
    assert world.read_all(world.reading([stalling(), behind], recompute_s=3.0)) == 2
    assert world.meter.noted_bytes == BASE_BYTES + len(behind.payload)
    counts = world.counts()
    assert counts["loaded_levels.0"] == 1
    assert "recompute_chosen" not in counts, "nothing of it is computed"


def test_a_load_that_is_given_up_counts_once(world: World) -> None:
    """The first chunk is used at the level that is there, though computing were faster; the second is given up."""
    with pytest.raises(NotLoadedError, match="slow"):
        world.read_all(world.reading([stalling(), small(lambda now_s: 0.0)], recompute_s=3.0))
    counts = world.counts()
    assert (counts["loaded_levels.0"], counts["recompute_chosen"]) == (1, 1)


@pytest.fixture(params=["lossless", "int8", "int4"])
def coded(request: pytest.FixtureRequest) -> Source:
    """A small chunk of a codec without levels; it is there."""
    codec, meta = codec_by_name(request.param), msgspec.structs.replace(SMALL, codec=request.param)
    payload = bytearray(codec.encoded_bytes(meta))
    num_bytes = codec.encode(torch.ones(meta.shape, dtype=torch.bfloat16), out=memoryview(payload), meta=meta)
    return Source(lambda now_s: num_bytes, memoryview(payload)[:num_bytes].toreadonly(), meta)


def test_whole_chunks_are_decoded_into_staged_memory(world: World, coded: Source) -> None:
    reading = world.reading([coded])
    piece = reading.read_next()
    assert piece is not None
    assert (piece.kv_L2TNH - 1.0).abs().max() < 0.1
    assert world.staging.used_bytes > 0
    piece.held.release()
    assert world.staging.used_bytes == 0


def test_nothing_of_a_whole_chunk_is_decoded_before_there_is_memory(
    world: World, coded: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Staging):
        def take(self, num_bytes: int, *, deadline_s: float) -> None:
            world.is_dropped = True

    def decode(*args: Any, **options: Any) -> None:
        raise AssertionError("decoded into memory that nobody counts")

    world.staging = Full(0)
    for name in ("decode", "decode_layers"):
        monkeypatch.setattr(type(codec_by_name(coded.meta.codec)), name, decode)
    with pytest.raises(NotLoadedError, match="deadline"):
        world.reading([coded]).read_next()


def test_a_whole_chunk_that_is_damaged_gives_its_memory_back(world: World, coded: Source) -> None:
    coded.payload = coded.payload[:-1]
    coded.arrives = lambda now_s: len(coded.payload)
    with pytest.raises(NotLoadedError, match="mismatch"):
        world.reading([coded]).read_next()
    assert world.staging.used_bytes == 0
