"""How a store finds the others: whom it asks again, and whom it forgets. Ray is played by a few lines."""

from collections.abc import Sequence
from types import SimpleNamespace

import msgspec
import pytest
import ray

from kvstore import actor as actor_module
from kvstore.actor import actor_name
from kvstore.wire import StoreEndpoint


def endpoint(node: str, epoch: str = "e1") -> StoreEndpoint:
    return StoreEndpoint(
        node_id=node, epoch=epoch, socket_path="s", events_address="e", snapshot_address="x", peer_address="h:1"
    )


class FakeRay:
    """Named actors that answer with their endpoint, die, or never answer."""

    exceptions = ray.exceptions

    def __init__(self, nodes: Sequence[str]) -> None:
        self.nodes = {node: endpoint(node) for node in nodes}
        self.dead: set[str] = set()
        self.silent: set[str] = set()
        self.unlisted: set[str] = set()
        self.asked: list[str] = []
        self.cancelled: list[str] = []
        self.util = SimpleNamespace(list_named_actors=self._list)

    def _list(self, *, all_namespaces: bool) -> list[dict[str, str]]:
        assert all_namespaces
        mine = [{"namespace": "n", "name": actor_name(node)} for node in self.nodes if node not in self.unlisted]
        return [*mine, {"namespace": "n", "name": "router"}, {"namespace": "other", "name": actor_name("foreign")}]

    def get_actor(self, name: str, *, namespace: str) -> SimpleNamespace:
        assert namespace == "n"
        node = name.removeprefix(actor_name(""))
        return SimpleNamespace(endpoint=SimpleNamespace(remote=lambda: self._ask(node)))

    def _ask(self, node: str) -> str:
        self.asked.append(node)
        return node

    def wait(self, calls: list[str], *, num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        assert num_returns == len(calls)
        assert 0 < timeout <= 5
        return [c for c in calls if c not in self.silent], [c for c in calls if c in self.silent]

    def get(self, call: str) -> bytes:
        if call in self.dead:
            raise ray.exceptions.RayActorError
        return msgspec.msgpack.encode(self.nodes[call])

    def cancel(self, call: str) -> None:
        self.cancelled.append(call)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay(["own", "a", "b"])
    monkeypatch.setattr(actor_module, "ray", fake)
    return fake


def look(known: dict[str, StoreEndpoint], *doubtful: str) -> dict[str, StoreEndpoint]:
    return actor_module._look_for_peers(endpoint("own"), known, namespace="n", doubtful=set(doubtful))


def test_others_of_the_namespace_are_found_and_not_asked_again(fake: FakeRay) -> None:
    known = look({})
    assert known == {"a": endpoint("a"), "b": endpoint("b")}
    assert sorted(fake.asked) == ["a", "b"]
    assert look(known) == known
    assert len(fake.asked) == 2


def test_one_that_does_not_answer_its_peers_is_asked_for_its_new_address(fake: FakeRay) -> None:
    known = look({})
    fake.nodes["a"] = endpoint("a", "e2")
    assert look(known)["a"].epoch == "e1"
    assert look(known, "a", "stranger")["a"].epoch == "e2"


def test_dead_one_is_forgotten_and_a_late_one_is_kept(fake: FakeRay) -> None:
    known = look({})
    fake.dead, fake.silent = {"a"}, {"b"}
    assert look(known, "a", "b") == {"b": endpoint("b")}
    assert fake.cancelled == ["b"]


def test_one_that_is_no_longer_named_is_forgotten(fake: FakeRay) -> None:
    known = look({})
    fake.unlisted = {"b"}
    assert look(known) == {"a": endpoint("a")}


def test_one_look_asks_a_bounded_number_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    many = FakeRay([f"n{index}" for index in range(150)])
    monkeypatch.setattr(actor_module, "ray", many)
    known: dict[str, StoreEndpoint] = {}
    for expected in (64, 128, 150):
        known = look(known)
        assert len(known) == expected
