"""One worker as a process of its own, without Ray: `python -m support.worker_process '{...}'` from `tests/`.

Prints one line of JSON when it serves. SIGTERM stops it, SIGUSR1 kills a no-op engine.
"""

import asyncio
import gc
import json
import os
import signal
import sys

import msgspec

from cluster.telemetry import configure_logging
from decode_workers.settings import DecodeSettings
from decode_workers.worker import start_decode_worker
from kvstore.client import NodeStoreClient
from kvstore.engine.build import engine_environment
from kvstore.engine.noop import NoopEngine
from kvstore.engine.settings import EngineSettings
from kvstore.engine.worker import WorkerPlace
from kvstore.wire import cluster_secret
from prefill_workers.settings import PrefillSettings
from prefill_workers.worker import start_prefill_worker

ROLES = {"decode": (start_decode_worker, DecodeSettings), "prefill": (start_prefill_worker, PrefillSettings)}


async def serve(given):
    start, settings_class = ROLES[given["role"]]
    engine = EngineSettings.model_validate_json(json.dumps(given["engine"]))
    if engine.kind == "vllm":
        os.environ.update(engine_environment(engine, replica_rank=given["rank"]))
    client = NodeStoreClient(given["socket"], secret=cluster_secret(), client_name=given["role"])

    async def no_store():
        return None

    worker = await start(
        settings_class.model_validate_json(json.dumps(given["settings"])),
        engine,
        place=WorkerPlace(
            replica_id=given["replica_id"],
            node_id="n0",
            host="127.0.0.1",
            secret=cluster_secret(),
            find_store=no_store,
        ),
        store=client,
        store_socket=given["socket"],
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(
        signal.SIGUSR1, lambda: [each.kill() for each in gc.get_objects() if isinstance(each, NoopEngine)]
    )
    print(json.dumps({"report": msgspec.to_builtins(await worker.report())}), flush=True)
    await stop.wait()
    await worker.stop()


if __name__ == "__main__":
    configure_logging()
    asyncio.run(serve(json.loads(sys.argv[1])))
