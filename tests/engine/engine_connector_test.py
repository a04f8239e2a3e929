"""Reuse equals computing, token for token, whatever goes wrong: two real engines, float32, one store between them.

`saver` has room for everything. `loader` has a KV pool of 64 blocks, and may stage one block of saves: less than any
chunk needs.
"""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.engine_harness import Ask, EngineProcess, chunk_spans

from kvstore.client import NodeStoreClient
from kvstore.engine.params import ChunkSpan, build_transfer_params
from kvstore.engine.settings import ConnectorSettings, EngineSettings
from kvstore.keys import chain_keys, root_key
from kvstore.settings import StoreSettings
from kvstore.testing.poll import wait_until
from kvstore.testing.process import StoreProcess

pytestmark = pytest.mark.engine

MODEL = os.environ.get("LEARNONCE_TEST_MODEL", str(Path(__file__).parents[2] / ".models" / "SmolLM2-135M-Instruct"))
BLOCK_TOKENS = 32
BLOCK_BYTES = BLOCK_TOKENS * 2 * 30 * 3 * 64 * 4
SPAN_TOKENS = 45
NUM_SPANS = 6
TAIL_TOKENS = 12
HELD_TOKENS = SPAN_TOKENS * NUM_SPANS
ANSWER_TOKENS = 24
PREFIX = "learnonce_kvstore_engine_"


def make_settings(num_blocks: int, connector: ConnectorSettings) -> EngineSettings:
    return EngineSettings(
        model=MODEL,
        dtype="float32",
        max_model_len=1024,
        block_size=BLOCK_TOKENS,
        kv_cache_bytes=num_blocks * BLOCK_BYTES,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        connector=connector,
    )


class Case:
    """A prompt of its own, its chunks, and the answer that a plain computation gives."""

    def __init__(self, number: int, engine: EngineProcess, *, num_spans: int = NUM_SPANS) -> None:
        held = SPAN_TOKENS * num_spans
        draw = random.Random(number)
        self.prompt = [draw.randrange(100, 40000) for _ in range(held + TAIL_TOKENS)]
        edges = [index * SPAN_TOKENS for index in range(num_spans + 1)]
        parts = [self.prompt[i * SPAN_TOKENS : (i + 1) * SPAN_TOKENS] for i in range(num_spans)]
        self.spans = chunk_spans(chain_keys(root_key(engine.scope, salt=str(number)), parts), edges)

    def save(self) -> dict[str, object]:
        return build_transfer_params(save=self.spans, load_deadline_s=5.0)

    def load(self, *, deadline_s: float = 5.0, save: tuple[ChunkSpan, ...] = ()) -> dict[str, object]:
        return build_transfer_params(load=self.spans, save=save, load_deadline_s=deadline_s)


class World:
    """The engines and their store."""

    def __init__(self, saver: EngineProcess, loader: EngineProcess, store: StoreProcess) -> None:
        self.saver, self.loader, self.store = saver, loader, store
        self.client = NodeStoreClient(store.socket_path, secret=store.secret, client_name="test")
        self._next = 0

    def case(self, *, num_spans: int = NUM_SPANS) -> Case:
        self._next += 1
        return Case(self._next, self.saver, num_spans=num_spans)

    def learned(self, *, without: int | None = None) -> tuple[Case, tuple[int, ...]]:
        """A case whose chunks (but one) are in the store, and its answer, computed by `saver`."""
        case = self.case()
        kept = [span for index, span in enumerate(case.spans) if index != without]
        save = build_transfer_params(save=kept, load_deadline_s=5.0)
        answer = self.saver.ask(case.prompt, transfer=save, max_tokens=ANSWER_TOKENS)
        assert answer.cached_tokens == 0
        assert all(self.client.wait([span.key for span in kept], deadline_s=20.0)), "chunks were not saved"
        return case, answer.tokens


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("engine")
    secret, path = os.urandom(32), str(folder / "store.sock")
    tiny = ConnectorSettings(save_staging_bytes=2 * BLOCK_BYTES)

    def engine(name: str, rank: int, num_blocks: int, connector: ConnectorSettings) -> EngineProcess:
        settings = make_settings(num_blocks, connector)
        return EngineProcess(settings, log=folder / f"{name}.log", store_socket=path, secret=secret, replica_rank=rank)

    with (
        StoreProcess(StoreSettings(host_bytes=1 << 30, nvme=None), secret=secret, socket_path=path) as store,
        engine("saver", 0, 256, ConnectorSettings()) as saver,
        engine("loader", 1, 64, tiny) as loader,
    ):
        try:
            assert saver.scope == loader.scope
            world = World(saver, loader, store)
            yield world
            world.client.close()
        finally:
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-6000:]}")


@pytest.fixture
def frozen(world: World) -> Iterator[Callable[[], None]]:
    """SIGSTOP the store process; call it to let it go on. Afterwards the engine's connection works again."""
    probe, _ = world.learned()
    world.store.freeze()
    thawed = threading.Event()

    def thaw() -> None:
        if not thawed.is_set():
            thawed.set()
            world.store.thaw()

    yield thaw
    thaw()

    def loads() -> bool:
        return world.loader.ask(probe.prompt, transfer=probe.load(), max_tokens=1).cached_tokens > 0

    wait_until(loads, what="the engine to find its store again", deadline_s=20.0)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test: no load, no staged save."""
    yield
    if "kill_of_the_owner" in request.node.name:
        return
    world: World = request.getfixturevalue("world")
    for engine in (world.saver, world.loader):
        wait_until(lambda engine=engine: idle(engine), what="loads and saves to end", deadline_s=20.0)


def idle(engine: EngineProcess) -> bool:
    state = engine.state()
    return state["open_loads"] == 0 and state["staged_bytes"] == 0


def grown(engine: EngineProcess, before: dict[str, float], name: str) -> float:
    name = PREFIX + name
    return engine.metrics().get(name, 0.0) - before.get(name, 0.0)


def test_gather_returns_what_scatter_wrote(world: World) -> None:
    assert [world.saver.round_trip(1), world.loader.round_trip(2)] == ["", ""]


def test_prefill_speed_is_learned_from_whole_steps(world: World) -> None:
    """Loads are given up for a faster prefill: a step timed without its forward would give all of them up."""
    case, before = world.case(), world.saver.metrics()
    began_s = time.monotonic()
    world.saver.ask(case.prompt, max_tokens=1)
    elapsed_s = time.monotonic() - began_s
    assert grown(world.saver, before, "prefill_tokens_total") == 256  # the second step has too few to count
    # Without the forward it is a ten-thousandth; the rest of an answer takes long where others use the cores.
    assert 0.02 * elapsed_s < grown(world.saver, before, "prefill_seconds_sum") <= elapsed_s


def test_loaded_by_another_process_is_computed_token_for_token(world: World) -> None:
    case, expected = world.learned()
    before = world.loader.metrics()
    answer = world.loader.ask(case.prompt, transfer=case.load(), max_tokens=ANSWER_TOKENS)
    assert answer.tokens == expected
    assert answer.cached_tokens == HELD_TOKENS
    assert grown(world.loader, before, "loaded_tokens_total") == HELD_TOKENS
    assert grown(world.loader, before, "loads_complete_total") == 1
    assert grown(world.loader, before, "load_seconds_count") == 1


def test_whole_prompt_held_leaves_one_token_to_compute(world: World) -> None:
    case, _ = world.learned()
    case.prompt = case.prompt[:HELD_TOKENS]
    expected = world.saver.ask(case.prompt, max_tokens=8).tokens
    answer = world.loader.ask(case.prompt, transfer=case.load(), max_tokens=8)
    assert (answer.tokens, answer.cached_tokens) == (expected, HELD_TOKENS - 1)


def test_missing_middle_chunk(world: World) -> None:
    case, expected = world.learned(without=3)
    before = world.loader.metrics()
    answer = world.loader.ask(case.prompt, transfer=case.load(), max_tokens=ANSWER_TOKENS)
    assert answer.tokens == expected
    # The engine computes again from the start of the block in which the hole begins.
    assert answer.cached_tokens == 3 * SPAN_TOKENS // BLOCK_TOKENS * BLOCK_TOKENS
    assert grown(world.loader, before, "load_failures_total.missing") == 1
    assert grown(world.loader, before, "load_failed_tokens_total") == (NUM_SPANS - 3) * SPAN_TOKENS


def test_first_chunk_missing(world: World) -> None:
    case, expected = world.learned(without=0)
    answer = world.loader.ask(case.prompt, transfer=case.load(), max_tokens=ANSWER_TOKENS)
    assert (answer.tokens, answer.cached_tokens) == (expected, 0)


def test_first_chunk_corrupt(world: World) -> None:
    case, expected = world.learned()
    assert world.store.damage(case.spans[0].key, at_byte=1000)
    answer = world.loader.ask(case.prompt, transfer=case.load(), max_tokens=ANSWER_TOKENS)
    assert (answer.tokens, answer.cached_tokens) == (expected, 0)


def test_chunk_of_another_span_is_refused(world: World) -> None:
    """A store that answers with other KV under the right name: lengths agree, positions do not."""
    case, expected = world.learned(without=1)
    (other,) = world.client.read([case.spans[2].key], deadline_s=5.0)
    assert other is not None
    with other:
        write = world.client.reserve(case.spans[1].key, other.meta, len(other.payload), deadline_s=5.0)
        assert write is not None
        write.payload[:] = other.payload
        assert write.commit()
    before = world.loader.metrics()
    answer = world.loader.ask(case.prompt, transfer=case.load(), max_tokens=ANSWER_TOKENS)
    assert answer.tokens == expected
    assert answer.cached_tokens == SPAN_TOKENS // BLOCK_TOKENS * BLOCK_TOKENS
    assert grown(world.loader, before, "load_failures_total.mismatch") == 1


def test_lost_chunk_is_learned_again_and_loaded_ones_are_not(world: World) -> None:
    case, expected = world.learned(without=NUM_SPANS - 2)
    before = world.saver.metrics()
    answer = world.saver.ask(case.prompt, transfer=case.load(save=tuple(case.spans)), max_tokens=ANSWER_TOKENS)
    assert answer.tokens == expected
    assert world.client.wait([case.spans[NUM_SPANS - 2].key], deadline_s=20.0) == [True]
    assert grown(world.saver, before, "saves_total.held") == NUM_SPANS - 2


def test_prefix_cache_hit_then_load(world: World) -> None:
    case, expected = world.learned()
    local = 3 * BLOCK_TOKENS
    world.loader.ask(case.prompt[: local + 3], salt="partial", max_tokens=1)
    before = world.loader.metrics()
    answer = world.loader.ask(case.prompt, salt="partial", transfer=case.load(), max_tokens=ANSWER_TOKENS)
    assert (answer.tokens, answer.cached_tokens) == (expected, HELD_TOKENS)
    assert grown(world.loader, before, "loaded_tokens_total") == HELD_TOKENS - local


def test_prefix_cache_hit_then_failed_load(world: World) -> None:
    case, expected = world.learned(without=2)
    local = 3 * BLOCK_TOKENS
    world.loader.ask(case.prompt[: local + 3], salt="partial failed", max_tokens=1)
    answer = world.loader.ask(case.prompt, salt="partial failed", transfer=case.load(), max_tokens=ANSWER_TOKENS)
    # The hole begins at token 90, inside the local hit of 96: nothing of the load continues from there.
    assert (answer.tokens, answer.cached_tokens) == (expected, local)


def test_prefix_cache_hit_is_saved_when_asked(world: World) -> None:
    case = world.case()
    expected = world.saver.ask(case.prompt, salt="hit", max_tokens=ANSWER_TOKENS).tokens
    answer = world.saver.ask(case.prompt, salt="hit", transfer=case.save(), max_tokens=1)
    assert answer.cached_tokens >= HELD_TOKENS - BLOCK_TOKENS
    assert all(world.client.wait([span.key for span in case.spans], deadline_s=20.0))
    loaded = world.loader.ask(case.prompt, transfer=case.load(), max_tokens=ANSWER_TOKENS)
    assert (loaded.tokens, loaded.cached_tokens) == (expected, HELD_TOKENS)


def test_frozen_store_costs_no_more_than_its_deadline(world: World) -> None:
    case, expected = world.learned()
    cold_s = world.loader.ask(case.prompt, max_tokens=1).ttft_s
    before = world.loader.metrics()
    world.store.freeze()
    try:
        answer = world.loader.ask(case.prompt, transfer=case.load(deadline_s=0.5), max_tokens=ANSWER_TOKENS)
    finally:
        world.store.thaw()
    assert (answer.tokens, answer.cached_tokens) == (expected, 0)
    assert answer.ttft_s < 2 * cold_s + 2.0
    assert grown(world.loader, before, "load_failures_total.deadline") == 1


def test_decoding_goes_on_during_a_load(world: World, frozen: Callable[[], None]) -> None:
    case, talker = world.case(), world.case(num_spans=1)
    expected = world.saver.ask(case.prompt, max_tokens=ANSWER_TOKENS).tokens
    timer = threading.Timer(1.5, frozen)
    timer.start()
    asks: list[Ask] = [
        {"prompt": talker.prompt, "max_tokens": 64, "transfer": None},
        {"prompt": case.prompt, "max_tokens": ANSWER_TOKENS, "transfer": case.load()},
    ]
    talk, answer = world.loader.generate(asks)
    timer.join()
    assert answer.tokens == expected
    meanwhile = [at_s for at_s in talk.token_times_s if at_s < answer.ttft_s]
    assert answer.ttft_s >= 1.4, "the request did not wait for its load"
    assert len(meanwhile) >= 5, "no tokens while the other request was loading"


def test_abort_during_a_load_leaves_nothing(world: World, frozen: Callable[[], None]) -> None:
    case = world.case()
    expected = world.saver.ask(case.prompt, max_tokens=ANSWER_TOKENS).tokens
    before = world.loader.metrics()
    asks: list[Ask] = [{"prompt": case.prompt, "transfer": case.load(deadline_s=30.0), "abort_after_s": 0.5}]
    (aborted,) = world.loader.generate(asks)
    assert (aborted.finish, aborted.tokens) == ("aborted", ())
    wait_until(lambda: idle(world.loader), what="the load to end with its request", deadline_s=2.0)
    assert grown(world.loader, before, "loads_dropped_total") == 1
    assert world.loader.ask(case.prompt, max_tokens=ANSWER_TOKENS).tokens == expected


def test_store_that_dies_is_a_miss_and_its_next_life_is_found(world: World) -> None:
    case, expected = world.learned()
    world.store.kill()
    answer = world.loader.ask(case.prompt, transfer=case.load(), max_tokens=ANSWER_TOKENS)
    assert (answer.tokens, answer.cached_tokens) == (expected, 0)
    world.store.restart()
    keys = [span.key for span in case.spans]

    def learned_again() -> bool:
        world.saver.ask(case.prompt, transfer=case.save(), max_tokens=1)
        return all(world.client.wait(keys, deadline_s=1.0))

    wait_until(learned_again, what="chunks in the new life of the store", deadline_s=30.0)

    def loaded_again() -> bool:
        again = world.loader.ask(case.prompt, transfer=case.load(), max_tokens=ANSWER_TOKENS)
        assert again.tokens == expected
        return again.cached_tokens == HELD_TOKENS

    wait_until(loaded_again, what="a load from the new life of the store", deadline_s=30.0)


def test_full_staging_drops_saves_not_answers(world: World) -> None:
    case = world.case()
    expected = world.saver.ask(case.prompt, max_tokens=ANSWER_TOKENS).tokens
    before = world.loader.metrics()
    answer = world.loader.ask(case.prompt, transfer=case.save(), max_tokens=ANSWER_TOKENS)
    assert answer.tokens == expected
    assert grown(world.loader, before, "saves_total.staging_full") == NUM_SPANS
    assert not any(world.client.lookup([span.key for span in case.spans], deadline_s=1.0))


def test_parameters_that_are_not_valid_are_ignored(world: World) -> None:
    case, expected = world.learned()
    bad = [
        {"learnonce": "nonsense"},
        {"learnonce": {"v": 1, "load": [["zz", 0, 5]], "load_deadline_s": 1.0}},
        {"learnonce": {"v": 1, "load": [[case.spans[0].key.hex(), 0, 10**9]], "load_deadline_s": 1.0}},
        {"learnonce": {"v": 2}},
    ]
    before = world.loader.metrics()
    for transfer in bad:
        answer = world.loader.ask(case.prompt[:40], transfer=transfer, max_tokens=1)
        assert answer.cached_tokens == 0
    assert grown(world.loader, before, "params_rejected_total") == len(bad)
    assert world.loader.ask(case.prompt, transfer=case.load(), max_tokens=ANSWER_TOKENS).tokens == expected


def test_preemption_changes_no_answer(world: World) -> None:
    """Eight requests need more blocks than there are; those that are preempted load again."""
    cases = [world.case(num_spans=5) for _ in range(8)]
    plain: list[Ask] = [{"prompt": case.prompt, "max_tokens": 64, "transfer": case.save()} for case in cases]
    expected = world.saver.generate(plain)
    assert all(world.client.wait([span.key for case in cases for span in case.spans], deadline_s=20.0))
    asks: list[Ask] = [{"prompt": case.prompt, "max_tokens": 64, "transfer": case.load()} for case in cases]
    before = world.loader.metrics()
    answers = world.loader.generate(asks)
    preemptions = "vllm:num_preemptions_total"
    assert world.loader.metrics()[preemptions] > before[preemptions], "the pool was large enough"
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert {answer.cached_tokens for answer in answers} == {5 * SPAN_TOKENS}


def test_hooks_never_failed(world: World) -> None:
    names = [name for engine in (world.saver, world.loader) for name in engine.metrics() if "hook_errors" in name]
    assert not [name for name in names if not name.endswith("_created") and name != PREFIX + "hook_errors_total"]


def test_kill_of_the_owner_ends_the_engine(world: World) -> None:
    """Last: it costs the engine. SIGKILL of the process that holds AsyncLLM leaves no EngineCore behind."""
    core = Path(f"/proc/{world.loader.core_pid}")
    assert world.loader.core_pid != world.loader.pid
    assert core.exists()
    world.loader.kill()
    wait_until(lambda: not core.exists() or "(zombie)" in (core / "status").read_text(), what="EngineCore to end")
