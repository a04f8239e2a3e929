"""The connector's worker half: carries out loads and saves beside the engine's steps.

Covers: the blocks of this worker, the loader, joins and the saver, and what an engine that cannot reuse KV answers.
Does not cover: vLLM's class and its hooks (`kvstore.engine.connector`).
"""

import contextlib
import dataclasses
import importlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch

from cluster.errors import SettingsError
from kvstore.engine.coding import Coding
from kvstore.engine.join.run import Joins
from kvstore.engine.loader import Loader, LoadLimits, LoadResult
from kvstore.engine.ops import LoadOp, StepOps
from kvstore.engine.paging import PagedKv, UnsupportedLayoutError
from kvstore.engine.params import ChunkSpan
from kvstore.engine.profiles import ProfileShelf, Weights
from kvstore.engine.saver import Saver
from kvstore.engine.settings import ConnectorSettings
from kvstore.engine.speeds import SpeedMeter
from kvstore.engine.step_clock import StepClock, marks_of
from kvstore.engine.tally import Tally
from kvstore.interfaces import StoreClient
from kvstore.wire import cluster_secret

if TYPE_CHECKING:
    from kvstore.engine.join.rotation import Rotation

logger = logging.getLogger(__name__)

StoreFactory = Callable[[Mapping[str, Any]], StoreClient]

_CORES_VARIABLE: Final = "VLLM_CPU_OMP_THREADS_BIND"


class StoreConnection:
    """The engine's client of its node's store, made at first use and again after a failure to make it.

    Args:
        extra: The connector's extra configuration: `store_socket`, or `store` ("module:callable") that makes a client.
    """

    def __init__(self, extra: Mapping[str, Any]) -> None:
        self._extra = extra
        self._lock = threading.Lock()
        self._client: StoreClient | None = None
        self._closed = False

    def __call__(self) -> StoreClient:
        """The client.

        Raises:
            SettingsError: The configuration names no store that can be used, or the connection was closed.
        """
        with self._lock:
            if self._closed:
                raise SettingsError("the engine's store connection is closed")
            if self._client is None:
                self._client = _factory(self._extra)(self._extra)
            return self._client

    def close(self) -> None:
        """Disconnect for good."""
        with self._lock:
            self._closed = True
            if self._client is not None:
                self._client.close()


class WorkerSide:
    """Loads and saves of one worker.

    Guarantees:
        Every load is reported as over, also by a worker that cannot load: then all of it counts as failed.

    Args:
        settings: Bounds.
        extra: Where the store is, see `StoreConnection`.
        block_size: Tokens per block as the scheduler counts them.
        tally: Where everything is counted.
    """

    def __init__(self, *, settings: ConnectorSettings, extra: Mapping[str, Any], block_size: int, tally: Tally) -> None:
        self._settings = settings
        self._block_size = block_size
        self._tally = tally
        self._store = StoreConnection(extra)
        self.blocks: PagedKv | None = None
        """The engine's blocks, once registered and understood."""
        self._loader: Loader | None = None
        self._saver: Saver | None = None
        self._layers: list[Any] = []
        self._rotation: Rotation | None = None
        self._joins: Joins | None = None
        self._reused: dict[str, int] = {}
        self._meter = SpeedMeter()
        self._clock = StepClock(None)
        self._finished: set[str] = set()
        self._bad_blocks: set[int] = set()

    def register(self, layers: list[Any], *, weights: Weights) -> str | None:
        """Take the engine's KV, computed with these weights; why it cannot be used, or None."""
        try:
            blocks = PagedKv(layers, block_size=self._block_size)
        except UnsupportedLayoutError as error:
            return str(error)
        self.blocks = blocks
        self._layers = layers
        self._clock = StepClock(marks_of(blocks.device))
        touched_bytes = blocks.pretouch()
        logger.info("event=kv_registered layers=%d pretouched_bytes=%d", len(layers), touched_bytes)
        settings, shelf = self._settings, ProfileShelf(store=self._store)
        model = blocks.meta(num_tokens=1, base_position=0)
        try:
            coding = Coding(settings, shelf=shelf, meter=self._meter, model=model, weights=weights)
        except SettingsError as error:
            return str(error)
        self._loader = Loader(
            store=self._store,
            blocks=blocks,
            coding=coding,
            tally=self._tally,
            limits=LoadLimits(
                num_threads=settings.load_threads,
                num_decoders=settings.decode_threads,
                step_bytes=settings.load_step_bytes,
                staging_bytes=settings.load_staging_bytes,
                initializer=_use_all_cores,
            ),
            meter=self._meter,
            may_recompute=settings.recompute_when_faster,
            move=self._move,
        )
        self._saver = Saver(
            store=self._store,
            blocks=blocks,
            coding=coding,
            tally=self._tally,
            staging_bytes=settings.save_staging_bytes,
            deadline_s=settings.save_deadline_s,
            num_threads=settings.save_threads,
            initializer=_use_all_cores,
        )
        return None

    def allow_joins(self, runner: Any) -> str | None:
        """Join from now on, by this model runner of vLLM; why that cannot be, or None. Before the first request."""
        from kvstore.engine.join.forward import ModelForward  # the only part that needs vLLM

        if self.blocks is None:
            return "KV of this engine is not reused"
        try:
            forward = ModelForward(runner, layers=[layer.layer_name for layer in self._layers], blocks=self.blocks)
            # Block 0 is never given to a request, and before the first one nobody uses the others either.
            forward.prove_rotation([1])
        except UnsupportedLayoutError as error:
            return str(error)
        except Exception as error:
            # Models are many, and one that cannot be run like this serves without joins.
            logger.exception("event=join_proof_failed")
            return f"{type(error).__name__}: {error}"
        self._rotation = forward.rotation
        self._joins = Joins(
            forward,
            blocks=self.blocks,
            tally=self._tally,
            step_tokens=self._settings.join_step_tokens,
            max_tokens=runner.vllm_config.scheduler_config.max_num_batched_tokens,
        )
        return None

    def begin_step(self, ops: StepOps) -> None:
        """The engine begins a step. Before its forward, which `load` may come after."""
        self._clock.begin(ops.num_tokens)

    def load(self, ops: StepOps) -> None:
        """Start this step's loads and scatter a bounded piece of those that have arrived."""
        prefill = self._meter.speeds.prefill
        queue_s = ops.num_tokens / prefill.per_s if prefill is not None else 0.0
        for op in ops.loads:
            self._start(op, queue_s=queue_s)
        if self._loader is not None:
            self._note(self._loader.advance(busy=ops.busy))
            self._join(busy=ops.busy)

    def _join(self, *, busy: bool) -> None:
        if self._joins is None or self._loader is None:
            return
        for placed in self._loader.take_placed():
            self._joins.submit(placed)
        if self._joins.num_open:
            # What this step takes says nothing about prefill.
            self._clock.begin(0)
            result = self._joins.advance(busy=busy)
            self._reused |= result.reused
            self._note(LoadResult(result.finished, result.bad_blocks))

    def save(self, ops: StepOps) -> None:
        """Take this step's complete chunks out of the engine."""
        self._note_prefill()
        if self._saver is None or self._loader is None:
            return
        for op in ops.saves:
            if self._loader.was_loaded(op.request_id, op.span.key):
                self._tally.save_ended("held")
            else:
                self._saver.save(op)

    def _note_prefill(self) -> None:
        for num_tokens, seconds in self._clock.end():
            self._meter.note_prefill(num_tokens, seconds=seconds)
            self._tally.add("prefill_tokens", num_tokens)
            self._tally.observe("prefill_s", seconds)

    def end_requests(self, request_ids: set[str]) -> None:
        """Requests that are done or aborted: their loads are over."""
        if self._loader is not None:
            self._finished.update(name for name in request_ids if self._drop(name))

    def _drop(self, request_id: str) -> bool:
        was_loading = self._loader is not None and self._loader.drop(request_id)
        return (self._joins is not None and self._joins.drop(request_id)) or was_loading

    def take_reused(self) -> dict[str, int]:
        """By request whose join is over since the last call: how many loaded tokens were kept."""
        taken, self._reused = self._reused, {}
        return taken

    def take_finished(self) -> set[str]:
        """Requests whose loads are over since the last call."""
        taken, self._finished = self._finished, set()
        return taken

    def take_bad_blocks(self) -> set[int]:
        """Blocks that loads left without valid KV since the last call."""
        taken, self._bad_blocks = self._bad_blocks, set()
        return taken

    @property
    def num_open_loads(self) -> int:
        """Loads and joins under way; 0 when the engine is idle."""
        num_joins = self._joins.num_open if self._joins is not None else 0
        return num_joins + (self._loader.num_open if self._loader is not None else 0)

    @property
    def staged_bytes(self) -> int:
        """KV waiting to be written; 0 when the engine has been idle for a while."""
        return self._saver.staged_bytes if self._saver is not None else 0

    def close(self) -> None:
        """Finish saves within a deadline, drop loads, disconnect."""
        if self._saver is not None:
            self._saver.close()
        if self._loader is not None:
            self._loader.close()
        self._store.close()

    def _move(self, kv_L2TNH: torch.Tensor, *, base: int, start: int) -> None:
        """On the loader's threads."""
        assert self._rotation is not None
        self._rotation.move(kv_L2TNH, base=base, start=start)

    def _start(self, op: LoadOp, *, queue_s: float) -> None:
        if op.join is not None and self._joins is None:
            self._tally.join_failed("refused")
            op = dataclasses.replace(op, join=None, spans=_exact_lead(op))
        try:
            if self._loader is not None:
                self._loader.submit(op, queue_s=queue_s)
                return
        except Exception:
            logger.exception("event=load_not_started request_id=%s", op.request_id)
        self._tally.load_failed("store_error", num_tokens=op.stop - op.start)
        self._note(LoadResult({op.request_id}, set(op.block_ids[op.start // self._block_size :])))

    def _note(self, result: LoadResult) -> None:
        self._finished |= result.finished
        self._bad_blocks |= result.bad_blocks


def _exact_lead(op: LoadOp) -> tuple[ChunkSpan, ...]:
    """The chunks that can be loaded without a join."""
    position, lead = op.start, []
    for span in op.spans:
        if span.base is not None or span.start > position:
            break
        lead.append(span)
        position = span.stop
    return tuple(lead)


def _use_all_cores() -> None:
    """Undo what a new thread inherits: OpenMP has bound the engine's thread, which starts it, to one core."""
    cores = os.environ.get(_CORES_VARIABLE, "")
    if cores.replace(",", "").isdigit():
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {int(core) for core in cores.split(",")})


def _factory(extra: Mapping[str, Any]) -> StoreFactory:
    name = extra.get("store")
    if name is None:
        return _node_store
    module, _, attribute = str(name).partition(":")
    factory: StoreFactory = getattr(importlib.import_module(module), attribute)
    return factory


def _node_store(extra: Mapping[str, Any]) -> StoreClient:
    from kvstore.client import NodeStoreClient  # engines with another store need no sockets

    socket_path = extra.get("store_socket")
    if not socket_path:
        raise SettingsError("the connector needs store_socket in its extra configuration")
    return NodeStoreClient(str(socket_path), secret=cluster_secret(), client_name=f"engine-{os.getpid()}")
