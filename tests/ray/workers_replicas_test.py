"""Both worker roles as Serve deployments, on the no-op engine: reports, remote prefill, replacement, drain."""

import asyncio
import os
import signal
import tempfile
import time
import warnings

import aiohttp
import psutil
import pytest
from support.workers import SECRET, Pair, eventually, make_plan, noop_settings, remote

from decode_workers.settings import DecodeSettings
from kvstore.client import NodeStoreClient
from kvstore.engine.worker import WorkerRuntime
from kvstore.settings import StoreSettings
from kvstore.wire import SECRET_VARIABLE, Role, WorkerReport
from prefill_workers.settings import PrefillSettings

with warnings.catch_warnings():
    # Ray 2.60 is imported with what pydantic calls deprecated.
    warnings.simplefilter("ignore")
    import ray
    from ray import serve
    from ray.serve.exceptions import DeploymentUnavailableError

    from decode_workers.actor import DecodeWorker
    from kvstore.actor import node_store_endpoint, stop_node_stores
    from prefill_workers.actor import PrefillWorker

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(240),
    # Ray's and Serve's own sockets and loops, while the cluster is up.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
APP, NAMESPACE = "workers", "workers-test"


@pytest.fixture(scope="module")
def handles(tmp_path_factory):
    """Handles of one deployment per role, in one application."""
    folder = tmp_path_factory.mktemp("run")
    # Ray's sockets do not fit into pytest's long paths.
    short = tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True)
    environment = {SECRET_VARIABLE: SECRET.hex()}
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
        _temp_dir=short.name,
    )
    engine, store = noop_settings(), StoreSettings(host_bytes=64 << 20, nvme=None)
    runtime = WorkerRuntime(namespace=NAMESPACE, runtime_dir=str(folder))
    options = {"health_check_period_s": 1.0, "graceful_shutdown_timeout_s": 20.0, "max_ongoing_requests": 100}
    deployments = {
        Role.DECODE: serve.deployment(DecodeWorker, name="Decode", **options).bind(
            DecodeSettings(), engine, store, runtime=runtime
        ),
        Role.PREFILL: serve.deployment(PrefillWorker, name="Prefill", **options).bind(
            PrefillSettings(), engine, store, runtime=runtime
        ),
    }
    try:
        serve.start(http_options={"location": "NoServer"})
        yield {
            role: serve.run(bound, name=f"{APP}-{role}", route_prefix=None, blocking=False)
            for role, bound in deployments.items()
        }
    finally:
        serve.shutdown()
        stop_node_stores(namespace=NAMESPACE)
        ray.shutdown()
        short.cleanup()


def report_of(handle):
    """The report of the only replica; None while there is none that answers."""
    try:
        answers = handle.broadcast("report").results(timeout_s=10, return_exceptions=True)
    except DeploymentUnavailableError:
        return None
    return next((answer for answer in answers if isinstance(answer, WorkerReport)), None)


async def fresh(handle, *, other_than=None):
    """The replica's report, from a thread; None while there is none, or only that of a replica called `other_than`."""
    report = await asyncio.to_thread(report_of, handle)
    return report if report is not None and report.peer.url != other_than else None


@pytest.fixture
def pair(handles):
    decode, prefill = report_of(handles[Role.DECODE]), report_of(handles[Role.PREFILL])
    client = NodeStoreClient(decode.store.socket_path, secret=SECRET, client_name="test")
    yield Pair(
        decode_url=decode.peer.url,
        prefill_url=prefill.peer.url,
        scope=decode.scope,
        model=decode.model,
        store=client,
        running=None,
    )
    client.close()


def test_reports_come_through_handles_whole(handles):
    reports = {role: report_of(handle) for role, handle in handles.items()}
    assert [report.role for report in reports.values()] == list(handles)
    assert len({report.peer.replica_id for report in reports.values()}) == 2
    assert {report.store for report in reports.values()} == {node_store_endpoint(namespace=NAMESPACE)}
    assert all(report.node_id == report.store.node_id for report in reports.values())


async def test_remote_prefill_between_two_actors(pair):
    prompt = pair.prompt("ray")
    answer = await pair.ask(remote(prompt, pair.prefill_url))
    assert (answer.status, answer.mode, answer.cached_tokens) == (200, "remote", 0)
    again = await pair.ask(make_plan(prompt.held(2)))
    assert (again.mode, again.cached_tokens) == ("local", prompt.spans[1].stop)
    assert again.text == answer.text


async def test_the_node_store_may_be_killed_under_the_workers(pair, handles):
    before = (await fresh(handles[Role.DECODE])).store
    os.kill(await asyncio.to_thread(_store_pid), signal.SIGKILL)
    answer = await pair.ask(make_plan(pair.prompt("away")))
    assert answer.status == 200

    async def is_back():
        store = (await fresh(handles[Role.DECODE])).store
        return store is not None and store.epoch != before.epoch

    await eventually(is_back, within_s=30, what="the new store is reported")
    await pair.ask(make_plan(pair.prompt("back")))
    keys = pair.prompt("back").keys[:2]
    assert await asyncio.to_thread(pair.store.wait, keys, deadline_s=10.0) == [True, True]


async def test_a_replica_that_dies_is_replaced_and_one_that_stops_drains(pair, handles):
    decode = handles[Role.DECODE]
    old = (await fresh(decode)).peer
    (process,) = [p for p in psutil.Process().children(recursive=True) if _listens(p, old.url)]
    process.kill()
    new = (await eventually(lambda: fresh(decode, other_than=old.url), within_s=60, what="another replica")).peer
    asking = asyncio.create_task(_stream(new.url, pair))

    async def is_inside():
        return (await fresh(decode)).running_requests

    await eventually(is_inside, what="the request is inside")
    started_s = time.monotonic()
    await asyncio.to_thread(serve.delete, f"{APP}-{Role.DECODE}")
    assert (await asking).events[-1] == "[DONE]"
    assert time.monotonic() - started_s > 1.0
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientError):
            await session.get(new.url + "/health")


def _store_pid():
    names = ray.util.list_named_actors(all_namespaces=True)
    (store,) = [actor for actor in names if actor["namespace"] == NAMESPACE and "store" in actor["name"]]
    return ray.get(ray.get_actor(**store).pid.remote())


def _listens(process, url):
    port = int(url.rsplit(":", 1)[1])
    try:
        return any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in process.net_connections("tcp"))
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


async def _stream(url, pair):
    pair.decode_url = url
    return await pair.stream(make_plan(pair.prompt("drain")), max_tokens=1500)
