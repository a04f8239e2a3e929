"""The scheduler half as a table: requests and steps in, operations out; no vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from kvstore.engine.ops import JoinOp, LoadOp, SaveOp
from kvstore.engine.params import ChunkSpan, JoinParams, build_transfer_params
from kvstore.engine.scheduler_side import ScheduledRequest, SchedulerSide
from kvstore.engine.tally import Tally
from kvstore.keys import tenant_of
from kvstore.testing.samples import sample_key

BLOCK = 16


@dataclass
class Stats:
    figures: tuple[int, int, int] | None = None

    def set(self, num_prompt_tokens: int, num_local_cached_tokens: int, num_external_cached_tokens: int) -> None:
        self.figures = (num_prompt_tokens, num_local_cached_tokens, num_external_cached_tokens)


@dataclass
class Request:
    """What vLLM's request looks like from here."""

    num_prompt_tokens: int
    kv_transfer_params: dict[str, Any] | None
    request_id: str = "r"
    prompt_token_ids: list[int] | None = None
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    prefill_stats: Stats | None = field(default_factory=Stats)


def spans(*edges: int) -> list[ChunkSpan]:
    return [ChunkSpan(sample_key(a), a, b) for a, b in pairwise(edges)]


def make(
    prompt: int, *, load: Sequence[ChunkSpan] = (), save: Sequence[ChunkSpan] = (), **options: Any
) -> tuple[SchedulerSide, Request]:
    side = SchedulerSide(block_size=BLOCK, tally=Tally())
    request = Request(prompt, build_transfer_params(load=load, save=save, load_deadline_s=2.0, **options))
    side.add_request(request)
    return side, request


def blocks_of(request_id: str) -> list[int]:
    return list(range(100, 200))


def step(side: SchedulerSide, computed: int, scheduled: int) -> tuple[tuple[LoadOp, ...], tuple[SaveOp, ...]]:
    item = ScheduledRequest(request_id="r", num_computed_tokens=computed, num_scheduled_tokens=scheduled)
    ops = side.take_step([item] if scheduled else [], blocks_of=blocks_of)
    assert ops.busy == bool(scheduled)
    return ops.loads, ops.saves


@pytest.mark.parametrize(
    ("edges", "num_local", "expected"),
    [
        ((0, 30, 50), 0, 50),
        ((0, 30, 50), 16, 34),
        ((0, 30, 50), 48, 2),
        ((0, 30, 50), 64, 0),
        ((20, 30), 0, 0),
        ((20, 30), 16, 0),
        ((20, 30), 32, 0),
        ((10, 60), 16, 44),
        ((0, 80), 0, 79),
        ((), 0, 0),
    ],
)
def test_how_much_to_load(edges: tuple[int, ...], num_local: int, expected: int) -> None:
    side, request = make(80, load=spans(*edges))
    assert [side.num_loadable(request, num_local) for _ in range(3)] == [expected] * 3


def test_a_gap_ends_the_load() -> None:
    side, request = make(80, load=[*spans(0, 10, 20), *spans(30, 60)])
    assert side.num_loadable(request, 0) == 20
    assert side.num_loadable(request, 32) == 28


def test_load_operation_is_clipped_to_what_is_needed() -> None:
    side, request = make(80, load=spans(0, 10, 30, 50))
    num_tokens = side.num_loadable(request, 16)
    side.blocks_allocated(request, list(range(7, 17)), num_tokens)
    ((op,), saves) = step(side, 0, 0)
    assert [(span.start, span.stop) for span in op.spans] == [(10, 30), (30, 50)]
    assert (op.start, op.stop, op.block_ids, op.deadline_s) == (16, 50, (7, 8, 9, 10), 2.0)
    assert saves == ()
    assert step(side, 0, 0) == ((), ())


def test_no_second_try_in_the_same_life_but_one_after_preemption() -> None:
    side, request = make(80, load=spans(0, 50))
    side.blocks_allocated(request, range(9), side.num_loadable(request, 0))
    assert side.num_loadable(request, 0) == 0
    request.num_preemptions = 1
    assert side.num_loadable(request, 0) == 50


@pytest.mark.parametrize(("arrived", "figures"), [(50, (80, 16, 34)), (32, (80, 16, 16)), (16, (80, 16, 0))])
def test_reused_tokens_are_what_arrived(arrived: int, figures: tuple[int, int, int]) -> None:
    side, request = make(80, load=spans(0, 50))
    side.blocks_allocated(request, range(9), side.num_loadable(request, 16))
    request.num_computed_tokens = arrived
    side.blocks_allocated(request, range(9), 0)
    assert request.prefill_stats is not None
    assert request.prefill_stats.figures == figures


def test_reused_tokens_are_left_alone_when_vllm_asked_anew_or_preempted() -> None:
    side, request = make(80, load=spans(0, 50))
    side.blocks_allocated(request, range(9), side.num_loadable(request, 0))
    side.num_loadable(request, 32)
    side.blocks_allocated(request, range(9), 0)
    assert request.prefill_stats == Stats()
    side, request = make(80, load=spans(0, 50))
    side.blocks_allocated(request, range(9), side.num_loadable(request, 0))
    request.num_preemptions, request.num_computed_tokens = 1, 32
    side.blocks_allocated(request, range(9), 0)
    assert request.prefill_stats == Stats()


JOIN = JoinParams(method="query_aware", share=0.15, tail_start=60)
JOINED = [*spans(0, 10, 20), ChunkSpan(sample_key(7), 30, 40, 10), *spans(44, 50), ChunkSpan(sample_key(8), 50, 60, 10)]


@pytest.mark.parametrize(
    ("num_local", "expected"), [(0, 79), (16, 63), (48, 31), (64, 0)], ids=["all", "exact", "clipped", "tail only"]
)
def test_a_joined_request_is_loaded_up_to_its_last_token(num_local: int, expected: int) -> None:
    side, request = make(80, load=JOINED, join=JOIN)
    assert [side.num_loadable(request, num_local) for _ in range(2)] == [expected] * 2


def test_join_operation() -> None:
    side, request = make(80, load=JOINED, join=JOIN)
    request.prompt_token_ids = list(range(80))
    side.blocks_allocated(request, range(9), side.num_loadable(request, 16))
    ((op,), _) = step(side, 0, 0)
    assert [(span.start, span.base) for span in op.spans] == [(10, None), (30, 10), (44, None), (50, 10)]
    assert (op.start, op.stop, op.block_ids) == (16, 79, (0, 1, 2, 3, 4))
    assert op.join == JoinOp(method="query_aware", share=0.15, tail_start=60, token_ids=tuple(range(80)))


def test_without_anything_left_to_join_only_exact_chunks_are_loaded() -> None:
    side, request = make(80, load=[*spans(0, 10), ChunkSpan(sample_key(7), 10, 20, 3), *spans(20, 60)], join=JOIN)
    assert side.num_loadable(request, 32) == 28
    side.blocks_allocated(request, range(9), 28)
    ((op,), _) = step(side, 0, 0)
    assert ([span.start for span in op.spans], op.join) == ([20], None)


@pytest.mark.parametrize(("computed", "figures"), [(79, (80, 16, 40)), (16, (80, 16, 0))], ids=["joined", "failed"])
def test_reused_tokens_of_a_join_are_those_that_it_kept(computed: int, figures: tuple[int, int, int]) -> None:
    side, request = make(80, load=JOINED, join=JOIN)
    side.blocks_allocated(request, range(9), side.num_loadable(request, 16))
    side.joins_ended({"r": 40} if computed == 79 else {})
    side.joins_ended({"somebody else": 3})
    request.num_computed_tokens = computed
    side.blocks_allocated(request, range(9), 0)
    assert request.prefill_stats is not None
    assert request.prefill_stats.figures == figures


def test_saves_are_due_once_when_their_last_token_is_computed() -> None:
    side, _ = make(80, save=spans(0, 10, 40, 80))
    seen = [[(op.span.start, op.block_ids) for op in step(side, computed, 20)[1]] for computed in (0, 20, 40, 60)]
    assert seen == [[(0, (100,))], [(10, (100, 101, 102))], [], [(40, (102, 103, 104))]]
    assert step(side, 0, 80)[1] == (), "saved again after a preemption"


def test_saves_carry_the_requests_tenant() -> None:
    side, _ = make(80, save=spans(0, 10), cache_salt="a salt")
    assert [op.tenant for op in step(side, 0, 80)[1]] == [tenant_of("a salt")]


def test_saves_carry_who_waits_for_them_and_steps_how_much_they_compute() -> None:
    side, _ = make(80, save=spans(0, 10), handoff="remote")
    scheduled = [ScheduledRequest(request_id="r", num_computed_tokens=0, num_scheduled_tokens=80)]
    ops = side.take_step(scheduled, blocks_of=lambda _: range(3))
    assert ([op.handoff for op in ops.saves], ops.num_tokens) == (["remote"], 80)


def test_prefix_hit_is_saved_in_the_first_step() -> None:
    side, _ = make(80, save=spans(0, 32, 64))
    assert [op.span.start for op in step(side, 64, 16)[1]] == [0, 32]


def test_blocks_that_are_not_there_are_not_saved() -> None:
    side, _ = make(80, save=spans(0, 80))
    item = ScheduledRequest(request_id="r", num_computed_tokens=0, num_scheduled_tokens=80)
    assert side.take_step([item], blocks_of=lambda _: [1, 2]).saves == ()


def test_nothing_is_left_of_a_finished_request() -> None:
    side, request = make(80, load=spans(0, 50), save=spans(0, 50))
    side.finish_request("r")
    side.finish_request("r")
    assert (side.num_tracked, side.num_loadable(request, 0), step(side, 0, 80)) == (0, 0, ((), ()))


def test_bad_parameters_are_counted() -> None:
    tally = Tally()
    side = SchedulerSide(block_size=BLOCK, tally=tally)
    side.add_request(Request(80, {"learnonce": {"v": 7}}))
    side.add_request(Request(80, None))
    assert side.num_tracked == 0
    assert tally.drain() == {"counts": {"params_rejected": 1}, "seconds": {}}


def test_an_error_while_saves_are_planned_loses_no_load() -> None:
    side, request = make(80, load=spans(0, 50), save=spans(50, 80))
    side.blocks_allocated(request, range(9), side.num_loadable(request, 0))
    item = ScheduledRequest(request_id="r", num_computed_tokens=0, num_scheduled_tokens=80)

    def broken(request_id: str) -> list[int]:
        raise KeyError(request_id)

    with pytest.raises(KeyError):
        side.take_step([item], blocks_of=broken)
    assert [load.request_id for load in step(side, 0, 0)[0]] == ["r"]
