"""What the connector's scheduler half tells its worker half.

Covers: one load, its join and one save as plain values (they are pickled between processes). Imports neither torch nor
vLLM.
Does not cover: the envelope vLLM carries them in (`kvstore.engine.metadata`).
"""

from dataclasses import dataclass

from kvstore.engine.params import ChunkSpan, Handoff, JoinMethod


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinOp:
    """What happens to a load's tokens once they are in place."""

    method: JoinMethod
    share: float
    """Share of the joined tokens that are computed again."""
    tail_start: int
    """Tokens from here on, and those that were not loaded, are computed."""
    token_ids: tuple[int, ...]
    """The prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOp:
    """Fill a request's blocks with stored KV for tokens `[start, stop)`."""

    request_id: str
    spans: tuple[ChunkSpan, ...]
    """Cover `[start, stop)` without gaps, or with a join in part; the first and the last may reach over it."""
    start: int
    """First token to load: everything before it is in the request's blocks already."""
    stop: int
    block_ids: tuple[int, ...]
    """The request's blocks from token 0 on."""
    deadline_s: float
    """Seconds from now until what has not arrived counts as missing."""
    join: JoinOp | None = None
    """Whatever is not loaded is then computed by the worker; all of `[start, stop)` is valid afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedLoad:
    """A joined load of which everything that will come is in the request's blocks."""

    op: LoadOp
    exact: tuple[tuple[int, int], ...]
    """Ranges of tokens behind `op.start` that hold exact KV, in order."""
    joined: tuple[tuple[int, int], ...]
    """Ranges that hold KV from elsewhere, moved to its place."""

    @property
    def exact_stop(self) -> int:
        """Everything before this token is exact, whatever becomes of the join."""
        position = self.op.start
        for start, stop in self.exact:
            if start > position:
                break
            position = stop
        return position


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
