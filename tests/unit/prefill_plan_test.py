"""What the prefill engine is told, what may queue, what the answer says."""

import pytest

from kvstore.wire import JoinPlan, Plan, Refusal, Span, SpanKind, pack_tokens
from prefill_workers.plan import admit, answer, budget_s, handoff_of, plan_work


def span(start, stop, *, held=False, save=True):
    return Span(key=bytes([stop]) * 32, start=start, stop=stop, kind=SpanKind.PASSAGE, held=held, save=save)


def plan(*spans, **values):
    defaults = {
        "request_id": "r1",
        "expires_unix_s": 100.0,
        "deadline_unix_s": 100.0,
        "prompt": pack_tokens(list(range(30))) if spans else b"",
        "spans": spans,
    }
    return Plan(**(defaults | values))


def test_held_spans_are_loaded_up_to_the_first_gap_and_the_rest_saved():
    spans = (
        span(0, 5, held=True),
        span(5, 10, held=True),
        span(10, 20),
        span(20, 25, held=True),
        span(25, 30, save=False),
    )
    work = plan_work(plan(*spans))
    assert work.load == spans[:2]
    assert work.save == spans[2:4]
    assert work.tokens_to_compute == 20
    assert work.key == spans[-1].key


def test_a_plan_without_a_prompt_cannot_be_prefilled():
    assert plan_work(plan()).status == 400


def test_a_join_is_not_for_prefill_replicas():
    moved = span(0, 30, held=True, save=False)
    assert plan_work(plan(moved, join=JoinPlan("naive", 0.0))).status == 400


def test_a_refusal_is_answered_as_it_is():
    refusal = Refusal(status=429, error_type="RateLimitError", message="later")
    assert plan_work(plan(span(0, 30), refusal=refusal)) is refusal


@pytest.mark.parametrize(
    ("asking", "here", "handoff"),
    [("n1", "n1", "local"), ("n2", "n1", "remote"), (None, "n1", "none"), ("", "n1", "none"), ("n1", "", "none")],
)
def test_chunks_are_handed_over_within_a_node_or_between_two(asking, here, handoff):
    assert handoff_of(asking, node_id=here) == handoff
    assert plan_work(plan(span(0, 30)), handoff=handoff).handoff == handoff


@pytest.mark.parametrize(("queued", "admitted"), [(0, True), (70, True), (71, False)])
def test_the_queue_is_bounded_but_an_idle_replica_takes_anything(queued, admitted):
    work = plan_work(plan(span(0, 30)))
    assert admit(work, queued_tokens=queued, max_queued_tokens=100) is admitted
    assert admit(work, queued_tokens=0, max_queued_tokens=1)


@pytest.mark.parametrize(("shared", "reused", "computed"), [(False, 10, 20), (True, 30, 0)])
def test_who_joined_a_running_prefill_computed_nothing(shared, reused, computed):
    asked = plan(span(0, 30))
    done = answer(asked, plan_work(asked), reused_tokens=10, held=[True], seconds=0.5, shared=shared)
    assert (done.reused_tokens, done.computed_tokens, done.held) == (reused, computed, (True,))


def test_nobody_waits_beyond_either_deadline():
    asked = plan(span(0, 30), prefill_deadline_s=7.0)
    assert budget_s(asked, now_unix_s=90.0) == 7.0
    assert budget_s(asked, now_unix_s=95.0) == 5.0
    assert budget_s(asked, now_unix_s=101.0) == 0.0
