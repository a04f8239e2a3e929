"""What the engine's processes are asked to do besides serving: one method that vLLM adds to its worker.

Covers: handing the model runner to the connector, once, when the engine has started (`kvstore.engine.llm.allow_joins`).
Does not cover: joins (`kvstore.engine.join`).

vLLM gives connectors the KV and not the model. Its `worker_extension_cls` is the public way to code that sees both.
"""

from typing import Any, Final

METHOD: Final = "learnonce_allow_joins"
"""For `collective_rpc`."""


class JoinExtension:
    """Mixed into vLLM's worker class."""

    model_runner: Any

    def learnonce_allow_joins(self) -> str | None:
        """Let the connector run the model; why it cannot, or None. Call before the first request."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        if not has_kv_transfer_group():
            return "the engine has no connector"
        refusal: str | None = get_kv_transfer_group().allow_joins(self.model_runner)
        return refusal
