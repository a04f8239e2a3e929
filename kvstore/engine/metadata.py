"""The envelopes in which vLLM carries one step's operations to the worker half, and its report back.

Covers: vLLM's base classes around `kvstore.engine.ops.StepOps` and around what joins kept.
Does not cover: the operations themselves.
"""

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from kvstore.engine.ops import StepOps


@dataclass(frozen=True, slots=True)
class StepPlan(KVConnectorMetadata):
    """One engine step."""

    ops: StepOps


@dataclass(frozen=True, slots=True)
class JoinReport(KVConnectorWorkerMetadata):
    """Joins that ended in one step."""

    reused: dict[str, int]
    """By request, how many loaded tokens were kept."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "JoinReport":
        """Of two workers."""
        return JoinReport({**self.reused, **(other.reused if isinstance(other, JoinReport) else {})})
