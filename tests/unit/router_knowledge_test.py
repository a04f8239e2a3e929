"""What the router knows: the directory as a fold, members and suspects, pages of metrics.

Covers: `router.directory`, `router.membership`, `router.scrape`, `router.errors`.
Does not cover: feeds and rounds over sockets (`router_ingress_test.py`).
"""

import random

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.router_fakes import MODEL, SCOPE, FakeReplica, added

from cluster.errors import CallerError, InvariantError
from kvstore.events import ChunkChange, ChunkEvent, FeedItem, HeldChunk, StoreLost, StoreSnapshot
from kvstore.keys import ChunkKey
from kvstore.wire import Role, StoreEndpoint, WorkerReport
from router.directory import Directory
from router.errors import DeadlineError, NoReplicaError, ReplicaAnswerError, RequestError, UnknownModelError, answer_for
from router.membership import Membership
from router.scrape import Families


def key(index: int) -> ChunkKey:
    return ChunkKey(bytes([index]) * 32)


def changed(change: ChunkChange, index: int, *, tier: str = "host", node: str = "n1", epoch: str = "e1") -> ChunkEvent:
    return ChunkEvent(change, key(index), tier, 640, 10, "raw", node, epoch, 1)


def snapshot(*indexes: int, node: str = "n1", epoch: str = "e1") -> StoreSnapshot:
    chunks = tuple(HeldChunk(key(index), "host", 640, 10, "raw") for index in indexes)
    return StoreSnapshot(node_id=node, epoch=epoch, seq=9, chunks=chunks)


def nodes(directory: Directory, index: int) -> set[str]:
    return set(directory.nodes_by_key([key(index)]).get(key(index), frozenset()))


ADDED, MOVED, DROPPED = ChunkChange.ADDED, ChunkChange.MOVED, ChunkChange.DROPPED
FOLDS: list[tuple[str, list[FeedItem], dict[int, set[str]]]] = [
    ("nothing", [], {1: set()}),
    ("added", [changed(ADDED, 1)], {1: {"n1"}, 2: set()}),
    ("on two nodes", [changed(ADDED, 1), changed(ADDED, 1, node="n2")], {1: {"n1", "n2"}}),
    ("dropped", [changed(ADDED, 1), changed(DROPPED, 1)], {1: set()}),
    ("dropped twice", [changed(DROPPED, 1), changed(DROPPED, 1)], {1: set()}),
    ("dropped on one node", [changed(ADDED, 1), changed(ADDED, 1, node="n2"), changed(DROPPED, 1)], {1: {"n2"}}),
    ("a snapshot replaces", [changed(ADDED, 1), snapshot(2, 3)], {1: set(), 2: {"n1"}, 3: {"n1"}}),
    ("a snapshot replaces its own node only", [changed(ADDED, 1, node="n2"), snapshot(2)], {1: {"n2"}, 2: {"n1"}}),
    ("a new epoch drops the old", [snapshot(1, 2), changed(ADDED, 3, epoch="e2")], {1: set(), 3: {"n1"}}),
    ("lost", [snapshot(1), StoreLost(node_id="n1", epoch="e1")], {1: set()}),
    ("an old life is lost", [snapshot(1, epoch="e2"), StoreLost(node_id="n1", epoch="e1")], {1: {"n1"}}),
    ("back after a loss", [snapshot(1), StoreLost(node_id="n1", epoch="e1"), snapshot(1)], {1: {"n1"}}),
]


@pytest.mark.parametrize(("items", "expected"), [r[1:] for r in FOLDS], ids=[r[0] for r in FOLDS])
def test_the_directory_is_a_fold(items: list[FeedItem], expected: dict[int, set[str]]) -> None:
    directory = Directory(max_entries=100)
    for item in items:
        directory.apply(item)
    assert {index: nodes(directory, index) for index in expected} == expected
    assert len(directory) == sum(directory.num_chunks(node) for node in ("n1", "n2"))


def test_a_move_changes_the_tier() -> None:
    directory = Directory(max_entries=9)
    directory.apply(changed(ADDED, 1))
    directory.apply(changed(MOVED, 1, tier="file"))
    assert [(n, at.tier, at.num_bytes, at.num_tokens) for n, at in directory.locations(key(1)).items()] == [
        ("n1", "file", 640, 10)
    ]


def test_the_directory_forgets_the_oldest() -> None:
    directory = Directory(max_entries=3)
    for index in (1, 2, 3, 1, 4):
        directory.apply(changed(ADDED, index))
    assert [bool(nodes(directory, i)) for i in (1, 2, 3, 4)] == [True, False, True, True]
    directory.apply(snapshot(*range(50), node="n2"))
    assert len(directory) == 3
    assert directory.num_chunks("n1") == 0


@pytest.mark.parametrize("seed", range(5))
def test_the_directory_agrees_with_a_plain_set(seed: int) -> None:
    chance, directory, held = random.Random(seed), Directory(max_entries=10_000), set[tuple[str, int]]()
    for _ in range(2_000):
        node, index = chance.choice(["n1", "n2", "n3"]), chance.randrange(40)
        action = chance.random()
        if action < 0.55:
            directory.apply(changed(ADDED, index, node=node))
            held.add((node, index))
        elif action < 0.97:
            directory.apply(changed(DROPPED, index, node=node))
            held.discard((node, index))
        elif action < 0.99:
            directory.drop_node(node)
            held = {pair for pair in held if pair[0] != node}
        else:
            directory.apply(snapshot(1, 2, node=node))
            held = {pair for pair in held if pair[0] != node} | {(node, 1), (node, 2)}
        assert len(directory) == len(held)
    for index in range(40):
        assert nodes(directory, index) == {node for node, held_index in held if held_index == index}


def report(name: str, role: Role = Role.DECODE, **kwargs: object) -> WorkerReport:
    return FakeReplica(role=role, replica_id=name, url=f"http://{name}", **kwargs).report()  # type: ignore[arg-type]


def members(*reports: WorkerReport, asked_s: float = 0.0) -> Membership:
    membership = Membership(model=MODEL, ttl_s=10.0)
    for role in Role:
        membership.apply_round(role, [r for r in reports if r.role is role], asked_s=asked_s)
    return membership


def ready(membership: Membership, role: Role = Role.DECODE) -> list[str]:
    return [r.peer.replica_id for r in membership.ready(role)]


def test_who_may_take_requests() -> None:
    membership = members(report("d1"), report("d0"), report("d2", draining=True), report("p0", Role.PREFILL))
    assert ready(membership) == ["d0", "d1"]
    assert ready(membership, Role.PREFILL) == ["p0"]
    other_model = Membership(model="other", ttl_s=10.0)
    other_model.apply_round(Role.DECODE, [report("d0")], asked_s=0.0)
    assert ready(other_model) == []


def test_a_suspect_is_out_until_a_report_that_was_asked_for_later() -> None:
    membership = members(report("d0"), report("d1"))
    membership.suspect("d0", now_s=5.0)
    membership.suspect("nobody", now_s=5.0)
    assert ready(membership) == ["d1"]
    membership.apply_round(Role.DECODE, [report("d0"), report("d1")], asked_s=4.9)  # was under way already
    assert ready(membership) == ["d1"]
    membership.apply_round(Role.DECODE, [report("d0"), report("d1")], asked_s=5.0)
    assert ready(membership) == ["d0", "d1"]


def test_a_late_report_of_the_only_replica_turns_nobody_away() -> None:
    membership = members(report("d0"))
    membership.apply_round(Role.DECODE, [], asked_s=1.0)
    assert ready(membership) == ["d0"]
    assert [worker["state"] for worker in membership.listing()] == ["suspect"]
    membership.suspect("d0", now_s=1.5)
    assert ready(membership) == []
    membership.apply_round(Role.DECODE, [report("d0")], asked_s=2.0)
    assert [worker["state"] for worker in membership.listing()] == ["ready"]
    membership.expire(12.1)
    assert ready(membership) == []


def test_who_is_missing_in_a_round_is_passed_over_and_then_gone() -> None:
    membership = members(report("d0"), report("d1"))
    membership.apply_round(Role.DECODE, [report("d1")], asked_s=1.0)
    assert ready(membership) == ["d1"]
    assert len(membership.known(Role.DECODE)) == 2
    membership.apply_round(Role.DECODE, [report("d1")], asked_s=9.0)
    membership.expire(10.1)
    assert [r.peer.replica_id for r in membership.known(Role.DECODE)] == ["d1"]
    membership.apply_round(Role.DECODE, [report("d0"), report("d1")], asked_s=11.0)
    assert ready(membership) == ["d0", "d1"]


def test_facts_are_what_most_agree_on() -> None:
    other = type(SCOPE)(**{name: getattr(SCOPE, name) for name in SCOPE.__struct_fields__} | {"model_digest": "zz"})
    membership = members(report("d0", scope=other, max_model_len=100), report("d1"), report("d2"))
    facts = membership.facts()
    assert facts is not None
    assert (facts.scope, facts.max_model_len) == (SCOPE, 100)
    assert members().facts() is None
    without = members(report("d0", scope=None)).facts()
    assert without is not None
    assert without.scope is None


def test_stores_are_the_latest_reported() -> None:
    membership = members(report("d0"), report("p0", Role.PREFILL), report("d1", node_id="n2"))
    assert sorted(membership.stores()) == ["n1", "n2"]
    old = membership.stores()["n1"]
    new = StoreEndpoint(**{n: getattr(old, n) for n in old.__struct_fields__} | {"epoch": "e2"})
    fresh = report("p0", Role.PREFILL)
    restarted = WorkerReport(**{n: getattr(fresh, n) for n in fresh.__struct_fields__} | {"store": new})
    membership.apply_round(Role.PREFILL, [restarted], asked_s=1.0)
    assert membership.stores()["n1"].epoch == "e2"
    membership.expire(10.5)
    assert sorted(membership.stores()) == ["n1"]


def test_nodes_share_chunks_whose_stores_have_an_address_for_each_other() -> None:
    membership = Membership(model=MODEL, ttl_s=10.0)
    reports = [report("d0", node_id="n1"), report("d1", node_id="n2"), report("d2", node_id="n3", has_store=False)]
    assert reports[0].store is not None
    shared = msgspec.structs.replace(reports[0].store, peer_address="10.0.0.1:7000")
    reports[0] = msgspec.structs.replace(reports[0], store=shared)
    membership.apply_round(Role.DECODE, reports, asked_s=0.0)
    assert membership.sharing_nodes() == {"n1"}


def test_merged_pages_are_valid_and_say_whose_they_are() -> None:
    page = (
        '# HELP a_total Things\n# TYPE a_total counter\na_total{x="a b"} 1\n'
        '# HELP h Times\n# TYPE h histogram\nh_bucket{le="1"} 2\nh_bucket{le="+Inf"} 2\nh_count 2\nh_sum 3\n'
        "# TYPE e gauge\ne{} 5\n"
    )
    families = Families()
    families.add(page, labels="")
    families.add(page, labels='replica="r"')
    families.add("garbage that is no sample", labels='replica="q"')
    text = families.render().decode()
    assert text.count("# TYPE a_total counter") == 1
    assert "garbage" not in text
    parsed = {f.name: f for f in text_string_to_metric_families(text)}
    assert [s.labels for s in parsed["a"].samples] == [{"x": "a b"}, {"replica": "r", "x": "a b"}]
    assert [s.labels for s in parsed["e"].samples] == [{}, {"replica": "r"}]
    assert len(parsed["h"].samples) == 8


ANSWERS: list[tuple[Exception, int, str]] = [
    (RequestError("m", "p", "c"), 400, "invalid_request_error"),
    (RequestError("m", None, None, 401), 401, "authentication_error"),
    (UnknownModelError("a", "b"), 404, "not_found_error"),
    (CallerError("m"), 400, "invalid_request_error"),
    (NoReplicaError("m", 3.0), 503, "service_unavailable_error"),
    (DeadlineError("m"), 504, "timeout_error"),
    (ReplicaAnswerError("m"), 502, "server_error"),
    (InvariantError("m"), 500, "server_error"),
    (ZeroDivisionError("secret"), 500, "server_error"),
]


@pytest.mark.parametrize(("error", "status", "kind"), ANSWERS, ids=[type(r[0]).__name__ for r in ANSWERS])
def test_every_error_has_an_answer(error: Exception, status: int, kind: str) -> None:
    answer = answer_for(error)
    assert (answer.status, kind in answer.body.decode()) == (status, True)
    assert b"secret" not in answer.body
    assert answer.headers.get("retry-after") == ("3" if isinstance(error, NoReplicaError) else None)


def test_an_event_helper_matches_the_store() -> None:
    directory = Directory(max_entries=9)
    directory.apply(added(key(7), node_id="n9"))
    assert nodes(directory, 7) == {"n9"}
