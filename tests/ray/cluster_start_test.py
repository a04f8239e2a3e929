"""When a start is over: the router knows every replica, each with its node's store."""

import pytest

from cluster.lifecycle import deployment_steps, missing_workers
from cluster.settings import ClusterSettings, Settings

pytestmark = pytest.mark.ray  # imports Ray


def worker(role, state="ready", store="epoch"):
    return {"role": role, "state": state, "store_epoch": store}


@pytest.mark.parametrize(
    ("workers", "missing"),
    [
        ([worker("prefill"), worker("decode")], ""),
        ([worker("decode")], "1 prefill"),
        ([worker("prefill", store=None), worker("decode")], "1 prefill"),
        ([worker("prefill"), worker("decode", state="suspect")], "1 decode"),
        ([], "1 prefill replica(s) to report with a node store, 1 decode"),
    ],
)
def test_every_replica_is_waited_for(workers, missing):
    ready, detail = missing_workers(workers, Settings())
    assert ready == (not missing)
    assert detail.startswith(missing)


def test_as_many_as_the_settings_ask_for():
    settings = Settings(cluster=ClusterSettings(prefill_replicas=0, decode_replicas=2))
    assert missing_workers([worker("decode")], settings)[1].startswith("1 decode")
    assert missing_workers([worker("decode"), worker("decode")], settings) == (True, "")


def test_without_prefill_replicas_none_is_waited_for():
    assert list(deployment_steps(Settings())) == ["Prefill", "Decode", "Router"]
    settings = Settings(cluster=ClusterSettings(prefill_replicas=0))
    assert list(deployment_steps(settings)) == ["Decode", "Router"]
