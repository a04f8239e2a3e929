"""Turn a router's plan, and what became of its prefill, into what the decode engine shall do.

Covers: which spans to load, join and save, how long to wait, what may be called reused. Pure: no clock, no network.
Does not cover: calling prefill replicas (`decode_workers.prefill`), obeying on the engine (`decode_workers.engine`).
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile

from kvstore.wire import JoinPlan, Mode, Plan, PrefillAnswer, Span, SpanKind


class FallbackReason(StrEnum):
    """Why the decode replica computes what a prefill replica should have computed."""

    ABSENT = "absent"
    """The plan names no prefill replica."""
    DEAD = "dead"
    """No prefill replica could be reached, or the connection broke."""
    REFUSED = "refused"
    """Every prefill replica was full or draining."""
    LATE = "late"
    """The plan's deadline for prefill passed."""
    BROKEN = "broken"
    """A prefill replica answered something else than was asked."""
    NOT_STORED = "not_stored"
    """A prefill replica computed the prompt, but none of its chunks can be read."""
    OTHER_PROMPT = "other_prompt"
    """vLLM made another prompt of the request than the plan says (`echo`, for one): nothing may be loaded into it."""


class ServedAs(StrEnum):
    """How a request was served, for the response header and the counter."""

    RENDERED = "rendered"
    """The plan brought no prompt: vLLM rendered it, nothing was loaded."""
    LOCAL = "local"
    REMOTE = "remote"
    FALLBACK = "fallback"
    """Planned as remote, computed here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillOutcome:
    """What asking the prefill replicas came to: an answer, or a reason."""

    replica_id: str = ""
    """Who answered."""
    answer: PrefillAnswer | None = None
    reason: FallbackReason | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """One request as the decode engine runs it."""

    served_as: ServedAs
    prompt_token_ids: tuple[int, ...] = ()
    """The prompt; empty if vLLM renders it."""
    cache_salt: str = ""
    """The client's: of keys and of the tenant."""
    load: tuple[Span, ...] = ()
    """From token 0 on, without a gap; with a join, gaps are holes that it computes."""
    join: JoinPlan | None = None
    tail_start: int = 0
    """With a join: the first token behind the passages."""
    save: tuple[Span, ...] = ()
    load_deadline_s: float = 0.0
    promised_tokens: int = 0
    """What the router believed held and need not be computed again: compared with what turns out to be reused."""
    max_reused_tokens: int | None = None
    """Bound on what is reported as reused: what prefill replicas computed for this very request is not."""
    fallback: FallbackReason | None = None

    @property
    def load_tokens(self) -> int:
        """Prompt tokens that the engine loads; a join computes a part of them again."""
        return sum(span.num_tokens for span in self.load)

    @property
    def engine_salt(self) -> str:
        """The salt of vLLM's prefix cache."""
        return engine_salt(self.cache_salt, self.join)


def engine_salt(cache_salt: str, join: JoinPlan | None) -> str:
    """The salt under which vLLM may keep a request's blocks.

    What a join leaves in them is not what an exact request with the same tokens would compute: neither may find the
    other's, nor may joins of another method or share.

    Example:
        >>> engine_salt("mine", None)
        'mine'
        >>> engine_salt("mine", JoinPlan("first_k", 0.15)) == engine_salt("", JoinPlan("first_k", 0.15))
        False
    """
    if join is None:
        return cache_salt
    digest = hashlib.blake2b(f"{join.method} {join.share!r} {cache_salt}".encode(), digest_size=16)
    return f"learnonce join 1 {digest.hexdigest()}"


def prefill_budget_s(plan: Plan, *, now_unix_s: float) -> float:
    """Seconds to wait for prefill replicas; 0 if there is nothing to ask them."""
    if plan.mode is not Mode.REMOTE or not plan.spans:
        return 0.0
    return max(0.0, min(plan.prefill_deadline_s, plan.deadline_unix_s - now_unix_s))


def plan_execution(plan: Plan, outcome: PrefillOutcome | None) -> Execution:
    """Decide what the engine loads, computes and saves.

    Without a join, loads start at token 0 and end at the first span that is not held, and a span that is loaded is not
    saved again. With one, all that is held is loaded, and nothing saved.

    Args:
        plan: The router's plan, already checked.
        outcome: What the prefill replicas answered; None if none was asked.
    """
    if not plan.prompt:
        return Execution(served_as=ServedAs.RENDERED, cache_salt=plan.cache_salt)
    if plan.join is not None:
        return _joined(plan, plan.join)
    answer, reason = (outcome.answer, outcome.reason) if outcome else (None, None)
    load = _held(plan.spans, answer.held if answer else [span.held for span in plan.spans])
    if answer is not None and not load:
        answer, reason = None, FallbackReason.NOT_STORED
    not_remote = ServedAs.FALLBACK if outcome else ServedAs.LOCAL
    to_compute = () if answer else plan.spans[len(load) :]
    return Execution(
        served_as=ServedAs.REMOTE if answer else not_remote,
        prompt_token_ids=tuple(plan.prompt_token_ids),
        cache_salt=plan.cache_salt,
        load=load,
        save=tuple(span for span in to_compute if span.save),
        load_deadline_s=plan.load_deadline_s,
        promised_tokens=plan.held_tokens,
        max_reused_tokens=answer.reused_tokens if answer else None,
        fallback=reason,
    )


def _joined(plan: Plan, join: JoinPlan) -> Execution:
    load = tuple(span for span in plan.spans if span.held)
    moved_tokens = sum(span.num_tokens for span in load if span.base is not None)
    promised_tokens = sum(span.num_tokens for span in load) - round(join.share * moved_tokens)
    return Execution(
        served_as=ServedAs.LOCAL,
        prompt_token_ids=tuple(plan.prompt_token_ids),
        cache_salt=plan.cache_salt,
        load=load,
        join=join,
        tail_start=max(span.stop for span in plan.spans if span.kind is not SpanKind.TAIL),
        load_deadline_s=plan.load_deadline_s,
        promised_tokens=promised_tokens,
        max_reused_tokens=max(0, promised_tokens - plan.learned_tokens) if plan.learned_tokens else None,
    )


def _held(spans: Sequence[Span], held: Iterable[bool]) -> tuple[Span, ...]:
    pairs = zip(spans, held, strict=True)
    return tuple(span for span, _ in takewhile(lambda pair: pair[1], pairs))
