"""Whatever is held: a joined plan adds up, travels, and is understood by the engine that carries it out.

Covers: `router.reuse` and `router.policy` through `kvstore.wire` and `decode_workers.plan` to `kvstore.engine.params`.
Does not cover: prompts as text (`router_segments_property_test.py`), the join itself.
"""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.router_fakes import SCOPE

from decode_workers.plan import plan_execution
from kvstore.engine.params import JoinParams, build_transfer_params, inexact_start, parse_transfer_params
from kvstore.wire import JoinPlan, Peer, Plan, SpanKind, open_plan, pack_tokens, sign_plan
from router.policy import choose
from router.reuse import PlacementRequest, exact_reuse, worth_learning
from router.segments import Prompt, Segment, cut_spans
from router.settings import DeadlineSettings, RuleSettings, SpanSettings
from router.view import ReplicaView, View

SPANS = SpanSettings(exact_chunk_tokens=7, max_chunk_tokens=11)
SECRET = b"s" * 32
METHODS = st.sampled_from(["naive", "random", "first_k", "deviation", "query_aware"])


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """A prefix (or none), some passages, a tail of at least one token."""
    kinds = [SpanKind.PREFIX, *[SpanKind.PASSAGE] * draw(st.integers(1, 5)), SpanKind.TAIL]
    lengths = [draw(st.integers(0, 16)), *(draw(st.integers(1, 30)) for _ in kinds[1:])]
    ids = iter(range(1, 1000))
    segments = (
        Segment(
            kind,
            np.array([next(ids) for _ in range(length)], dtype=np.uint32),
            index - 1 if kind is SpanKind.PASSAGE else None,
        )
        for index, (kind, length) in enumerate(zip(kinds, lengths, strict=True))
    )
    return Prompt(tuple(segment for segment in segments if len(segment.ids)))


@settings(max_examples=200, deadline=None)
@given(prompt=prompts(), method=METHODS, share=st.floats(0, 1), data=st.data())
def test_a_joined_plan_adds_up_and_the_engine_understands_it(
    prompt: Prompt, method: str, share: float, data: st.DataObject
) -> None:
    spans = cut_spans(prompt, scope=SCOPE, salt="", settings=SPANS)
    keys = sorted({key for span in spans for key in (span.key, span.passage_key) if key is not None})
    held = data.draw(st.sets(st.sampled_from(keys)))
    join = JoinPlan(method, share)  # type: ignore[arg-type]
    request = PlacementRequest(spans=spans, num_tokens=prompt.num_tokens, join=join)
    replica = ReplicaView(peer=Peer("d", "http://d"), node_id="n", booked_tokens=0)
    view = View(decode=(replica,), nodes_by_key={key: frozenset({"n"}) for key in held})
    decision = choose(request, view=view, rule=RuleSettings(), deadlines=DeadlineSettings())
    exact = exact_reuse(request, view=view, node_id="n")
    assert decision.uncached_tokens <= exact.computed_tokens
    missing = worth_learning(request, view=view, node_id="n", min_tokens=1)
    assert all(not {s.passage_key for s in spans if s.document == document} <= held for document in missing)

    plan = Plan(
        request_id="r",
        expires_unix_s=1.0,
        deadline_unix_s=1.0,
        prompt=pack_tokens(prompt.ids),
        spans=decision.spans,
        join=decision.join,
    )
    execution = plan_execution(open_plan(sign_plan(plan, secret=SECRET), secret=SECRET, now_unix_s=0.0), None)
    if decision.join is None:
        assert decision.spans == exact.spans or not any(span.base is not None for span in decision.spans)
        return
    # What is loaded was held, each chunk once; what is neither loaded nor tail is a hole.
    assert {span.key for span in execution.load} <= held
    tail_tokens = prompt.num_tokens - execution.tail_start
    assert execution.load_tokens + decision.hole_tokens + tail_tokens == prompt.num_tokens
    assert execution.promised_tokens + decision.uncached_tokens == prompt.num_tokens
    params = parse_transfer_params(
        build_transfer_params(
            load=execution.load,
            save=execution.save,
            load_deadline_s=execution.load_deadline_s,
            join=JoinParams(method=join.method, share=join.share, tail_start=execution.tail_start),
        ),
        num_prompt_tokens=prompt.num_tokens,
    )
    assert params is not None
    assert [(s.key, s.start, s.stop, s.base) for s in params.load] == [
        (s.key, s.start, s.stop, s.base) for s in execution.load
    ]
    assert inexact_start(params) <= execution.load[-1].start
    # Every chunk is named as it was learned: the anchor and its passage alone give the same key at its base.
    for span in params.load:
        if span.base is not None:
            (keyed,) = [k for k in spans if k.start == span.start]
            alone = Prompt(tuple(s for s in prompt.segments if s.document in (None, keyed.document))[:2])
            learned = cut_spans(alone, scope=SCOPE, salt="", settings=SPANS)
            assert (span.key, span.base) in [(s.key, s.start) for s in learned]
