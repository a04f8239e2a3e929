"""Requests that either side may end, the gate, and the server beside an engine."""

import asyncio
import json
import pickle
import socket

import aiohttp
import pytest

from kvstore.engine.serving import Exchange, Gate, HttpServer, ServerStartError, exchange
from kvstore.engine.worker import WorkerRuntime
from kvstore.keys import KvScope
from kvstore.wire import SECRET_VARIABLE, Peer, Refusal, Role, StoreEndpoint, WorkerReport, cluster_secret

LATE = Refusal(status=504, error_type="DeadlineExceededError", message="too late")


class Client:
    """The other side of one ASGI request."""

    def __init__(self, *bodies):
        self.inbox = asyncio.Queue()
        for index, body in enumerate(bodies or (b"",)):
            more = index < len(bodies) - 1
            self.inbox.put_nowait({"type": "http.request", "body": body, "more_body": more})
        self.got = []
        self.exchange = Exchange({"type": "http", "headers": [(b"x-a", b"1")]}, self.inbox.get, self._send)

    async def _send(self, message):
        self.got.append(message)

    def leave(self):
        self.inbox.put_nowait({"type": "http.disconnect"})

    @property
    def status(self):
        return self.got[0]["status"]

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.got[1:])


async def start(send, *, content_type=b"application/json", status=200):
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]})


async def test_the_app_gets_the_whole_body_and_its_answer_passes():
    client = Client(b"ab", b"cd")
    client.exchange.response_headers["x-more"] = "yes"
    assert await client.exchange.read_body(max_bytes=4)

    async def app(_, receive, send):
        assert (await receive())["body"] == b"abcd"
        await start(send)
        await send({"type": "http.response.body", "body": b"{}", "more_body": False})

    await client.exchange.run(app)
    await client.exchange.close()
    assert (client.status, client.body) == (200, b"{}")
    assert (b"x-more", b"yes") in client.got[0]["headers"]
    assert client.exchange.header("x-a") == "1"
    assert client.exchange.header("x-b") is None


async def test_the_end_of_a_complete_answer_is_no_client_that_left():
    client = Client()
    await client.exchange.read_body(max_bytes=10)

    async def app(_, receive, send):
        await start(send)
        await send({"type": "http.response.body", "body": b"{}", "more_body": False})
        client.leave()  # what servers say once an answer is complete

    await client.exchange.run(app)
    await client.exchange._listener
    assert not client.exchange.gone.is_set()


async def test_a_body_over_the_bound_is_not_kept():
    client = Client(b"ab", b"cd")
    assert not await client.exchange.read_body(max_bytes=3)
    assert client.exchange.body == b""


@pytest.mark.parametrize("ended_by", ["client", "us"])
async def test_work_is_cancelled_once_the_request_is_gone(ended_by):
    client, cancelled = Client(), asyncio.Event()
    await client.exchange.read_body(max_bytes=10)

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    waiting = asyncio.create_task(client.exchange.unless_gone(work()))
    await asyncio.sleep(0)
    if ended_by == "client":
        client.leave()
    else:
        client.exchange.end(LATE)
    assert await waiting is None
    assert cancelled.is_set()
    assert (client.exchange.ending is LATE) is (ended_by == "us")
    await client.exchange.close()


async def test_work_that_ends_in_time_keeps_its_result_and_its_error():
    client = Client()

    async def seven():
        return 7

    async def fail():
        raise ValueError("no")

    assert await client.exchange.unless_gone(seven()) == 7
    with pytest.raises(ValueError, match="no"):
        await client.exchange.unless_gone(fail())


async def test_an_ended_request_looks_to_the_app_like_a_disconnect():
    client = Client()
    await client.exchange.read_body(max_bytes=10)

    async def app(_, receive, send):
        await receive()
        client.exchange.end(LATE)
        assert (await receive())["type"] == "http.disconnect"
        await start(send)

    await client.exchange.run(app)
    await client.exchange.close()
    assert client.status == 504
    assert json.loads(client.body)["error"]["message"] == "too late"
    assert len(client.got) == 2


async def test_a_stream_that_has_begun_ends_with_an_error_event():
    client = Client()
    await client.exchange.read_body(max_bytes=10)

    async def app(_, receive, send):
        await start(send, content_type=b"text/event-stream; charset=utf-8")
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        client.exchange.end(LATE)
        await send({"type": "http.response.body", "body": b"data: 2\n\n", "more_body": True})

    await client.exchange.run(app)
    await client.exchange.close()
    first, last = client.body.split(b"\n\n")[:2]
    assert first == b"data: 1"
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == 504
    assert client.got[-1]["more_body"] is False


async def test_the_first_ending_counts():
    client = Client()
    client.exchange.end(LATE)
    client.exchange.end(Refusal(status=503, error_type="x", message="x"))
    await client.exchange.finish()
    await client.exchange.finish()
    assert client.status == 504
    assert len(client.got) == 2


async def test_a_server_error_may_be_explained():
    client = Client()
    client.exchange.on_server_error = lambda: Refusal(status=503, error_type="x", message="dead", retry_after_s=2.0)

    async def app(_, receive, send):
        await start(send, status=500)
        await send({"type": "http.response.body", "body": b"internal", "more_body": False})

    await client.exchange.run(app)
    assert client.status == 503
    assert (b"retry-after", b"2") in client.got[0]["headers"]
    assert b"internal" not in client.body


async def test_an_app_that_fails_is_not_hidden():
    async def app(_, receive, send):
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        await Client().exchange.run(app)


async def test_the_gate_counts_and_closes():
    gate, client, late = Gate(), Client(), Client()
    async with exchange(client.exchange.scope, client.inbox.get, client._send, gate=gate) as inside:
        assert gate.running_requests == 1
        assert not await gate.wait_empty(timeout_s=0.01)
        gate.end_all(LATE)
        assert inside.gone.is_set()
        async with exchange(late.exchange.scope, late.inbox.get, late._send, gate=gate) as refused:
            assert refused is None
    assert late.status == 504
    assert gate.running_requests == 0
    assert await gate.wait_empty(timeout_s=1.0)


async def ok(scope, receive, send):
    if scope["type"] == "http":
        await start(send)
        await send({"type": "http.response.body", "body": scope["headers"][-1][1][:5]})


async def test_the_server_takes_a_large_header_on_a_port_of_its_own():
    server = HttpServer(ok, host="127.0.0.1")
    await server.start()
    try:
        # asyncio turns Nagle's algorithm off only for sockets that name their protocol.
        assert server._server.servers[0].sockets[0].proto == socket.IPPROTO_TCP
        async with (
            aiohttp.ClientSession() as session,
            session.get(server.url, headers={"x-plan": "p" * (4 << 20)}) as answer,
        ):
            assert answer.status == 200
    finally:
        await server.stop()
    port = int(server.url.rsplit(":", 1)[1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


async def test_an_address_that_is_not_here_is_said_so():
    with pytest.raises(ServerStartError, match=r"192\.0\.2\.1"):
        await HttpServer(ok, host="192.0.2.1").start()


def test_reports_survive_pickling():
    scope = KvScope(
        model_digest="d",
        compute_dtype="float32",
        kv_dtype="float32",
        num_layers=1,
        num_kv_heads=1,
        head_dim=4,
        rope="{}",
    )
    store = StoreEndpoint(node_id="n", epoch="e", socket_path="s", events_address="a", snapshot_address="b")
    report = WorkerReport(
        peer=Peer(replica_id="r", url="u"),
        role=Role.DECODE,
        node_id="n",
        model="m",
        max_model_len=8,
        scope=scope,
        store=store,
    )
    assert pickle.loads(pickle.dumps(report)) == report
    runtime = WorkerRuntime(runtime_dir="somewhere")
    assert pickle.loads(pickle.dumps(runtime)) == runtime


@pytest.mark.parametrize(("value", "message"), [(None, "is not set"), ("xyz", "hexadecimal")])
def test_the_secret_must_be_there(monkeypatch, value, message):
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(SECRET_VARIABLE, value)
    with pytest.raises(Exception, match=message):
        cluster_secret()
