"""The envelope in which vLLM carries one step's operations from the scheduler half to the worker half.

Covers: vLLM's base class around `kvstore.engine.ops.StepOps`. Does not cover: the operations themselves.
"""

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from kvstore.engine.ops import StepOps


@dataclass(frozen=True, slots=True)
class StepPlan(KVConnectorMetadata):
    """One engine step."""

    ops: StepOps
