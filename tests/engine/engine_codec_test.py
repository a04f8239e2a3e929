"""Coded chunks between two real engines: answers stay close, and whatever is wrong with a chunk costs a recompute.

Covers: `transform` saved by one engine process and loaded by another, both levels of the KL bound, damage and
truncation, a profile that is missing and one that travels through the store, a hand-over within one node.
Does not cover: quality over many texts (`learnonce bench codec`), exactness of raw chunks
(`tests/engine/engine_connector_test.py`).
"""

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvstore.client import NodeStoreClient
from kvstore.codecs.profile import Profile
from kvstore.engine.harness import Answered, EngineChild
from kvstore.engine.params import ChunkSpan, Handoff, build_transfer_params
from kvstore.engine.profiles import profile_key
from kvstore.engine.settings import ConnectorSettings, EngineSettings
from kvstore.keys import ChunkKey, chain_keys, root_key
from kvstore.settings import StoreSettings
from kvstore.testing.poll import wait_until
from kvstore.testing.process import StoreProcess

pytestmark = pytest.mark.engine

MODEL = os.environ.get("LEARNONCE_TEST_MODEL", str(Path(__file__).parents[2] / ".models" / "SmolLM2-135M-Instruct"))
PROFILE = os.environ.get("LEARNONCE_TEST_PROFILE")
"""Another profile than the shipped one; the reading engine then finds it in the store."""
PREFIX = "learnonce_kvstore_engine_"
SPAN_TOKENS = 96
NUM_SPANS = 4
ANSWER_TOKENS = 8
HELD_TOKENS = SPAN_TOKENS * NUM_SPANS
TEXT = """The lighthouse of Brennhaven was built in 1871 from grey granite. Its keeper, Mara Lindqvist, wrote down the
weather every morning. In the spring of 1902 a storm took the boathouse, and the village paid for a new one. The lamp
burned whale oil first, then paraffin, and since 1934 it has been electric. Ships on their way to the northern ports
steer by its two white flashes every ten seconds. Children of the village learn to count by them.
"""
KL_BOUND = 0.2
"""Of one first token after a few hundred: ten times what the mean over texts may be at this level."""


class World:
    """Two engines and their store."""

    def __init__(self, coder: EngineChild, reader: EngineChild, store: StoreProcess) -> None:
        self.coder, self.reader, self.store = coder, reader, store
        self.client = NodeStoreClient(store.socket_path, secret=store.secret, client_name="test")
        self.ids = self._tokens(TEXT * 6)[: HELD_TOKENS + 12]

    @staticmethod
    def _tokens(text: str) -> list[int]:
        from transformers import AutoTokenizer

        ids: list[int] = AutoTokenizer.from_pretrained(MODEL)(text).input_ids
        return ids

    def spans(self, name: str) -> list[ChunkSpan]:
        edges = [index * SPAN_TOKENS for index in range(NUM_SPANS + 1)]
        parts = [self.ids[start : start + SPAN_TOKENS] for start in edges[:-1]]
        keys = chain_keys(root_key(self.coder.scope, salt=name), parts)
        return [ChunkSpan(key, start, start + SPAN_TOKENS) for key, start in zip(keys, edges[:-1], strict=True)]

    def learn(self, name: str, *, handoff: Handoff = "none") -> list[ChunkSpan]:
        """Chunks of the text under keys of their own, saved by `coder`."""
        spans = self.spans(name)
        transfer = build_transfer_params(save=spans, load_deadline_s=5.0, handoff=handoff)
        assert self.coder.ask(self.ids, salt=f"learn {name}", transfer=transfer).cached_tokens == 0
        assert all(self.client.wait([span.key for span in spans], deadline_s=30.0)), "chunks were not saved"
        return spans

    def load(self, spans: list[ChunkSpan], *, salt: str) -> Answered:
        transfer = build_transfer_params(load=spans, load_deadline_s=20.0)
        return self.reader.ask(self.ids, salt=salt, transfer=transfer, max_tokens=ANSWER_TOKENS, logprobs=100)

    def rewrite(self, key: ChunkKey, *, keep_bytes: int | None = None, flip: int | None = None) -> None:
        """Put other bytes under a key, with a record checksum that fits them."""
        (lease,) = self.client.read([key], deadline_s=5.0)
        assert lease is not None
        with lease:
            data, meta = bytearray(lease.payload[:keep_bytes]), lease.meta
        if flip is not None:
            data[flip] ^= 0x40
        assert self.client.drop([key], deadline_s=5.0)
        write = self.client.reserve(key, meta, len(data), deadline_s=5.0)
        assert write is not None
        write.payload[:] = data
        assert write.commit()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("codec")
    secret, path = os.urandom(32), str(folder / "store.sock")
    cores = sorted(os.sched_getaffinity(0))

    def engine(name: str, core: int, connector: ConnectorSettings) -> EngineChild:
        settings = EngineSettings(
            model=MODEL,
            dtype="float32",
            max_model_len=512,
            block_size=32,
            kv_cache_bytes=256 << 20,
            cpus=(str(cores[core % len(cores)]),),
            connector=connector,
            vllm_arguments={"max_logprobs": 100},
        )
        return EngineChild(settings, store_socket=path, secret=secret, log=folder / f"{name}.log")

    coded = ConnectorSettings(codec="transform", profile=PROFILE, recompute_when_faster=False)
    with (
        StoreProcess(StoreSettings(host_bytes=1 << 30, nvme=None), secret=secret, socket_path=path) as store,
        engine("coder", 0, coded) as coder,
        engine("reader", 1, ConnectorSettings(recompute_when_faster=False)) as reader,
    ):
        try:
            assert coder.scope == reader.scope
            world = World(coder, reader, store)
            yield world
            world.client.close()
        finally:
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}")


@pytest.fixture(scope="module")
def exact(world: World) -> Answered:
    """The answer of an engine that computes the whole prompt."""
    return world.reader.ask(world.ids, salt="exact", max_tokens=ANSWER_TOKENS, logprobs=100)


def kl(exact: Answered, other: Answered) -> float:
    least = min(other.logprobs.values())
    return sum(math.exp(p) * (p - other.logprobs.get(token, least)) for token, p in exact.logprobs.items())


class Grown:
    """How much the reader's counters have grown."""

    def __init__(self, engine: EngineChild) -> None:
        self._engine, self._asked = engine, 0
        self._before = self._reported()

    def _reported(self) -> dict[str, float]:
        """An engine reports what it did with its steps, so it has to make some."""
        self._asked += 1
        self._engine.ask([5, 6, 7], salt=f"step {self._asked} {time.monotonic()}", max_tokens=2)
        return self._engine.counters()

    def __call__(self, name: str) -> float:
        return self._reported().get(PREFIX + name, 0.0) - self._before.get(PREFIX + name, 0.0)

    def wait(self, name: str, amount: float) -> None:
        wait_until(lambda: self(name) == amount, what=f"{name} to grow by {amount}")


def test_an_answer_from_coded_chunks_is_close(world: World, exact: Answered) -> None:
    saved, loaded = Grown(world.coder), Grown(world.reader)
    spans = world.learn("close")
    answer = world.load(spans, salt="close")
    assert answer.cached_tokens == HELD_TOKENS
    assert 0 <= kl(exact, answer) < KL_BOUND
    assert answer.tokens == exact.tokens, "the text is one that repeats itself: nobody should get it wrong"
    saved.wait("saved_chunks_total.transform", NUM_SPANS)
    assert saved("saved_kv_bytes_total") > 4 * saved("saved_bytes_total")
    loaded.wait("loads_complete_total", 1)
    assert loaded("load_decode_seconds_count") == NUM_SPANS


def test_a_truncated_chunk_is_a_coarser_one(world: World, exact: Answered) -> None:
    spans = world.learn("truncated")
    (lease,) = world.client.read([spans[1].key], deadline_s=5.0)
    assert lease is not None
    with lease:
        whole = len(lease.payload)
    world.rewrite(spans[1].key, keep_bytes=int(whole * 0.9))
    grown = Grown(world.reader)
    answer = world.load(spans, salt="truncated")
    assert answer.cached_tokens == HELD_TOKENS
    assert kl(exact, answer) < KL_BOUND
    grown.wait("loads_complete_total", 1)
    assert sum(grown(f"loaded_levels_total.{level}") for level in range(4)) == NUM_SPANS


def test_a_damaged_refinement_is_left_out(world: World, exact: Answered) -> None:
    spans = world.learn("damaged")
    world.rewrite(spans[2].key, flip=-100)
    grown = Grown(world.reader)
    answer = world.load(spans, salt="damaged")
    assert answer.cached_tokens == HELD_TOKENS
    assert kl(exact, answer) < KL_BOUND
    grown.wait("damaged_parts_total", 1)


def test_a_chunk_without_its_head_is_computed(world: World, exact: Answered) -> None:
    spans = world.learn("headless")
    world.rewrite(spans[0].key, flip=40)
    grown = Grown(world.reader)
    answer = world.load(spans, salt="headless")
    assert (answer.cached_tokens, answer.tokens) == (0, exact.tokens)
    grown.wait("load_failures_total.mismatch", 1)


def test_a_chunk_of_an_unknown_profile_is_computed(world: World, exact: Answered) -> None:
    spans = world.learn("unknown profile")
    (lease,) = world.client.read([spans[0].key], deadline_s=5.0)
    assert lease is not None
    with lease:
        data, meta = bytes(lease.payload), lease.meta
    assert world.client.drop([spans[0].key], deadline_s=5.0)
    other = msgspec.structs.replace(meta, profile="0" * 64)
    write = world.client.reserve(spans[0].key, other, len(data), deadline_s=5.0)
    assert write is not None
    write.payload[:] = data
    assert write.commit()
    grown = Grown(world.reader)
    answer = world.load(spans, salt="unknown profile")
    assert (answer.cached_tokens, answer.tokens) == (0, exact.tokens)
    grown.wait("load_failures_total.profile", 1)


def test_the_profile_is_in_the_store(world: World) -> None:
    world.learn("profile")
    (lease,) = world.client.read([world.spans("profile")[0].key], deadline_s=5.0)
    assert lease is not None
    with lease:
        profile_id = lease.meta.profile
    assert world.client.wait([profile_key(profile_id)], deadline_s=10.0) == [True]
    (record,) = world.client.read([profile_key(profile_id)], deadline_s=5.0)
    assert record is not None
    with record:
        assert Profile.from_bytes(bytes(record.payload)).id == profile_id


def test_a_hand_over_within_the_node_is_raw_and_exact(world: World, exact: Answered) -> None:
    saved = Grown(world.coder)
    spans = world.learn("hand-over", handoff="local")
    answer = world.load(spans, salt="hand-over")
    assert (answer.cached_tokens, answer.tokens) == (HELD_TOKENS, exact.tokens)
    assert kl(exact, answer) == pytest.approx(0.0, abs=1e-3)
    saved.wait("saved_chunks_total.raw", NUM_SPANS)
