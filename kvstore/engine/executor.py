"""The engine's model in the EngineCore process itself, on the CPU as well.

Covers: vLLM's single-process executor for engines whose OpenMP environment was set before they started.
Does not cover: that environment (`kvstore.engine.build`), several ranks (vLLM's own executors).

vLLM replaces "uni" by "mp" on the CPU, because it sets the OpenMP environment when it starts a worker process. We set
it before the engine starts, so the extra process buys nothing: without it an engine was ready in 30 s instead of 49 s
and took 0.6 GB less (docs/engine.md).
"""

from vllm.v1.executor.uniproc_executor import UniProcExecutor

from kvstore.engine.guard import exit_with_parent


class InProcessExecutor(UniProcExecutor):
    """One worker in the EngineCore process."""

    def _init_executor(self) -> None:
        exit_with_parent()
        super()._init_executor()
