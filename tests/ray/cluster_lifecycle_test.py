"""The `learnonce` command on a real Ray with the no-op engine: up, used, hurt, down, and nothing left."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from support.live import LEARNONCE, LiveCluster, kill, until

pytestmark = pytest.mark.ray

NOOP = {"engine.kind": "noop", "store.host_bytes": 64 << 20, "store.nvme": None, "cluster.drain_s": 10.0}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    live = LiveCluster(tmp_path_factory.mktemp("live"), NOOP)
    live.up()
    yield live
    live.down()


def test_up_prints_examples_that_work(cluster, tmp_path):
    printed = cluster.command("up")
    assert printed.returncode == 2
    assert f"is ready at {cluster.url}" in printed.stderr

    folder = LiveCluster(tmp_path, NOOP, name="examples")
    done = folder.up()
    try:
        curl = done.stdout[done.stdout.index("curl ") : done.stdout.index("from openai")]
        answer = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=60, check=True)
        assert json.loads(answer.stdout)["choices"][0]["message"]["content"]
        python = done.stdout[done.stdout.index("from openai") : done.stdout.index("learnonce ask")]
        answer = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, timeout=60, check=False)
        assert answer.returncode == 0, answer.stderr
        assert "cached_tokens" in answer.stdout
    finally:
        folder.down()


def test_status_lists_replicas_and_processes(cluster):
    done = cluster.command("status")
    assert done.returncode == 0, done.stderr
    for word in ("ready", f"{cluster.url}/v1", "prefill", "decode"):
        assert word in done.stdout


def test_second_question_about_a_document_reuses_it(cluster, tmp_path):
    page = tmp_path / "tide.txt"
    page.write_text("The tide gauge is read at six in the morning. " * 200)
    first = cluster.command("ask", "When is the gauge read?", "--document", str(page))
    assert first.returncode == 0, first.stderr
    assert "prompt tokens, 0 reused" in first.stderr

    until(lambda: _held(cluster, page) > 1000, within_s=20, what="the router knows the document's chunks")
    second = cluster.command("ask", "Who reads it?", "--document", str(page))
    reused = int(second.stderr.split("prompt tokens, ")[1].split(" reused")[0])
    assert reused > 1000


def _held(cluster, page):
    done = cluster.command("explain", "Who reads it?", "--document", str(page), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["held_tokens"]


def test_explain_tells_learned_from_unknown(cluster, tmp_path):
    known, unknown = tmp_path / "known.txt", tmp_path / "unknown.txt"
    known.write_text("The lamp is lit at dusk by the keeper. " * 100)
    unknown.write_text("The boat comes on Tuesdays with flour. " * 100)
    cluster.command("ask", "When?", "--document", str(known))
    until(lambda: _held(cluster, known) > 500, within_s=20, what="the router knows the document's chunks")
    done = cluster.command("explain", "When?", "--document", str(known), "--document", str(unknown))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    passages = [line for line in lines if line.strip().startswith("passage")]
    assert passages[0].split()[-2:] == ["held", "known"]
    assert passages[1].split()[-2:] == ["unknown", "unknown"]
    assert any("uncached" in line for line in lines), "the reasons are given"


def test_documents_in_another_order_are_joined(cluster, tmp_path):
    pages = [tmp_path / "gulls.txt", tmp_path / "ropes.txt"]
    pages[0].write_text("Gulls nest on the eastern wall in April. " * 100)
    pages[1].write_text("Ropes are tarred before the first frost. " * 100)
    documents = [word for page in reversed(pages) for word in ("--document", str(page))]
    learned = cluster.command("ask", "When?", *documents, "--quality", "high")
    assert learned.returncode == 0, learned.stderr

    body = {
        "messages": [{"role": "user", "content": "Where?"}],
        "documents": [{"title": page.stem, "text": page.read_text()} for page in pages],
        "quality": "fast",
        "max_tokens": 4,
    }
    request = urllib.request.Request(f"{cluster.url}/v1/chat/completions", data=json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        headers, usage = dict(answer.headers.items()), json.load(answer)["usage"]
    assert headers["x-learnonce-join"] == "query_aware;share=0.05"
    passage_tokens = [d["tokens"] for d in _plan(cluster, *documents)["documents"]]
    moved_tokens = passage_tokens[0]  # as the second document it stands where it was not learned
    expected = usage["prompt_tokens"] - round(0.05 * moved_tokens)
    assert expected - 40 < usage["prompt_tokens_details"]["cached_tokens"] < expected

    plan = _plan(cluster, *documents, "--quality", "0.5")
    assert plan["join"] == {"method": "query_aware", "share": 0.5}
    assert [document["state"] for document in plan["documents"]] == ["held", "moved"]
    shown = cluster.command("explain", "When?", *documents, "--quality", "fast").stdout
    assert "joined by query_aware, 5% of moved tokens computed again" in shown
    refused = cluster.command("ask", "When?", *documents, "--quality", "best")
    assert refused.returncode == 2
    assert "0 to 1" in refused.stderr
    assert cluster.metric("learnonce_router_plans_total", mode="joined") == 2
    assert cluster.metric("learnonce_router_learned_first_total", state="learned") == 2


def _plan(cluster, *words):
    done = cluster.command("explain", "When?", *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("title", ["NodeStoreActor", "ServeReplica:learnonce:Prefill", "ServeReplica:learnonce:Decode"])
def test_a_killed_process_is_replaced_without_a_person(cluster, title):
    victim = until(lambda: cluster.process_named(title), within_s=60, what=f"{title} runs")
    kill(victim)
    replaced = until(lambda: cluster.process_named(title), within_s=60, what=f"{title} is replaced")
    assert replaced.pid != victim.pid
    until(lambda: _all_ready(cluster), within_s=60, what="all replicas are ready again")
    assert cluster.command("ask", "Still there?").returncode == 0


def _all_ready(cluster):
    ready = cluster.ready()
    if not ready:
        return False
    return {w["role"] for w in ready["workers"] if w["state"] == "ready" and w["store_epoch"]} == {"prefill", "decode"}


def test_metrics_of_every_process_on_one_page(cluster):
    assert cluster.metric("learnonce_router_requests_total") > 0
    page = urllib.request.urlopen(f"{cluster.url}/metrics", timeout=10).read().decode()
    for role in ("prefill", "decode"):
        assert f'role="{role}"' in page


def test_taken_port_and_unknown_setting_are_one_message_and_status_2(cluster, tmp_path):
    other = LiveCluster(tmp_path, NOOP, name="other", port=cluster.port)
    done = other.command("up")
    assert done.returncode == 2
    assert f"--set cluster.port={cluster.port + 1}" in done.stderr
    assert "Traceback" not in done.stderr
    done = cluster.command("status", "--set", "cluster.prot=1")
    assert done.returncode == 2
    assert "did you mean 'port'?" in done.stderr


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"engine.kind": "vllm", "engine.model": "/no/such/folder"}, ["no model '/no/such/folder'"]),
        ({"engine.kind": "vllm", "engine.model": "NoSuchModel"}, ["no model 'NoSuchModel'", "owner/name"]),
        ({"store.host_bytes": 1 << 45}, ["GiB", "store.host_bytes"]),
        ({"store.encrypt_at_rest": True}, ["LEARNONCE_STORE_KEY is not set", "openssl rand -hex 32"]),
    ],
)
def test_what_cannot_start_says_why(tmp_path, override, words):
    live = LiveCluster(tmp_path, {**NOOP, **override}, name="wrong")
    done = live.command("up")
    assert done.returncode == 2, done.stderr
    for word in words:
        assert word in done.stderr
    assert live.state() is None or not live.processes()


def test_commands_without_a_cluster_say_so(tmp_path):
    live = LiveCluster(tmp_path, NOOP, name="absent")
    for words in (["status"], ["ask", "Anyone?"], ["explain", "Anyone?"]):
        done = live.command(*words)
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr
    assert live.command("down").returncode == 0


def test_sigterm_lets_a_running_answer_finish_and_leaves_nothing(tmp_path):
    live = LiveCluster(tmp_path, {**NOOP, "engine.noop.decode_s_per_token": 0.05}, name="drain")
    live.up()
    state = live.state()
    lines = []
    streaming = threading.Event()

    def read():
        body = {"model": _model(live), "messages": [{"role": "user", "content": "Go on."}], "stream": True}
        request = urllib.request.Request(
            f"{live.url}/v1/chat/completions",
            data=json.dumps({**body, "max_completion_tokens": 60}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            for line in answer:
                lines.append(line)
                streaming.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert streaming.wait(30)
    os.kill(state.supervisor_pid, signal.SIGTERM)
    reader.join(30)
    assert lines[-2] == b"data: [DONE]\n", lines[-4:]
    until(lambda: not live.processes(), within_s=60, what="every process has ended")
    live.down()
    assert not Path(state.runtime_dir).exists()


def _model(live):
    with urllib.request.urlopen(f"{live.url}/v1/models", timeout=5) as answer:
        return json.load(answer)["data"][0]["id"]


def test_down_after_the_supervisor_was_killed_leaves_nothing(tmp_path):
    live = LiveCluster(tmp_path, NOOP, name="orphans")
    live.up()
    state = live.state()
    strangers = {p.pid for p in psutil.process_iter()} - {p.pid for p in live.processes()}
    kill(psutil.Process(state.supervisor_pid))
    live.down()
    assert live.processes() == []
    assert not Path(state.runtime_dir).exists()
    # The test's own shell, the other cluster of this module: nothing else was touched.
    assert all(psutil.pid_exists(pid) for pid in strangers & {os.getpid(), os.getppid()})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_start_leaves_nothing(tmp_path, number):
    live = LiveCluster(tmp_path, NOOP, name="interrupted")
    values = {"cluster.name": live.name, "cluster.port": live.port, "cluster.state_dir": str(tmp_path), **NOOP}
    settings = [word for name, value in values.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    # A shell without job control makes what it runs in the background, these tests too, ignore SIGINT.
    command = subprocess.Popen(
        [*LEARNONCE, "up", *settings],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until(lambda: live.state() and len(live.processes()) > 3, within_s=60, what="Ray is starting")
    assert command.poll() is None, "the case is about a start under way"
    command.send_signal(number)
    began_s = time.monotonic()
    command.communicate(timeout=60)
    assert command.returncode == 130
    assert time.monotonic() - began_s < 60
    assert live.processes() == []
