"""The life of a worker process: start, report, drain, and leave at once when its engine is dead.

Covers: what the prefill and the decode worker share besides HTTP (`kvstore.engine.serving`). No Ray in here: the
actors pass in what they know from Ray, tests pass in what they like.
Does not cover: engines (`*_workers.engine`), placement (`cluster.app`).
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final, Protocol

import psutil
from pydantic import Field, PositiveFloat
from starlette.types import ASGIApp

from cluster.clock import Clock, SystemClock
from cluster.errors import UnavailableError
from cluster.settings_base import SettingsBase
from kvstore.engine.serving import Gate, HttpServer
from kvstore.keys import KvScope
from kvstore.wire import Peer, Refusal, Role, StoreEndpoint, WorkerReport

logger = logging.getLogger(__name__)

EXIT_ENGINE_DEAD: Final = 70
"""Exit status of a worker whose engine died (EX_SOFTWARE)."""
_KILL_WAIT_S: Final = 2.0
_RESOURCE_TRACKER: Final = "multiprocessing.resource_tracker"


class WorkerRuntime(SettingsBase):
    """What a worker is told about the place where it runs. The secret comes from the environment instead."""

    namespace: str = "learnonce"
    """Ray namespace of the cluster's named actors."""
    runtime_dir: str
    """Folder on this node for sockets and other files that die with the cluster."""
    bind_host: str = "127.0.0.1"
    """Address of this node that other workers reach; ports are bound to it. 0.0.0.0 takes Ray's address of the node."""
    log_level: str = "INFO"
    """Level of this project's loggers."""
    log_json: bool = False
    """One JSON object per log line."""


class LifeSettings(SettingsBase):
    """When a worker waits, and for how long."""

    drain_s: PositiveFloat = 30.0
    """Seconds that requests get to finish when the worker is told to stop; a cluster puts `cluster.drain_s` here."""
    engine_check_s: PositiveFloat = 0.1
    """Seconds between two looks at whether the engine is alive."""
    death_grace_s: PositiveFloat = 1.0
    """Seconds for telling clients that the engine died, before the process leaves."""
    store_refresh_s: PositiveFloat = 2.0
    """A report asks again for the node store's address when the one it has is older than this."""
    store_refresh_timeout_s: PositiveFloat = Field(default=0.5, le=5.0)
    """Seconds that a report waits for that address; the last one known is reported until then."""


class WorkerEngine(Protocol):
    """What a worker's life needs to know about its engine."""

    @property
    def model(self) -> str:
        """Served model name."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        ...

    @property
    def scope(self) -> KvScope | None:
        """What makes this engine's KV interchangeable with another's."""
        ...

    @property
    def joins(self) -> bool:
        """Whether passages can be moved and joined in its KV."""
        ...

    @property
    def dead(self) -> bool:
        """The engine cannot serve any more and will not come back."""
        ...

    @property
    def running_requests(self) -> int:
        """Requests inside the engine."""
        ...

    @property
    def queued_prompt_tokens(self) -> int:
        """Prompt tokens accepted and not yet computed."""
        ...

    async def close(self) -> None:
        """Stop the engine and all of its processes."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlace:
    """Where a worker runs and as whom."""

    replica_id: str
    node_id: str
    host: str
    """Address that the HTTP port is bound to and that others reach."""
    secret: bytes
    find_store: Callable[[], Awaitable[StoreEndpoint | None]]
    """Asks for the node store's address, which changes when the store is replaced."""


class EngineGoneError(UnavailableError):
    """The worker's engine is dead; another replica may answer."""


ENGINE_DEAD: Final = Refusal(
    status=503, error_type="ServiceUnavailableError", message="this worker's engine died", retry_after_s=1.0
)
DRAINING: Final = Refusal(
    status=503, error_type="ServiceUnavailableError", message="this worker is shutting down", retry_after_s=1.0
)


def kill_children() -> None:
    """Kill every process that this one has started, and theirs: an engine leaves none behind.

    Python's resource tracker is spared: it removes shared memory that the killed ones left, and then ends by itself.
    """
    killed: list[psutil.Process] = []
    for child in psutil.Process().children(recursive=True):
        try:
            if _RESOURCE_TRACKER not in " ".join(child.cmdline()):
                child.kill()
                killed.append(child)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(killed, timeout=_KILL_WAIT_S)


def leave_process() -> None:
    """End this process now, with its children, so that Serve sees the death at once and replaces the replica."""
    kill_children()
    logging.shutdown()
    os._exit(EXIT_ENGINE_DEAD)


class Worker:
    """One replica: an engine, its HTTP port, and what it says about itself.

    Guarantees:
        Once the engine is dead, no request waits longer than `death_grace_s`, and `leave` is called.
        After `stop`, the port is closed and the engine's processes have ended.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        role: Role,
        place: WorkerPlace,
        engine: WorkerEngine,
        gate: Gate,
        life: LifeSettings,
        resources: AsyncExitStack,
        leave: Callable[[], None] = leave_process,
        clock: Clock | None = None,
    ) -> None:
        """Put the parts together; nothing runs yet.

        Args:
            app: What is served.
            role: What the worker does.
            place: Where it runs.
            engine: The engine inside.
            gate: The gate that `app` counts requests in.
            life: Waiting times.
            resources: Closed at the end of `stop`, after the port: the engine and whatever serves it.
            leave: Ends the process once the engine is dead.
            clock: Time between looks at the engine.
        """
        self._role, self._place = role, place
        self._engine, self._gate, self._life, self._leave = engine, gate, life, leave
        self._resources, self._clock = resources, clock or SystemClock()
        self._store_endpoint: StoreEndpoint | None = None
        self._store_asked_s = float("-inf")
        self._server = HttpServer(app, host=place.host)
        self._watch: asyncio.Task[None] | None = None
        self._draining = False

    async def start(self) -> str:
        """Open the port and begin to watch the engine.

        Returns:
            The worker's URL.

        Raises:
            ServerStartError: The port could not be opened.
        """
        await self._server.start()
        self._watch = asyncio.create_task(self._watch_engine())
        logger.info("worker ready role=%s replica=%s url=%s", self._role, self._place.replica_id, self._server.url)
        return self._server.url

    @property
    def url(self) -> str:
        """Where the worker serves."""
        return self._server.url

    async def report(self) -> WorkerReport:
        """What routers need to know about this worker now."""
        await self._refresh_store()
        return WorkerReport(
            peer=Peer(replica_id=self._place.replica_id, url=self._server.url),
            role=self._role,
            node_id=self._place.node_id,
            model=self._engine.model,
            max_model_len=self._engine.max_model_len,
            scope=self._engine.scope,
            store=self._store_endpoint,
            running_requests=self._gate.running_requests,
            queued_prompt_tokens=self._engine.queued_prompt_tokens,
            draining=self._draining or self._engine.dead,
            joins=self._engine.joins,
        )

    async def _refresh_store(self) -> None:
        now_s = self._clock.now_s()
        if now_s - self._store_asked_s < self._life.store_refresh_s:
            return
        self._store_asked_s = now_s
        try:
            self._store_endpoint = await asyncio.wait_for(self._place.find_store(), self._life.store_refresh_timeout_s)
        except TimeoutError:
            logger.warning("node store's address is late, keeping the last one known")
        except Exception:
            # Whatever the store's keeper raises, the worker goes on without a store.
            logger.exception("node store's address cannot be found")
            self._store_endpoint = None

    def check_health(self) -> None:
        """Raise if the worker cannot serve.

        Raises:
            EngineGoneError: The engine is dead.
        """
        if self._engine.dead:
            raise EngineGoneError(f"engine of {self._place.replica_id} is dead")

    async def _watch_engine(self) -> None:
        while not self._engine.dead:
            await self._clock.sleep_s(self._life.engine_check_s)
        logger.error("engine died, worker leaves role=%s replica=%s", self._role, self._place.replica_id)
        self._gate.end_all(ENGINE_DEAD)
        await self._gate.wait_empty(timeout_s=self._life.death_grace_s)
        self._leave()

    async def stop(self) -> bool:
        """Refuse new requests, let those inside finish, then close the port and the engine.

        Returns:
            Whether every request had finished by itself within `drain_s`.
        """
        self._draining = True
        started_s = time.monotonic()
        self._gate.close(DRAINING)
        empty = await self._gate.wait_empty(timeout_s=self._life.drain_s)
        if not empty:
            self._gate.end_all(DRAINING)
            await self._gate.wait_empty(timeout_s=self._life.death_grace_s)
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await self._server.stop()
        await self._resources.aclose()
        logger.info(
            "worker stopped role=%s replica=%s finished=%s seconds=%.2f",
            self._role,
            self._place.replica_id,
            empty,
            time.monotonic() - started_s,
        )
        return empty
