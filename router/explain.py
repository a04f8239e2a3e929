"""A decision in words and numbers, for `POST /v1/plan` and `learnonce explain`.

Covers: the JSON that is shown. Does not cover: deciding (`router.policy`). Never token ids, never prompt text.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from kvstore.wire import Span, SpanKind
from router.planner import PreparedRequest
from router.policy import Decision, LearnFirst


def explain(prepared: PreparedRequest, decision: Decision, *, first: LearnFirst | None = None) -> dict[str, Any]:
    """The plan that this request would get now.

    Args:
        prepared: The request.
        decision: Made as if `first` were learned.
        first: Passages that would be learned before.
    """
    opaque = prepared.prompt.opaque
    return {
        "object": "learnonce.plan",
        "mode": decision.mode.value,
        "decode": decision.decode.replica_id,
        "prefill": [peer.replica_id for peer in decision.prefill],
        "prompt_tokens": prepared.prompt.num_tokens,
        "held_tokens": decision.hit_tokens,
        "uncached_tokens": decision.uncached_tokens,
        "opaque": opaque.value if opaque else None,
        "segments": _segments(prepared),
        "join": msgspec.to_builtins(decision.join),
        "documents": _documents(prepared, decision, learned=first.documents if first else ()),
        "chunks": [
            {
                "key": span.key.hex()[:12],
                "segment": span.kind.value,
                "document": keyed.document,
                "tokens": span.num_tokens,
                "held": span.held,
                "save": span.save,
                "base": span.base,
            }
            for keyed, span in zip(prepared.spans, decision.spans, strict=True)
        ],
        "prefill_deadline_s": round(decision.prefill_deadline_s, 3),
        "load_deadline_s": round(decision.load_deadline_s, 3),
        "reasons": [*([first.reason] if first else []), *decision.reasons],
    }


def _segments(prepared: PreparedRequest) -> dict[str, int]:
    tokens = {kind.value: 0 for kind in SpanKind}
    for segment in prepared.prompt.segments:
        tokens[segment.kind.value] += len(segment.ids)
    return tokens


def _documents(prepared: PreparedRequest, decision: Decision, *, learned: Sequence[int]) -> list[dict[str, Any]]:
    """Per document its tokens, and what is done with its KV."""
    spans: dict[int, list[Span]] = {}
    for keyed, span in zip(prepared.spans, decision.spans, strict=True):
        if keyed.document is not None:
            spans.setdefault(keyed.document, []).append(span)
    documents = []
    for segment in prepared.prompt.segments:
        if segment.document is None:
            continue
        document = prepared.request.documents[segment.document]
        state = "learn first" if segment.document in learned else _state(spans.get(segment.document, []))
        documents.append(
            {"index": segment.document, "title": document.title, "tokens": len(segment.ids), "state": state}
        )
    return documents


def _state(spans: Sequence[Span]) -> str:
    """held: exact where it stands; moved: learned elsewhere and joined; unknown: some of it must be computed."""
    if not spans or not all(span.held for span in spans):
        return "unknown"
    return "held" if all(span.base is None for span in spans) else "moved"
