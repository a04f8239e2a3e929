"""A decode worker without an engine, for running the router under a real Serve."""

import asyncio
import json
from typing import Any

from aiohttp import web
from ray import serve

from kvstore.keys import KvScope
from kvstore.wire import PLAN_HEADER, Peer, Role, WorkerReport, open_plan


@serve.deployment(name="Decode", ray_actor_options={"num_cpus": 0})
class FakeDecode:
    """Serves its own HTTP port and reports it, as real workers do."""

    async def __init__(self, model: str, secret_hex: str) -> None:
        self._model = model
        self._secret = bytes.fromhex(secret_hex)
        self.num_cancelled = 0
        app = web.Application()
        app.router.add_post("/{path:.*}", self._answer)
        runner = web.AppRunner(app, handler_cancellation=True, max_field_size=1 << 24)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._port: int = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def report(self) -> WorkerReport:
        return WorkerReport(
            peer=Peer("d0", f"http://127.0.0.1:{self._port}"),
            role=Role.DECODE,
            node_id="n1",
            model=self._model,
            max_model_len=2048,
            scope=KvScope(
                model_digest="x",
                compute_dtype="float32",
                kv_dtype="float32",
                num_layers=1,
                num_kv_heads=1,
                head_dim=8,
                rope="{}",
            ),
            store=None,
        )

    async def cancelled(self) -> int:
        return self.num_cancelled

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        plan = open_plan(request.headers[PLAN_HEADER], secret=self._secret, now_unix_s=0.0)
        body: dict[str, Any] = json.loads(await request.read())
        if not body.get("stream"):
            return web.json_response({"prompt_tokens": plan.num_prompt_tokens, "body": body})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        try:
            await response.write(b"data: first\n\n")
            if body.get("seed") == 1:
                await asyncio.Event().wait()
            await response.write(b"data: [DONE]\n\n")
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return response
