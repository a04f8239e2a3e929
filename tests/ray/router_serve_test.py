"""The router under a real Ray Serve, in front of a decode deployment without an engine.

Covers: `router.actor`: reports through handles, the ASGI hook, streaming and disconnects through Serve's proxy.
Does not cover: engines, placement (`tests/unit/router_policy_test.py`).
"""

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.router_fakes import make_tokenizer

from kvstore.testing.poll import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

SECRET_HEX = "ab" * 32
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import ray
    from ray import serve
    from support.live import free_port
    from support.router_ray_worker import FakeDecode

    from router.actor import RouterIngress
    from router.settings import RouterSettings

    folder = tmp_path_factory.mktemp("model")
    make_tokenizer(folder)
    port = free_port()
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100_000_000,
        runtime_env={"env_vars": {"PYTHONPATH": path, "LEARNONCE_CLUSTER_SECRET": SECRET_HEX}},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    decode = FakeDecode.bind("tiny", SECRET_HEX)
    router = RouterIngress.options(ray_actor_options={"num_cpus": 0}).bind(
        RouterSettings(report_period_s=0.2), str(folder), "tiny", decode
    )
    serve.run(router, name="learnonce", route_prefix="/")
    base = f"http://127.0.0.1:{port}"
    wait_until(lambda: _status(base + "/ready") == 200, what="the router to be ready")
    yield base
    serve.shutdown()
    ray.shutdown()


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def post(url: str, body: Any) -> tuple[int, Any, dict[str, str]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.loads(response.read()), dict(response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read()), dict(error.headers)


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}


def test_answers_and_errors_come_through_serve(url: str) -> None:
    status, answer, headers = post(url + "/v1/chat/completions", {**CHAT, "documents": [{"text": "a b c"}]})
    assert (status, answer["body"]["documents"]) == (200, [{"text": "a b c"}])
    assert answer["prompt_tokens"] > 10
    assert headers["x-request-id"]
    with urllib.request.urlopen(urllib.request.Request(url + "/health", headers={"x-request-id": "abc-1"})) as response:
        assert response.headers.get_all("x-request-id") == ["abc-1"]
    assert post(url + "/v1/chat/completions", b"{")[0] == 400
    status, answer, _ = post(url + "/v1/plan", CHAT)
    assert (status, answer["decode"]) == (200, "d0")
    assert post(url + "/v1/nothing", CHAT)[1]["error"]["code"] == "unknown_url"


def test_a_stream_arrives_before_it_ends_and_stops_with_the_client(url: str) -> None:
    from ray import serve

    body = json.dumps({**CHAT, "stream": True, "seed": 1}).encode()
    request = urllib.request.Request(url + "/v1/chat/completions", data=body)
    with urllib.request.urlopen(request, timeout=20) as response:
        assert response.headers["content-type"] == "text/event-stream"
        assert response.readline() == b"data: first\n"
    handle = serve.get_deployment_handle("Decode", "learnonce")
    wait_until(
        lambda: handle.cancelled.remote().result(timeout_s=10) == 1, what="the replica to see that the client has gone"
    )
