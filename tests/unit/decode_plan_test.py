"""What the decode engine is told, for every outcome of prefill."""

import pytest

from decode_workers.plan import FallbackReason, PrefillOutcome, ServedAs, plan_execution, prefill_budget_s
from kvstore.wire import Mode, Plan, PrefillAnswer, Span, SpanKind, pack_tokens


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
