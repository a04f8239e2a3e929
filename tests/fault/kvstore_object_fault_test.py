"""The object tier on a bucket that fails: every read is a miss or the right bytes, nothing outlives its deadline, the
tier pauses and comes back, and nothing is left behind.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import obstore
import pytest
from support.object_nodes import (
    PAUSE_S,
    PAYLOAD_BYTES,
    QUICK,
    SCHEDULING_S,
    Nodes,
    list_names,
    longest_s,
    our_threads,
    timed_get,
)

from kvstore import metrics
from kvstore.settings import ObjectSettings
from kvstore.testing.poll import wait_until
from kvstore.testing.s3 import Fault, S3Process, unanswered_port, unused_port
from kvstore.testing.samples import sample_key
from kvstore.testing.tier import put_record, record_of
from kvstore.tiers import obs, obs_clients
from kvstore.tiers.bucket import BucketLateError
from kvstore.tiers.object_names import object_name
from kvstore.tiers.obs import ObstoreBucket


@pytest.fixture
def outcomes() -> Callable[[], dict[str, float]]:
    """Reads of the object tier since the last call, by outcome."""
    names = ("hit", "miss", "corrupt", "error", "late")

    def count(name: str) -> float:
        return metrics.TIER_READS.labels("object", name)._value.get()

    before = {name: count(name) for name in names}

    def since() -> dict[str, float]:
        changes = {name: count(name) - before[name] for name in names}
        before.update({name: count(name) for name in names})
        return {name: change for name, change in changes.items() if change}

    return since


# Requests that fail.


def test_every_second_request_is_answered_503(server: S3Process, nodes: Nodes) -> None:
    tier = nodes.ready()
    server.set_fault(Fault(kind="unavailable", every=2))
    records = {sample_key(i): put_record(tier, i, 10_000 + i) for i in range(8)}
    assert {key: tier.get(key) for key in records} == records


def test_503_to_all_pauses_reads_and_a_pause_ends(
    server: S3Process, nodes: Nodes, outcomes: Callable[[], dict[str, float]]
) -> None:
    tier = nodes.ready()
    record = put_record(tier, 0, 5000)
    server.set_fault(Fault(kind="unavailable", methods=("GET",)))
    for _ in range(2):
        found, took_s = timed_get(tier, 0)
        assert found is None
        assert took_s < longest_s(tier)
    assert outcomes() == {"error": 2}
    assert not tier.contains(sample_key(0))
    requests = server.requests()
    assert tier.get(sample_key(0)) is None
    assert server.requests() == requests, "a paused tier asks nothing"
    assert outcomes() == {"miss": 1}
    put_record(tier, 1, 5000)
    server.set_fault(None)
    nodes.clock.advance_s(PAUSE_S)
    assert tier.get(sample_key(0)) == record
    assert tier.contains(sample_key(0))
    assert tier.get(sample_key(1)) == record_of(1, 5000)


def test_503_to_all_writes_pauses_them_and_reads_go_on(server: S3Process, nodes: Nodes) -> None:
    tier = nodes.ready()
    record = put_record(tier, 0, 5000)
    server.set_fault(Fault(kind="unavailable", methods=("PUT",)))
    for index in (1, 2):
        assert not tier.put(sample_key(index), memoryview(record_of(index, 100)))
    requests = server.requests()
    assert not tier.put(sample_key(3), memoryview(record_of(3, 100)))
    assert server.requests() == requests
    assert tier.get(sample_key(0)) == record
    assert tier.stat().chunks == 1
    server.set_fault(None)
    nodes.clock.advance_s(PAUSE_S)
    put_record(tier, 3, 100)


def test_403_is_told_from_a_miss_and_says_what_to_do(
    server: S3Process, nodes: Nodes, caplog: pytest.LogCaptureFixture, outcomes: Callable[[], dict[str, float]]
) -> None:
    tier = nodes.ready()
    record = put_record(tier, 0, 5000)
    server.set_fault(Fault(kind="forbidden"))
    before = server.requests().get("GET", 0)
    assert tier.get(sample_key(0)) is None
    assert server.requests()["GET"] == before + 1, "not tried again"
    assert outcomes() == {"error": 1}
    assert "AWS_ACCESS_KEY_ID" in caplog.text
    assert not tier.refresh()
    assert "the store runs without it" in caplog.text
    assert tier.stat().chunks == 1
    server.set_fault(None)
    assert tier.refresh()
    assert tier.get(sample_key(0)) == record


def test_missing_object_is_a_miss_and_no_failure(nodes: Nodes, outcomes: Callable[[], dict[str, float]]) -> None:
    tier = nodes.ready()
    for index in range(4):
        put_record(tier, index, 5000)
        entry = tier.entry(sample_key(index))
        assert entry is not None
        obstore.delete(nodes.bare(), object_name(sample_key(index), entry))
        assert tier.get(sample_key(index)) is None
    assert outcomes() == {"miss": 4}
    assert tier.stat().chunks == 0
    assert nodes.changed == [sample_key(i) for i in range(4)]
    put_record(tier, 0, 5000)
    assert tier.contains(sample_key(0)), "misses do not pause the tier"


# Bodies that fail.


def test_body_that_stalls_is_late_and_never_lands(
    server: S3Process, nodes: Nodes, outcomes: Callable[[], dict[str, float]]
) -> None:
    tier = nodes.ready()
    record = put_record(tier, 0, PAYLOAD_BYTES)
    server.set_fault(Fault(kind="stall", methods=("GET",)))
    memory = bytearray(len(record))
    told: list[int] = []
    start_s = time.monotonic()
    view = memoryview(memory)
    assert tier.read_into(sample_key(0), view, stop_s=start_s + 0.2, on_bytes=told.append) is None
    assert time.monotonic() - start_s < 0.2 + SCHEDULING_S
    assert outcomes() == {"late": 1}
    # The memory is the caller's again: what it writes stays, and nothing else refers to it.
    server.set_fault(None)
    memory[:] = bytes(len(memory))
    told.clear()
    assert tier.get(sample_key(0)) == record, "a late read says nothing about the record, nor, in a hurry, the bucket"
    assert not any(memory)
    assert told == []
    view.release()
    memory.clear()


def test_body_that_stalls_ends_by_the_tiers_own_deadline(server: S3Process, nodes: Nodes) -> None:
    tier = nodes.ready(**QUICK)
    put_record(tier, 0, PAYLOAD_BYTES)
    server.set_fault(Fault(kind="stall", methods=("GET",)))
    found, took_s = timed_get(tier, 0)
    assert found is None
    assert took_s < longest_s(tier)


def test_stalls_hold_no_thread_beyond_their_time(server: S3Process, nodes: Nodes) -> None:
    tier = nodes.ready(breaker_failures=100)
    record = put_record(tier, 0, PAYLOAD_BYTES)
    assert tier.get(sample_key(0)) == record
    server.set_fault(Fault(kind="stall", methods=("GET",)))
    memories = [memoryview(bytearray(len(record))) for _ in range(24)]
    with ThreadPoolExecutor(8) as pool:
        stop_s = time.monotonic() + 0.3
        found = list(pool.map(lambda view: tier.read_into(sample_key(0), view, stop_s=stop_s), memories))
    assert found == [None] * 24
    assert time.monotonic() < stop_s + SCHEDULING_S
    assert our_threads() == ["kvstore-object"]
    server.set_fault(None)
    assert tier.get(sample_key(0)) == record


def test_rest_of_a_cut_body_is_asked_for_not_all_of_it(server: S3Process, nodes: Nodes) -> None:
    tier = nodes.ready()
    record = put_record(tier, 0, PAYLOAD_BYTES)
    server.set_fault(Fault(kind="cut", methods=("GET",), every=2))
    server.bytes_sent()
    assert tier.get(sample_key(0)) == record
    told: list[int] = []
    with memoryview(bytearray(len(record))) as view:
        assert tier.read_into(sample_key(0), view, stop_s=time.monotonic() + 60, on_bytes=told.append) is not None
        assert view == record
    assert told == sorted(set(told))
    assert server.bytes_sent() < 3 * len(record)


def test_object_replaced_between_two_tries_is_not_read_under_bytes_that_were_told_of(
    server: S3Process, nodes: Nodes
) -> None:
    tier = nodes.ready()
    record = put_record(tier, 0, PAYLOAD_BYTES)
    entry = tier.entry(sample_key(0))
    assert entry is not None
    server.set_fault(Fault(kind="cut", methods=("GET",)))
    was_replaced = threading.Event()

    def replace(num_bytes: int) -> None:
        if not was_replaced.is_set():
            was_replaced.set()
            obstore.put(nodes.bare(), object_name(sample_key(0), entry), record, use_multipart=False)
            server.set_fault(None)

    with memoryview(bytearray(len(record))) as view:
        assert tier.read_into(sample_key(0), view, stop_s=time.monotonic() + 60, on_bytes=replace) is None
    assert was_replaced.is_set()
    assert len(list_names(nodes)) == 1
    assert tier.get(sample_key(0)) == record


def test_body_that_is_cut_is_completed_or_a_miss(server: S3Process, nodes: Nodes) -> None:
    tier = nodes.ready()
    record = put_record(tier, 0, PAYLOAD_BYTES)
    server.set_fault(Fault(kind="cut", methods=("GET",), every=2))
    for _ in range(4):
        assert tier.get(sample_key(0)) == record
    server.set_fault(Fault(kind="cut", methods=("GET",)))
    found, took_s = timed_get(tier, 0)
    assert found is None
    assert took_s < longest_s(tier)
    assert tier.stat().chunks == 1


def test_wrong_bytes_are_a_miss_and_the_object_is_deleted(
    server: S3Process, nodes: Nodes, outcomes: Callable[[], dict[str, float]]
) -> None:
    tier = nodes.ready()
    record = put_record(tier, 0, PAYLOAD_BYTES)
    server.set_fault(Fault(kind="wrong_bytes", methods=("GET",)))
    assert tier.get(sample_key(0)) is None
    assert outcomes() == {"corrupt": 1}
    assert nodes.changed == [sample_key(0)]
    wait_until(lambda: not list_names(nodes), what="the object is deleted")
    server.set_fault(None)
    assert tier.put(sample_key(0), memoryview(record))
    assert tier.get(sample_key(0)) == record


def test_damaged_object_that_was_repaired_meanwhile_is_not_deleted(nodes: Nodes) -> None:
    tier = nodes.ready()
    record = put_record(tier, 0, 5000)
    entry = tier.entry(sample_key(0))
    assert entry is not None
    name = object_name(sample_key(0), entry)
    version = obstore.head(nodes.bare(), name)["e_tag"]
    obstore.put(nodes.bare(), name, record, use_multipart=False)
    tier._bucket.delete_version(name, version=version, stop_s=time.monotonic() + 5)
    assert tier.get(sample_key(0)) == record


def test_body_that_comes_slowly_is_told_as_it_comes(server: S3Process, nodes: Nodes) -> None:
    tier = nodes.ready()
    record = put_record(tier, 0, PAYLOAD_BYTES)
    server.set_fault(Fault(kind="slow", methods=("GET",), seconds=0.4))
    told: list[int] = []
    with memoryview(bytearray(len(record))) as view:
        assert tier.read_into(sample_key(0), view, stop_s=time.monotonic() + 60, on_bytes=told.append) is not None
        assert view == record
    assert len(told) > 2
    assert told == sorted(told)
    assert told[-1] == len(record)


def test_body_that_comes_too_slowly_is_given_up(server: S3Process, nodes: Nodes) -> None:
    tier = nodes.ready(**QUICK)
    put_record(tier, 0, PAYLOAD_BYTES)
    server.set_fault(Fault(kind="slow", methods=("GET",), seconds=20.0))
    found, took_s = timed_get(tier, 0)
    assert found is None
    assert took_s < longest_s(tier)


@pytest.mark.parametrize("ends_by", ["the client's timeout", "the tier's deadline"])
def test_write_without_an_answer_ends_and_lets_the_memory_go(server: S3Process, nodes: Nodes, ends_by: str) -> None:
    tier = nodes.ready(**QUICK if ends_by == "the client's timeout" else {**QUICK, "timeout_s": 60.0})
    server.set_fault(Fault(kind="silent", methods=("PUT",)))
    record = record_of(0, PAYLOAD_BYTES)
    start_s = time.monotonic()
    with memoryview(record) as view:
        assert not tier.put(sample_key(0), view)
    assert time.monotonic() - start_s < longest_s(tier)
    record.clear()  # raises while anything still refers to it
    assert tier.stat().chunks == 0


def test_listing_without_an_answer_ends_by_the_tiers_deadline(server: S3Process, nodes: Nodes) -> None:
    """Though one request may take longer."""
    tier = nodes.ready(**{**QUICK, "timeout_s": 10.0})
    server.set_fault(Fault(kind="silent", methods=("GET",)))
    start_s = time.monotonic()
    assert not tier.refresh()
    assert time.monotonic() - start_s < longest_s(tier)


# Servers that are not there.


def test_connection_refused_and_back(nodes: Nodes) -> None:
    with S3Process() as own:
        tier = nodes.ready(endpoint=own.endpoint)
        put_record(tier, 0, 5000)
        own.stop()
        found, took_s = timed_get(tier, 0)
        assert found is None
        assert took_s < longest_s(tier)
        assert not tier.refresh()
        assert tier.stat().chunks == 1, "a failed listing drops nothing"
        own.restart()
        assert tier.refresh()
        assert tier.stat().chunks == 0, "the new server is empty"
        put_record(tier, 1, 5000)
        assert tier.get(sample_key(1)) == record_of(1, 5000)


def test_nobody_listens_at_the_start(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    start_s = time.monotonic()
    tier = nodes.open(endpoint=f"http://127.0.0.1:{unused_port()}")
    assert time.monotonic() - start_s < SCHEDULING_S, "opening asks nothing"
    assert not tier.refresh()
    assert not tier.put(sample_key(0), memoryview(record_of(0, 100)))
    assert tier.get(sample_key(0)) is None
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING and "object_tier_unusable" in r.message]
    assert len(warnings) == 1, "one warning, not one per try"


def test_connections_that_are_not_made(nodes: Nodes) -> None:
    with unanswered_port() as port:
        tier = nodes.open(endpoint=f"http://127.0.0.1:{port}", connect_timeout_s=0.3, **QUICK)
        start_s = time.monotonic()
        assert not tier.put(sample_key(0), memoryview(record_of(0, 100)))
        assert time.monotonic() - start_s < longest_s(tier)
        assert not tier.refresh()


def test_missing_bucket_says_what_to_do(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    tier = nodes.open(url="s3://not-there/pool")
    assert not tier.refresh()
    assert not tier.put(sample_key(0), memoryview(record_of(0, 100)))
    assert "s3://not-there/pool does not exist: create it" in caplog.text


def test_refused_listing_is_tried_again_by_itself(server: S3Process, nodes: Nodes) -> None:
    writer = nodes.ready()
    put_record(writer, 0, 5000)
    server.set_fault(Fault(kind="forbidden", methods=("GET",)))
    reader = nodes.open(breaker_pause_s=0.05)
    assert not reader.refresh()
    server.set_fault(None)
    wait_until(lambda: reader.contains(sample_key(0)), what="the bucket was listed")


@pytest.mark.parametrize("one_by_one", [False, True])
def test_no_deletion_begins_after_the_deadline(nodes: Nodes, monkeypatch: pytest.MonkeyPatch, one_by_one: bool) -> None:
    """Each takes its time, whatever the client does in one request."""
    for index in range(5):
        obstore.put(nodes.bare(), f"{index}.rec", b"record")
    bucket = ObstoreBucket(ObjectSettings(url=nodes.url, options=nodes.options))
    if one_by_one:
        monkeypatch.setattr(bucket._clients, "scheme", "gs")
    monkeypatch.setattr(obs, "_DELETIONS", 1)
    monkeypatch.setattr(obs, "time", SimpleNamespace(monotonic=iter(range(100)).__next__))
    names = list_names(nodes)
    with pytest.raises(BucketLateError, match="no time is left"):
        bucket.delete(names, stop_s=3.0)
    assert list_names(nodes) == names[3:]
    with pytest.raises(BucketLateError, match="no time is left"):
        bucket.delete_version(names[4], version=None, stop_s=3.0)
    assert list_names(nodes) == names[3:]
    bucket.close()


@pytest.mark.parametrize("readings_s", [(2.0,) * 99, (0.0,) + (2.0,) * 99], ids=["before", "while a client is made"])
def test_no_try_is_made_when_the_deadline_has_passed(
    monkeypatch: pytest.MonkeyPatch, readings_s: tuple[float, ...]
) -> None:
    """And nobody looks at the clock for ever."""
    clients = obs_clients.Clients(ObjectSettings(url="s3://bucket", options={"region": "here"}))
    clock = SimpleNamespace(monotonic=iter(readings_s).__next__)
    monkeypatch.setattr(obs_clients, "time", clock)
    with pytest.raises(BucketLateError, match="no time is left"):
        clients.for_one_try(0.5, stop_s=1.0, has_answer_body=True)
