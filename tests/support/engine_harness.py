"""A real engine in a process of its own, asked what tests want to know.

Covers: requests at the same time and aborted ones, what the connector's worker half holds, killing.
Does not cover: processes and pipes (`kvstore.engine.harness`), HTTP, plans, Ray (`*_workers`).

The child is `python -m support.engine_harness`.
"""

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypedDict

import msgspec

from kvstore.engine.extension import JoinExtension
from kvstore.engine.harness import EnginePipe, run_child, samples
from kvstore.engine.params import ChunkSpan
from kvstore.engine.settings import EngineSettings
from kvstore.keys import ChunkKey

_PROBE = "support.engine_harness.ConnectorProbe"


class Ask(TypedDict, total=False):
    """One request to the engine."""

    prompt: list[int]
    max_tokens: int
    transfer: dict[str, Any] | None
    """`kv_transfer_params`."""
    salt: str
    """Requests with different salts share nothing in the engine's own prefix cache."""
    abort_after_s: float
    """Cancel the request this long after it was sent."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine said."""

    tokens: tuple[int, ...]
    cached_tokens: int
    """As vLLM reports it in `usage`."""
    token_times_s: tuple[float, ...]
    """When each output arrived, from the request on."""
    finish: str
    logprobs: tuple[float, ...] = ()
    """Of the tokens."""

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.token_times_s[0]


class EngineProcess(EnginePipe):
    """One engine; use as a context manager. It shares this machine's cores with another one.

    Args:
        settings: The engine.
        store_socket: Unix socket of a node store.
        secret: The node store's.
        replica_rank: Chooses the core.
        log: Where the child's own output goes.
    """

    def __init__(
        self, settings: EngineSettings, *, log: Path, store_socket: str, secret: bytes, replica_rank: int = 0
    ) -> None:
        super().__init__(
            "support.engine_harness",
            settings,
            store_socket=store_socket,
            secret=secret,
            log=log,
            replica_rank=replica_rank,
            num_replicas=2,
            folder=Path(__file__).parents[1],
        )

    def generate(self, asks: Sequence[Ask], *, deadline_s: float = 120.0) -> list[Answer]:
        """Run requests at the same time."""
        return [msgspec.convert(item, Answer) for item in self._op("generate", list(asks), deadline_s)]

    def ask(self, prompt: list[int], **options: Any) -> Answer:
        """Run one request."""
        ask: Any = {"prompt": prompt, **options}
        return self.generate([ask])[0]

    def state(self) -> dict[str, Any]:
        """What the connector's worker half holds: open loads, staged bytes."""
        state: dict[str, Any] = self._op("state", None, 30.0)
        return state

    def metrics(self) -> dict[str, float]:
        """Samples of vLLM's metrics and ours, by name and our labels."""
        metrics: dict[str, float] = self._op("metrics", None, 30.0)
        return metrics

    def round_trip(self, seed: int) -> str:
        """Scatter random KV into the engine's blocks and gather it back; "" or what differs."""
        result: str = self._op("round_trip", seed, 60.0)
        return result

    def set_joins(self, mode: Literal["free", "held", "broken"]) -> None:
        """Joins make no progress while held; broken: the next forward of a join fails."""
        self._op("set_joins", mode, 30.0)

    @property
    def core_pid(self) -> int:
        """The process that holds vLLM's core; 0 if there is none."""
        pid: int = self._op("core_pid", None, 30.0)
        return pid

    def _op(self, op: str, value: Any, deadline_s: float) -> Any:
        return self.call({"op": op, "value": value}, deadline_s=deadline_s)


def chunk_spans(keys: Sequence[ChunkKey], edges: Sequence[int]) -> list[ChunkSpan]:
    """Spans between consecutive edges, one per key."""
    return [ChunkSpan(key, start, stop) for key, (start, stop) in zip(keys, pairwise(edges), strict=True)]


class ConnectorProbe(JoinExtension):
    """vLLM worker extension: what a test wants to know from inside the worker process."""

    def learnonce_state(self) -> dict[str, Any]:
        """Open loads and staged bytes; both 0 when nothing is left."""
        worker = _worker_half()
        return {
            "open_loads": worker.num_open_loads,
            "staged_bytes": worker.staged_bytes,
            "loading_bytes": worker._loader.staged_bytes,
            "pid": os.getpid(),
        }

    def learnonce_set_joins(self, mode: str) -> None:
        """See `EngineProcess.set_joins`."""
        from kvstore.engine.join.run import JoinResult

        joins, forward = _worker_half()._joins, _worker_half()._joins._forward
        vars(joins).pop("advance", None)
        if mode == "held":
            joins.advance = lambda *, busy: JoinResult(set(), set(), {})
        if mode == "broken":

            def run(*args: Any, **options: Any) -> None:
                del forward.run
                raise RuntimeError("a model that breaks on request")

            forward.run = run

    def learnonce_round_trip(self, seed: int) -> str:
        """Write random KV to blocks that nobody uses and read it back."""
        import torch

        blocks = _worker_half().blocks
        generator = torch.Generator().manual_seed(seed)
        num_blocks = 7
        total = num_blocks * blocks.block_size
        ids = (torch.randperm(40, generator=generator)[:num_blocks] + 1).tolist()
        start, stop = 5, total - 3
        shape = blocks.meta(num_tokens=stop - start, base_position=start).shape
        kv = torch.randn(shape, generator=generator).to(torch.float32)
        blocks.scatter(kv, slots=blocks.slots(ids, start=start, stop=stop))
        seen = blocks.gather(ids, first=start, num_tokens=stop - start).kv()
        return "" if torch.equal(seen, kv) else f"{int((seen != kv).sum())} of {kv.numel()} values differ"


def _worker_half() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker


class _Child:
    """The engine's side of the pipe."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._count = 0

    async def answer(self, message: Mapping[str, Any]) -> Any:
        op, value = message["op"], message["value"]
        if op == "generate":
            return await asyncio.gather(*(self._generate(ask) for ask in value))
        if op == "state":
            return (await self._llm.collective_rpc("learnonce_state"))[0]
        if op == "round_trip":
            return (await self._llm.collective_rpc("learnonce_round_trip", args=(value,)))[0]
        if op == "set_joins":
            return (await self._llm.collective_rpc("learnonce_set_joins", args=(value,)))[0]
        if op == "core_pid":
            return _core_pid()
        return samples(("learnonce_", "vllm:num_preemptions", "vllm:kv_cache_usage"))

    async def _generate(self, ask: Ask) -> dict[str, Any]:
        from vllm import SamplingParams

        self._count += 1
        name = f"ask-{self._count}"
        params = SamplingParams(max_tokens=ask.get("max_tokens", 32), temperature=0.0, ignore_eos=True, logprobs=0)
        if ask.get("transfer") is not None:
            params.extra_args = {"kv_transfer_params": ask["transfer"]}
        prompt = {"prompt_token_ids": ask["prompt"], "cache_salt": ask.get("salt", name)}
        began_s = time.monotonic()
        result: dict[str, Any] = {"tokens": [], "cached_tokens": 0, "token_times_s": [], "finish": "aborted"}
        result["logprobs"] = []

        async def consume() -> None:
            async for output in self._llm.generate(prompt, params, name):
                result["tokens"] = list(output.outputs[0].token_ids)
                result["cached_tokens"] = output.num_cached_tokens or 0
                result["token_times_s"].append(time.monotonic() - began_s)
                result["logprobs"] = [
                    found[token].logprob
                    for token, found in zip(result["tokens"], output.outputs[0].logprobs or [], strict=True)
                ]
                result["finish"] = output.outputs[0].finish_reason or "running"

        task = asyncio.ensure_future(consume())
        try:
            await asyncio.wait_for(task, ask.get("abort_after_s"))
        except TimeoutError:
            result["finish"] = "aborted"
        return result


def _core_pid() -> int:
    import psutil

    children = psutil.Process().children(recursive=True)
    return next((child.pid for child in children if "EngineCore" in " ".join(child.cmdline())), 0)


if __name__ == "__main__":
    run_child(lambda llm: _Child(llm).answer, vllm_arguments={"worker_extension_cls": _PROBE})
