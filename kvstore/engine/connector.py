"""learnonce's KV connector: vLLM's hooks, answered by the scheduler half or by the worker half.

Covers: the class that vLLM loads by `kv_connector_module_path`, and what must never leave it: an exception.
Does not cover: decisions (`kvstore.engine.scheduler_side`) and work (`kvstore.engine.worker_side`).

vLLM makes one instance with role SCHEDULER in EngineCore and one with role WORKER per rank. They share nothing but
`StepPlan`s. Loads are asynchronous only: a request waits with its blocks allocated while others compute. The per-layer
hooks do nothing, so that full CUDA graphs stay possible.

An engine whose KV cannot be moved (`kvstore.engine.support`) loads and saves nothing, says so once, and serves.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole

from kvstore.engine.guard import exit_with_parent
from kvstore.engine.metadata import JoinReport, StepPlan
from kvstore.engine.ops import StepOps
from kvstore.engine.scheduler_side import ScheduledRequest, SchedulerSide
from kvstore.engine.scope import engine_weights
from kvstore.engine.settings import ConnectorSettings
from kvstore.engine.stats import LearnoncePromMetrics, LearnonceStats
from kvstore.engine.support import refusal_of_layout, refusal_of_request
from kvstore.engine.tally import Tally
from kvstore.engine.worker_side import WorkerSide

logger = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])


def _guarded(answer: Callable[[], Any]) -> Callable[[F], F]:
    """A hook that answers `answer()` when it fails: a bug here may cost reuse, never the engine."""

    def decorate(hook: F) -> F:
        @functools.wraps(hook)
        def guarded(self: "LearnonceConnector", *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(self, *args, **kwargs)
            except Exception:
                logger.exception("event=hook_failed hook=%s", hook.__name__)
                self.tally.add(f"hook_errors.{hook.__name__}")
                return answer()

        return cast("F", guarded)

    return decorate


class LearnonceConnector(KVConnectorBase_V1):
    """See the module."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        exit_with_parent()
        self.tally = Tally()
        self.scheduler: SchedulerSide | None = None
        self.worker: WorkerSide | None = None
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        block_size = vllm_config.cache_config.block_size
        self.refusal = refusal_of_layout(vllm_config, kv_cache_config)
        if self.refusal is not None:
            logger.warning("event=kv_reuse_off reason=%r", self.refusal)
        elif role is KVConnectorRole.SCHEDULER:
            self.scheduler = SchedulerSide(block_size=block_size, tally=self.tally)
        if role is KVConnectorRole.WORKER:
            settings = ConnectorSettings.model_validate(extra.get("settings", {}))
            self.worker = WorkerSide(settings=settings, extra=extra, block_size=block_size, tally=self.tally)

    @property
    def requires_kv_delivery(self) -> bool:
        """Saves are best effort: a dropped one is a later miss."""
        return False

    # Scheduler half.

    @_guarded(lambda: None)
    def on_new_request(self, request: Any) -> None:
        """A request was added."""
        if self.scheduler is None or request.kv_transfer_params is None:
            return
        if reason := refusal_of_request(request):
            self.tally.add("params_rejected")
            logger.warning("event=params_ignored request_id=%s reason=%s", request.request_id, reason)
            return
        self.scheduler.add_request(request)

    @_guarded(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens to load behind those the engine holds."""
        num_tokens = self.scheduler.num_loadable(request, num_computed_tokens) if self.scheduler is not None else 0
        return num_tokens, num_tokens > 0

    @_guarded(lambda: None)
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request has blocks."""
        if self.scheduler is not None:
            self.scheduler.blocks_allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """This step's operations."""
        return StepPlan(self._step_ops(scheduler_output))

    @_guarded(StepOps)
    def _step_ops(self, scheduler_output: Any) -> StepOps:
        if self.scheduler is None:
            return StepOps()
        state = scheduler_output.kv_connector_block_state

        def blocks_of(request_id: str) -> list[int]:
            groups = state.get_block_ids(request_id)
            return list(groups[0]) if groups else []

        return self.scheduler.take_step(_scheduled(scheduler_output), blocks_of=blocks_of)

    @_guarded(lambda: None)
    def update_connector_output(self, connector_output: Any) -> None:
        """What the worker half reports about a step."""
        report = connector_output.kv_connector_worker_meta
        if self.scheduler is not None and isinstance(report, JoinReport):
            self.scheduler.joins_ended(report.reused)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request is done or aborted; its blocks are free at once."""
        if self.scheduler is not None:
            self.scheduler.finish_request(request.request_id)
        return False, None

    # Worker half.

    @_guarded(lambda: None)
    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """The engine's KV is allocated."""
        if self.worker is None or self.refusal is not None:
            return
        modules = self._vllm_config.compilation_config.static_forward_context
        layers = [modules[name] for name in self._kv_cache_config.kv_cache_groups[0].layer_names]
        self.refusal = self.worker.register(layers, weights=engine_weights(self._vllm_config))
        if self.refusal is not None:
            logger.warning("event=kv_reuse_off reason=%r", self.refusal)

    @_guarded(lambda: "an error, see the engine's log")
    def allow_joins(self, runner: Any) -> str | None:
        """The engine has started: its model may be run for joins. Why it cannot, or None."""
        if self.worker is None or self.refusal is not None:
            return self.refusal or "not a worker"
        return self.worker.allow_joins(runner)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins, with its operations."""
        super().bind_connector_metadata(connector_metadata)
        self._begin_step()

    @_guarded(lambda: None)
    def _begin_step(self) -> None:
        if self.worker is not None:
            self.worker.begin_step(self._ops())

    @_guarded(lambda: None)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start loads and scatter what has arrived."""
        if self.worker is not None:
            self.worker.load(self._ops())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads are over before their request computes."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: whole chunks are saved after the step."""

    @_guarded(lambda: None)
    def wait_for_save(self) -> None:
        """Take complete chunks out of the engine."""
        if self.worker is not None:
            self.worker.save(self._ops())

    @_guarded(lambda: (None, None))
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose load is over."""
        if self.worker is None:
            return None, None
        self.worker.end_requests(finished_req_ids)
        return None, self.worker.take_finished()

    @_guarded(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that must be computed after all."""
        return self.worker.take_bad_blocks() if self.worker is not None else set()

    @_guarded(lambda: None)
    def build_connector_worker_meta(self) -> JoinReport | None:
        """How much of what was loaded the joins that are over kept."""
        reused = self.worker.take_reused() if self.worker is not None else {}
        return JoinReport(reused) if reused else None

    @_guarded(lambda: None)
    def shutdown(self) -> None:
        """The engine ends."""
        if self.worker is not None:
            self.worker.close()

    def _ops(self) -> StepOps:
        plan = self._get_connector_metadata()
        return plan.ops if isinstance(plan, StepPlan) else StepOps()

    # Statistics.

    @_guarded(lambda: None)
    def get_kv_connector_stats(self) -> LearnonceStats | None:
        """What happened since the last call."""
        data = self.tally.drain()
        return LearnonceStats(data) if data else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> LearnonceStats:
        """Statistics as they arrive in the front end."""
        return LearnonceStats(data)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> LearnoncePromMetrics:
        """Our series among vLLM's."""
        return LearnoncePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _scheduled(scheduler_output: Any) -> list[ScheduledRequest]:
    computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
    cached = scheduler_output.scheduled_cached_reqs
    computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return [
        ScheduledRequest(request_id=name, num_computed_tokens=computed[name], num_scheduled_tokens=count)
        for name, count in scheduler_output.num_scheduled_tokens.items()
    ]
