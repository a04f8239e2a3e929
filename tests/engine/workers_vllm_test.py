"""The workers' promises on real vLLM: float32, one core per engine, one store between two worker processes."""

import asyncio
import os
import signal
import time

import openai
import psutil
import pytest
from support.openai_suite import OpenAISuite
from support.workers import SECRET, Pair, eventually, make_plan, remote
from support.workers_suite import EndingSuite, JoinSuite, PlanSuite, RemoteSuite, salt
from support.workers_vllm import VLLM, node_store, start_worker

from kvstore.engine.worker import EXIT_ENGINE_DEAD
from kvstore.wire import PLAN_HEADER, sign_plan

__all__ = ["salt"]
pytestmark = [pytest.mark.engine, pytest.mark.timeout(540)]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The store's client, and both workers, started at the same time."""
    folder = tmp_path_factory.mktemp("workers")
    with node_store(folder) as (socket, client):
        decode = start_worker(folder, "decode", socket=socket, engine=VLLM, rank=0)
        prefill = start_worker(folder, "prefill", socket=socket, engine=VLLM, rank=1)
        children = []
        try:
            decode.wait_ready()
            prefill.wait_ready()
            children = [*decode.children(), *prefill.children()]
            assert children
            yield client, decode, prefill
        finally:
            for worker in (decode, prefill):
                worker.stop()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


@pytest.fixture(scope="module")
def pair(processes):
    client, decode, prefill = processes
    urls = {"decode": decode.url, "prefill": prefill.url}

    async def running(role):
        # vLLM's gauges move with its steps; the queued tokens are those of calls into the engine.
        names = ["vllm:num_requests_running", "vllm:num_requests_waiting"]
        names += ["learnonce_prefill_queued_tokens"] if role == "prefill" else []
        return sum([await made.metric(urls[role], name) for name in names])

    made = Pair(
        decode_url=decode.url,
        prefill_url=prefill.url,
        scope=decode.report.scope,
        model="smol",
        store=client,
        running=running,
        stream_deadline_s=8.0,
    )
    return made


class TestPlan(PlanSuite):
    async def test_another_prompt_than_the_plans_loads_nothing(self, pair, salt):
        """With `echo`, vLLM renders the messages after all: the plan's KV would be wrong for them."""
        name = "learnonce_decode_fallbacks_total"
        prompt = pair.prompt(salt)
        await pair.ask(make_plan(prompt, cache_salt=salt))
        assert await asyncio.to_thread(pair.store.wait, prompt.keys[:-1], deadline_s=10.0) == [True, True]
        before = await pair.metric(pair.decode_url, name, reason="other_prompt")
        answer = await pair.ask(make_plan(prompt.held(2), cache_salt=salt + "b"), echo=True)
        assert answer.status == 200
        assert answer.usage["prompt_tokens"] < 100
        assert answer.cached_tokens == 0
        assert await pair.metric(pair.decode_url, name, reason="other_prompt") == before + 1

    async def test_token_ids_outside_the_vocabulary_are_refused(self, pair, salt):
        prompt = pair.prompt(salt, 40, 10, first=60_000)
        assert (await pair.ask(make_plan(prompt, cache_salt=salt))).status == 400
        assert (await pair.ask(make_plan(pair.prompt(salt), cache_salt=salt))).status == 200


class TestRemote(RemoteSuite):
    pass


class TestJoin(JoinSuite):
    pass


class TestEnding(EndingSuite):
    pass


class TestOpenAI(OpenAISuite):
    @pytest.fixture
    def model(self, pair):
        return pair.model

    @pytest.fixture
    async def client(self, pair):
        plan = make_plan(expires_unix_s=time.time() + 300, deadline_unix_s=time.time() + 300)
        headers = {PLAN_HEADER: sign_plan(plan, secret=SECRET)}
        async with openai.AsyncOpenAI(
            base_url=pair.decode_url + "/v1", api_key="none", default_headers=headers, max_retries=0
        ) as made:
            yield made


class TestDeath:
    """The last tests of this module: they kill what the others use, prefill first."""

    async def test_prefill_killed_in_the_middle_changes_no_token(self, pair, processes, salt):
        _, _, prefill = processes
        local = await pair.ask(make_plan(pair.prompt(salt + "local", *pair.long_lengths), cache_salt=salt + "a"))
        prompt = pair.prompt(salt, *pair.long_lengths)
        asking = asyncio.create_task(pair.ask(remote(prompt, pair.prefill_url, cache_salt=salt + "b")))
        await eventually(lambda: pair.running("prefill"), what="the prefill runs")
        children = prefill.children()
        prefill.process.kill()
        answer = await asking
        assert (answer.mode, answer.headers["x-learnonce-fallback"]) == ("fallback", "dead")
        assert answer.text == local.text
        assert psutil.wait_procs(children, timeout=20)[1] == [], "the engine outlived its worker"

    async def test_a_killed_engine_tells_its_clients_and_the_worker_leaves(self, pair, processes, salt):
        _, decode, _ = processes
        whole = asyncio.create_task(pair.ask(make_plan(pair.prompt(salt), cache_salt=salt), max_tokens=1000))
        stream = asyncio.create_task(pair.stream(make_plan(pair.prompt(salt), cache_salt=salt), max_tokens=1000))
        await eventually(lambda: pair.running("decode"), what="requests run")
        (core,) = [child for child in decode.children() if "EngineCore" in " ".join(child.cmdline())]
        killed_s = time.monotonic()
        os.kill(core.pid, signal.SIGKILL)
        status = await asyncio.to_thread(decode.process.wait, 20)
        assert status == EXIT_ENGINE_DEAD
        assert time.monotonic() - killed_s < 10.0
        assert (await whole).status == 503
        assert any('"error"' in event for event in (await stream).events[-2:])
