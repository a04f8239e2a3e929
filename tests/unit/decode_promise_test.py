"""The directory's self-check: tokens promised by the plan against tokens that were really reused."""

import pytest

from decode_workers.execute import count_reuse
from decode_workers.metrics import KEPT_TOKENS, PROMISED_TOKENS
from decode_workers.plan import Execution, PrefillOutcome, plan_execution
from kvstore.wire import Plan, PrefillAnswer, Span, SpanKind, pack_tokens


def plan(*held: bool) -> Plan:
    spans = tuple(
        Span(key=bytes([i]) * 32, start=10 * i, stop=10 * i + 10, kind=SpanKind.PASSAGE, held=yes, save=not yes)
        for i, yes in enumerate(held)
    )
    prompt = pack_tokens(list(range(10 * len(held))))
    return Plan(request_id="r", expires_unix_s=1e12, deadline_unix_s=1e12, prompt=prompt, spans=spans)


def answered(*held: bool, reused: int) -> PrefillOutcome:
    answer = PrefillAnswer(request_id="r", reused_tokens=reused, computed_tokens=0, held=held, seconds=0.1)
    return PrefillOutcome(replica_id="p", answer=answer)


def counted(execution: Execution | None, cached_tokens: int) -> tuple[float, float]:
    """How far one request moves the two counters."""
    before = PROMISED_TOKENS._value.get(), KEPT_TOKENS._value.get()
    count_reuse(execution, prompt_tokens=30, cached_tokens=cached_tokens)
    return PROMISED_TOKENS._value.get() - before[0], KEPT_TOKENS._value.get() - before[1]


@pytest.mark.parametrize(
    ("held", "cached", "expected"),
    [
        ((True, True, False), 20, (20, 20)),
        ((True, True, False), 10, (20, 10)),  # one chunk was gone
        ((True, True, False), 0, (20, 0)),
        ((True, False, True), 10, (10, 10)),  # what lies behind a gap was never promised
        ((False, False, False), 20, (0, 0)),  # luck is no promise kept
        ((True, True, True), 29, (29, 29)),  # the last token is always computed
    ],
)
def test_promise_against_outcome(held: tuple[bool, ...], cached: int, expected: tuple[int, int]) -> None:
    assert counted(plan_execution(plan(*held), None), cached) == expected


def test_what_prefill_computed_for_this_request_keeps_no_promise() -> None:
    execution = plan_execution(plan(True, True, False), answered(True, True, True, reused=10))
    assert counted(execution, 29) == (20, 10)


def test_request_without_a_plan_promises_nothing() -> None:
    assert counted(None, 10) == (0, 0)
    rendered = plan_execution(Plan(request_id="r", expires_unix_s=1e12, deadline_unix_s=1e12), None)
    assert counted(rendered, 10) == (0, 0)
