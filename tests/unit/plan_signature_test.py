"""Plans as headers: what comes back, and which ones nobody obeys.

Covers: `kvstore.wire.sign_plan` and `open_plan`, joins above all. Does not cover: arbitrary bytes
(`tests/fault/kvstore_fuzz_test.py`), what HTTP says about them (`workers_suite`).
"""

import msgspec
import pytest

from kvstore.wire import JoinPlan, Mode, Plan, PlanRejectedError, Span, SpanKind, open_plan, pack_tokens, sign_plan

SECRET = b"s" * 32
JOIN = JoinPlan("query_aware", 0.15)
MOVED = Span(b"m" * 32, 10, 20, SpanKind.PASSAGE, held=True, save=False, base=3)
JOINED = Plan(
    request_id="r",
    expires_unix_s=10.0,
    deadline_unix_s=10.0,
    prompt=pack_tokens(list(range(30))),
    spans=(
        Span(b"a" * 32, 0, 10, SpanKind.PREFIX, held=True, save=False),
        MOVED,
        Span(b"t" * 32, 20, 30, SpanKind.TAIL, held=False, save=False),
    ),
    join=JOIN,
)


def opened(plan: Plan) -> Plan:
    return open_plan(sign_plan(plan, secret=SECRET), secret=SECRET, now_unix_s=5.0)


def test_a_joined_plan_travels_whole() -> None:
    assert opened(JOINED) == JOINED
    assert opened(JOINED).held_tokens == 10, "what is moved is not held from position 0 on"


def _with(index: int, **values: object) -> tuple[Span, ...]:
    spans = list(JOINED.spans)
    spans[index] = msgspec.structs.replace(spans[index], **values)
    return tuple(spans)


REJECTED: list[tuple[dict[str, object], str]] = [
    ({"join": None}, "without a join"),
    ({"mode": Mode.REMOTE}, "mode remote"),
    ({"join": JoinPlan("random", 1.01)}, "share"),
    ({"join": JoinPlan("random", float("nan"))}, "share"),
    ({"join": JoinPlan("clever", 0.1)}, "damaged"),  # type: ignore[arg-type]
    ({"spans": _with(2, save=True)}, "saves"),
    ({"spans": _with(1, base=None)}, "moves no chunk"),
    ({"spans": _with(1, kind=SpanKind.TAIL)}, "no passage"),
    ({"spans": _with(1, base=-1)}, "before"),
]


@pytest.mark.parametrize(("values", "message"), REJECTED, ids=[message for _, message in REJECTED])
def test_a_join_that_nobody_could_carry_out_is_rejected(values: dict[str, object], message: str) -> None:
    with pytest.raises(PlanRejectedError, match=message):
        opened(msgspec.structs.replace(JOINED, **values))
