"""Joined passages in a real engine, float32: what is recomputed is right, and whatever goes wrong is computed.

Covers: 100 % recomputed equals a full prefill token for token, holes, missing and damaged chunks, prefix cache, salts,
other requests meanwhile, failures, aborts, what is counted and saved.
Does not cover: how good a small share is (`learnonce bench join`), other model families
(`tests/engine/engine_join_models_test.py`), plans of the router.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.engine_harness import Ask
from support.joins import (
    ANCHOR_TOKENS,
    ANSWER_TOKENS,
    JOINED_TOKENS,
    NOISE,
    PREFIX,
    TAIL_TOKENS,
    World,
    assert_same,
    idle,
    run_world,
)

from kvstore.engine.params import JoinMethod
from kvstore.engine.settings import ConnectorSettings, EngineSettings
from kvstore.keys import child_key
from kvstore.testing.poll import wait_until

pytestmark = pytest.mark.engine

MODEL = os.environ.get("LEARNONCE_TEST_MODEL", str(Path(__file__).parents[2] / ".models" / "SmolLM2-135M-Instruct"))
BLOCK_TOKENS = 32
BLOCK_BYTES = BLOCK_TOKENS * 2 * 30 * 3 * 64 * 4
STEP_TOKENS = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    settings = EngineSettings(
        model=MODEL,
        dtype="float32",
        max_model_len=1024,
        block_size=BLOCK_TOKENS,
        kv_cache_bytes=256 * BLOCK_BYTES,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        connector=ConnectorSettings(join_step_tokens=STEP_TOKENS),
    )
    with run_world(tmp_path_factory.mktemp("join"), settings) as world:
        yield world


@pytest.fixture(autouse=True)
def nothing_left(world: World) -> Iterator[None]:
    """After each test: no load, no join, no staged memory."""
    yield
    wait_until(lambda: idle(world.engine), what="loads and joins to end", deadline_s=20.0)


@pytest.mark.parametrize("method", ["first_k", "query_aware", "deviation"])
def test_everything_recomputed_is_a_full_prefill(world: World, method: JoinMethod) -> None:
    case, expected = world.shared()
    before = world.engine.metrics()
    answer = world.joined(case, case.load(1.0, method=method))
    assert_same(answer, expected)
    assert answer.cached_tokens == ANCHOR_TOKENS
    assert world.grown(before, f"joins_total.{method}") == 1
    assert world.grown(before, "loaded_tokens_total") == ANCHOR_TOKENS + JOINED_TOKENS
    assert world.grown(before, "joined_tokens_total") == JOINED_TOKENS
    assert world.grown(before, "join_recomputed_tokens_total") == JOINED_TOKENS
    assert world.grown(before, "join_computed_tokens_total") == TAIL_TOKENS - 1
    assert world.grown(before, "join_seconds_count") == 1


def test_nothing_recomputed_is_close_and_not_the_same(world: World) -> None:
    """The control: were the other tests blind, this one would fail."""
    case, expected = world.shared()
    answer = world.joined(case, case.load(0.0, method="naive"))
    assert answer.cached_tokens == ANCHOR_TOKENS + JOINED_TOKENS
    assert answer.logprobs != pytest.approx(expected.logprobs, abs=NOISE)


@pytest.mark.parametrize("method", ["random", "first_k", "deviation", "query_aware"])
def test_a_share_is_recomputed(world: World, method: JoinMethod) -> None:
    case, _ = world.shared()
    before = world.engine.metrics()
    answer = world.joined(case, case.load(0.25, method=method))
    again = world.joined(case, case.load(0.25, method=method))
    chosen = round(0.25 * JOINED_TOKENS)
    assert answer.cached_tokens == ANCHOR_TOKENS + JOINED_TOKENS - chosen
    assert world.grown(before, "join_recomputed_tokens_total") == 2 * chosen
    assert_same(again, answer)


@pytest.mark.parametrize("without", [0, 2], ids=["anchor", "passage"])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_hole_is_computed_in_place(world: World, without: int, share: float) -> None:
    case, expected = world.shared()
    hole = case.spans[without].stop - case.spans[without].start
    before = world.engine.metrics()
    answer = world.joined(case, case.load(share, method="query_aware", without=without))
    assert world.grown(before, "join_computed_tokens_total") == hole + TAIL_TOKENS - 1
    if share == 1.0:
        assert_same(answer, expected)


def test_missing_and_damaged_passages_are_holes(world: World) -> None:
    case, expected = world.learned()
    assert world.store.damage(case.spans[2].key, at_byte=1000)
    lost = case.spans[3]._replace(key=child_key(case.lead.key, [1, 2, 3]))
    case.spans[3] = lost
    before = world.engine.metrics()
    answer = world.joined(case, case.load(1.0))
    assert_same(answer, expected)
    holes = sum(case.spans[index].stop - case.spans[index].start for index in (2, 3))
    assert world.grown(before, "load_failed_tokens_total") == holes
    assert world.grown(before, "joined_tokens_total") == JOINED_TOKENS - holes


def test_with_no_passage_left_the_engine_computes(world: World) -> None:
    case, expected = world.learned()
    case.spans[1:] = [span._replace(key=child_key(case.lead.key, [index])) for index, span in enumerate(case.spans[1:])]
    before = world.engine.metrics()
    answer = world.joined(case, case.load(0.25))
    assert_same(answer, expected)
    assert answer.cached_tokens == ANCHOR_TOKENS // BLOCK_TOKENS * BLOCK_TOKENS
    assert world.grown(before, "joins_total.first_k") == 0


def test_passages_where_they_were_learned_are_not_recomputed(world: World) -> None:
    """The first passage may stand at its own place as an exact chunk: share 1 leaves it alone."""
    case, _ = world.learned()
    own = case.spans[1]
    exact = own._replace(base=None)
    assert own.start == ANCHOR_TOKENS
    expected = world.joined(case, case.load(1.0))
    case.spans[1] = exact
    before = world.engine.metrics()
    answer = world.joined(case, case.load(1.0))
    assert_same(answer, expected)
    assert world.grown(before, "join_recomputed_tokens_total") == JOINED_TOKENS - (own.stop - own.start)
    assert answer.cached_tokens == own.stop


def test_prefix_cache_hit_then_join(world: World) -> None:
    case, expected = world.shared()
    local = 3 * BLOCK_TOKENS
    world.engine.ask(case.prompt[: local + 3], salt="partial", max_tokens=1)
    before = world.engine.metrics()
    answer = world.joined(case, case.load(1.0), salt="partial")
    assert_same(answer, expected)
    assert world.grown(before, "loaded_tokens_total") == ANCHOR_TOKENS + JOINED_TOKENS - local
    assert answer.cached_tokens == local


def test_a_joined_prompt_in_the_prefix_cache_is_not_joined_again(world: World) -> None:
    case, _ = world.shared()
    first = world.joined(case, case.load(0.25), salt="twice")
    before = world.engine.metrics()
    second = world.joined(case, case.load(0.25), salt="twice")
    assert second.tokens == first.tokens
    assert world.grown(before, "joins_total.first_k") == 0


def test_exact_requests_after_joined_ones_are_clean(world: World) -> None:
    case, expected = world.shared()
    world.joined(case, case.load(0.0, method="naive"), salt="tenant joined naive")
    assert_same(world.joined(case, {}, salt="tenant"), expected)


def test_only_what_is_exact_is_saved(world: World) -> None:
    case, expected = world.shared()
    key = child_key(case.lead.key, [4, 5, 6])
    wrong = case.load(1.0, save=[case.spans[1]._replace(key=key, base=None)])
    before = world.engine.metrics()
    assert_same(world.joined(case, wrong), expected)
    assert world.grown(before, "params_rejected_total") == 1
    lead = child_key(case.lead.key, [7, 8, 9])
    good = case.load(1.0, without=0, save=[case.lead._replace(key=lead)])
    assert_same(world.joined(case, good), expected)
    assert world.client.wait([lead, key], deadline_s=5.0) == [True, False]


def test_decoding_goes_on_during_a_join(world: World) -> None:
    case, expected = world.shared()
    talker = [(7 * index) % 5000 + 100 for index in range(40)]
    alone = world.engine.ask(talker, max_tokens=96)
    asks: list[Ask] = [
        {"prompt": talker, "max_tokens": 96, "transfer": None},
        {"prompt": case.prompt, "max_tokens": ANSWER_TOKENS, "transfer": case.load(1.0)},
    ]
    talk, answer = world.engine.generate(asks)
    assert_same(answer, expected)
    assert talk.tokens == alone.tokens
    meanwhile = [at_s for at_s in talk.token_times_s if at_s < answer.ttft_s]
    # The join's steps compute 16 tokens each, and the talker one.
    assert len(meanwhile) >= (JOINED_TOKENS + TAIL_TOKENS - 1) // STEP_TOKENS


def test_failure_inside_the_forward_is_a_full_prefill(world: World) -> None:
    case, expected = world.shared()
    before = world.engine.metrics()
    world.engine.set_joins("broken")
    answer = world.joined(case, case.load(0.25, method="query_aware"))
    assert_same(answer, expected)
    assert answer.cached_tokens == ANCHOR_TOKENS // BLOCK_TOKENS * BLOCK_TOKENS
    assert world.grown(before, "join_failures_total.error") == 1
    assert_same(world.joined(case, case.load(1.0)), expected)


def test_abort_during_a_join_leaves_nothing(world: World) -> None:
    case, expected = world.shared()
    world.engine.set_joins("held")
    asks: list[Ask] = [{"prompt": case.prompt, "transfer": case.load(0.25), "abort_after_s": 1.0}]
    (aborted,) = world.engine.generate(asks)
    assert (aborted.finish, aborted.tokens) == ("aborted", ())
    wait_until(lambda: idle(world.engine), what="the join to end with its request", deadline_s=5.0)
    world.engine.set_joins("free")
    assert_same(world.joined(case, case.load(1.0)), expected)


def test_hooks_never_failed(world: World) -> None:
    names = [name for name in world.engine.metrics() if "hook_errors" in name]
    assert not [name for name in names if not name.endswith("_created") and name != PREFIX + "hook_errors_total"]
