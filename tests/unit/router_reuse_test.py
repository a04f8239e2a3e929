"""Exact or joined, what is moved, what is learned first: as tables over one prompt.

Covers: `router.reuse`, and what `router.policy` makes of joins. Does not cover: tokens and keys
(`router_segments_test.py`), learning over sockets (`router_join_test.py`).
"""

from dataclasses import replace

import pytest

from kvstore.keys import ChunkKey
from kvstore.wire import JoinPlan, Mode, Peer, Role, SpanKind
from router.policy import BookedTokens, Decision, LearnFirst, choose, choose_learning
from router.reuse import PlacementRequest, best_reuse
from router.settings import DeadlineSettings, JoinSettings, RuleSettings
from router.view import KeyedSpan, ReplicaView, View

JOIN = JoinPlan("query_aware", 0.1)
RULE = RuleSettings(remote_min_tokens=100, min_save_tokens=10, stream_tokens=1)
DEADLINES = DeadlineSettings()
ANCHOR, FIRST, SECOND, THIRD, TAIL = (ChunkKey(bytes([i]) * 32) for i in range(5))
ALONE_SECOND, ALONE_THIRD = ChunkKey(b"s" * 32), ChunkKey(b"t" * 32)


def request(join: JoinPlan | None = JOIN, *, tail: int = 20, third: int = 50) -> PlacementRequest:
    """An anchor of 100 tokens, passages of 400, 300 and 50, a tail."""
    spans = (
        KeyedSpan(ANCHOR, 0, 100, SpanKind.PREFIX),
        KeyedSpan(FIRST, 100, 500, SpanKind.PASSAGE, 0, passage_key=FIRST, base=100),
        KeyedSpan(SECOND, 500, 800, SpanKind.PASSAGE, 1, passage_key=ALONE_SECOND, base=100),
        KeyedSpan(THIRD, 800, 800 + third, SpanKind.PASSAGE, 2, passage_key=ALONE_THIRD, base=100),
        KeyedSpan(TAIL, 800 + third, 800 + third + tail, SpanKind.TAIL),
    )
    return PlacementRequest(spans=spans, num_tokens=spans[-1].stop, join=join)


def replica(name: str, *, node: str = "n1", booked: int = 0) -> ReplicaView:
    return ReplicaView(peer=Peer(name, f"http://{name}"), node_id=node, booked_tokens=booked)


def view(*held: ChunkKey, node: str = "n1", decode: int = 1, prefill: int = 0, sharing: tuple[str, ...] = ()) -> View:
    return View(
        decode=tuple(replica(f"d{i}") for i in range(decode)),
        prefill=tuple(replica(f"p{i}") for i in range(prefill)),
        nodes_by_key={key: frozenset({node}) for key in held},
        sharing_nodes=frozenset(sharing),
    )


def decide(asked: PlacementRequest, seen: View) -> Decision:
    return choose(asked, view=seen, rule=RULE, deadlines=DEADLINES)


def learning(asked: PlacementRequest, seen: View, *, min_tokens: int = 10) -> LearnFirst | None:
    return choose_learning(asked, view=seen, rule=RULE, deadlines=DEADLINES, min_tokens=min_tokens)


WAYS: list[tuple[str, PlacementRequest, View, tuple[bool, int, int, int, int]]] = [
    # held, moved, holes, to compute
    ("all moved but the first", request(), view(ANCHOR, FIRST, ALONE_SECOND, ALONE_THIRD), (True, 850, 350, 0, 55)),
    ("a hole in the middle", request(), view(ANCHOR, FIRST, ALONE_THIRD), (True, 550, 50, 300, 325)),
    ("a hole at the end", request(), view(ANCHOR, FIRST, ALONE_SECOND), (True, 800, 300, 50, 100)),
    ("the anchor is a hole", request(), view(ALONE_SECOND, ALONE_THIRD), (True, 350, 350, 500, 555)),
    ("behind a lost anchor the first is moved too", request(), view(FIRST), (True, 400, 400, 450, 510)),
    ("nothing to move", request(), view(ANCHOR, FIRST), (False, 500, 0, 0, 370)),
    ("nothing held", request(), view(), (False, 0, 0, 0, 870)),
    ("all exact", request(), view(ANCHOR, FIRST, SECOND, THIRD), (False, 850, 0, 0, 20)),
    (
        "exact where both are held, moved from there on",
        request(),
        view(ANCHOR, FIRST, SECOND, ALONE_SECOND, ALONE_THIRD),
        (True, 850, 50, 0, 25),
    ),
    ("not allowed", request(None), view(ANCHOR, FIRST, ALONE_SECOND, ALONE_THIRD), (False, 500, 0, 0, 370)),
    (
        "as much to compute either way",
        request(JoinPlan("random", 1.0)),
        view(ANCHOR, FIRST, ALONE_SECOND, ALONE_THIRD),
        (False, 500, 0, 0, 370),
    ),
    ("held elsewhere only", request(), view(ANCHOR, FIRST, ALONE_SECOND, node="n2"), (False, 0, 0, 0, 870)),
    (
        "held elsewhere, and shared",
        request(),
        view(ANCHOR, FIRST, ALONE_SECOND, node="n2", sharing=("n1", "n2")),
        (True, 800, 300, 50, 100),
    ),
    ("no tail for a join", request(tail=1), view(ANCHOR, FIRST, ALONE_SECOND, ALONE_THIRD), (False, 500, 0, 0, 351)),
]


@pytest.mark.parametrize(("asked", "seen", "expected"), [r[1:] for r in WAYS], ids=[r[0] for r in WAYS])
def test_the_way_that_computes_less(
    asked: PlacementRequest, seen: View, expected: tuple[bool, int, int, int, int]
) -> None:
    reuse = best_reuse(asked, view=seen, node_id="n1")
    got = (reuse.join is not None, reuse.held_tokens, reuse.moved_tokens, reuse.hole_tokens, reuse.computed_tokens)
    assert got == expected
    assert [(s.start, s.stop) for s in reuse.spans] == [(s.start, s.stop) for s in asked.spans]
    assert reuse.local_tokens == (0 if "n2" in str(seen.nodes_by_key.values()) else reuse.held_tokens)


def test_a_joined_plan_names_what_was_learned_and_where_and_saves_nothing() -> None:
    decision = decide(request(), view(ANCHOR, FIRST, ALONE_SECOND, prefill=2))
    assert (decision.mode, decision.join, decision.prefill) == (Mode.LOCAL, JOIN, ())
    assert [(span.key, span.held, span.base) for span in decision.spans] == [
        (ANCHOR, True, None),
        (FIRST, True, None),
        (ALONE_SECOND, True, 100),
        (THIRD, False, None),
        (TAIL, False, None),
    ]
    assert not any(span.save for span in decision.spans)
    assert (decision.hit_tokens, decision.hole_tokens, decision.uncached_tokens) == (800, 50, 100)
    assert decision.bookings[0] == BookedTokens(Role.DECODE, "d0", 100, until_first_byte=True)
    assert decision.load_deadline_s == DEADLINES.load_base_s + 800 / DEADLINES.load_floor_tokens_per_s
    assert "join query_aware;share=0.1: 300 tokens moved, 50 in holes, 100 to compute" in decision.reasons
    assert decision.way == "joined"


def test_who_asked_for_a_join_and_gets_none_is_told_why() -> None:
    better = decide(request(), view(ANCHOR, FIRST, SECOND, THIRD))
    assert "exact: a join would not compute fewer than 20 tokens" in better.reasons
    unable = replace(request(None), exact_because="no engine can")
    assert "exact: no engine can" in decide(unable, view(ANCHOR, ALONE_SECOND)).reasons
    silent = decide(request(None), view(ANCHOR))
    assert not any("join" in reason or "exact" in reason for reason in silent.reasons)
    assert silent.way == "remote" if silent.prefill else "local"


def test_the_replica_with_most_to_reuse_counts_moved_passages() -> None:
    seen = View(
        decode=(replica("d0"), replica("d1", node="n2")),
        nodes_by_key={
            ANCHOR: frozenset({"n1", "n2"}),
            FIRST: frozenset({"n1"}),
            ALONE_SECOND: frozenset({"n2"}),
            ALONE_THIRD: frozenset({"n2"}),
        },
    )
    assert decide(request(None), seen).decode.replica_id == "d0"
    # 370 tokens on n1, 455 on n2: a long exact first passage beats two moved ones.
    assert decide(request(), seen).decode.replica_id == "d0"
    shorter = replace(seen, nodes_by_key={**seen.nodes_by_key, FIRST: frozenset()})
    assert decide(request(), shorter).decode.replica_id == "d1"


LEARNS: list[tuple[str, PlacementRequest, View, tuple[int, ...]]] = [
    ("all", request(), view(prefill=1), (0, 1, 2)),
    ("what is missing", request(), view(ANCHOR, FIRST, ALONE_THIRD, prefill=1), (1,)),
    ("nothing is missing", request(), view(ANCHOR, FIRST, ALONE_SECOND, ALONE_THIRD, prefill=1), ()),
    ("nobody to learn", request(), view(ANCHOR, FIRST), ()),
    ("exact only", request(None), view(ANCHOR, prefill=1), ()),
    ("exact already", request(), view(ANCHOR, FIRST, SECOND, THIRD, prefill=1), ()),
    ("of what is exact only the rest", request(), view(ANCHOR, FIRST, SECOND, prefill=1), (2,)),
    ("a join would not pay", request(JoinPlan("random", 1.0)), view(ANCHOR, prefill=1), ()),
    ("too short", request(third=9), view(ANCHOR, FIRST, ALONE_SECOND, prefill=1), ()),
]


@pytest.mark.parametrize(("asked", "seen", "expected"), [r[1:] for r in LEARNS], ids=[r[0] for r in LEARNS])
def test_missing_passages_are_learned_first(asked: PlacementRequest, seen: View, expected: tuple[int, ...]) -> None:
    first = learning(asked, seen)
    assert (first.documents if first else ()) == expected


def test_a_single_passage_behind_its_anchor_is_not_learned_first() -> None:
    """It is exact there: the request itself computes and saves it, on a prefill replica if it is long."""
    spans = request().spans
    alone = PlacementRequest(spans=(*spans[:2], KeyedSpan(TAIL, 500, 520, SpanKind.TAIL)), num_tokens=520, join=JOIN)
    assert learning(alone, view(ANCHOR, prefill=1)) is None


def test_learning_happens_where_the_decode_replica_can_read_it_or_not_at_all() -> None:
    far = replace(view(ANCHOR), prefill=(replica("p0", node="n2"),))
    assert learning(request(), far) is None
    shared = replace(far, sharing_nodes=frozenset({"n1", "n2"}))
    first = learning(request(), shared)
    assert first is not None
    assert first.node_id == "n1"
    assert first.budget_s == DEADLINES.prefill_base_s + 750 / DEADLINES.prefill_floor_tokens_per_s
    busy = replace(shared, prefill=(replica("p0", node="n1", booked=RULE.prefill_max_booked_tokens + 1),))
    assert learning(request(), busy) is None


def test_what_a_quality_means() -> None:
    settings = JoinSettings(high_method="deviation", high_share=0.3)
    assert settings.plan_for(None) is None
    assert settings.plan_for("exact") is None
    assert settings.plan_for("high") == JoinPlan("deviation", 0.3)
    assert settings.plan_for("fast") == JoinPlan("query_aware", 0.05)
    assert settings.plan_for(0.0) == JoinPlan("deviation", 0.0)
    assert JoinSettings(default_quality="fast").plan_for(None) == JoinPlan("query_aware", 0.05)
    assert JoinSettings(default_quality="fast").plan_for("exact") is None
