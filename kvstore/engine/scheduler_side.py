"""The connector's scheduler half: what to load and what to save, decided without touching KV or the store.

Covers: turning requests and the scheduler's steps into `StepOps`, failure memory, the true number of reused tokens.
Does not cover: vLLM's class (`kvstore.engine.connector`), carrying the operations out (`kvstore.engine.worker_side`).
Imports neither torch nor vLLM: it sees vLLM's objects through the protocols below.

A request's tokens, half-open ranges:

    [0, num_local)          in this engine's prefix cache, block aligned
    [num_local, load_stop)  loaded: the chunks that continue from num_local without a gap, at most prompt - 1
    [load_stop, prompt)     computed; at least one token, from which the first output is sampled

A joined request is loaded up to prompt - 1, whatever its chunks cover: the worker half computes what is missing.

Livelock: when nothing of a load arrives, vLLM asks again as if the request were new. The half remembers
`(request, num_preemptions)` and answers "nothing" the second time.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvstore.engine.ops import JoinOp, LoadOp, SaveOp, StepOps
from kvstore.engine.params import ChunkSpan, TransferParams, TransferParamsError, parse_transfer_params
from kvstore.engine.tally import Tally

logger = logging.getLogger(__name__)


class PrefillStatsView(Protocol):
    """vLLM's record of what a request reused."""

    def set(self, num_prompt_tokens: int, num_local_cached_tokens: int, num_external_cached_tokens: int) -> None:
        """Replace the figures."""
        ...


class RequestView(Protocol):
    """What this half reads of `vllm.v1.request.Request`."""

    request_id: str
    num_prompt_tokens: int
    num_computed_tokens: int
    num_preemptions: int
    prompt_token_ids: list[int] | None
    kv_transfer_params: dict[str, Any] | None
    prefill_stats: PrefillStatsView | None


@dataclass(slots=True)
class _Attempt:
    """A load under way or ended, of one life of a request between preemptions."""

    num_preemptions: int
    num_local: int
    reused: int | None = None
    """Tokens that a join kept of what was loaded."""
    superseded: bool = False
    """vLLM asked anew: nothing of the load arrived, and its own figures are right again."""


@dataclass(slots=True)
class _Tracked:
    """A request that asked for something."""

    params: TransferParams
    num_local: int = 0
    """What vLLM said it holds when it last asked for more."""
    attempt: _Attempt | None = None
    saved: int = 0
    """Spans of `params.save` handed to the worker so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledRequest:
    """One request of one scheduler step."""

    request_id: str
    num_computed_tokens: int
    """Before the step."""
    num_scheduled_tokens: int


class SchedulerSide:
    """State per request, folded over vLLM's calls.

    Args:
        block_size: Tokens per block of the engine.
        tally: Where refused parameters are counted.
    """

    def __init__(self, *, block_size: int, tally: Tally) -> None:
        self._block_size = block_size
        self._tally = tally
        self._tracked: dict[str, _Tracked] = {}
        self._new_loads: list[LoadOp] = []

    def add_request(self, request: RequestView) -> None:
        """Read what the request asks for; anything that is not valid is counted and ignored."""
        try:
            params = parse_transfer_params(request.kv_transfer_params, num_prompt_tokens=request.num_prompt_tokens)
        except TransferParamsError as error:
            self._tally.add("params_rejected")
            logger.warning("event=params_rejected request_id=%s reason=%r", request.request_id, str(error))
            return
        if params is not None and (params.load or params.save):
            self._tracked[request.request_id] = _Tracked(params)

    def num_loadable(self, request: RequestView, num_local: int) -> int:
        """Tokens to load behind the `num_local` that the engine holds. May be asked again: the last answer counts."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return 0
        attempt = tracked.attempt
        if attempt is not None and attempt.num_preemptions == request.num_preemptions:
            attempt.superseded = True
            return 0
        tracked.num_local = num_local
        last = request.num_prompt_tokens - 1
        if _is_joined(tracked.params, num_local):
            return max(0, last - num_local)
        exact = [span for span in tracked.params.load if span.base is None]
        return max(0, min(contiguous_stop(exact, start=num_local), last) - num_local)

    def blocks_allocated(self, request: RequestView, block_ids: Sequence[int], num_external: int) -> None:
        """Blocks are there: start the load, or, after one, correct what vLLM reports as reused."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return
        if num_external > 0:
            self._start_load(tracked, request, block_ids, num_external)
        elif tracked.attempt is not None:
            _correct_reused(tracked.attempt, request)

    def joins_ended(self, reused: Mapping[str, int]) -> None:
        """By request, how many tokens a join kept of what was loaded."""
        for request_id, num_tokens in reused.items():
            tracked = self._tracked.get(request_id)
            if tracked is not None and tracked.attempt is not None:
                tracked.attempt.reused = num_tokens

    def take_step(
        self,
        scheduled: Sequence[ScheduledRequest],
        *,
        blocks_of: Callable[[str], Sequence[int]],
    ) -> StepOps:
        """Operations of one engine step.

        Args:
            scheduled: Requests that compute tokens in this step.
            blocks_of: A scheduled request's blocks from token 0 on.
        """
        saves: list[SaveOp] = []
        for item in scheduled:
            tracked = self._tracked.get(item.request_id)
            if tracked is not None:
                computed = item.num_computed_tokens + item.num_scheduled_tokens
                saves.extend(self._due_saves(tracked, item.request_id, computed, blocks_of))
        # Taken last: a load that an error above would lose is a request that waits for ever.
        loads, self._new_loads = tuple(self._new_loads), []
        num_tokens = sum(item.num_scheduled_tokens for item in scheduled)
        return StepOps(loads=loads, saves=tuple(saves), busy=bool(scheduled), num_tokens=num_tokens)

    def finish_request(self, request_id: str) -> None:
        """Forget a request that is done or aborted."""
        self._tracked.pop(request_id, None)

    @property
    def num_tracked(self) -> int:
        """Requests with state; 0 when the engine is idle."""
        return len(self._tracked)

    def _start_load(self, tracked: _Tracked, request: RequestView, block_ids: Sequence[int], num_external: int) -> None:
        start = tracked.num_local
        stop = start + num_external
        tracked.attempt = _Attempt(num_preemptions=request.num_preemptions, num_local=start)
        join = _join_op(tracked.params, request) if _is_joined(tracked.params, start) else None
        wanted = tracked.params.load if join else [span for span in tracked.params.load if span.base is None]
        self._new_loads.append(
            LoadOp(
                request_id=request.request_id,
                spans=tuple(span for span in wanted if span.stop > start and span.start < stop),
                start=start,
                stop=stop,
                block_ids=tuple(block_ids[: -(-stop // self._block_size)]),
                deadline_s=tracked.params.load_deadline_s,
                join=join,
            )
        )

    def _due_saves(
        self, tracked: _Tracked, request_id: str, computed: int, blocks_of: Callable[[str], Sequence[int]]
    ) -> list[SaveOp]:
        spans = tracked.params.save
        ops: list[SaveOp] = []
        while tracked.saved < len(spans) and spans[tracked.saved].stop <= computed:
            span = spans[tracked.saved]
            tracked.saved += 1
            first, last = span.start // self._block_size, -(-span.stop // self._block_size)
            block_ids = tuple(blocks_of(request_id)[first:last])
            if len(block_ids) == last - first:
                params = tracked.params
                ops.append(
                    SaveOp(
                        request_id=request_id,
                        span=span,
                        block_ids=block_ids,
                        tenant=params.tenant,
                        handoff=params.handoff,
                    )
                )
        return ops


def contiguous_stop(spans: Sequence[ChunkSpan], *, start: int) -> int:
    """Where the run of chunks that continues from token `start` without a gap ends; `start` if there is none.

    Example:
        >>> from kvstore.keys import ChunkKey
        >>> a, b, c = (ChunkSpan(ChunkKey(bytes(32)), *r) for r in ((0, 4), (4, 9), (12, 20)))
        >>> [contiguous_stop([a, b, c], start=n) for n in (0, 6, 9, 12, 25)]
        [9, 9, 9, 20, 25]
    """
    position = start
    for span in spans:
        if span.start > position:
            break
        position = max(position, span.stop)
    return position


def _is_joined(params: TransferParams, num_local: int) -> bool:
    """Whether anything is left to join behind what the engine holds."""
    return params.join is not None and any(span.base is not None and span.stop > num_local for span in params.load)


def _join_op(params: TransferParams, request: RequestView) -> JoinOp:
    assert params.join is not None
    return JoinOp(
        method=params.join.method,
        share=params.join.share,
        tail_start=params.join.tail_start,
        token_ids=tuple(request.prompt_token_ids or ()),
    )


def _correct_reused(attempt: _Attempt, request: RequestView) -> None:
    """Make vLLM report what was loaded, not what was planned.

    vLLM fixes the figures when it plans the load and leaves them after a partial failure
    (`v1/core/sched/scheduler.py`: `prefill_stats.set` runs only while nothing is computed). By the second allocation
    `num_computed_tokens` is what really arrived, and the request's own record can still be replaced.
    """
    stats = request.prefill_stats
    repeated = request.num_preemptions > 0 or attempt.num_preemptions > 0
    if stats is None or repeated or attempt.superseded:
        return
    num_local = min(attempt.num_local, request.num_computed_tokens)
    num_loaded = request.num_computed_tokens - num_local
    if attempt.reused is not None:
        num_loaded = min(num_loaded, attempt.reused)
    stats.set(request.num_prompt_tokens, num_local, num_loaded)
