"""The object tier of several nodes on one bucket: writers of one key, losses, capacity; settings that cannot work."""

import threading
from concurrent.futures import ThreadPoolExecutor

import obstore
import pytest
from support.object_nodes import (
    SECRET,
    Nodes,
    list_names,
    our_threads,
)

from cluster.errors import SettingsError
from kvstore.settings import ObjectSettings
from kvstore.testing.poll import wait_until
from kvstore.testing.s3 import Fault, S3Process
from kvstore.testing.samples import sample_key
from kvstore.testing.tier import put_record, record_of
from kvstore.tiers.object import ObjectTier, open_object_tier

# Several nodes.


def test_server_without_conditional_writes(server: S3Process, nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    tier = nodes.ready()
    server.set_fault(Fault(kind="no_condition"))
    records = {sample_key(i): put_record(tier, i, 5000) for i in range(3)}
    assert {key: tier.get(key) for key in records} == records
    assert caplog.text.count("object_tier_no_conditional_put") == 1


def test_two_writers_of_one_key(server: S3Process, nodes: Nodes) -> None:
    writers = [nodes.ready(), nodes.ready()]
    records = [record_of(index, 50_000) for index in range(10)]
    with ThreadPoolExecutor(2) as pool:
        for index, record in enumerate(records):
            both = threading.Barrier(2)

            def write(tier: ObjectTier, index: int = index, record: bytearray = record, both: threading.Barrier = both):
                both.wait()
                return tier.put(sample_key(index), memoryview(record))

            assert list(pool.map(write, writers)) == [True, True]
    for index, record in enumerate(records):
        assert [tier.get(sample_key(index)) for tier in writers] == [record, record]
    assert len(list_names(nodes)) == len(records)


def test_second_writer_leaves_what_the_first_wrote(nodes: Nodes) -> None:
    first, second = nodes.ready(), nodes.ready()
    record = put_record(first, 0, 5000)
    (name,) = list_names(nodes)
    version = obstore.head(nodes.bare(), name)["e_tag"]
    assert second.put(sample_key(0), memoryview(record))
    assert obstore.head(nodes.bare(), name)["e_tag"] == version
    assert second.get(sample_key(0)) == record


def test_what_one_node_wrote_another_finds(nodes: Nodes) -> None:
    first, second = nodes.ready(), nodes.ready()
    records = {sample_key(i): put_record(first, i, 5000 + i) for i in range(5)}
    assert second.get(sample_key(0)) is None
    assert second.refresh()
    assert sorted(nodes.changed) == sorted(records)
    assert {key: second.get(key) for key, _ in second.keys()} == records  # noqa: SIM118 not a dict
    assert second.stat() == first.stat()


def test_what_one_node_drops_another_forgets(nodes: Nodes) -> None:
    first, second = nodes.ready(), nodes.ready()
    for index in range(2):
        put_record(first, index, 5000)
    assert second.refresh()
    assert first.drop(sample_key(0))
    assert first.drop(sample_key(1))
    wait_until(lambda: not list_names(nodes), what="objects are deleted")
    nodes.changed.clear()
    assert second.get(sample_key(0)) is None
    assert second.refresh()
    assert second.stat().chunks == 0
    assert nodes.changed == [sample_key(0), sample_key(1)]


def test_dropped_record_does_not_come_back_while_it_cannot_be_deleted(server: S3Process, nodes: Nodes) -> None:
    tier = nodes.ready()
    put_record(tier, 0, 5000)
    server.set_fault(Fault(kind="forbidden", methods=("POST", "DELETE")))
    assert tier.drop(sample_key(0))
    assert tier.refresh()
    assert tier.get(sample_key(0)) is None
    record = put_record(tier, 0, 5000)
    assert tier.get(sample_key(0)) == record, "written again, it stays"
    server.set_fault(None)
    assert tier.refresh()
    assert tier.get(sample_key(0)) == record


def test_evicted_records_leave_the_bucket(nodes: Nodes) -> None:
    tier = nodes.ready(capacity_bytes=3 * len(record_of(0, 5000)))
    for index in range(5):
        put_record(tier, index, 5000)
    assert {key for key, _ in tier.keys()} == {sample_key(i) for i in (2, 3, 4)}  # noqa: SIM118 not a dict
    wait_until(lambda: len(list_names(nodes)) == 3, what="objects of evicted records are deleted")
    assert nodes.changed == [sample_key(0), sample_key(1)]


def test_foreign_objects_are_left_alone(nodes: Nodes) -> None:
    key = sample_key(0)
    digits = key.hex()
    names = [
        "readme.txt",
        f"{digits[:2]}/{digits}.rec",
        f"{digits[:2]}/{digits}.3.0.raw.-.0.rec",
        f"{digits[:2]}/{digits}.3.0.raw.-.99999999999999.rec",
        f"{digits[:2]}/{digits}.03.0.raw.-.10.rec",
        f"ff/{digits}.3.0.raw.-.10.rec",
        f"{digits[:2]}/{digits}.3.0.raw.=zz.10.rec",
        f"{digits[:2]}/{digits}.3.0.raw.-.10.rec",  # of a wrong length
    ]
    for name in names:
        obstore.put(nodes.bare(), name, b"somebody else's")
    tier = nodes.ready()
    assert tier.stat().chunks == 0
    tier.close()
    assert list_names(nodes) == sorted(names)


# Settings.


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("s3://bucket/prefix", {"no_such_option": SECRET}, "no_such_option"),
        ("s3://bucket/prefix", {"timeout": "5s"}, "use timeout_s"),
        ("arrow+file:///folder", {"access_key": SECRET}, "access_key is not known"),
    ],
)
def test_options_that_cannot_work_say_so(url: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        open_object_tier(ObjectSettings(url=url, options=options))
    assert SECRET not in str(caught.value)
    assert our_threads() == []
