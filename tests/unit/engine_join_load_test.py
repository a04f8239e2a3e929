"""Joined loads: chunks from elsewhere are moved on their way, holes stay holes, and all of it is handed on.

Covers: the loader and the reader over an in-process store, keys turned by a real rotation.
Does not cover: what becomes of a placed load (`tests/unit/engine_join_run_test.py`), exact loads
(`tests/unit/engine_transfers_test.py`).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support.engine_parts import until

from kvstore.codecs import codec_by_name
from kvstore.engine.coding import Coding
from kvstore.engine.join.rotation import Rotation
from kvstore.engine.loader import Loader, LoadLimits, LoadResult
from kvstore.engine.ops import JoinOp, LoadOp, PlacedLoad
from kvstore.engine.params import ChunkSpan
from kvstore.engine.profiles import ProfileShelf, Weights
from kvstore.engine.settings import ConnectorSettings
from kvstore.engine.speeds import SpeedMeter
from kvstore.engine.tally import Tally
from kvstore.interfaces import ChunkMeta
from kvstore.testing import MemoryStore, MemoryStoreClient
from kvstore.testing.samples import sample_key

LAYERS, HEADS, DIM, BLOCK = 2, 1, 4, 8
TOKEN_BYTES = LAYERS * 2 * HEADS * DIM * 4
BLOCK_IDS = tuple(range(7))
PROMPT = 50
TAIL = 44
SPANS = (
    ChunkSpan(sample_key(1), 0, 10),
    ChunkSpan(sample_key(2), 10, 21, 300),
    ChunkSpan(sample_key(3), 21, 30, 10),
    ChunkSpan(sample_key(4), 33, 44, 33),
)


class Module:
    """Half a turn per position in the first pair, none in the second."""

    rotary_dim = DIM
    is_neox_style = False

    def __init__(self) -> None:
        angle = torch.arange(400, dtype=torch.float64)[:, None] * torch.tensor([torch.pi, 0.0], dtype=torch.float64)
        self.cos_sin_cache = torch.cat([angle.cos(), angle.sin()], dim=-1).float()


class Rows:
    """Blocks that are rows by position."""

    block_size = BLOCK

    def __init__(self) -> None:
        self.kv = torch.zeros(LAYERS, 2, PROMPT, HEADS, DIM)
        self.broken = False

    def accepts(self, meta: ChunkMeta) -> bool:
        return meta.num_layers == LAYERS

    def slots(self, block_ids: Sequence[int], *, start: int, stop: int) -> torch.Tensor:
        return torch.arange(start, stop)

    def scatter(self, kv_L2TNH: torch.Tensor, *, slots: torch.Tensor) -> None:
        if self.broken:
            raise RuntimeError("no blocks today")
        self.kv[:, :, slots] = kv_L2TNH


class World:
    def __init__(self) -> None:
        self.store, self.rows, self.tally = MemoryStore(), Rows(), Tally()
        self.client: Any = MemoryStoreClient(self.store)
        self.chunks: dict[int, torch.Tensor] = {}
        self.loader = self.make(Rotation([Module()] * LAYERS).move)

    def make(self, move: Any) -> Loader:
        meter = SpeedMeter()
        shelf = ProfileShelf(store=lambda: self.client)
        meta = self.meta(1, 0)
        coding = Coding(ConnectorSettings(), shelf=shelf, meter=meter, model=meta, weights=Weights("none", None))
        return Loader(
            store=lambda: self.client,
            blocks=self.rows,
            coding=coding,
            tally=self.tally,
            limits=LoadLimits(num_threads=1, num_decoders=1, step_bytes=5 * TOKEN_BYTES, staging_bytes=1 << 20),
            meter=meter,
            move=move,
        )

    @staticmethod
    def meta(num_tokens: int, base: int, codec: str = "raw") -> ChunkMeta:
        return ChunkMeta(
            num_tokens=num_tokens,
            num_layers=LAYERS,
            num_kv_heads=HEADS,
            head_dim=DIM,
            dtype="float32",
            base_position=base,
            codec=codec,
        )

    def put(self, span: ChunkSpan, *, codec: str = "raw", base: int | None = None) -> None:
        count = span.stop - span.start
        kv = torch.randn((LAYERS, 2, count, HEADS, DIM), generator=torch.Generator().manual_seed(span.start))
        learned = span.base if span.base is not None else span.start
        meta, coder = self.meta(count, learned if base is None else base, codec), codec_by_name(codec)
        write = self.client.reserve(span.key, meta, coder.encoded_bytes(meta), deadline_s=1.0)
        num_bytes = coder.encode(kv, out=write.payload, meta=meta)
        assert write.commit(num_bytes if num_bytes < len(write.payload) else None)
        self.chunks[span.start] = kv

    def load(self, op: LoadOp, loader: Loader | None = None) -> tuple[LoadResult, list[PlacedLoad]]:
        """Submit and step until the load is over."""
        loader = loader or self.loader
        loader.submit(op)
        results: list[LoadResult] = []
        placed: list[PlacedLoad] = []

        def is_over() -> bool:
            results.append(loader.advance(busy=True))
            placed.extend(loader.take_placed())
            return bool(placed or results[-1].finished)

        until(is_over)
        assert loader.num_open == 0
        return results[-1], placed

    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = self.tally.drain()["counts"]
        return counts


@pytest.fixture
def world() -> Iterator[World]:
    """Nothing is left of any test: no lease, no staged memory."""
    world = World()
    yield world
    until(lambda: world.loader.staged_bytes == 0)
    world.loader.close()
    assert world.store.leftovers() == []


def op(*spans: ChunkSpan, start: int = 0) -> LoadOp:
    join = JoinOp(method="naive", share=0.0, tail_start=TAIL, token_ids=tuple(range(PROMPT)))
    return LoadOp(
        request_id="r",
        spans=tuple(span for span in spans or SPANS if span.stop > start),
        start=start,
        stop=PROMPT - 1,
        block_ids=BLOCK_IDS,
        deadline_s=30.0,
        join=join,
    )


def turned(kv: torch.Tensor, by: int) -> torch.Tensor:
    """An odd number of half turns changes the sign of the first pair of K."""
    out = kv.clone()
    out[:, 0, ..., :2] *= -1 if by % 2 else 1
    return out


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_chunks_are_turned_to_their_place(world: World, codec: str) -> None:
    for span in SPANS:
        world.put(span, codec=codec)
    result, (placed,) = world.load(op())
    assert result == LoadResult(set(), set()), "the request goes on before it is joined"
    assert (placed.exact, placed.joined) == (((0, 10),), ((10, 21), (21, 30), (33, 44)))
    for span in SPANS:
        by = span.start - span.base if span.base is not None else 0
        expected = turned(world.chunks[span.start], by)
        torch.testing.assert_close(world.rows.kv[:, :, span.start : span.stop], expected)
    assert world.counts()["loads_complete"] == 1


def test_stored_chunks_are_not_changed(world: World) -> None:
    world.put(SPANS[2])
    world.load(op())
    (lease,) = world.client.read([SPANS[2].key], deadline_s=1.0)
    with lease:
        kept = torch.frombuffer(bytearray(lease.payload), dtype=torch.float32)
    assert torch.equal(kept, world.chunks[21].flatten())


def test_what_the_engine_holds_is_not_loaded_again(world: World) -> None:
    for span in SPANS:
        world.put(span)
    _, (placed,) = world.load(op(start=16))
    assert (placed.exact, placed.joined) == ((), ((16, 21), (21, 30), (33, 44)))
    assert not world.rows.kv[:, :, :16].any()
    torch.testing.assert_close(world.rows.kv[:, :, 16:21], turned(world.chunks[10], -290)[:, :, 6:])


@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_a_missing_chunk_is_a_hole_and_the_rest_is_loaded(world: World, missing: int) -> None:
    for index, span in enumerate(SPANS):
        if index != missing:
            world.put(span)
    _, (placed,) = world.load(op())
    found = sorted([*placed.exact, *placed.joined])
    assert found == [(span.start, span.stop) for index, span in enumerate(SPANS) if index != missing]
    assert placed.exact_stop == (0 if missing == 0 else 10)
    counts = world.counts()
    lost = SPANS[missing].stop - SPANS[missing].start
    assert (counts["load_failures.missing"], counts["load_failed_tokens"]) == (1, lost)


def test_a_chunk_that_was_learned_elsewhere_than_promised_is_a_hole(world: World) -> None:
    world.put(SPANS[0])
    world.put(SPANS[1], base=17)
    world.put(SPANS[2])
    _, (placed,) = world.load(op(*SPANS[:3]))
    assert placed.joined == ((21, 30),)
    assert world.counts()["load_failures.mismatch"] == 1


def test_positions_beyond_the_models_end_the_load(world: World) -> None:
    far = SPANS[1]._replace(base=395)
    world.put(far)
    result, placed = world.load(op(far))
    assert (result.finished, result.bad_blocks, placed) == ({"r"}, set(BLOCK_IDS), [])
    assert world.counts()["load_failures.store_error"] == 1


def test_without_a_rotation_every_moved_chunk_is_a_mismatch(world: World) -> None:
    loader = world.make(None)
    for span in SPANS:
        world.put(span)
    result, placed = world.load(op(), loader)
    # Block 1 holds the last two tokens of the exact chunk and the first of a joined one.
    assert (result.finished, result.bad_blocks, placed) == ({"r"}, set(BLOCK_IDS[1:]), [])
    assert world.counts()["load_failures.mismatch"] == 1
    loader.close()


def test_with_nothing_to_join_the_request_is_computed(world: World) -> None:
    world.put(SPANS[0])
    result, placed = world.load(op())
    assert (result.finished, result.bad_blocks, placed) == ({"r"}, set(BLOCK_IDS[1:]), [])


def test_blocks_that_fail_cost_the_join(world: World) -> None:
    for span in SPANS:
        world.put(span)
    world.rows.broken = True
    result, placed = world.load(op())
    assert (result.finished, result.bad_blocks, placed) == ({"r"}, set(BLOCK_IDS), [])
    assert world.counts()["load_failures.scatter_error"] == 1


def test_exact_end_of_what_was_placed() -> None:
    placed = PlacedLoad(op=op(start=4), exact=((4, 9), (9, 12), (20, 30)), joined=((12, 20),))
    assert placed.exact_stop == 12
    assert dataclasses.replace(placed, exact=((5, 9),)).exact_stop == 4
