"""What the decode engine is told, for every outcome of prefill."""

import pytest

from decode_workers.plan import (
    FallbackReason,
    PrefillOutcome,
    ServedAs,
    engine_salt,
    plan_execution,
    prefill_budget_s,
)
from kvstore.wire import JoinPlan, Mode, Plan, PrefillAnswer, Span, SpanKind, pack_tokens


def span(start, stop, *, held=False, save=True):
    return Span(key=bytes([start]) * 32, start=start, stop=stop, kind=SpanKind.PASSAGE, held=held, save=save)


def plan(*spans, **values):
    defaults = {
        "request_id": "r1",
        "expires_unix_s": 100.0,
        "deadline_unix_s": 100.0,
        "prompt": pack_tokens(list(range(30))),
        "spans": spans,
        "load_deadline_s": 2.0,
        "cache_salt": "salt",
    }
    return Plan(**(defaults | values))


def answered(*held, reused=0):
    answer = PrefillAnswer(request_id="r1", reused_tokens=reused, computed_tokens=30 - reused, held=held, seconds=0.1)
    return PrefillOutcome(replica_id="p0", answer=answer)


def test_local_loads_what_is_held_from_the_start_and_saves_the_rest():
    spans = (span(0, 10, held=True), span(10, 20), span(20, 30, held=True, save=False))
    execution = plan_execution(plan(*spans), None)
    assert execution.served_as is ServedAs.LOCAL
    assert (execution.load, execution.save) == (spans[:1], spans[1:2])
    assert execution.load_tokens == 10
    assert execution.max_reused_tokens is None
    assert execution.prompt_token_ids == tuple(range(30))
    assert (execution.cache_salt, execution.load_deadline_s) == ("salt", 2.0)


def test_remote_loads_what_the_answer_says_and_saves_nothing():
    spans = (span(0, 10, held=True), span(10, 20), span(20, 30))
    execution = plan_execution(plan(*spans), answered(True, True, False, reused=10))
    assert execution.served_as is ServedAs.REMOTE
    assert (execution.load, execution.save) == (spans[:2], ())
    assert execution.max_reused_tokens == 10
    assert execution.fallback is None


@pytest.mark.parametrize("reason", [r for r in FallbackReason if r is not FallbackReason.OTHER_PROMPT])
def test_every_failure_of_prefill_is_computed_here_and_says_why(reason):
    spans = (span(0, 10, held=True), span(10, 30))
    outcome = answered(False, True) if reason is FallbackReason.NOT_STORED else PrefillOutcome(reason=reason)
    if reason is FallbackReason.NOT_STORED:
        spans = (span(0, 10), span(10, 30))
    execution = plan_execution(plan(*spans), outcome)
    assert execution.served_as is ServedAs.FALLBACK
    assert execution.fallback is reason
    assert execution.load == tuple(s for s in spans if s.held)
    assert execution.save == tuple(s for s in spans if not s.held)
    assert execution.max_reused_tokens is None


def test_without_a_prompt_vllm_renders_and_nothing_is_loaded():
    execution = plan_execution(plan(prompt=b""), None)
    assert execution.served_as is ServedAs.RENDERED
    assert (execution.load, execution.save, execution.prompt_token_ids) == ((), (), ())
    assert execution.cache_salt == "salt"


@pytest.mark.parametrize(
    ("values", "budget_s"),
    [
        ({"mode": Mode.LOCAL, "prefill_deadline_s": 5.0}, 0.0),
        ({"mode": Mode.REMOTE, "prefill_deadline_s": 5.0}, 5.0),
        ({"mode": Mode.REMOTE, "prefill_deadline_s": 50.0}, 10.0),
        ({"mode": Mode.REMOTE, "prefill_deadline_s": 5.0, "deadline_unix_s": 80.0}, 0.0),
        ({"mode": Mode.REMOTE, "prefill_deadline_s": 5.0, "spans": (), "prompt": b""}, 0.0),
    ],
)
def test_prefill_is_waited_for_within_both_deadlines(values, budget_s):
    assert prefill_budget_s(plan(span(0, 30), **values), now_unix_s=90.0) == budget_s


JOIN = JoinPlan("query_aware", 0.15)


def moved(start, stop, base):
    return Span(key=bytes([stop]) * 32, start=start, stop=stop, kind=SpanKind.PASSAGE, held=True, save=False, base=base)


def test_a_join_loads_all_that_is_held_and_saves_nothing():
    tail = Span(key=bytes(32), start=25, stop=30, kind=SpanKind.TAIL, held=False, save=False)
    spans = (span(0, 5, held=True, save=False), span(5, 10, save=False), moved(10, 20, 5), moved(20, 25, 5), tail)
    execution = plan_execution(plan(*spans, join=JOIN), None)
    assert (execution.load, execution.save) == ((spans[0], spans[2], spans[3]), ())
    assert (execution.join, execution.tail_start, execution.load_tokens) == (JOIN, 25, 20)
    # 15 moved tokens, two of them computed again.
    assert (execution.promised_tokens, execution.max_reused_tokens) == (18, None)
    assert (execution.served_as, execution.fallback, execution.load_deadline_s) == (ServedAs.LOCAL, None, 2.0)
    assert execution.cache_salt == "salt"
    assert execution.engine_salt == engine_salt("salt", JOIN)


def test_what_was_learned_for_this_very_request_is_not_called_reused():
    spans = (span(0, 10, held=True, save=False), moved(10, 30, 10))
    known = plan_execution(plan(*spans, join=JOIN), None)
    fresh = plan_execution(plan(*spans, join=JOIN, learned_tokens=20), None)
    assert (known.max_reused_tokens, fresh.max_reused_tokens) == (None, 7)
    assert known.promised_tokens == fresh.promised_tokens == 27
    assert plan_execution(plan(*spans, join=JOIN, learned_tokens=30), None).max_reused_tokens == 0


def test_what_a_join_leaves_in_vllms_cache_is_found_by_nothing_but_the_same_join():
    joins = [None, JOIN, JoinPlan("query_aware", 0.05), JoinPlan("first_k", 0.15)]
    salts = [engine_salt(salt, join) for salt in ("", "mine") for join in joins]
    assert len(set(salts)) == len(salts)
    assert (salts[0], salts[4]) == ("", "mine")
    assert engine_salt("mine", JoinPlan("query_aware", 0.15)) == engine_salt("mine", JOIN)
    assert all("mine" not in salt for salt in salts[5:]), "a salt may be a secret"
