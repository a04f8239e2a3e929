"""What a request tells the connector: `kv_transfer_params["learnonce"]`, made by workers, checked by the engine.

Covers: building and validating the parameters. Does not cover: who decides them (`*_workers.plan`), carrying them out
(`kvstore.engine.scheduler_side`). Imports neither torch nor vLLM.

On the wire: `{"learnonce": {"v": 1, "load": [[hexkey, start, stop], ...], "save": [...], "load_deadline_s": 2.0}}`, and
`"tenant"` where the request has a salt, `"handoff"` ("local", "remote") where a worker waits for what is saved.
A joined request also has `"join": {"method": "query_aware", "share": 0.15, "tail": 900}`, and spans of four:
`[hexkey, start, stop, base]` is a passage that was learned at position `base` and is moved to `start`.
The field is part of vLLM's public JSON API, so the engine may see anything here: whatever is not valid is ignored and
counted, and the request is computed.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Protocol, cast, get_args

from cluster.errors import DataError
from kvstore.keys import ChunkKey, parse_key, tenant_of

NAMESPACE: Final = "learnonce"
"""Our key in `kv_transfer_params`; vLLM's own keys are never used."""
VERSION: Final = 1
MAX_SPANS: Final = 16384
"""Bound on each list; a million-token prompt of 64-token passages fits."""
MAX_LOAD_DEADLINE_S: Final = 600.0
_FIELDS: Final = frozenset({"v", "load", "save", "load_deadline_s", "tenant", "handoff", "join"})
_JOIN_FIELDS: Final = frozenset({"method", "share", "tail"})
MAX_POSITION: Final = (1 << 31) - 1
_TENANT: Final = re.compile(r"([0-9a-f]{16})?", re.ASCII)


Handoff = Literal["none", "local", "remote"]
"""Who waits for a chunk that is saved: nobody in particular, a worker of this node, a worker of another node."""


JoinMethod = Literal["naive", "random", "first_k", "deviation", "query_aware"]
"""How tokens of joined passages are chosen that are computed again (`kvstore.engine.join.selection`)."""


class TransferParamsError(DataError):
    """Parameters that cannot be used; the request is computed without them."""


class ChunkSpan(NamedTuple):
    """A chunk and the prompt tokens it covers, half-open."""

    key: ChunkKey
    start: int
    stop: int
    base: int | None = None
    """Where the chunk was learned, if it is joined. None: it is exact, valid behind the very tokens before `start`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinParams:
    """How the chunks of a joined request are made to fit."""

    method: JoinMethod
    share: float
    """Share of the joined tokens that are computed again, from 0 to 1."""
    tail_start: int
    """Everything from this token on is computed: the request's own question."""


class SpanLike(Protocol):
    """Anything with a key and a token range, e.g. `kvstore.wire.Span`."""

    @property
    def key(self) -> bytes:
        """The chunk's key."""
        ...

    @property
    def start(self) -> int:
        """First token."""
        ...

    @property
    def stop(self) -> int:
        """Token behind the last."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferParams:
    """What to reuse and what to keep, for one request."""

    load: tuple[ChunkSpan, ...]
    """Chunks to load, in order of position, not overlapping."""
    save: tuple[ChunkSpan, ...]
    """Chunks to store once their last token is computed, in order of position, not overlapping."""
    load_deadline_s: float
    """Seconds after which chunks that have not arrived are computed; unused without `load`."""
    tenant: str = ""
    """Whose chunks are stored (`kvstore.keys.tenant_of`); "" without a salt."""
    handoff: Handoff = "none"
    """Who waits for the chunks to be stored."""
    join: JoinParams | None = None
    """Set if chunks may stand elsewhere than they were learned, and with holes between them."""


def build_transfer_params(
    *,
    load: Iterable[SpanLike] = (),
    save: Iterable[SpanLike] = (),
    load_deadline_s: float,
    cache_salt: str = "",
    handoff: Handoff = "none",
    join: JoinParams | None = None,
) -> dict[str, Any]:
    """`kv_transfer_params` for one request, as plain JSON data. The salt itself is not in it.

    Spans to load that have a `base` are joined, which needs `join`.

    Example:
        >>> span = ChunkSpan(ChunkKey(bytes(32)), 0, 3)
        >>> build_transfer_params(save=[span], load_deadline_s=2.0)["learnonce"]["save"][0][1:]
        [0, 3]
    """
    ours: dict[str, Any] = {
        "v": VERSION,
        "load": [_wire_span(span) for span in load],
        "save": [[bytes(span.key).hex(), span.start, span.stop] for span in save],
        "load_deadline_s": load_deadline_s,
    }
    tenant = tenant_of(cache_salt)
    ours |= {"tenant": tenant} if tenant else {}
    if join is not None:
        ours["join"] = {"method": join.method, "share": join.share, "tail": join.tail_start}
    return {NAMESPACE: ours | {"handoff": handoff} if handoff != "none" else ours}


def parse_transfer_params(raw: Mapping[str, Any] | None, *, num_prompt_tokens: int) -> TransferParams | None:
    """Check a request's `kv_transfer_params`.

    Args:
        raw: The request's value, from anywhere.
        num_prompt_tokens: Spans must lie within the prompt.

    Returns:
        None if the request says nothing to this connector.

    Raises:
        TransferParamsError: It says something that is not valid.
    """
    if not isinstance(raw, Mapping) or NAMESPACE not in raw:
        return None
    ours = raw[NAMESPACE]
    if not isinstance(ours, Mapping):
        raise TransferParamsError(f"{NAMESPACE} parameters are a {type(ours).__name__}, not an object")
    if ours.get("v") != VERSION:
        raise TransferParamsError(f"{NAMESPACE} parameters have version {ours.get('v')!r}, this engine knows {VERSION}")
    if unknown := set(ours) - _FIELDS:
        raise TransferParamsError(f"{len(unknown)} unknown field(s) in {NAMESPACE} parameters")
    params = TransferParams(
        load=_spans(ours.get("load", []), "load", num_prompt_tokens),
        save=_spans(ours.get("save", []), "save", num_prompt_tokens),
        load_deadline_s=_deadline_s(ours.get("load_deadline_s", 0.0)),
        tenant=_tenant(ours.get("tenant", "")),
        handoff=_handoff(ours.get("handoff", "none")),
        join=_join(ours.get("join"), num_prompt_tokens),
    )
    _check_join(params)
    return params


def inexact_start(params: TransferParams) -> int:
    """The first token whose KV is approximate after a join: everything before it is loaded exact, or computed.

    Example:
        >>> a, b, c = (ChunkSpan(ChunkKey(bytes(32)), *r) for r in ((0, 4), (5, 9), (12, 20, 4)))
        >>> join = JoinParams(method="naive", share=0.0, tail_start=20)
        >>> inexact_start(TransferParams(load=(a, b, c), save=(), load_deadline_s=1.0, join=join))
        12
    """
    assert params.join is not None
    return min((span.start for span in params.load if span.base is not None), default=params.join.tail_start)


def _wire_span(span: SpanLike) -> list[Any]:
    base = getattr(span, "base", None)
    return [bytes(span.key).hex(), span.start, span.stop, *([] if base is None else [base])]


def _check_join(params: TransferParams) -> None:
    if params.join is None:
        if any(span.base is not None for span in params.load):
            raise TransferParamsError("load holds a span with a base, and there is no join")
    elif params.load and params.load[-1].stop > params.join.tail_start:
        raise TransferParamsError(f"load reaches into the tail, which begins at {params.join.tail_start}")
    elif params.save and params.save[-1].stop > inexact_start(params):
        raise TransferParamsError(
            f"save reaches to token {params.save[-1].stop}, KV of a joined request is exact up to "
            f"{inexact_start(params)} only"
        )
    if any(span.base is not None for span in params.save):
        raise TransferParamsError("save holds a span with a base")


def _spans(raw: Any, name: str, num_prompt_tokens: int) -> tuple[ChunkSpan, ...]:
    if not isinstance(raw, Sequence) or isinstance(raw, str | bytes) or len(raw) > MAX_SPANS:
        raise TransferParamsError(f"{name} is not a list of at most {MAX_SPANS} spans")
    spans = tuple(_span(item, name) for item in raw)
    position = 0
    for span in spans:
        if not position <= span.start < span.stop <= num_prompt_tokens:
            raise TransferParamsError(
                f"{name} span [{span.start}, {span.stop}) overlaps the one before it, is empty, "
                f"or leaves the prompt of {num_prompt_tokens} tokens"
            )
        position = span.stop
    return spans


def _join(raw: Any, num_prompt_tokens: int) -> JoinParams | None:
    if raw is None:
        return None
    if not isinstance(raw, Mapping) or set(raw) != _JOIN_FIELDS:
        raise TransferParamsError(f"join is not an object of {', '.join(sorted(_JOIN_FIELDS))}")
    method, share, tail = raw["method"], raw["share"], raw["tail"]
    if method not in get_args(JoinMethod):
        raise TransferParamsError(f"join's method is none of {', '.join(get_args(JoinMethod))}")
    if type(share) not in (int, float) or not 0 <= share <= 1:
        raise TransferParamsError("join's share is not a number from 0 to 1")
    # The engine itself computes the last token. A tail needs another one, whose attention is looked at.
    if type(tail) is not int or not 0 <= tail <= num_prompt_tokens - 2:
        raise TransferParamsError(
            f"join's tail does not begin two tokens before the end of {num_prompt_tokens}, or earlier"
        )
    return JoinParams(method=cast("JoinMethod", method), share=float(share), tail_start=tail)


def _span(item: Any, name: str) -> ChunkSpan:
    if not isinstance(item, Sequence) or isinstance(item, str | bytes) or len(item) not in (3, 4):
        raise TransferParamsError(f"{name} holds something that is not [key, start, stop] or [key, start, stop, base]")
    key, start, stop = item[:3]
    base = item[3] if len(item) == 4 else None
    if base is not None and (type(base) is not int or not 0 <= base <= MAX_POSITION):
        raise TransferParamsError(f"{name} holds a span whose base is no position")
    if not isinstance(key, str) or type(start) is not int or type(stop) is not int:
        raise TransferParamsError(f"{name} holds a span that is not [text, integer, integer]")
    try:
        return ChunkSpan(parse_key(key), start, stop, base)
    except ValueError as error:
        raise TransferParamsError(f"{name} holds a key that is not 64 hex digits") from error


def _tenant(raw: Any) -> str:
    if not isinstance(raw, str) or not _TENANT.fullmatch(raw):
        raise TransferParamsError("tenant is not 16 hex digits")
    return raw


def _handoff(raw: Any) -> Handoff:
    for known in get_args(Handoff):
        if raw == known:
            return cast("Handoff", known)
    raise TransferParamsError(f"handoff is none of {', '.join(get_args(Handoff))}")


def _deadline_s(raw: Any) -> float:
    if type(raw) not in (int, float) or not math.isfinite(raw) or not 0 <= raw <= MAX_LOAD_DEADLINE_S:
        raise TransferParamsError(f"load_deadline_s is not a number of seconds from 0 to {MAX_LOAD_DEADLINE_S}")
    return float(raw)
