"""The placement rule as tables: a view and a request in, a decision out.

Covers: `router.policy`, `router.view`, `router.bookings`. Does not cover: how views are gathered.
"""

from dataclasses import replace

import pytest

from kvstore.keys import ChunkKey
from kvstore.wire import Mode, Peer, Role, SpanKind
from router.bookings import Ledger
from router.errors import NoReplicaError
from router.policy import (
    BookedTokens,
    Decision,
    choose,
    choose_learner,
    plan_learning,
)
from router.reuse import PlacementRequest
from router.settings import DeadlineSettings, RuleSettings
from router.view import KeyedSpan, ReplicaView, View

RULE = RuleSettings(
    remote_min_tokens=500,
    prefill_max_booked_tokens=10_000,
    decode_max_lead_tokens=2_000,
    min_save_tokens=64,
    max_candidates=2,
    stream_tokens=10,
)
DEADLINES = DeadlineSettings(
    prefill_base_s=5.0,
    prefill_floor_tokens_per_s=100.0,
    prefill_max_s=60.0,
    load_base_s=2.0,
    load_floor_tokens_per_s=1000.0,
    load_max_s=4.0,
)


def key(index: int) -> ChunkKey:
    return ChunkKey(bytes([index]) * 32)


def request(*lengths: int) -> PlacementRequest:
    spans, position = [], 0
    for index, length in enumerate(lengths):
        kind = SpanKind.PREFIX if index == 0 else SpanKind.TAIL if index == len(lengths) - 1 else SpanKind.PASSAGE
        spans.append(KeyedSpan(key(index), position, position + length, kind))
        position += length
    return PlacementRequest(spans=tuple(spans), num_tokens=position)


def replica(name: str, *, booked: int = 0, node: str = "n1", store: bool = True) -> ReplicaView:
    return ReplicaView(peer=Peer(name, f"http://{name}"), node_id=node, booked_tokens=booked, has_store=store)


def view(
    decode: list[ReplicaView],
    prefill: list[ReplicaView] | None = None,
    held: dict[int, list[str]] | None = None,
    sharing: tuple[str, ...] = (),
) -> View:
    nodes = {key(index): frozenset(names) for index, names in (held or {}).items()}
    return View(
        decode=tuple(decode), prefill=tuple(prefill or ()), nodes_by_key=nodes, sharing_nodes=frozenset(sharing)
    )


def decide(asked: PlacementRequest, seen: View) -> Decision:
    return choose(asked, view=seen, rule=RULE, deadlines=DEADLINES)


PROMPT = request(100, 800, 100)
BOTH_NODES = [replica("d0"), replica("d1", node="n2")]
SHARING = ("n1", "n2")
MODES: list[tuple[str, PlacementRequest, View, Mode, list[str], bool, str]] = [
    ("long and unknown", PROMPT, view([replica("d0")], [replica("p0")]), Mode.REMOTE, ["p0"], True, "remote on p0"),
    ("just long enough", request(500), view([replica("d0")], [replica("p0")]), Mode.REMOTE, ["p0"], True, "500"),
    ("short", request(499), view([replica("d0")], [replica("p0")]), Mode.LOCAL, [], False, "under 500"),
    (
        "held but for the tail",
        PROMPT,
        view([replica("d0")], [replica("p0")], {0: ["n1"], 1: ["n1"]}),
        Mode.LOCAL,
        [],
        False,
        "100 uncached",
    ),
    (
        "a gap at the start makes the rest unreachable",
        PROMPT,
        view([replica("d0")], [replica("p0")], {1: ["n1"], 2: ["n1"]}),
        Mode.REMOTE,
        ["p0"],
        True,
        "1000 uncached",
    ),
    (
        "held on another node only",
        PROMPT,
        view([replica("d0")], [replica("p0")], {0: ["n2"], 1: ["n2"]}),
        Mode.REMOTE,
        ["p0"],
        True,
        "1000 uncached",
    ),
    ("no prefill replica", PROMPT, view([replica("d0")]), Mode.LOCAL, [], True, "no prefill replica"),
    (
        "prefill on another node",
        PROMPT,
        view([replica("d0")], [replica("p0", node="n2")]),
        Mode.LOCAL,
        [],
        True,
        "1 elsewhere",
    ),
    (
        "prefill on another node that shares chunks",
        PROMPT,
        view([replica("d0")], [replica("p0", node="n2")], sharing=SHARING),
        Mode.REMOTE,
        ["p0"],
        True,
        "remote on p0 on another node",
    ),
    (
        "prefill on a node that shares with others only",
        PROMPT,
        view([replica("d0")], [replica("p0", node="n2")], sharing=("n2", "n3")),
        Mode.LOCAL,
        [],
        True,
        "1 elsewhere",
    ),
    (
        "of equally busy prefill replicas the nearest, then the one that holds most",
        PROMPT,
        view(
            [replica("d0")],
            [replica("p0", node="n3"), replica("p1", node="n2"), replica("p2"), replica("p3", booked=1)],
            {0: ["n2"]},
            sharing=("n1", "n2", "n3"),
        ),
        Mode.REMOTE,
        ["p2", "p1"],
        True,
        "best of 4",
    ),
    (
        "a less busy prefill replica before a nearer one",
        PROMPT,
        view([replica("d0")], [replica("p0", booked=1), replica("p1", node="n2")], sharing=SHARING),
        Mode.REMOTE,
        ["p1", "p0"],
        True,
        "p1 on another node",
    ),
    (
        "held on another node that shares",
        PROMPT,
        view([replica("d0")], [replica("p0")], {0: ["n2"], 1: ["n2"]}, sharing=SHARING),
        Mode.LOCAL,
        [],
        False,
        "100 uncached",
    ),
    (
        "prefill overloaded",
        PROMPT,
        view([replica("d0")], [replica("p0", booked=10_001)]),
        Mode.LOCAL,
        [],
        True,
        "overloaded",
    ),
    (
        "candidates by booked tokens, then id, bounded",
        PROMPT,
        view(
            [replica("d0")], [replica("p2", booked=5), replica("p1"), replica("p0", booked=5), replica("p3", booked=9)]
        ),
        Mode.REMOTE,
        ["p1", "p0"],
        True,
        "best of 4",
    ),
    (
        "no store at the decode replica",
        PROMPT,
        view([replica("d0", store=False)], [replica("p0")]),
        Mode.LOCAL,
        [],
        True,
        "no store",
    ),
    (
        "no chunks",
        PlacementRequest(num_tokens=9_000),
        view([replica("d0")], [replica("p0")]),
        Mode.LOCAL,
        [],
        False,
        "",
    ),
]


@pytest.mark.parametrize(
    ("asked", "seen", "mode", "prefill", "wanted", "reason"), [r[1:] for r in MODES], ids=[r[0] for r in MODES]
)
def test_mode(asked: PlacementRequest, seen: View, mode: Mode, prefill: list[str], wanted: bool, reason: str) -> None:
    decision = decide(asked, seen)
    assert decision.mode is mode
    assert [peer.replica_id for peer in decision.prefill] == prefill
    assert decision.wanted_remote is wanted
    assert reason in " ".join(decision.reasons)


DECODE: list[tuple[str, View, str]] = [
    ("least booked", view([replica("d0", booked=2), replica("d1", booked=1)]), "d1"),
    ("ties go to the smaller id", view([replica("d1"), replica("d0")]), "d0"),
    ("holder before least booked", view([replica("d0"), replica("d1", booked=9, node="n2")], held={0: ["n2"]}), "d1"),
    ("more held before less", view(BOTH_NODES, held={0: ["n1", "n2"], 1: ["n2"]}), "d1"),
    ("held behind a gap counts nothing", view(BOTH_NODES, held={1: ["n2"], 2: ["n2"]}), "d0"),
    (
        "local before remote where all can read",
        view(BOTH_NODES, held={0: ["n1", "n2"], 1: ["n2"]}, sharing=SHARING),
        "d1",
    ),
    (
        "readable before local: the longer run, wherever it is",
        view([replica("d0", node="n3"), replica("d1", node="n2")], held={0: ["n1", "n3"], 1: ["n1"]}, sharing=SHARING),
        "d1",
    ),
    (
        "a holder far ahead of the others loses its advantage",
        view([replica("d0"), replica("d1", booked=2_001, node="n2")], held={0: ["n2"]}),
        "d0",
    ),
    (
        "a holder just not too far ahead keeps it",
        view([replica("d0"), replica("d1", booked=2_000, node="n2")], held={0: ["n2"]}),
        "d1",
    ),
]


@pytest.mark.parametrize(("seen", "expected"), [r[1:] for r in DECODE], ids=[r[0] for r in DECODE])
def test_decode_replica(seen: View, expected: str) -> None:
    assert decide(PROMPT, seen).decode.replica_id == expected
    turned = replace(seen, decode=tuple(reversed(seen.decode)))
    assert decide(PROMPT, turned).decode.replica_id == expected


SAVES: list[tuple[str, PlacementRequest, dict[int, list[str]], list[bool]]] = [
    ("all unknown", request(100, 800, 64), {}, [True, True, True]),
    ("a short end is not worth it", request(100, 800, 63), {}, [True, True, False]),
    ("a short span before others is", request(10, 10, 64), {}, [True, True, True]),
    ("held ones are not saved again", request(100, 800, 64), {0: ["n1"]}, [False, True, True]),
    ("held elsewhere is not held here", request(100, 800, 64), {0: ["n2"]}, [True, True, True]),
]


@pytest.mark.parametrize(("asked", "held", "expected"), [r[1:] for r in SAVES], ids=[r[0] for r in SAVES])
def test_saved_spans(asked: PlacementRequest, held: dict[int, list[str]], expected: list[bool]) -> None:
    decision = decide(asked, view([replica("d0")], held=held))
    assert [span.save for span in decision.spans] == expected
    assert [span.held for span in decision.spans] == ["n1" in held.get(i, []) for i in range(len(expected))]
    without_store = decide(asked, view([replica("d0", store=False)]))
    assert not any(span.save for span in without_store.spans)


def test_held_elsewhere_is_loaded_and_not_saved_again_where_nodes_share() -> None:
    decision = decide(request(100, 800, 64), view([replica("d0")], held={0: ["n2"], 1: ["n1"]}, sharing=SHARING))
    assert [(span.held, span.save) for span in decision.spans] == [(True, False), (True, False), (False, True)]
    assert decision.hit_tokens == 900
    assert "its node holds 800 of 964 tokens and 100 more are on other nodes" in decision.reasons[0]


def test_deadlines_grow_with_tokens_up_to_their_maximum() -> None:
    remote = decide(PROMPT, view([replica("d0")], [replica("p0", booked=500)]))
    assert remote.prefill_deadline_s == 5.0 + (500 + 1000) / 100
    assert remote.load_deadline_s == 2.0 + 1000 / 1000
    far = decide(request(9_000), view([replica("d0")], [replica("p0", booked=9_000)]))
    assert (far.prefill_deadline_s, far.load_deadline_s) == (60.0, 4.0)
    local = decide(PROMPT, view([replica("d0")], held={0: ["n1"]}))
    assert (local.prefill_deadline_s, local.load_deadline_s) == (0.0, 2.1)


def test_what_is_booked() -> None:
    remote = decide(PROMPT, view([replica("d0")], [replica("p0")], {0: ["n1"]}))
    assert remote.bookings == (
        BookedTokens(Role.PREFILL, "p0", 900, True),
        BookedTokens(Role.DECODE, "d0", 10, False),
    )
    local = decide(PROMPT, view([replica("d0")]))
    assert local.bookings[0] == BookedTokens(Role.DECODE, "d0", 1000, True)


def test_no_decode_replica() -> None:
    with pytest.raises(NoReplicaError):
        decide(PROMPT, view([], [replica("p0")]))


def test_the_same_view_gives_the_same_decision() -> None:
    seen = view(BOTH_NODES, [replica("p0"), replica("p1")], {0: ["n1", "n2"]})
    assert decide(PROMPT, seen) == decide(PROMPT, seen)


def test_bookings_spread_a_burst() -> None:
    """Without bookings every request of a burst would go to the same replica."""
    ledger, counts = Ledger(), {"d0": 0, "d1": 0, "d2": 0}
    for _ in range(30):
        replicas = [replica(name, booked=ledger.tokens(Role.DECODE, name)) for name in counts]
        decision = decide(request(300), view(replicas))
        ledger.book(decision.bookings, expires_s=100.0)
        counts[decision.decode.replica_id] += 1
    assert set(counts.values()) == {10}


def test_learning_goes_to_the_least_booked_replica_with_a_store() -> None:
    seen = view([], [replica("p0", booked=3), replica("p1", store=False), replica("p2", booked=2)], {0: ["n1"]})
    learner = choose_learner(seen, rule=RULE)
    assert learner.peer.replica_id == "p2"
    spans, budget_s = plan_learning(request(10, 90).spans, view=seen, learner=learner, deadlines=DEADLINES)
    assert [(span.held, span.save) for span in spans] == [(True, False), (False, True)]
    assert budget_s == 5.0 + (2 + 100) / 100
    with pytest.raises(NoReplicaError):
        choose_learner(view([replica("d0")], [replica("p0", booked=10_001)]), rule=RULE)


def test_bookings_end_in_parts_once_and_by_themselves() -> None:
    ledger = Ledger()
    promises = [BookedTokens(Role.PREFILL, "p", 900, True), BookedTokens(Role.DECODE, "d", 10, False)]
    booking = ledger.book(promises, expires_s=5.0)
    late = ledger.book(promises, expires_s=9.0)
    assert (ledger.tokens(Role.PREFILL, "p"), ledger.total(Role.DECODE)) == (1800, 20)
    booking.first_byte()
    booking.first_byte()
    assert (ledger.tokens(Role.PREFILL, "p"), ledger.total(Role.DECODE)) == (900, 20)
    booking.end()
    booking.end()
    assert (ledger.tokens(Role.PREFILL, "p"), ledger.total(Role.DECODE)) == (900, 10)
    ledger.expire(8.9)
    assert ledger.total(Role.PREFILL) == 900
    ledger.expire(9.0)
    late.end()
    assert (ledger.total(Role.PREFILL), ledger.total(Role.DECODE)) == (0, 0)


def test_ended_bookings_are_forgotten_before_their_deadline() -> None:
    ledger = Ledger()
    promise = BookedTokens(Role.DECODE, "d", 10, False)
    kept = [ledger.book([promise], expires_s=1e9) for _ in range(5)]
    for _ in range(10_000):
        ledger.book([promise], expires_s=1e9).end()
    assert len(ledger._expiries) < 1000
    assert ledger.total(Role.DECODE) == 50
    ledger.expire(1e9)
    assert ledger.total(Role.DECODE) == 0
    assert not any(booking.is_open for booking in kept)
