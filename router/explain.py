"""A decision in words and numbers, for `POST /v1/plan` and `learnonce explain`.

Covers: the JSON that is shown. Does not cover: deciding (`router.policy`). Never token ids, never prompt text.
"""

from typing import Any

from kvstore.wire import SpanKind
from router.planner import PreparedRequest
from router.policy import Decision


def explain(prepared: PreparedRequest, decision: Decision) -> dict[str, Any]:
    """The plan that this request would get now."""
    opaque = prepared.prompt.opaque
    planned = {span.key: span for span in decision.spans}
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
        "documents": _documents(prepared, decision),
        "chunks": [
            {
                "key": span.key.hex()[:12],
                "segment": span.kind.value,
                "document": span.document,
                "tokens": span.num_tokens,
                "held": planned[span.key].held,
                "save": planned[span.key].save,
            }
            for span in prepared.spans
        ],
        "prefill_deadline_s": round(decision.prefill_deadline_s, 3),
        "load_deadline_s": round(decision.load_deadline_s, 3),
        "reasons": list(decision.reasons),
    }


def _segments(prepared: PreparedRequest) -> dict[str, int]:
    tokens = {kind.value: 0 for kind in SpanKind}
    for segment in prepared.prompt.segments:
        tokens[segment.kind.value] += len(segment.ids)
    return tokens


def _documents(prepared: PreparedRequest, decision: Decision) -> list[dict[str, Any]]:
    """Per document its tokens, and whether its KV behind everything before it is held."""
    held: dict[int, bool] = {}
    for keyed, span in zip(prepared.spans, decision.spans, strict=True):
        if keyed.document is not None:
            held[keyed.document] = held.get(keyed.document, True) and span.held
    documents = []
    for segment in prepared.prompt.segments:
        if segment.document is None:
            continue
        document = prepared.request.documents[segment.document]
        state = "held" if held.get(segment.document, False) else "unknown"
        documents.append(
            {"index": segment.document, "title": document.title, "tokens": len(segment.ids), "state": state}
        )
    return documents
