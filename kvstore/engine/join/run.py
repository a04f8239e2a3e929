"""Joins under way: scored, chosen and recomputed on the engine's own thread, a bounded piece per step.

Covers: one join from the last loaded token to the report that the request can go on.
Does not cover: loading and moving chunks (`kvstore.engine.loader`), one forward (`kvstore.engine.join.forward`).

A join is a generator that pauses after each forward. It begins when everything that will be loaded is in the blocks,
and leaves all tokens up to the prompt's last one valid:

    exact    loaded where they were learned, or held by the engine: kept
    joined   loaded from elsewhere: the chosen share is computed again
    missing  holes and the tail: computed

Computed tokens go in order of position, so each sees what is fresh before it.
"""

import logging
import time
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from kvstore.engine.join.probe import Forward, Request, StepBudget, score_attention, score_deviation
from kvstore.engine.join.selection import Positions, positions_of, select
from kvstore.engine.ops import LoadOp, PlacedLoad
from kvstore.engine.paging import PagedKv
from kvstore.engine.tally import Tally

logger = logging.getLogger(__name__)


class JoinResult(NamedTuple):
    """What one engine step has to report."""

    finished: set[str]
    """Requests whose join is over, well or badly."""
    bad_blocks: set[int]
    """Blocks of those requests without valid KV."""
    reused: dict[str, int]
    """How many loaded tokens were kept, by request whose join went well."""


@dataclass(slots=True, eq=False)
class _Join:
    op: LoadOp
    exact_stop: int
    steps: Iterator[None]
    seconds: float = 0.0
    reused: int | None = None


class Joins:
    """Joins of one engine worker.

    Guarantees:
        Every join that is submitted and not dropped is reported once. After a failure the blocks from the first
        inexact token on are reported as bad.

    Args:
        forward: The engine's model.
        blocks: Its blocks.
        tally: Where everything is counted.
        step_tokens: Tokens computed in a step that also computes others.
        max_tokens: Tokens of one forward, and of a step without others.
    """

    def __init__(self, forward: Forward, *, blocks: PagedKv, tally: Tally, step_tokens: int, max_tokens: int) -> None:
        self._forward = forward
        self._blocks = blocks
        self._tally = tally
        self._step_tokens = min(step_tokens, max_tokens)
        self._max_tokens = max_tokens
        self._budget = StepBudget(max_tokens=max_tokens)
        self._open: deque[_Join] = deque()

    @property
    def num_open(self) -> int:
        """Joins that are neither reported nor dropped."""
        return len(self._open)

    def submit(self, placed: PlacedLoad) -> None:
        """Begin a join."""
        join = _Join(placed.op, placed.exact_stop, iter(()))
        join.steps = self._run(join, placed)
        self._open.append(join)

    def drop(self, request_id: str) -> bool:
        """Forget a request that ended; whether its join was open."""
        kept = deque(join for join in self._open if join.op.request_id != request_id)
        found = len(kept) < len(self._open)
        self._open = kept
        return found

    @torch.inference_mode()
    def advance(self, *, busy: bool) -> JoinResult:
        """Compute within the step's bound, and report what is over."""
        result = JoinResult(set(), set(), {})
        self._budget.left_tokens = self._step_tokens if busy else self._max_tokens
        while self._open and self._budget.left_tokens > 0:
            join = self._open[0]
            began_s = time.monotonic()
            try:
                is_over = next(join.steps, self) is self
            except Exception:
                # Whatever goes wrong in somebody's model must not cost more than the recomputation.
                logger.exception("event=join_failed request_id=%s", join.op.request_id)
                self._tally.join_failed("error")
                result.bad_blocks.update(join.op.block_ids[join.exact_stop // self._blocks.block_size :])
                is_over = True
            join.seconds += time.monotonic() - began_s
            if is_over:
                self._open.popleft()
                self._tally.observe("join_s", join.seconds)
                result.finished.add(join.op.request_id)
                if join.reused is not None:
                    result.reused[join.op.request_id] = join.reused
        return result

    def _run(self, join: _Join, placed: PlacedLoad) -> Iterator[None]:
        op = placed.op
        assert op.join is not None
        request = Request(
            forward=self._forward,
            blocks=self._blocks,
            block_ids=op.block_ids,
            token_ids=op.join.token_ids,
            tail_start=op.join.tail_start,
            tail_stop=op.stop,
        )
        joined = positions_of(placed.joined)
        holes = np.setdiff1d(
            np.arange(op.start, op.join.tail_start), np.concatenate([joined, positions_of(placed.exact)])
        )
        scores_T = torch.zeros(op.join.tail_start)
        if 0 < round(op.join.share * len(joined)) < len(joined):
            yield from self._score(request, op.join.method, joined, holes, scores_T)
        chosen = select(
            op.join.method,
            spans=placed.joined,
            share=op.join.share,
            seed=zlib.crc32(np.array(op.join.token_ids, np.int64).tobytes()),
            scores=scores_T.numpy()[joined],
        )
        missing = np.concatenate([holes, np.arange(max(op.start, op.join.tail_start), op.stop)])
        work = torch.from_numpy(np.union1d(chosen, missing))
        for piece in self._budget.split(work, depth_ratio=1.0):
            request.compute(piece)
            if piece[-1] < work[-1]:
                yield
        join.reused = len(positions_of(placed.exact)) + len(joined) - len(chosen)
        self._tally.add(f"joins.{op.join.method}")
        self._tally.add("joined_tokens", len(joined))
        self._tally.add("join_recomputed_tokens", len(chosen))
        self._tally.add("join_computed_tokens", len(missing))

    def _score(
        self, request: Request, method: str, joined: Positions, holes: Positions, scores_T: torch.Tensor
    ) -> Iterator[None]:
        options: dict[str, Any] = {"scores_T": scores_T, "budget": self._budget}
        if method == "deviation":
            positions = torch.from_numpy(np.union1d(joined, holes))
            yield from score_deviation(request, positions=positions, **options)
        elif method == "query_aware":
            yield from score_attention(request, holes=torch.from_numpy(holes), **options)
