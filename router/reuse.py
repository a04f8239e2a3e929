"""What one node's replicas can read of a prompt, and what that leaves to compute.

Covers: exact reuse from token 0, passages moved from where they were learned and joined, which of the two computes
less, which passages are worth learning before a join. Does not cover: which replica (`router.policy`), which tokens of
a join are computed again (`kvstore.engine.join`).

Pure, as all that a placement is made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from kvstore.keys import ChunkKey
from kvstore.wire import JoinPlan, Span, SpanKind
from router.view import KeyedSpan, View

_MIN_TAIL_TOKENS: Final = 2
"""The engine computes a prompt's last token itself, and a join the tail before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRequest:
    """What placement needs to know about one prompt."""

    spans: tuple[KeyedSpan, ...] = ()
    """Empty: nothing can be reused (opaque prompt, or an engine without KV)."""
    num_tokens: int = 0
    join: JoinPlan | None = None
    """How its passages may be joined; None: exact reuse only."""
    exact_because: str = ""
    """Why there is no `join` although the client allowed one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """One way of reusing a prompt's chunks on one node."""

    spans: tuple[Span, ...]
    """As the plan has them; `save` says what is missing and would be right in a store."""
    held_tokens: int
    """Tokens that are loaded, wherever they are."""
    local_tokens: int
    """Those of them that the node's own store holds."""
    computed_tokens: int
    """Tokens that are left to compute."""
    join: JoinPlan | None = None
    moved_tokens: int = 0
    """Loaded tokens that stood elsewhere when they were learned."""
    hole_tokens: int = 0
    """Tokens before the tail that nobody holds."""


def best_reuse(request: PlacementRequest, *, view: View, node_id: str) -> Reuse:
    """The way that computes fewer tokens; exact if that is as good."""
    exact = exact_reuse(request, view=view, node_id=node_id)
    joined = joined_reuse(request, view=view, node_id=node_id)
    return joined if joined is not None and joined.computed_tokens < exact.computed_tokens else exact


def exact_reuse(request: PlacementRequest, *, view: View, node_id: str) -> Reuse:
    """Reuse of what is held from token 0 on without a gap."""
    held_tokens = view.held_prefix_tokens(request.spans, node_id=node_id)
    return Reuse(
        spans=tuple(_as_it_stands(span, held=view.holds(span.key, node_id=node_id)) for span in request.spans),
        held_tokens=held_tokens,
        local_tokens=view.local_tokens(request.spans, node_id=node_id),
        computed_tokens=request.num_tokens - held_tokens,
    )


def joined_reuse(request: PlacementRequest, *, view: View, node_id: str) -> Reuse | None:
    """Reuse of passages wherever they were learned; None if the request allows none, or none is to be moved.

    Exact as far as everything from token 0 on is held, then every passage that is held behind the anchor. Holes and the
    tail are the rest.
    """
    if request.join is None:
        return None
    exact_tokens = view.held_prefix_tokens(request.spans, node_id=node_id)
    spans: list[Span] = []
    moved_tokens = hole_tokens = 0
    for span in request.spans:
        alone = span.passage_key
        if span.stop <= exact_tokens:
            spans.append(_as_it_stands(span, held=True))
        elif alone is not None and view.holds(alone, node_id=node_id):
            spans.append(Span(alone, span.start, span.stop, span.kind, True, False, span.base))
            moved_tokens += span.num_tokens
        else:
            # Nothing is saved: behind a moved chunk no KV is what its key says.
            spans.append(_as_it_stands(span, held=False, can_save=False))
            hole_tokens += span.num_tokens
    tail_tokens = sum(span.num_tokens for span in request.spans if span.kind is SpanKind.TAIL)
    if not moved_tokens or tail_tokens < _MIN_TAIL_TOKENS:
        return None
    held_tokens = exact_tokens + moved_tokens
    is_local = (view.is_local(ChunkKey(span.key), node_id=node_id) and span.held for span in spans)
    return Reuse(
        spans=tuple(spans),
        held_tokens=held_tokens,
        local_tokens=sum(span.num_tokens for span, local in zip(spans, is_local, strict=True) if local),
        computed_tokens=request.num_tokens - held_tokens + round(request.join.share * moved_tokens),
        join=request.join,
        moved_tokens=moved_tokens,
        hole_tokens=hole_tokens - tail_tokens,
    )


def worth_learning(request: PlacementRequest, *, view: View, node_id: str, min_tokens: int) -> tuple[int, ...]:
    """Documents whose passages a join would move if they were held, and that nobody has learned yet.

    Empty if the request would not be joined even then.

    Args:
        request: The prompt.
        view: What is held.
        node_id: Where it would be joined.
        min_tokens: A shorter passage is not worth it.
    """
    if request.join is None:
        return ()
    exact_tokens = view.held_prefix_tokens(request.spans, node_id=node_id)
    tokens: dict[int, int] = {}
    missing: set[int] = set()
    for span in request.spans:
        if span.document is None or span.passage_key is None or span.stop <= exact_tokens:
            continue
        tokens[span.document] = tokens.get(span.document, 0) + span.num_tokens
        if not view.holds(span.passage_key, node_id=node_id):
            missing.add(span.document)
    documents = tuple(sorted(document for document in missing if tokens[document] >= min_tokens))
    learned = with_learned(request, documents, view=view, node_id=node_id)
    return documents if best_reuse(request, view=learned, node_id=node_id).join is not None else ()


def with_learned(request: PlacementRequest, documents: Sequence[int], *, view: View, node_id: str) -> View:
    """The same view once these passages, and the anchor before them, can be read on a node."""
    wanted = set(documents)
    keys = {span.passage_key for span in request.spans if span.document in wanted and span.passage_key is not None}
    keys |= {span.key for span in request.spans if wanted and span.kind is SpanKind.PREFIX}
    nodes = {key: view.nodes_by_key.get(key, frozenset()) | {node_id} for key in keys}
    return replace(view, nodes_by_key={**view.nodes_by_key, **nodes})


def _as_it_stands(span: KeyedSpan, *, held: bool, can_save: bool = True) -> Span:
    return Span(span.key, span.start, span.stop, span.kind, held, can_save and not held)
