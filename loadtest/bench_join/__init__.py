"""`learnonce bench join`: how good and how fast answers are over passages that were learned elsewhere.

Covers: what the modules share: points, choices of the command line. Does not cover: the texts
(`loadtest.bench_join.contexts`), the protocol (`rounds`), its engine (`engine`), figures and pictures.

A context is a prompt of several passages. Each is learned on its own behind the system prompt, then all are joined in
another order, behind a question. The reference is a full prefill of exactly the same token ids in the same engine, in
float32; its greedy answer is forced on every point, and the whole distributions of its tokens are compared.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvstore.engine.params import JoinMethod

ANSWER_TOKENS: Final = 64
"""Tokens of the reference's answer that are compared."""
DEFAULT_CONTEXTS: Final = 30
DEFAULT_RETRIEVALS: Final = 30
QUICK_CONTEXTS: Final = 4
QUICK_RETRIEVALS: Final = 2

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinPoint:
    """One way to serve a context from passages learned elsewhere."""

    name: str
    """In figures: `kl_<name>`."""
    method: JoinMethod
    share: float
    """Of the joined tokens, computed again."""


FULL: Final = "full"
"""The reference: everything computed."""
FULL_SHARE: Final = "share_100"
"""Control: everything joined is computed again."""
JOIN_POINTS: Final = (
    JoinPoint(name="naive", method="naive", share=0.0),
    JoinPoint(name="random_15", method="random", share=0.15),
    JoinPoint(name="first_k_15", method="first_k", share=0.15),
    JoinPoint(name="deviation_15", method="deviation", share=0.15),
    JoinPoint(name="query_aware_05", method="query_aware", share=0.05),
    JoinPoint(name="query_aware_15", method="query_aware", share=0.15),
    JoinPoint(name=FULL_SHARE, method="first_k", share=1.0),
)
"""The last is a control: it must equal the reference."""
DEFAULT_POINT: Final = "query_aware_15"
FAST_POINT: Final = "query_aware_05"

AGAIN: Final = "full_again"
"""Control: the reference's prefill once more."""
EXACT_LOAD: Final = "exact_load"
"""Control: the reference's own KV, stored and loaded."""
NOISE_FLOOR: Final = "noise_floor"
"""The reference's own KV rounded to bfloat16: what a deployment in 16 bits cannot be better than."""
WRONG_KV: Final = "wrong_kv"
"""Control: every K with the V of another passage. A benchmark that finds no error here measures nothing."""
CONTROLS: Final = (AGAIN, EXACT_LOAD, NOISE_FLOOR, WRONG_KV)


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinBenchSettings:
    """What the command line chose."""

    model: str
    """Folder of the model, as `cluster.model.provide_model` gives it."""
    data: Path | None
    """Folder of texts; without one they are generated."""
    plots: Path | None
    work: Path
    """Finished contexts; what is found there is not measured again."""
    num_contexts: int = DEFAULT_CONTEXTS
    num_retrievals: int = DEFAULT_RETRIEVALS
    """Contexts of the look-up task."""
    seed: int = 1
    """Of the choice of passages and of their order."""
