"""A real engine in a process of its own, driven over pipes: for measurements across processes.

Covers: starting an engine exactly as a worker does (environment, arguments, `AsyncLLM`), asking it, its counters.
Does not cover: HTTP, plans, Ray (`*_workers`).

Parent and child exchange one JSON object per line. The child is `python -m kvstore.engine.harness`.
"""

import asyncio
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
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


class EngineChild:
    """One engine; use as a context manager. It binds all cores of this machine, as the only replica would.

    Args:
        settings: The engine.
        store_socket: Unix socket of a node store.
        secret: The node store's.
        log: File for the child's own output.
    """

    def __init__(self, settings: EngineSettings, *, store_socket: str, secret: bytes, log: Path) -> None:
        self._log_path = log
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvstore.engine.harness"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={
                **os.environ,
                **engine_environment(settings, replica_rank=0),
                "HF_HUB_OFFLINE": "1",
                SECRET_VARIABLE: secret.hex(),
                "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
            },
        )
        self._answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._pump, name="engine-answers", daemon=True).start()
        self._send({"settings": settings.model_dump(), "socket": store_socket})
        self._scope: KvScope | None = None

    @property
    def scope(self) -> KvScope:
        """The engine's scope; waits until it has started.

        Raises:
            EngineGoneError: It does not start.
        """
        if self._scope is None:
            self._scope = msgspec.convert(self._receive(_START_S)["scope"], KvScope)
        return self._scope

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
        assert self.scope
        question = {"prompt": list(prompt), "salt": salt, "transfer": transfer, "max_tokens": max_tokens}
        return msgspec.convert(self._call(question | {"logprobs": logprobs}), Answered)

    def counters(self) -> dict[str, float]:
        """Our counters by name and our own label, e.g. `…_saves_total.stored`."""
        assert self.scope
        found: dict[str, float] = self._call({"counters": True})
        return found

    def close(self) -> None:
        """Stop the engine; kill it if it does not."""
        with suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, question: Mapping[str, Any]) -> Any:
        self._send(question)
        return self._receive(_ASK_S)

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


class _Child:
    """The engine's side of the pipe."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._count = 0

    async def answer(self, question: Mapping[str, Any]) -> Any:
        return _counters() if "counters" in question else await self._generate(question)

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


def _counters() -> dict[str, float]:
    from prometheus_client import REGISTRY

    own = ("reason", "outcome", "hook", "codec", "level")
    return {
        sample.name + "".join(f".{sample.labels[name]}" for name in own if name in sample.labels): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith("learnonce_") and "le" not in sample.labels
    }


async def _serve(first: Mapping[str, Any], source: IO[bytes], sink: IO[bytes]) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    from kvstore.engine.coding import check_coding
    from kvstore.engine.scope import kv_scope

    settings = EngineSettings.model_validate_json(json.dumps(first["settings"]))
    llm = AsyncLLM.from_engine_args(build_engine_args(settings, role=Role.DECODE, store_socket=first["socket"]))
    child, scope = _Child(llm), kv_scope(llm.vllm_config)
    check_coding(settings.connector, scope)
    _write(sink, {"scope": msgspec.to_builtins(scope)})
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
