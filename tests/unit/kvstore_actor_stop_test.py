"""Stopping every node's store: one that fails does not save the others. Ray is played by a few lines."""

from types import SimpleNamespace

import pytest
import ray

from kvstore import actor as actor_module
from kvstore.actor import actor_name, stop_node_stores


class FakeRay:
    """Three listed stores: one is gone, one fails to stop, one stops."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        names = [actor_name(node) for node in ("gone", "failing", "sound")]
        entries = [{"namespace": "n", "name": name} for name in (*names, "something else")]
        entries.append({"namespace": "another", "name": names[2]})
        self.util = SimpleNamespace(list_named_actors=lambda all_namespaces: entries)
        self.calls: list[str] = []

    def get_actor(self, name: str, *, namespace: str) -> SimpleNamespace:
        if name == actor_name("gone"):
            raise ValueError(name)
        return SimpleNamespace(name=name, stop=SimpleNamespace(remote=lambda drain_s: name))

    def get(self, call: str, *, timeout: float) -> None:
        self.calls.append(f"stop {call}")
        if call == actor_name("failing"):
            raise ray.exceptions.RayError("the store's thread failed")

    def kill(self, actor: SimpleNamespace, *, no_restart: bool) -> None:
        assert no_restart
        self.calls.append(f"kill {actor.name}")


def test_every_store_is_stopped_and_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay()
    monkeypatch.setattr(actor_module, "ray", fake)
    assert stop_node_stores(namespace="n") == 2
    failing, sound = actor_name("failing"), actor_name("sound")
    assert fake.calls == [f"stop {failing}", f"kill {failing}", f"stop {sound}", f"kill {sound}"]
