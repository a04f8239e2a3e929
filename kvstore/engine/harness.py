"""A real engine in a process of its own, driven over pipes: for tests and measurements across processes.

Covers: starting an engine exactly as a worker does (environment, arguments, `AsyncLLM`), asking it, its counters.
Does not cover: HTTP, plans, Ray (`*_workers`).

Parent and child exchange one JSON object per line. The child of `EngineChild` is `python -m kvstore.engine.harness`;
whoever wants to ask other things has a module of its own that calls `run_child`.
"""

import asyncio
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import msgspec

from cluster.errors import UnavailableError
from kvstore.engine.build import build_engine_args, engine_environment
from kvstore.engine.settings import EngineSettings
from kvstore.keys import KvScope
from kvstore.wire import SECRET_VARIABLE, Role

_ROOT: Final = Path(__file__).resolve().parents[2]
_START_S: Final = 240.0
_ASK_S: Final = 300.0


Answering = Callable[[Any], Awaitable[Any]]
"""Answers one question, both of JSON."""


class EngineGoneError(UnavailableError):
    """The engine's process ended, or did not answer in time."""


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine said to one prompt."""

    tokens: tuple[int, ...]
    cached_tokens: int
    ttft_s: float
    """From the request to the first token."""
    logprobs: dict[str, float] = {}
    """Of the first token: the likeliest ones by token id, as many as were asked for."""


class EnginePipe:
    """An engine's process and the pipes to it; use as a context manager.

    Args:
        module: What the process runs: its main calls `run_child`.
        settings: The engine.
        store_socket: Unix socket of a node store.
        secret: The node store's.
        log: File for the child's own output.
        replica_rank: Chooses the cores.
        num_replicas: Engines that share this machine's cores.
        folder: Where the child and vLLM's own processes find `module` besides this project's root.
    """

    def __init__(
        self,
        module: str,
        settings: EngineSettings,
        *,
        store_socket: str,
        secret: bytes,
        log: Path,
        replica_rank: int = 0,
        num_replicas: int = 1,
        folder: Path = _ROOT,
    ) -> None:
        self._log_path = log
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={
                **os.environ,
                **engine_environment(settings, replica_rank=replica_rank, num_replicas=num_replicas),
                "HF_HUB_OFFLINE": "1",
                SECRET_VARIABLE: secret.hex(),
                "PYTHONPATH": os.pathsep.join([str(folder), str(_ROOT), os.environ.get("PYTHONPATH", "")]),
            },
        )
        self._answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._pump, name="engine-answers", daemon=True).start()
        self._send({"settings": settings.model_dump(), "socket": store_socket})
        self._scope: KvScope | None = None

    @property
    def pid(self) -> int:
        """The process that holds `AsyncLLM`."""
        return self._process.pid

    @property
    def scope(self) -> KvScope:
        """The engine's scope; waits until it has started.

        Raises:
            EngineGoneError: It does not start.
        """
        if self._scope is None:
            self._scope = msgspec.convert(self._receive(_START_S)["scope"], KvScope)
        return self._scope

    def call(self, question: Mapping[str, Any], *, deadline_s: float = _ASK_S) -> Any:
        """Ask the child something.

        Raises:
            EngineGoneError: It ended, or does not answer in time.
        """
        assert self.scope
        self._send(question)
        return self._receive(deadline_s)

    def kill(self) -> None:
        """SIGKILL the process that holds `AsyncLLM`, nothing else."""
        self._process.kill()
        self._process.wait(10)

    def close(self) -> None:
        """Stop the engine; kill it if it does not."""
        with suppress(BrokenPipeError):
            if self._process.stdin is not None:
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

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def _receive(self, deadline_s: float) -> Any:
        try:
            line = self._answers.get(timeout=deadline_s)
        except queue.Empty as error:
            raise EngineGoneError(f"the engine did not answer within {deadline_s} s") from error
        if line is None:
            tail = self._log_path.read_text(errors="replace")[-1500:]
            raise EngineGoneError(f"the engine process ended with {self._process.wait(10)}: {tail}")
        return json.loads(line)

    def _pump(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)


class EngineChild(EnginePipe):
    """One engine that answers prompts. It binds all cores of this machine, as the only replica would.

    Args:
        settings: The engine.
        store_socket: Unix socket of a node store.
        secret: The node store's.
        log: File for the child's own output.
    """

    def __init__(self, settings: EngineSettings, *, store_socket: str, secret: bytes, log: Path) -> None:
        super().__init__("kvstore.engine.harness", settings, store_socket=store_socket, secret=secret, log=log)

    def ask(
        self,
        prompt: Sequence[int],
        *,
        salt: str,
        transfer: Mapping[str, Any] | None = None,
        max_tokens: int = 1,
        logprobs: int | None = None,
    ) -> Answered:
        """Run one prompt greedily.

        Args:
            prompt: Token ids.
            salt: Prompts with different salts share nothing in the engine's own prefix cache.
            transfer: `kv_transfer_params`.
            max_tokens: Tokens to generate.
            logprobs: How many of the first token's log probabilities to return.

        Raises:
            EngineGoneError: It ended, or does not answer.
        """
        question = {"prompt": list(prompt), "salt": salt, "transfer": transfer, "max_tokens": max_tokens}
        return msgspec.convert(self.call(question | {"logprobs": logprobs}), Answered)

    def counters(self) -> dict[str, float]:
        """Our counters by name and our own label, e.g. `…_saves_total.stored`."""
        found: dict[str, float] = self.call({"counters": True})
        return found


class _Child:
    """The engine's side of the pipe."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._count = 0

    async def answer(self, question: Mapping[str, Any]) -> Any:
        return samples() if "counters" in question else await self._generate(question)

    async def _generate(self, ask: Mapping[str, Any]) -> dict[str, Any]:
        from vllm import SamplingParams

        self._count += 1
        params = SamplingParams(
            max_tokens=ask["max_tokens"], temperature=0.0, ignore_eos=True, logprobs=ask["logprobs"], detokenize=False
        )
        if ask["transfer"] is not None:
            params.extra_args = {"kv_transfer_params": ask["transfer"]}
        prompt = {"prompt_token_ids": ask["prompt"], "cache_salt": ask["salt"]}
        found: dict[str, Any] = {}
        began_s = time.monotonic()
        async for output in self._llm.generate(prompt, params, f"ask-{self._count}"):
            found.setdefault("ttft_s", time.monotonic() - began_s)
            found["tokens"] = list(output.outputs[0].token_ids)
            found["cached_tokens"] = output.num_cached_tokens or 0
            if output.outputs[0].logprobs:
                found["logprobs"] = {str(k): v.logprob for k, v in output.outputs[0].logprobs[0].items()}
        return found


def samples(prefixes: tuple[str, ...] = ("learnonce_",)) -> dict[str, float]:
    """This process's metrics by name and our own label, e.g. `…_saves_total.stored`."""
    from prometheus_client import REGISTRY

    own = ("reason", "outcome", "hook", "codec", "level", "method")
    return {
        sample.name + "".join(f".{sample.labels[name]}" for name in own if name in sample.labels): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith(prefixes) and "le" not in sample.labels
    }


def run_child(make: Callable[[Any], Answering], *, vllm_arguments: Mapping[str, Any] | None = None) -> None:
    """Run an engine on this process's pipes: answers go to standard output, everything else to standard error.

    Args:
        make: Given the engine, makes what answers questions.
        vllm_arguments: Besides those of the settings.
    """
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    first = json.loads(sys.stdin.buffer.readline())
    asyncio.run(_serve(first, make, vllm_arguments or {}, sink))


async def _serve(
    first: Mapping[str, Any], make: Callable[[Any], Answering], vllm_arguments: Mapping[str, Any], sink: IO[bytes]
) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    from kvstore.engine.coding import check_coding
    from kvstore.engine.llm import allow_joins
    from kvstore.engine.scope import engine_weights, kv_scope

    settings = EngineSettings.model_validate_json(json.dumps(first["settings"]))
    settings = settings.model_copy(update={"vllm_arguments": {**settings.vllm_arguments, **vllm_arguments}})
    llm = AsyncLLM.from_engine_args(build_engine_args(settings, role=Role.DECODE, store_socket=first["socket"]))
    answer, scope = make(llm), kv_scope(llm.vllm_config)
    check_coding(settings.connector, scope, weights=engine_weights(llm.vllm_config))
    await allow_joins(llm)
    _write(sink, {"scope": msgspec.to_builtins(scope)})
    while line := await asyncio.to_thread(sys.stdin.buffer.readline):
        _write(sink, await answer(json.loads(line)))
    await asyncio.to_thread(llm.shutdown, timeout=0)


def _write(sink: IO[bytes], value: Any) -> None:
    sink.write(json.dumps(value).encode() + b"\n")
    sink.flush()


if __name__ == "__main__":
    run_child(lambda llm: _Child(llm).answer)
