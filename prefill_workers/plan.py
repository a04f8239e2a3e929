"""Turn a router's plan into one prefill: what to load, what to save, which requests are the same work.

Covers: pure decisions. Does not cover: queueing (`prefill_workers.app`), the engine (`prefill_workers.engine`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from kvstore.engine.params import Handoff
from kvstore.keys import ChunkKey
from kvstore.wire import Plan, PrefillAnswer, Refusal, Span, key_of


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillWork:
    """One prompt as the prefill engine runs it."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    cache_salt: str
    spans: tuple[Span, ...]
    load: tuple[Span, ...]
    """From token 0 on, without a gap."""
    save: tuple[Span, ...]
    load_deadline_s: float
    handoff: Handoff = "none"
    """Where the worker is that waits for the saved chunks; of several that wait for the same work, the first."""

    @property
    def key(self) -> ChunkKey:
        """Names the whole prompt behind its salt: plans with equal keys are the same work."""
        return key_of(self.spans[-1])

    @property
    def tokens_to_compute(self) -> int:
        """Prompt tokens that are not loaded, as far as the router knew."""
        return len(self.prompt_token_ids) - (self.load[-1].stop if self.load else 0)


def handoff_of(asking_node_id: str | None, *, node_id: str) -> Handoff:
    """Whether the worker that asks reads chunks from the same store; "none" where somebody does not say where it is."""
    if not asking_node_id or not node_id:
        return "none"
    return "local" if asking_node_id == node_id else "remote"


def plan_work(plan: Plan, *, handoff: Handoff = "none") -> PrefillWork | Refusal:
    """What the engine shall do, or why nothing can be done."""
    if plan.refusal is not None:
        return plan.refusal
    if not plan.spans:
        return Refusal(
            status=400, error_type="BadRequestError", message="the plan has no prompt that a prefill replica could run"
        )
    if plan.join is not None:
        message = "prefill replicas do not join passages: the decode replica does"
        return Refusal(status=400, error_type="BadRequestError", message=message)
    load = tuple(takewhile(lambda span: span.held, plan.spans))
    return PrefillWork(
        request_id=plan.request_id,
        prompt_token_ids=tuple(plan.prompt_token_ids),
        cache_salt=plan.cache_salt,
        spans=plan.spans,
        load=load,
        save=tuple(span for span in plan.spans[len(load) :] if span.save),
        load_deadline_s=plan.load_deadline_s,
        handoff=handoff,
    )


def budget_s(plan: Plan, *, now_unix_s: float) -> float:
    """Seconds after which nobody waits for the answer."""
    return max(0.0, min(plan.prefill_deadline_s, plan.deadline_unix_s - now_unix_s))


def admit(work: PrefillWork, *, queued_tokens: int, max_queued_tokens: int) -> bool:
    """Whether the work may queue. An idle replica takes work of any size, or long prompts would never run."""
    return queued_tokens == 0 or queued_tokens + work.tokens_to_compute <= max_queued_tokens


def answer(
    plan: Plan, work: PrefillWork, *, reused_tokens: int, held: Sequence[bool], seconds: float, shared: bool
) -> PrefillAnswer:
    """The answer to one of the requests that waited for the work.

    Args:
        plan: That request's plan.
        work: What was run.
        reused_tokens: Prompt tokens that the engine did not compute.
        held: Per span: readable from the store now.
        seconds: From the request's arrival.
        shared: The work was started by another request: for this one, everything is reused.
    """
    num_tokens = len(work.prompt_token_ids)
    reused = num_tokens if shared else reused_tokens
    return PrefillAnswer(
        request_id=plan.request_id,
        reused_tokens=reused,
        computed_tokens=num_tokens - reused,
        held=tuple(held),
        seconds=seconds,
    )
