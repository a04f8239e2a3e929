"""Loader and saver over an in-process store and blocks that are plain tensors."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.engine_parts import Host, until

from kvstore.codecs import codec_by_name
from kvstore.engine.coding import Coding
from kvstore.engine.loader import Loader, LoadLimits, LoadResult
from kvstore.engine.ops import LoadOp, SaveOp
from kvstore.engine.params import ChunkSpan
from kvstore.engine.profiles import ProfileShelf, Weights
from kvstore.engine.saver import Saver
from kvstore.engine.settings import ConnectorSettings
from kvstore.engine.speeds import SpeedMeter
from kvstore.engine.tally import Tally
from kvstore.interfaces import ChunkMeta
from kvstore.testing import Fault, FaultyStoreClient, MemoryStore, MemoryStoreClient
from kvstore.testing.samples import sample_key

LAYERS, HEADS, DIM, BLOCK, NUM_BLOCKS = 2, 1, 4, 8, 16
TOKEN_BYTES = LAYERS * 2 * HEADS * DIM * 4
EDGES = (0, 10, 20, 30)
BLOCK_IDS = (5, 3, 9, 1)


class TensorBlocks:
    """`PagedKv` without an engine: slots are rows."""

    block_size = BLOCK
    bytes_per_block = BLOCK * TOKEN_BYTES

    def __init__(self) -> None:
        self.rows = torch.zeros(LAYERS, 2, NUM_BLOCKS * BLOCK, HEADS, DIM)
        self.broken = False

    def meta(self, *, num_tokens: int, base_position: int) -> ChunkMeta:
        return ChunkMeta(
            num_tokens=num_tokens,
            num_layers=LAYERS,
            num_kv_heads=HEADS,
            head_dim=DIM,
            dtype="float32",
            base_position=base_position,
        )

    def accepts(self, meta: ChunkMeta) -> bool:
        return meta.shape[0] == LAYERS and meta.dtype == "float32"

    def slots(self, block_ids: Sequence[int], *, start: int, stop: int) -> torch.Tensor:
        return torch.tensor([block_ids[i // BLOCK] * BLOCK + i % BLOCK for i in range(start, stop)], dtype=torch.int64)

    def scatter(self, kv_L2TNH: torch.Tensor, *, slots: torch.Tensor) -> None:
        if self.broken:
            raise RuntimeError("no blocks today")
        self.rows[:, :, slots] = kv_L2TNH

    def gather(self, block_ids: Sequence[int], *, first: int, num_tokens: int) -> Host:
        if self.broken:
            raise RuntimeError("no blocks today")
        slots = self.slots(block_ids, start=first, stop=first + num_tokens)
        return Host(self.rows[:, :, slots].clone())

    def tokens(self, start: int, stop: int) -> torch.Tensor:
        return self.rows[:, :, self.slots(BLOCK_IDS, start=start, stop=stop)]


KV = torch.arange(LAYERS * 2 * 30 * HEADS * DIM, dtype=torch.float32).reshape(LAYERS, 2, 30, HEADS, DIM) + 1
SPANS = tuple(ChunkSpan(sample_key(a), a, b) for a, b in pairwise(EDGES))


def put(client: Any, span: ChunkSpan, **changes: Any) -> None:
    kv = KV[:, :, span.start : span.stop].contiguous()
    fields = {"num_tokens": span.stop - span.start, "base_position": span.start} | changes
    meta = TensorBlocks().meta(**fields)
    write = client.reserve(span.key, meta, kv.numel() * 4, deadline_s=1.0)
    codec_by_name("raw").encode(kv, out=write.payload)
    assert write.commit()


class Rig:
    """One loader or saver with everything around it."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.client: Any = MemoryStoreClient(self.store)
        self.blocks = TensorBlocks()
        self.tally = Tally()
        self.meter = SpeedMeter()
        self.now_s = 100.0
        self.counts: dict[str, int] = {}
        self._closers: list[Callable[[], None]] = []

    def coding(self) -> Coding:
        model = self.blocks.meta(num_tokens=1, base_position=0)
        shelf = ProfileShelf(store=lambda: self.client)
        return Coding(ConnectorSettings(), shelf=shelf, meter=self.meter, model=model, weights=Weights("none", None))

    def loader(self, *, step_bytes: int = 1 << 20, store: Any = None) -> Loader:
        loader = Loader(
            store=store or (lambda: self.client),
            blocks=self.blocks,
            coding=self.coding(),
            tally=self.tally,
            limits=LoadLimits(num_threads=2, num_decoders=2, step_bytes=step_bytes, staging_bytes=1 << 20),
            meter=self.meter,
            now_s=lambda: self.now_s,
        )
        self._closers.append(loader.close)
        return loader

    def saver(self, *, staging_bytes: int = 1 << 20) -> Saver:
        saver = Saver(
            store=lambda: self.client,
            blocks=self.blocks,
            coding=self.coding(),
            tally=self.tally,
            staging_bytes=staging_bytes,
            deadline_s=1.0,
        )
        self._closers.append(saver.close)
        return saver

    def run(self, loader: Loader, op: LoadOp) -> LoadResult:
        """Submit and step until the load is reported."""
        loader.submit(op)
        results: list[LoadResult] = []

        def done() -> bool:
            results.append(loader.advance(busy=True))
            return bool(results[-1].finished)

        until(done)
        assert all(not r.bad_blocks for r in results[:-1]), "bad blocks were reported before the request"
        return results[-1]

    def count(self, name: str) -> int:
        for key, amount in self.tally.drain().get("counts", {}).items():
            self.counts[key] = self.counts.get(key, 0) + amount
        return self.counts.get(name, 0)

    def close(self) -> None:
        for close in self._closers:
            close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Nothing is left of any test: no lease, no reservation."""
    rig = Rig()
    yield rig
    rig.close()
    assert rig.store.leftovers() == []


def op(start: int = 0, stop: int = 30, deadline_s: float = 30.0) -> LoadOp:
    spans = tuple(span for span in SPANS if span.stop > start and span.start < stop)
    return LoadOp(request_id="r", spans=spans, start=start, stop=stop, block_ids=BLOCK_IDS, deadline_s=deadline_s)


@pytest.mark.parametrize("step_bytes", [1, 3 * TOKEN_BYTES, 1 << 20])
@pytest.mark.parametrize(("start", "stop"), [(0, 30), (8, 30), (0, 29), (16, 27)])
def test_everything_arrives(rig: Rig, start: int, stop: int, step_bytes: int) -> None:
    for span in SPANS:
        put(rig.client, span)
    result = rig.run(rig.loader(step_bytes=step_bytes), op(start, stop))
    assert (result.finished, result.bad_blocks) == ({"r"}, set())
    assert torch.equal(rig.blocks.tokens(start, stop), KV[:, :, start:stop])
    assert (rig.count("loaded_tokens"), rig.count("loads_complete")) == (stop - start, 1)


def test_a_busy_step_is_bounded_and_an_idle_one_is_eight_times_that(rig: Rig) -> None:
    for span in SPANS:
        put(rig.client, span)
    loader = rig.loader(step_bytes=TOKEN_BYTES)
    loader.submit(op())
    steps = [0]

    def first_step() -> bool:
        loader.advance(busy=True)
        steps[0] = rig.count("loaded_tokens")
        return steps[0] > 0

    until(first_step)
    assert steps[0] == 1
    loader.advance(busy=False)
    assert rig.count("loaded_tokens") == 9


def test_nothing_behind_a_gap_is_asked_for(rig: Rig) -> None:
    asked: list[Any] = []

    class Watching(MemoryStoreClient):
        def stream(self, key: Any, *, deadline_s: float) -> Any:
            asked.append(key)
            return super().stream(key, deadline_s=deadline_s)

    put(rig.client, SPANS[0])
    put(rig.client, SPANS[2])
    rig.client = Watching(rig.store)
    rig.run(rig.loader(), op(deadline_s=0.2))
    assert asked == [SPANS[0].key, SPANS[1].key, SPANS[1].key], "ahead of its turn, and once more when it is due"


@pytest.mark.parametrize(("missing", "valid_blocks"), [(0, 0), (1, 1), (2, 2)])
def test_the_first_missing_chunk_ends_the_load(rig: Rig, missing: int, valid_blocks: int) -> None:
    for index, span in enumerate(SPANS):
        if index != missing:
            put(rig.client, span)
    result = rig.run(rig.loader(), op())
    assert result.bad_blocks == set(BLOCK_IDS[valid_blocks:])
    assert torch.equal(rig.blocks.tokens(0, 10 * missing), KV[:, :, : 10 * missing])
    assert (rig.count("load_failures.missing"), rig.count("load_failed_tokens")) == (1, 30 - 10 * missing)


@pytest.mark.parametrize("changes", [{"base_position": 3}, {"num_tokens": 5}])
def test_a_chunk_of_something_else_is_a_mismatch(rig: Rig, changes: dict[str, int]) -> None:
    put(rig.client, SPANS[0], **changes)
    result = rig.run(rig.loader(), op(stop=10))
    assert result.bad_blocks == set(BLOCK_IDS)
    assert rig.count("load_failures.mismatch") == 1


def test_a_store_that_fails_costs_the_load(rig: Rig) -> None:
    def broken() -> Any:
        raise OSError("no store")

    assert rig.run(rig.loader(store=broken), op()).bad_blocks == set(BLOCK_IDS)
    assert rig.count("load_failures.store_error") == 1


def test_blocks_that_fail_cost_the_load(rig: Rig) -> None:
    for span in SPANS:
        put(rig.client, span)
    rig.blocks.broken = True
    assert rig.run(rig.loader(), op()).bad_blocks == set(BLOCK_IDS)
    assert rig.count("load_failures.scatter_error") == 1


def test_a_deadline_that_has_passed_reads_nothing(rig: Rig) -> None:
    assert rig.run(rig.loader(), op(deadline_s=0.0)).bad_blocks == set(BLOCK_IDS)
    assert rig.count("load_failures.deadline") == 1


class HangingClient(MemoryStoreClient):
    """Breaks the store client's promise: reads do not end by their deadline."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.go_on = threading.Event()
        self.entered = threading.Event()

    def stream(self, key: Any, *, deadline_s: float) -> Any:
        self.entered.set()
        self.go_on.wait(60)
        return super().stream(key, deadline_s=deadline_s)


@pytest.mark.parametrize("dropped", [False, True])
def test_a_read_that_hangs_is_given_up_and_its_leases_return(rig: Rig, dropped: bool) -> None:
    put(rig.client, SPANS[0])
    rig.client = client = HangingClient(rig.store)
    loader = rig.loader()
    loader.submit(op(stop=10, deadline_s=1.0))
    assert client.entered.wait(30)
    if dropped:
        assert loader.drop("r")
        assert not loader.drop("r")
    else:
        assert loader.advance(busy=True) == LoadResult(set(), set())
        rig.now_s += 10.0
        assert loader.advance(busy=True) == LoadResult({"r"}, set(BLOCK_IDS))
        assert rig.count("load_failures.deadline") == 1
    assert loader.num_open == 0
    client.go_on.set()
    until(lambda: rig.store.leftovers() == [])
    assert loader.advance(busy=True) == LoadResult(set(), set())


def test_drop_of_a_staged_load_returns_its_leases(rig: Rig) -> None:
    put(rig.client, SPANS[0])
    loader = rig.loader(step_bytes=TOKEN_BYTES)
    loader.submit(op(stop=10))
    until(lambda: not loader.advance(busy=True).finished and rig.count("loaded_tokens") > 0)
    assert loader.was_loaded("r", SPANS[0].key)
    assert loader.drop("r")
    assert rig.store.leftovers() == []
    assert not loader.was_loaded("r", SPANS[0].key)
    assert loader.advance(busy=True) == LoadResult(set(), set())


def save_op(span: ChunkSpan) -> SaveOp:
    first, last = span.start // BLOCK, -(-span.stop // BLOCK)
    return SaveOp(request_id="r", span=span, block_ids=BLOCK_IDS[first:last], tenant="0123456789abcdef")


def fill(rig: Rig) -> None:
    rig.blocks.scatter(KV, slots=rig.blocks.slots(BLOCK_IDS, start=0, stop=30))


def test_saved_chunks_are_what_was_in_the_blocks(rig: Rig) -> None:
    began_s = time.time()
    fill(rig)
    saver = rig.saver()
    for span in SPANS:
        saver.save(save_op(span))
    rig.blocks.rows.zero_()
    assert saver.flush(deadline_s=30.0)
    for span, lease in zip(SPANS, rig.client.read([s.key for s in SPANS], deadline_s=1.0), strict=True):
        with lease:
            assert (lease.meta.base_position, lease.meta.num_tokens) == (span.start, 10)
            assert lease.meta.tenant == "0123456789abcdef"
            assert began_s <= lease.meta.learned_unix_s <= time.time()
            kv = codec_by_name("raw").decode(lease.payload, meta=lease.meta)
            assert torch.equal(kv, KV[:, :, span.start : span.stop])
    assert (rig.count("saves.stored"), rig.count("saved_tokens")) == (3, 30)


def test_saves_beyond_the_staging_bound_are_dropped(rig: Rig) -> None:
    fill(rig)
    saver = rig.saver(staging_bytes=0)
    saver.save(save_op(SPANS[0]))
    assert (saver.staged_bytes, rig.count("saves.staging_full")) == (0, 1)
    assert rig.store.keys() == []


@pytest.mark.parametrize(
    ("fault", "outcome"), [(Fault.REFUSED, "refused"), (Fault.UNCOMMITTED, "refused"), (None, "refused")]
)
def test_a_store_that_does_not_take_it(rig: Rig, fault: Fault | None, outcome: str) -> None:
    fill(rig)
    put(rig.client, SPANS[1])
    rig.client = FaultyStoreClient(rig.client, named={SPANS[0].key: fault} if fault else {})
    saver = rig.saver()
    saver.save(save_op(SPANS[0] if fault else SPANS[1]))
    assert saver.flush(deadline_s=30.0)
    assert rig.count(f"saves.{outcome}") == 1
    assert rig.store.keys() == [SPANS[1].key]


def test_errors_on_either_side_are_counted_and_leave_nothing_staged(rig: Rig) -> None:
    saver = rig.saver()
    rig.blocks.broken = True
    saver.save(save_op(SPANS[0]))
    rig.blocks.broken = False
    rig.client = None
    saver.save(save_op(SPANS[0]))
    assert saver.flush(deadline_s=30.0)
    assert (saver.staged_bytes, rig.count("saves.error")) == (0, 2)
