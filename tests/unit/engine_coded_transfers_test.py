"""Coded chunks between store and engine: layer by layer, level by level, with profiles that travel.

Covers: decoding while a chunk arrives, deadlines, damage, silence, missing profiles, bounds on memory, hand-overs.
Does not cover: uncoded chunks (`tests/unit/engine_transfers_test.py`), real codecs (`tests/contract`), real engines
(`tests/engine`).
"""

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import msgspec
import pytest
import torch
from support.engine_parts import Host, until
from support.layered_codec import TrickleClient, TwoLevels, tiny_profile

from kvstore.codecs.controller import PRIORS
from kvstore.codecs.profile import Profile
from kvstore.engine.coding import Coding
from kvstore.engine.loader import Loader, LoadLimits, LoadResult
from kvstore.engine.ops import LoadOp, SaveOp
from kvstore.engine.params import ChunkSpan, Handoff
from kvstore.engine.profiles import ProfileShelf, Weights, profile_key
from kvstore.engine.saver import Saver
from kvstore.engine.settings import ConnectorSettings
from kvstore.engine.speeds import SpeedMeter
from kvstore.engine.tally import Tally
from kvstore.interfaces import ChunkMeta
from kvstore.testing import MemoryStore, MemoryStoreClient
from kvstore.testing.samples import sample_key

LAYERS, HEADS, DIM, BLOCK = 3, 1, 4, 8
EDGES = (0, 10, 20, 30)
BLOCK_IDS = (0, 1, 2, 3)
SPANS = tuple(ChunkSpan(sample_key(a), a, b) for a, b in pairwise(EDGES))
KV = torch.randn(LAYERS, 2, 30, HEADS, DIM, generator=torch.Generator().manual_seed(1))
WEIGHTS = Weights("tiny", "the digest of tiny")
PROFILE = tiny_profile(layers=LAYERS, heads=HEADS, dim=DIM, digest="the digest of tiny")
TOKEN_BYTES = LAYERS * 2 * HEADS * DIM * 4


def model_meta(*, num_tokens: int = 1, base_position: int = 0) -> ChunkMeta:
    return ChunkMeta(
        num_tokens=num_tokens,
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        dtype="float32",
        base_position=base_position,
    )


class Rows:
    """Blocks as rows of one tensor."""

    block_size = BLOCK
    bytes_per_block = BLOCK * TOKEN_BYTES

    def __init__(self) -> None:
        self.rows = torch.zeros(LAYERS, 2, 64, HEADS, DIM)

    def meta(self, *, num_tokens: int, base_position: int) -> ChunkMeta:
        return model_meta(num_tokens=num_tokens, base_position=base_position)

    def accepts(self, meta: ChunkMeta) -> bool:
        return meta.num_layers == LAYERS

    def slots(self, block_ids: Any, *, start: int, stop: int) -> torch.Tensor:
        return torch.arange(start, stop)

    def scatter(self, kv_L2TNH: torch.Tensor, *, slots: torch.Tensor) -> None:
        self.rows[:, :, slots] = kv_L2TNH

    def gather(self, block_ids: Any, *, first: int, num_tokens: int) -> Any:
        start = block_ids[0] * BLOCK + first
        return Host(self.rows[:, :, start : start + num_tokens].clone())


class Worker:
    """One engine's connector: a loader and a saver over a store."""

    def __init__(self, client: Any, *, settings: ConnectorSettings | None = None, **options: Any) -> None:
        self.client, self.tally, self.meter, self.blocks = client, Tally(), options.pop("meter", SpeedMeter()), Rows()
        self.made: list[TwoLevels] = []
        self.shelf = ProfileShelf(store=lambda: client)
        settings = settings or ConnectorSettings()
        self.coding = Coding(
            settings,
            shelf=self.shelf,
            meter=self.meter,
            model=model_meta(),
            weights=WEIGHTS,
            layered={"transform": self._make},
        )
        limits: dict[str, Any] = {"num_threads": 2, "num_decoders": 2, "step_bytes": 1 << 20, "staging_bytes": 1 << 30}
        self.loader = Loader(
            store=lambda: client,
            blocks=self.blocks,
            coding=self.coding,
            tally=self.tally,
            limits=LoadLimits(**limits | options),
            meter=self.meter,
        )
        self.saver = Saver(
            store=lambda: client,
            blocks=self.blocks,
            coding=self.coding,
            tally=self.tally,
            staging_bytes=1 << 30,
            deadline_s=5.0,
        )
        self.counts: dict[str, int] = {}

    def _make(self, profile: Profile) -> TwoLevels:
        self.made.append(TwoLevels(profile))
        return self.made[-1]

    def save(self, *, handoff: Handoff = "none") -> None:
        self.blocks.rows[:, :, :30] = KV
        for span in SPANS:
            first, last = span.start // BLOCK, -(-span.stop // BLOCK)
            self.saver.save(
                SaveOp(request_id="s", span=span, block_ids=tuple(range(first, last)), tenant="", handoff=handoff)
            )
        assert self.saver.flush(deadline_s=30.0)

    def load(self, *, deadline_s: float = 30.0, spans: tuple[ChunkSpan, ...] = SPANS) -> LoadResult:
        self.loader.submit(
            LoadOp(
                request_id="r",
                spans=spans,
                start=0,
                stop=spans[-1].stop,
                block_ids=BLOCK_IDS,
                deadline_s=deadline_s,
            )
        )
        found: list[LoadResult] = []

        def over() -> bool:
            found.append(self.loader.advance(busy=True))
            return bool(found[-1].finished)

        until(over)
        return found[-1]

    def count(self, name: str) -> int:
        for key, amount in self.tally.drain().get("counts", {}).items():
            self.counts[key] = self.counts.get(key, 0) + amount
        return self.counts.get(name, 0)

    def close(self) -> None:
        self.loader.close()
        self.saver.close()
        assert self.loader.staged_bytes == 0


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """The only shipped profile is `PROFILE`."""
    monkeypatch.setattr("kvstore.engine.profiles.SHIPPED", tmp_path)
    (tmp_path / "tiny.lkp").write_bytes(PROFILE.to_bytes())
    return tmp_path


@pytest.fixture
def world(shipped: Any) -> Iterator[Any]:
    """A store, `transform` savers and whatever else a test makes; nothing is left at the end."""
    store = MemoryStore()
    made: list[Worker] = []

    def make(client: Any = None, **options: Any) -> Worker:
        made.append(Worker(client or MemoryStoreClient(store), **options))
        return made[-1]

    make.store = store  # type: ignore[attr-defined]
    yield make
    for worker in made:
        worker.close()
    assert store.leftovers() == []


CODED = ConnectorSettings(codec="transform")


def trickle(world: Any) -> TrickleClient:
    """Three chunks saved with both levels; nothing of them has arrived."""
    world(settings=CODED).save()
    client = TrickleClient(world.store)
    for span in SPANS:
        client.arrived[span.key] = 0
    client.arrived[profile_key(PROFILE.id)] = 1 << 30
    return client


def size_of(world: Any, span: ChunkSpan) -> int:
    (lease,) = MemoryStoreClient(world.store).read([span.key], deadline_s=1.0)
    with lease:
        return len(lease.payload)


def test_saved_by_one_worker_and_loaded_by_another(world: Any) -> None:
    saver, loader = world(settings=CODED), world()
    saver.save()
    assert loader.load() == LoadResult({"r"}, set())
    assert torch.equal(loader.blocks.rows[:, :, :30], KV)
    assert (saver.count("saved_chunks.transform"), loader.count("loaded_levels.1")) == (3, 3)
    assert saver.count("saved_kv_bytes") == 30 * TOKEN_BYTES
    assert loader.count("loaded_encoded_bytes") == saver.count("saved_bytes")


def test_a_level_below_the_finest_is_stored_as_a_prefix(world: Any) -> None:
    saver, loader = world(settings=ConnectorSettings(codec="transform", level=0)), world()
    saver.save()
    loader.load()
    assert torch.equal(loader.blocks.rows[:, :, :30], KV.bfloat16().float())
    assert loader.count("loaded_levels.0") == 3


def test_a_layer_is_decoded_before_the_next_has_arrived(world: Any) -> None:
    client = trickle(world)
    loader = world(client)
    loader.loader.submit(
        LoadOp(request_id="r", spans=SPANS[:1], start=0, stop=10, block_ids=BLOCK_IDS, deadline_s=30.0)
    )
    meta = model_meta(num_tokens=10)
    whole = size_of(world, SPANS[0])
    client.arrive(SPANS[0].key, whole - 2 * TwoLevels.layer_bytes(meta, 1))
    until(lambda: bool(loader.made) and (0, 1) in loader.made[0].decoded)
    assert (1, 1) not in loader.made[0].decoded
    assert loader.loader.advance(busy=True) == LoadResult(set(), set())
    client.arrive(SPANS[0].key, whole)
    until(lambda: bool(loader.loader.advance(busy=True).finished))
    assert torch.equal(loader.blocks.rows[:, :, :10], KV[:, :, :10])


def test_nothing_is_asked_of_a_head_whose_first_bytes_are_not_there(world: Any) -> None:
    client = trickle(world)
    loader = world(client)
    client.arrive(SPANS[0].key, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TwoLevels, "head_bytes", None)
        assert loader.load(deadline_s=0.3, spans=SPANS[:1]).bad_blocks
    assert loader.count("load_failures.deadline") == 1


def test_a_chunk_can_be_read_only_when_its_profile_can(world: Any) -> None:
    asked: list[Any] = []

    class Watching(MemoryStoreClient):
        def reserve(self, key: Any, *args: Any, **options: Any) -> Any:
            asked.append(key)
            return super().reserve(key, *args, **options)

    world(Watching(world.store), settings=CODED).save()
    assert asked[0] == profile_key(PROFILE.id)


def test_at_the_deadline_what_has_arrived_is_used(world: Any) -> None:
    client = trickle(world)
    loader = world(client)
    meta = model_meta(num_tokens=10)
    # Level 0 of all layers, level 1 of the first layer.
    client.arrive(SPANS[0].key, size_of(world, SPANS[0]) - 2 * TwoLevels.layer_bytes(meta, 1))
    result = loader.load(deadline_s=0.3, spans=SPANS[:1])
    assert result == LoadResult({"r"}, set())
    assert torch.equal(loader.blocks.rows[0, :, :10], KV[0, :, :10])
    assert torch.equal(loader.blocks.rows[1:, :, :10], KV[1:, :, :10].bfloat16().float())
    assert (loader.count("loaded_levels.0"), loader.count("loads_complete")) == (1, 1)


def test_a_chunk_without_its_coarsest_level_is_a_miss_from_there_on(world: Any) -> None:
    client = trickle(world)
    loader = world(client)
    client.arrive(SPANS[0].key, 1 << 20)
    client.arrive(SPANS[1].key, 100)
    result = loader.load(deadline_s=0.3)
    assert result.bad_blocks == set(BLOCK_IDS[1:])
    assert torch.equal(loader.blocks.rows[:, :, :10], KV[:, :, :10])
    assert loader.count("load_failures.deadline") == 1


def rewrite(world: Any, span: ChunkSpan, change: Callable[[bytearray], bytearray]) -> None:
    client = MemoryStoreClient(world.store)
    (lease,) = client.read([span.key], deadline_s=1.0)
    with lease:
        data, meta = change(bytearray(lease.payload)), lease.meta
    world.store.drop(span.key)
    write = client.reserve(span.key, meta, len(data), deadline_s=1.0)
    write.payload[:] = data
    assert write.commit()


def flip(at: int) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        data[at] ^= 1
        return data

    return change


def test_damage_in_a_refinement_costs_that_level_of_that_layer(world: Any) -> None:
    world(settings=CODED).save()
    rewrite(world, SPANS[0], flip(-10))
    loader = world()
    assert loader.load() == LoadResult({"r"}, set())
    assert torch.equal(loader.blocks.rows[:2, :, :10], KV[:2, :, :10])
    assert torch.equal(loader.blocks.rows[2, :, :10], KV[2, :, :10].bfloat16().float())
    assert (loader.count("damaged_parts"), loader.count("loaded_levels.0")) == (1, 1)


@pytest.mark.parametrize("at", [0, 20])
def test_damage_in_the_base_or_the_head_is_a_miss(world: Any, at: int) -> None:
    world(settings=ConnectorSettings(codec="transform", level=0)).save()
    rewrite(world, SPANS[1], flip(at))
    loader = world()
    assert loader.load().bad_blocks == set(BLOCK_IDS[1:])
    assert loader.count("load_failures.mismatch") == 1


def test_a_truncated_chunk_is_a_coarser_one(world: Any) -> None:
    world(settings=CODED).save()
    meta = model_meta(num_tokens=10)
    rewrite(world, SPANS[0], lambda data: data[: -TwoLevels.layer_bytes(meta, 1)])
    loader = world()
    assert loader.load(spans=SPANS[:1]) == LoadResult({"r"}, set())
    assert torch.equal(loader.blocks.rows[:, :, :10], KV[:, :, :10].bfloat16().float())


def test_a_profile_that_does_not_ship_comes_from_the_store(world: Any, shipped: Any) -> None:
    world(settings=CODED).save()
    (shipped / "tiny.lkp").unlink()
    loader = world()
    assert loader.load() == LoadResult({"r"}, set())
    assert torch.equal(loader.blocks.rows[:, :, :30], KV)


def test_a_missing_profile_is_a_miss_and_is_asked_for_again_later(world: Any, shipped: Any) -> None:
    world(settings=CODED).save()
    (shipped / "tiny.lkp").unlink()
    world.store.drop(profile_key(PROFILE.id))
    loader = world()
    for _ in range(2):
        assert loader.load().bad_blocks == set(BLOCK_IDS)
    assert loader.count("load_failures.profile") == 2


def test_a_record_that_is_not_the_profile_it_claims_to_be_is_refused(world: Any, shipped: Any) -> None:
    world(settings=CODED).save()
    (shipped / "tiny.lkp").unlink()
    key = profile_key(PROFILE.id)
    other = tiny_profile(layers=LAYERS, heads=HEADS, dim=DIM, name="other").to_bytes()
    world.store.drop(key)
    client = MemoryStoreClient(world.store)
    write = client.reserve(key, model_meta(), len(other), deadline_s=1.0)
    write.payload[:] = other
    assert write.commit()
    loader = world()
    loader.load()
    assert loader.count("load_failures.profile") == 1


def test_a_lost_profile_is_published_again(world: Any) -> None:
    now_s = [0.0]
    client = MemoryStoreClient(world.store)
    shelf = ProfileShelf(store=lambda: client, now_s=lambda: now_s[0])
    assert shelf.publish(PROFILE, deadline_s=1.0)
    world.store.drop(profile_key(PROFILE.id))
    assert shelf.publish(PROFILE, deadline_s=1.0)
    assert world.store.keys() == []
    now_s[0] += 61.0
    assert shelf.publish(PROFILE, deadline_s=1.0)
    assert world.store.keys() == [profile_key(PROFILE.id)]


def test_an_unknown_codec_is_a_miss(world: Any) -> None:
    world(settings=CODED).save()
    client = MemoryStoreClient(world.store)
    (lease,) = client.read([SPANS[0].key], deadline_s=1.0)
    with lease:
        data, meta = bytes(lease.payload), lease.meta
    world.store.drop(SPANS[0].key)
    write = client.reserve(SPANS[0].key, msgspec.structs.replace(meta, codec="next"), len(data), deadline_s=1.0)
    write.payload[:] = data
    assert write.commit()
    loader = world()
    loader.load()
    assert loader.count("load_failures.mismatch") == 1


def fast_prefill(tokens_per_s: float) -> SpeedMeter:
    meter = SpeedMeter()
    meter.note_prefill(int(tokens_per_s), seconds=1.0)
    return meter


def test_a_silent_source_is_given_up_long_before_the_deadline(world: Any) -> None:
    client = trickle(world)
    loader = world(client, meter=fast_prefill(1000.0))
    began_s = time.monotonic()
    assert loader.load(deadline_s=20.0).bad_blocks == set(BLOCK_IDS)
    assert time.monotonic() - began_s < 10.0
    assert (loader.count("load_failures.slow"), loader.count("recompute_chosen")) == (1, 1)
    assert loader.meter.speeds.link["remote"].per_s < PRIORS.link["remote"].per_s


def test_a_link_known_to_be_slow_is_watched_while_its_request_computes(world: Any) -> None:
    client = trickle(world)
    meter = fast_prefill(10_000.0)
    for _ in range(200):
        meter.note_link("remote", 0, seconds=5.0)
    slow = meter.speeds.link["remote"].per_s
    loader = world(client, meter=meter)
    client.arrive(SPANS[0].key, 100)
    assert loader.load(deadline_s=20.0).bad_blocks == set(BLOCK_IDS)
    assert loader.count("load_failures.slow") == 1
    for span in SPANS:
        client.arrive(span.key, 1 << 20)
    until(lambda: meter.speeds.link["remote"].per_s > 100 * slow)


def test_nothing_is_computed_by_choice_where_that_is_off(world: Any) -> None:
    client = trickle(world)
    loader = world(client, meter=fast_prefill(1000.0))
    object.__setattr__(loader.loader._reader, "may_recompute", False)
    assert loader.load(deadline_s=0.5).bad_blocks == set(BLOCK_IDS)
    assert loader.count("load_failures.deadline") == 1


def test_decoded_chunks_wait_for_memory(world: Any) -> None:
    """The bound holds one chunk: the next is decoded when the engine has taken the one before."""
    world(settings=CODED).save()
    loader = world(staging_bytes=1 << 20)
    loader.loader.submit(LoadOp(request_id="r", spans=SPANS, start=0, stop=30, block_ids=BLOCK_IDS, deadline_s=30.0))
    seen: set[int] = set()

    def over() -> bool:
        seen.add(loader.loader.staged_bytes)
        return bool(loader.loader.advance(busy=True).finished)

    until(over)
    assert max(seen) <= 1 << 20
    assert torch.equal(loader.blocks.rows[:, :, :30], KV)


def test_a_load_that_is_dropped_gives_everything_back(world: Any) -> None:
    client = trickle(world)
    loader = world(client)
    client.arrive(SPANS[0].key, 1 << 20)
    client.arrive(SPANS[1].key, 100)
    loader.loader.submit(LoadOp(request_id="r", spans=SPANS, start=0, stop=30, block_ids=BLOCK_IDS, deadline_s=30.0))
    until(lambda: loader.loader.staged_bytes > 0)
    assert loader.loader.drop("r")
    until(lambda: loader.loader.staged_bytes == 0 and world.store.leftovers() == [])


@pytest.mark.parametrize(
    ("handoff", "rate", "codec"),
    [("none", 5e9, "transform"), ("local", 5e9, "raw"), ("remote", 5e9, "raw"), ("remote", 1e6, "transform")],
)
def test_a_hand_over_is_coded_where_the_link_is_slower_than_the_codec(
    world: Any, handoff: Handoff, rate: float, codec: str
) -> None:
    saver = world(settings=CODED)
    if handoff != "none":
        for _ in range(20):
            saver.meter.note_link(handoff, int(rate), seconds=1.0)
    saver.save(handoff=handoff)
    assert saver.count(f"saved_chunks.{codec}") == 3


@pytest.mark.parametrize(("codec", "bound"), [("lossless", 0.0), ("int8", 0.1), ("int4", 0.6)])
def test_codecs_without_levels_are_read_when_they_are_whole(world: Any, codec: Any, bound: float) -> None:
    world(settings=ConnectorSettings(codec=codec)).save()
    loader = world()
    assert loader.load() == LoadResult({"r"}, set())
    assert (loader.blocks.rows[:, :, :30] - KV).abs().max() <= bound
