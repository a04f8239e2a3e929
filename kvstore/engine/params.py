"""What a request tells the connector: `kv_transfer_params["learnonce"]`, made by workers, checked by the engine.

Covers: building and validating the parameters. Does not cover: who decides them (`*_workers.plan`), carrying them out
(`kvstore.engine.scheduler_side`). Imports neither torch nor vLLM.

On the wire: `{"learnonce": {"v": 1, "load": [[hexkey, start, stop], ...], "save": [...], "load_deadline_s": 2.0}}`, and
`"tenant"` where the request has a salt, `"handoff"` ("local", "remote") where a worker waits for what is saved.
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
_FIELDS: Final = frozenset({"v", "load", "save", "load_deadline_s", "tenant", "handoff"})
_TENANT: Final = re.compile(r"([0-9a-f]{16})?", re.ASCII)


Handoff = Literal["none", "local", "remote"]
"""Who waits for a chunk that is saved: nobody in particular, a worker of this node, a worker of another node."""


class TransferParamsError(DataError):
    """Parameters that cannot be used; the request is computed without them."""


class ChunkSpan(NamedTuple):
    """A chunk and the prompt tokens it covers, half-open."""

    key: ChunkKey
    start: int
    stop: int


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


def build_transfer_params(
    *,
    load: Iterable[SpanLike] = (),
    save: Iterable[SpanLike] = (),
    load_deadline_s: float,
    cache_salt: str = "",
    handoff: Handoff = "none",
) -> dict[str, Any]:
    """`kv_transfer_params` for one request, as plain JSON data. The salt itself is not in it.

    Example:
        >>> span = ChunkSpan(ChunkKey(bytes(32)), 0, 3)
        >>> build_transfer_params(save=[span], load_deadline_s=2.0)["learnonce"]["save"][0][1:]
        [0, 3]
    """
    ours: dict[str, Any] = {
        "v": VERSION,
        "load": [[bytes(span.key).hex(), span.start, span.stop] for span in load],
        "save": [[bytes(span.key).hex(), span.start, span.stop] for span in save],
        "load_deadline_s": load_deadline_s,
    }
    tenant = tenant_of(cache_salt)
    ours |= {"tenant": tenant} if tenant else {}
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
    return TransferParams(
        load=_spans(ours.get("load", []), "load", num_prompt_tokens),
        save=_spans(ours.get("save", []), "save", num_prompt_tokens),
        load_deadline_s=_deadline_s(ours.get("load_deadline_s", 0.0)),
        tenant=_tenant(ours.get("tenant", "")),
        handoff=_handoff(ours.get("handoff", "none")),
    )


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


def _span(item: Any, name: str) -> ChunkSpan:
    if not isinstance(item, Sequence) or isinstance(item, str | bytes) or len(item) != 3:
        raise TransferParamsError(f"{name} holds something that is not [key, start, stop]")
    key, start, stop = item
    if not isinstance(key, str) or type(start) is not int or type(stop) is not int:
        raise TransferParamsError(f"{name} holds a span that is not [text, integer, integer]")
    try:
        return ChunkSpan(parse_key(key), start, stop)
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
