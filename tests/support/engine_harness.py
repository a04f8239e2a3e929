"""A real engine in a process of its own, driven over pipes: for tests and measurements.

Covers: starting an engine exactly as a worker does (environment, arguments, `AsyncLLM`), asking it, killing it.
Does not cover: HTTP, plans, Ray (`*_workers`).

Parent and child exchange one JSON object per line. The child is `python -m support.engine_harness`.
"""

import asyncio
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypedDict

import msgspec

from cluster.errors import UnavailableError
from kvstore.engine.build import build_engine_args, engine_environment
from kvstore.engine.params import ChunkSpan
from kvstore.engine.settings import EngineSettings
from kvstore.keys import ChunkKey, KvScope
from kvstore.wire import SECRET_VARIABLE, Role

_PROBE = "support.engine_harness.ConnectorProbe"


class EngineGoneError(UnavailableError):
    """The engine process ended, or did not answer in time."""


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

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.token_times_s[0]


class EngineProcess:
    """One engine; use as a context manager.

    Args:
        settings: The engine.
        store_socket: Unix socket of a node store.
        secret: The node store's.
        replica_rank: Chooses the core.
        num_replicas: Engines that share this machine's cores.
        log: Where the child's own output goes.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        log: Path,
        store_socket: str,
        secret: bytes,
        replica_rank: int = 0,
        num_replicas: int = 2,
    ) -> None:
        binding = engine_environment(settings, replica_rank=replica_rank, num_replicas=num_replicas)
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.engine_harness"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={
                **os.environ,
                **binding,
                "HF_HUB_OFFLINE": "1",
                SECRET_VARIABLE: secret.hex(),
                # The child and vLLM's own processes import this module by its name.
                "PYTHONPATH": str(Path(__file__).parents[1]),
            },
        )
        self._answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._pump, name="engine-answers", daemon=True).start()
        self._send({"settings": settings.model_dump(), "socket": store_socket})
        self.scope: KvScope | None = None
        self.started_s = 0.0
        self.core_pid = 0

    @property
    def pid(self) -> int:
        """The process that holds `AsyncLLM`."""
        return self._process.pid

    def wait_ready(self, *, deadline_s: float = 180.0) -> Self:
        """Wait until the engine answers."""
        ready = self._receive(deadline_s)
        self.scope = msgspec.convert(ready["scope"], KvScope)
        self.started_s, self.core_pid = ready["started_s"], ready["core_pid"]
        return self

    def generate(self, asks: Sequence[Ask], *, deadline_s: float = 120.0) -> list[Answer]:
        """Run requests at the same time."""
        return [msgspec.convert(item, Answer) for item in self._call("generate", list(asks), deadline_s)]

    def ask(self, prompt: list[int], **options: Any) -> Answer:
        """Run one request."""
        ask: Any = {"prompt": prompt, **options}
        return self.generate([ask])[0]

    def state(self) -> dict[str, Any]:
        """What the connector's worker half holds: open loads, staged bytes."""
        state: dict[str, Any] = self._call("state", None, 30.0)
        return state

    def metrics(self) -> dict[str, float]:
        """Samples of vLLM's metrics and ours, by name and our labels."""
        metrics: dict[str, float] = self._call("metrics", None, 30.0)
        return metrics

    def round_trip(self, seed: int) -> str:
        """Scatter random KV into the engine's blocks and gather it back; "" or what differs."""
        result: str = self._call("round_trip", seed, 60.0)
        return result

    def kill(self) -> None:
        """SIGKILL the process that holds `AsyncLLM`, nothing else."""
        self._process.kill()
        self._process.wait(10)

    def close(self) -> None:
        """Stop the engine; kill it if it does not."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, op: str, value: Any, deadline_s: float) -> Any:
        self._send({"op": op, "value": value})
        return self._receive(deadline_s)

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def _receive(self, deadline_s: float) -> Any:
        try:
            line = self._answers.get(timeout=deadline_s)
        except queue.Empty as error:
            raise EngineGoneError(f"no answer within {deadline_s} s") from error
        if line is None:
            raise EngineGoneError(f"the engine process ended with {self._process.wait(10)}")
        return json.loads(line)

    def _pump(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)


def chunk_spans(keys: Sequence[ChunkKey], edges: Sequence[int]) -> list[ChunkSpan]:
    """Spans between consecutive edges, one per key."""
    return [ChunkSpan(key, start, stop) for key, (start, stop) in zip(keys, pairwise(edges), strict=True)]


class ConnectorProbe:
    """vLLM worker extension: what a test wants to know from inside the worker process."""

    def learnonce_state(self) -> dict[str, Any]:
        """Open loads and staged bytes; both 0 when nothing is left."""
        worker = _worker_half()
        return {"open_loads": worker.num_open_loads, "staged_bytes": worker.staged_bytes, "pid": os.getpid()}

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
        return _samples()

    async def _generate(self, ask: Ask) -> dict[str, Any]:
        from vllm import SamplingParams

        self._count += 1
        name = f"ask-{self._count}"
        params = SamplingParams(max_tokens=ask.get("max_tokens", 32), temperature=0.0, ignore_eos=True)
        if ask.get("transfer") is not None:
            params.extra_args = {"kv_transfer_params": ask["transfer"]}
        prompt = {"prompt_token_ids": ask["prompt"], "cache_salt": ask.get("salt", name)}
        began_s = time.monotonic()
        result: dict[str, Any] = {"tokens": [], "cached_tokens": 0, "token_times_s": [], "finish": "aborted"}

        async def consume() -> None:
            async for output in self._llm.generate(prompt, params, name):
                result["tokens"] = list(output.outputs[0].token_ids)
                result["cached_tokens"] = output.num_cached_tokens or 0
                result["token_times_s"].append(time.monotonic() - began_s)
                result["finish"] = output.outputs[0].finish_reason or "running"

        task = asyncio.ensure_future(consume())
        try:
            await asyncio.wait_for(task, ask.get("abort_after_s"))
        except TimeoutError:
            result["finish"] = "aborted"
        return result


def _samples() -> dict[str, float]:
    from prometheus_client import REGISTRY

    found: dict[str, float] = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name.startswith(("learnonce_", "vllm:num_preemptions", "vllm:kv_cache_usage")):
                label = "".join(
                    f".{sample.labels[name]}" for name in ("reason", "outcome", "hook") if name in sample.labels
                )
                if "le" not in sample.labels:
                    found[sample.name + label] = sample.value
    return found


async def _serve(first: Mapping[str, Any], source: IO[bytes], sink: IO[bytes]) -> None:
    import psutil
    from vllm.v1.engine.async_llm import AsyncLLM

    from kvstore.engine.scope import kv_scope

    began_s = time.monotonic()
    settings = EngineSettings.model_validate_json(json.dumps(first["settings"]))
    extended = settings.model_copy(
        update={"vllm_arguments": {**settings.vllm_arguments, "worker_extension_cls": _PROBE}}
    )
    llm = AsyncLLM.from_engine_args(build_engine_args(extended, role=Role.DECODE, store_socket=first["socket"]))
    child = _Child(llm)
    cores = [p.pid for p in psutil.Process().children(recursive=True) if "EngineCore" in " ".join(p.cmdline())]
    ready = {
        "scope": msgspec.to_builtins(kv_scope(llm.vllm_config)),
        "started_s": time.monotonic() - began_s,
        "core_pid": cores[0] if cores else 0,
    }
    _write(sink, ready)
    while line := await asyncio.to_thread(source.readline):
        _write(sink, await child.answer(json.loads(line)))
    await asyncio.to_thread(llm.shutdown, timeout=0)


def _write(sink: IO[bytes], value: Any) -> None:
    sink.write(json.dumps(value).encode() + b"\n")
    sink.flush()


def main() -> None:
    """Run the child: answers go to the original standard output, everything else to standard error."""
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    first = json.loads(sys.stdin.buffer.readline())
    asyncio.run(_serve(first, sys.stdin.buffer, sink))


if __name__ == "__main__":
    main()
