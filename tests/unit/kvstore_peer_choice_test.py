"""Who is asked for a chunk, and on which path: pure rules over what peers have told."""

import pytest

from kvstore.container import stored_bytes
from kvstore.events import ChunkChange, ChunkEvent, FeedItem, HeldChunk, StoreLost, StoreSnapshot
from kvstore.keys import ChunkKey
from kvstore.peer_directory import Holder, PeerDirectory, order_holders
from kvstore.testing.samples import sample_key
from kvstore.transport.negotiation import Choice, Reach, negotiate

PREFERENCES = ("shm", "nixl", "tcp")


def reach(*paths: str, boot: str = "m1", **missing: str) -> Reach:
    return Reach(boot_id=boot, addresses={path: path.encode() for path in paths}, missing=missing)


# Negotiation.


@pytest.mark.parametrize(
    ("ours", "theirs", "chosen", "said"),
    [
        (reach("shm", "tcp"), reach("shm", "tcp"), "shm", "one machine"),
        (reach("shm", "tcp"), reach("shm", "tcp", boot="m2"), "tcp", "shm: another machine"),
        (reach("shm", "nixl", "tcp"), reach("shm", "nixl", "tcp", boot="m2"), "nixl", "nixl: both have it"),
        (reach("tcp", nixl="not installed: no module"), reach("nixl", "tcp"), "tcp", "nixl: not installed: no module"),
        (reach("nixl", "tcp"), reach("tcp", nixl="is starting"), "tcp", "the peer has none: is starting"),
        (reach("shm"), reach("shm", boot="m2"), None, "shm: another machine"),
        (reach(), reach("shm", "tcp"), None, "not here"),
    ],
)
def test_first_path_that_both_have_is_taken(ours: Reach, theirs: Reach, chosen: str | None, said: str) -> None:
    choice = negotiate(ours, theirs, PREFERENCES)
    assert choice.transport == chosen
    assert said in choice.reason


def test_order_of_preference_decides() -> None:
    both = reach("shm", "tcp")
    assert negotiate(both, both, ("tcp", "shm")).transport == "tcp"
    assert negotiate(both, both, ()) == Choice(None, "no path is configured")


def test_failing_path_is_left_with_its_reason() -> None:
    both = reach("shm", "tcp")
    choice = negotiate(both, both, PREFERENCES, failing={"shm": "its socket is not visible here"})
    assert choice.transport == "tcp"
    assert "shm: its socket is not visible here" in choice.reason
    assert negotiate(both, both, PREFERENCES, failing={"shm": "a", "tcp": "b"}).transport is None


# The order of holders.


def holder(name: str, *, near: bool = False, busy: int = 0) -> Holder:
    return Holder(node_id=name, same_machine=near, transfers=busy)


def test_same_machine_first_then_the_least_busy() -> None:
    holders = [holder("a", busy=2), holder("b"), holder("c", near=True, busy=9), holder("d", busy=1)]
    for turn in range(4):
        assert order_holders(holders, turn=turn) == ["c", "b", "d", "a"]


def test_equals_take_turns() -> None:
    holders = [holder("c"), holder("a"), holder("b"), holder("near", near=True)]
    firsts = [order_holders(holders, turn=turn)[1] for turn in range(300)]
    assert {name: firsts.count(name) for name in "abc"} == {"a": 100, "b": 100, "c": 100}
    assert order_holders([], turn=7) == []


# The directory.


def held(index: int, *, num_bytes: int = 5000, codec: str = "raw") -> HeldChunk:
    return HeldChunk(sample_key(index), "host", num_bytes, 3, codec, base_position=7, tenant="t", learned_unix_s=9.0)


def snapshot(node: str, *indexes: int, epoch: str = "e1") -> StoreSnapshot:
    return StoreSnapshot(node_id=node, epoch=epoch, seq=0, chunks=tuple(held(i) for i in indexes))


def event(change: ChunkChange, node: str, index: int, *, epoch: str = "e1", num_bytes: int = 5000) -> ChunkEvent:
    return ChunkEvent(change, sample_key(index), "nvme", num_bytes, 3, "raw", node, epoch, 1)


def nodes(directory: PeerDirectory, index: int) -> list[str]:
    return sorted(copy.node_id for copy in directory.copies(sample_key(index)))


def folded(*items: FeedItem, max_keys: int = 1000) -> PeerDirectory:
    directory = PeerDirectory(max_keys=max_keys)
    for item in items:
        directory.apply(item)
    return directory


def test_copies_of_all_nodes_are_known() -> None:
    directory = folded(snapshot("a", 1, 2), snapshot("b", 2, 3), event(ChunkChange.ADDED, "b", 4))
    assert [nodes(directory, i) for i in range(6)] == [[], ["a"], ["a", "b"], ["b"], ["b"], []]
    (copy,) = directory.copies(sample_key(1))
    entry = copy.entry()
    assert (entry.payload_bytes, entry.stored_bytes, entry.num_tokens) == (5000, stored_bytes(5000), 3)
    assert (entry.base_position, entry.codec, entry.tenant, entry.learned_unix_s) == (7, "raw", "t", 9.0)


def test_changes_are_told_once_they_can_be_read() -> None:
    directory = PeerDirectory(max_keys=1000)
    assert directory.apply(snapshot("a", 1, 2)) == [sample_key(1), sample_key(2)]
    assert list(directory.apply(event(ChunkChange.MOVED, "a", 1))) == [sample_key(1)]
    assert list(directory.apply(event(ChunkChange.DROPPED, "a", 1))) == []
    assert list(directory.apply(StoreLost(node_id="a", epoch="e1"))) == []


def test_dropped_and_moved() -> None:
    directory = folded(
        snapshot("a", 1, 2), event(ChunkChange.DROPPED, "a", 1), event(ChunkChange.MOVED, "a", 2, num_bytes=9000)
    )
    assert nodes(directory, 1) == []
    assert directory.copies(sample_key(2))[0].payload_bytes == 9000
    directory.drop("a", sample_key(1))
    directory.drop("nobody", sample_key(2))
    assert directory.num_chunks("a") == 1


def test_lost_node_leaves_nothing_and_others_everything() -> None:
    directory = folded(snapshot("a", 1, 2), snapshot("b", 2), StoreLost(node_id="a", epoch="e1"))
    assert [nodes(directory, i) for i in (1, 2)] == [[], ["b"]]
    assert (len(directory), directory.num_chunks("a"), directory.keys_of("b")) == (1, 0, [sample_key(2)])


def test_loss_of_a_former_life_is_ignored() -> None:
    directory = folded(snapshot("a", 1, epoch="e2"), StoreLost(node_id="a", epoch="e1"))
    assert nodes(directory, 1) == ["a"]


def test_new_life_replaces_the_former_one() -> None:
    assert nodes(folded(snapshot("a", 1), snapshot("a", 2, epoch="e2")), 1) == []
    directory = folded(snapshot("a", 1), event(ChunkChange.ADDED, "a", 2, epoch="e2"))
    assert [nodes(directory, i) for i in (1, 2)] == [[], ["a"]]


def test_table_is_bounded_and_forgets_the_longest_known() -> None:
    directory = folded(snapshot("a", *range(100)), snapshot("b", *range(50, 100)), max_keys=100)
    for index in range(100, 300):
        directory.apply(event(ChunkChange.ADDED, "a", index))
        assert len(directory) <= 100
    assert nodes(directory, 299) == ["a"]
    assert nodes(directory, 0) == []
    known = {key for node in "ab" for key in directory.keys_of(node)}
    assert len(known) == len(directory)
    assert all(directory.copies(ChunkKey(key)) for key in known)
