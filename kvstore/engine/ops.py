"""What the connector's scheduler half tells its worker half.

Covers: one load and one save as plain values (they are pickled between processes). Imports neither torch nor vLLM.
Does not cover: the envelope vLLM carries them in (`kvstore.engine.metadata`).
"""

from dataclasses import dataclass

from kvstore.engine.params import ChunkSpan, Handoff


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOp:
    """Fill a request's blocks with stored KV for tokens `[start, stop)`."""

    request_id: str
    spans: tuple[ChunkSpan, ...]
    """Cover `[start, stop)` without gaps; the first and the last may reach over it."""
    start: int
    """First token to load: everything before it is in the request's blocks already."""
    stop: int
    block_ids: tuple[int, ...]
    """The request's blocks from token 0 on."""
    deadline_s: float
    """Seconds from now until what has not arrived counts as missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOp:
    """Store the KV of one chunk, all of which is in the request's blocks after this step."""

    request_id: str
    span: ChunkSpan
    block_ids: tuple[int, ...]
    """The blocks that hold the span: the first one contains token `span.start`."""
    tenant: str = ""
    """Whose chunk it is."""
    handoff: Handoff = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOps:
    """Everything for one engine step."""

    loads: tuple[LoadOp, ...] = ()
    saves: tuple[SaveOp, ...] = ()
    busy: bool = False
    """Whether this step also computes tokens, so that loads must not hold it up."""
    num_tokens: int = 0
    """Tokens that the step computes."""
