"""The measured engine, in a process of its own: prompts with forced answers, whole distributions, seconds.

Covers: both ends of the pipe to it. Does not cover: what happens inside vLLM (`loadtest.bench_join.forcing`), stores
and chunks (`loadtest.bench_join.rounds`).
Shape letters: T tokens of an answer, W words of the vocabulary.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import torch

from cluster.errors import InvariantError
from kvstore.engine.harness import EnginePipe, run_child, samples
from kvstore.engine.settings import EngineSettings
from loadtest.bench_join.forcing import FIELD

_MODULE: Final = "loadtest.bench_join.engine"
_PROCESSOR: Final = "loadtest.bench_join.processor:ForcedAnswers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One answer."""

    tokens: tuple[int, ...]
    cached_tokens: int
    """Prompt tokens that were not computed."""
    ttft_s: float
    """From the request to the first token."""
    cpu_s: float
    """CPU seconds of the engine's processes, from the request to the last token."""


class MeasuredEngine(EnginePipe):
    """One engine that takes forced answers; use as a context manager. It binds all cores of this machine.

    Args:
        settings: The engine.
        store_socket: Unix socket of a node store.
        secret: The node store's.
        log: File for the child's own output.
        scratch: Folder for logits on their way.
    """

    def __init__(self, settings: EngineSettings, *, store_socket: str, secret: bytes, log: Path, scratch: Path) -> None:
        super().__init__(_MODULE, settings, store_socket=store_socket, secret=secret, log=log)
        self._record = scratch / "logits.f32"

    def time(
        self,
        prompt: Sequence[int],
        *,
        salt: str,
        transfer: Mapping[str, Any] | None = None,
        max_tokens: int = 1,
        forced: Mapping[str, Any] | None = None,
    ) -> Said:
        """Run one prompt greedily.

        Args:
            prompt: Token ids.
            salt: Prompts with different salts share nothing in the engine's own prefix cache.
            transfer: `kv_transfer_params`.
            max_tokens: Tokens to generate.
            forced: As `loadtest.bench_join.forcing.FIELD` says.

        Raises:
            EngineGoneError: It ended, or does not answer.
        """
        question = {"prompt": list(prompt), "salt": salt, "transfer": transfer, "max_tokens": max_tokens}
        before_s = self._cpu_s()
        answer = self.call(question | {"forced": forced})
        cpu_s = self._cpu_s() - before_s
        return Said(
            tokens=tuple(answer["tokens"]),
            cached_tokens=answer["cached_tokens"],
            ttft_s=answer["ttft_s"],
            cpu_s=cpu_s,
        )

    def read(
        self,
        prompt: Sequence[int],
        *,
        salt: str,
        max_tokens: int,
        transfer: Mapping[str, Any] | None = None,
        answer: Sequence[int] = (),
    ) -> tuple[Said, torch.Tensor]:
        """Run one prompt, and give the logits behind every token of its answer.

        Args:
            prompt: Token ids.
            salt: As in `time`.
            max_tokens: Tokens of the answer.
            transfer: `kv_transfer_params`.
            answer: Tokens that are said in any case; without them the model's own greedy ones.

        Returns:
            What was said, and logits `[T, W]` in float32.

        Raises:
            EngineGoneError: It ended, or does not answer.
            InvariantError: It did not say what it was to say, or logits are missing.
        """
        self._record.unlink(missing_ok=True)
        forced = {"answer": list(answer), "record": str(self._record)}
        said = self.time(prompt, salt=salt, transfer=transfer, max_tokens=max_tokens, forced=forced)
        logits_TW = torch.from_numpy(np.fromfile(self._record, np.float32).reshape(max_tokens, -1))
        self._record.unlink()
        expected = tuple(answer) or tuple(logits_TW.argmax(dim=-1).tolist())
        if said.tokens != expected:
            raise InvariantError(f"{salt}: the engine said {said.tokens[:8]}..., not {expected[:8]}...")
        return said, logits_TW

    def counters(self) -> dict[str, float]:
        """Our counters by name and own label."""
        found: dict[str, float] = self.call({"counters": True})
        return found

    def _cpu_s(self) -> float:
        """Of the process that holds `AsyncLLM` and of vLLM's own processes, so far."""
        front = psutil.Process(self.pid)
        times = [process.cpu_times() for process in (front, *front.children(recursive=True))]
        return sum(each.user + each.system for each in times)


class _Child:
    """The engine's side of the pipe."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._count = 0

    async def answer(self, question: Mapping[str, Any]) -> Any:
        if "counters" in question:
            return samples()
        return await self._generate(question)

    async def _generate(self, ask: Mapping[str, Any]) -> dict[str, Any]:
        from vllm import SamplingParams  # only here is standard output free of the pipe

        self._count += 1
        params = SamplingParams(max_tokens=ask["max_tokens"], temperature=0.0, ignore_eos=True, detokenize=False)
        extra = {"kv_transfer_params": ask["transfer"], FIELD: ask["forced"]}
        params.extra_args = {name: value for name, value in extra.items() if value is not None}
        prompt = {"prompt_token_ids": ask["prompt"], "cache_salt": ask["salt"]}
        found: dict[str, Any] = {}
        began_s = time.monotonic()
        async for output in self._llm.generate(prompt, params, f"ask-{self._count}"):
            found.setdefault("ttft_s", time.monotonic() - began_s)
            found["tokens"] = list(output.outputs[0].token_ids)
            found["cached_tokens"] = output.num_cached_tokens or 0
        return found


if __name__ == "__main__":
    run_child(lambda llm: _Child(llm).answer, vllm_arguments={"logits_processors": [_PROCESSOR]})
