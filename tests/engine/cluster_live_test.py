"""A live cluster on real vLLM and the embedded model: the demo, bad input, and processes killed under load.

The figures that the kill tests print (`pytest -s`, or the captured output in CI's log) are part of what they show.
"""

import asyncio
import io
import json
import time
import urllib.error
import urllib.request

import openai
import psutil
import pytest
from rich.console import Console
from support.live import LiveCluster, Load, kill, until
from support.openai_suite import OpenAISuite

from cluster import client
from cluster.demo import load_documents, load_questions, run_demo
from cluster.errors import UnavailableError

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.timeout(600)]

REQUEST_S = 60.0
"""The cluster's deadline for one request in this module."""
SLACK_S = 5.0
"""On top of the deadline: a busy machine of two cores."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    live = LiveCluster(
        tmp_path_factory.mktemp("live"),
        {
            "engine.max_model_len": 8192,
            "engine.kv_cache_bytes": 1 << 30,
            "engine.tool_call_parser": "hermes",
            "store.host_bytes": 1 << 30,
            "store.nvme": {"folders": [str(tmp_path_factory.mktemp("chunks"))]},
            "router.deadlines.request_s": REQUEST_S,
        },
    )
    live.up()
    state = live.state()
    print(f"\nready after {state.ready_after_s:.1f} s")
    yield live
    live.down()
    assert live.processes() == []


def test_demo_reuses_and_answers(cluster):
    printed = io.StringIO()
    console = Console(file=printed, width=80)
    rows = run_demo(None, keep=True, console=console, start=lambda _: cluster.url, stop=lambda _: None)
    text = printed.getvalue()
    print(text)
    assert [row.question for row in rows] == load_questions()
    for row in rows:
        assert row.cold.cached_tokens == 0
        # Everything but the question itself.
        assert row.warm.cached_tokens > row.warm.prompt_tokens - 64
        assert row.warm.prompt_tokens == row.cold.prompt_tokens
        assert row.question.expects in row.warm.text
        assert row.question.text in text
    assert f"{rows[0].warm.prompt_tokens:,}" in text


@pytest.mark.parametrize(("quality", "share", "swapped"), [("high", 0.15, False), ("fast", 0.05, True)])
def test_learned_documents_are_joined_in_any_order(cluster, quality, share, swapped):
    """One of them always stands where it was not learned; what is loaded and kept is known to the token."""
    question = load_questions()[0]
    other = next(page for page in load_documents().values() if page != question.document)
    until(lambda: learned(cluster, [question.document, other]), within_s=150, what="both documents are learned")
    documents = [other, question.document] if swapped else [question.document, other]
    body = {"messages": [{"role": "user", "content": question.text}], "documents": documents, "quality": quality}
    plan = client.post_json(f"{cluster.url}/v1/plan", body)
    assert [document["state"] for document in plan["documents"]] == ["held", "moved"]
    request = urllib.request.Request(
        f"{cluster.url}/v1/chat/completions",
        data=json.dumps({**body, "max_tokens": 24, "temperature": 0}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=REQUEST_S + SLACK_S) as answer:
        headers, answered = dict(answer.headers.items()), json.load(answer)
    print(quality, answered["choices"][0]["message"]["content"], answered["usage"])
    assert headers["x-learnonce-join"] == f"query_aware;share={share}"
    again_tokens = round(share * plan["documents"][1]["tokens"])
    kept_tokens = plan["prompt_tokens"] - plan["segments"]["tail"] - again_tokens
    assert answered["usage"]["prompt_tokens"] == plan["prompt_tokens"]
    assert answered["usage"]["prompt_tokens_details"]["cached_tokens"] == kept_tokens


def learned(cluster, documents):
    try:
        return client.learn(cluster.url, documents)
    except UnavailableError:
        return None  # not in time: what is under way goes on


BAD = [
    (b"{not json", 400),
    (b"[]", 400),
    (json.dumps({"messages": []}).encode(), 400),
    (json.dumps({"model": "MODEL", "messages": "hello"}).encode(), 400),
    (json.dumps({"model": "nope", "messages": [{"role": "user", "content": "x"}]}).encode(), 404),
    (json.dumps({"model": "MODEL", "messages": [{"role": "user", "content": "x " * 20000}]}).encode(), 400),
    (json.dumps({"model": "MODEL", "documents": [], "messages": [{"role": "user", "content": 5}]}).encode(), 400),
    (
        json.dumps(
            {"model": "MODEL", "documents": [{"text": ""}], "messages": [{"role": "user", "content": "x"}]}
        ).encode(),
        400,
    ),
    (
        json.dumps(
            {
                "model": "MODEL",
                "documents": [{"text": "y " * 5_000_000}],
                "messages": [{"role": "user", "content": "x"}],
            }
        ).encode(),
        400,
    ),
    (
        json.dumps({"model": "MODEL", "messages": [{"role": "user", "content": "x"}], "temperature": "hot"}).encode(),
        400,
    ),
]


@pytest.mark.parametrize(("body", "status"), BAD, ids=range(len(BAD)))
def test_bad_input_is_answered_in_openais_format(cluster, body, status):
    request = urllib.request.Request(
        f"{cluster.url}/v1/chat/completions",
        data=body.replace(b"MODEL", b"SmolLM2-135M-Instruct"),
        headers={"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    with caught.value as answer:
        error = json.loads(answer.read())["error"]
    assert answer.code == status, error
    assert error["message"]
    assert error["type"]
    assert cluster.ready()


class TestOpenAIThroughTheIngress(OpenAISuite):
    """The same list as on a worker's own port, now through Serve's proxy and the router."""

    @pytest.fixture
    def model(self):
        return "SmolLM2-135M-Instruct"

    @pytest.fixture
    async def client(self, cluster):
        async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as made:
            yield made


def victim_decode_engine(cluster):
    return cluster.engine_core_of("Decode")


def victim_store(cluster):
    return cluster.process_named("NodeStoreActor")


def victim_prefill(cluster):
    return cluster.process_named("ServeReplica:learnonce:Prefill")


def question(number, count):
    """A load of every kind: short ones, and ones about documents that are long enough to be prefilled remotely."""
    pages = list(load_documents().values())
    body = {
        "model": "SmolLM2-135M-Instruct",
        "messages": [{"role": "user", "content": f"Client {number} asks for fact {count}."}],
        "max_completion_tokens": 8,
        "temperature": 0,
    }
    if number % 2:
        body["documents"] = [pages[(number + count) % len(pages)]]
        body["cache_salt"] = f"{number}-{count % 3}"
    return body


@pytest.mark.parametrize("victim", [victim_store, victim_prefill, victim_decode_engine])
async def test_kill_9_under_load_heals_and_nothing_hangs(cluster, victim):
    target = until(lambda: victim(cluster), within_s=90, what="the victim runs")
    orphans = [target, *target.children(recursive=True)]
    async with Load(cluster, clients=4, body=question, request_timeout_s=REQUEST_S + SLACK_S) as load:
        await load.wait_ok(since_s=0.0, within_s=REQUEST_S)
        killed_s = time.monotonic()
        await asyncio.to_thread(kill, target)
        service_back_s = await load.wait_ok(since_s=killed_s, within_s=150)
        await asyncio.to_thread(
            until,
            lambda: (new := victim(cluster)) is not None and new.pid != target.pid and all_ready(cluster),
            within_s=150,
            what="the victim is replaced and all replicas are ready",
        )
        whole_s = time.monotonic() - killed_s
    slowest_s = max(outcome.seconds for outcome in load.outcomes)
    print(
        f"\n{victim.__name__}: first 4 good answers {service_back_s:.1f} s after the kill, all replicas back after "
        f"{whole_s:.1f} s, slowest request {slowest_s:.1f} s, outcomes {load.tally()}"
    )
    assert "HUNG" not in load.tally()
    assert slowest_s < REQUEST_S + SLACK_S
    assert not [p for p in orphans if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def all_ready(cluster):
    ready = cluster.ready()
    if not ready:
        return False
    states = {(worker["role"], worker["state"]) for worker in ready["workers"] if worker["store_epoch"]}
    return states == {("prefill", "ready"), ("decode", "ready")}
