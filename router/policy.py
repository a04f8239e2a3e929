"""The first placement rule: one frozen view in, one decision with its reasons out.

Covers: decode replica, mode, prefill candidates, which spans are saved, deadlines, what to book.
Does not cover: prices in seconds (a later rule with the same interface), signing, sending.

Pure: reads no clock, draws no random number, touches no counter. The rule as a formula: docs/router.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.wire import Mode, Peer, Role, Span
from router.errors import NoReplicaError
from router.settings import DeadlineSettings, RuleSettings
from router.view import KeyedSpan, ReplicaView, View


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRequest:
    """What placement needs to know about one prompt."""

    spans: tuple[KeyedSpan, ...] = ()
    """Empty: nothing can be reused (opaque prompt, or an engine without KV)."""
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class BookedTokens:
    """Work promised to one replica."""

    role: Role
    replica_id: str
    tokens: int
    until_first_byte: bool
    """Done when the answer begins; else when it ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Where one request goes, and why."""

    decode: Peer
    mode: Mode
    prefill: tuple[Peer, ...] = ()
    spans: tuple[Span, ...] = ()
    hit_tokens: int = 0
    """Tokens from position 0 that the decode replica can read, wherever they are."""
    uncached_tokens: int = 0
    prefill_deadline_s: float = 0.0
    load_deadline_s: float = 0.0
    wanted_remote: bool = False
    """The prompt was long enough for a prefill replica, whether or not one could take it."""
    reasons: tuple[str, ...] = ()
    bookings: tuple[BookedTokens, ...] = ()


def choose(request: PlacementRequest, *, view: View, rule: RuleSettings, deadlines: DeadlineSettings) -> Decision:
    """Place one request.

    Ties go to the smaller replica id, so that a recorded view replays to the same decision.

    Raises:
        NoReplicaError: The view has no decode replica.
    """
    decode, decode_reason = _choose_decode(request, view, rule)
    hit_tokens = view.held_prefix_tokens(request.spans, node_id=decode.node_id)
    uncached_tokens = request.num_tokens - hit_tokens
    prefill, mode_reason, wanted = _choose_prefill(request, view, rule, decode, uncached_tokens)
    spans = _spans(request.spans, view=view, rule=rule, replica=decode)
    ahead_tokens = prefill[0].booked_tokens if prefill else 0
    return Decision(
        decode=decode.peer,
        mode=Mode.REMOTE if prefill else Mode.LOCAL,
        prefill=tuple(replica.peer for replica in prefill),
        spans=spans,
        hit_tokens=hit_tokens,
        uncached_tokens=uncached_tokens,
        prefill_deadline_s=_prefill_deadline_s(ahead_tokens + uncached_tokens, deadlines) if prefill else 0.0,
        load_deadline_s=_load_deadline_s(request.num_tokens if prefill else hit_tokens, deadlines),
        wanted_remote=wanted,
        reasons=(decode_reason, mode_reason, *_save_reason(spans, decode)),
        bookings=_bookings(decode, prefill, uncached_tokens, rule),
    )


def choose_learner(view: View, *, rule: RuleSettings) -> ReplicaView:
    """The prefill replica that learns a passage ahead: the least booked one.

    Raises:
        NoReplicaError: No prefill replica can take work.
    """
    by_id = sorted(view.prefill, key=lambda replica: replica.peer.replica_id)
    ready = _idle_first([replica for replica in by_id if replica.has_store], rule)
    if not ready:
        raise NoReplicaError("no prefill replica can learn passages now")
    return ready[0]


def plan_learning(
    spans: Sequence[KeyedSpan], *, view: View, learner: ReplicaView, deadlines: DeadlineSettings
) -> tuple[tuple[Span, ...], float]:
    """The spans of a passage learned ahead (everything missing is saved), and how long it may take in seconds."""
    held = [view.holds(span, node_id=learner.node_id) for span in spans]
    planned = tuple(
        Span(span.key, span.start, span.stop, span.kind, is_held, not is_held)
        for span, is_held in zip(spans, held, strict=True)
    )
    tokens = spans[-1].stop if spans else 0
    return planned, _prefill_deadline_s(learner.booked_tokens + tokens, deadlines)


def _choose_decode(request: PlacementRequest, view: View, rule: RuleSettings) -> tuple[ReplicaView, str]:
    if not view.decode:
        raise NoReplicaError("no decode replica is ready")
    least = min(replica.booked_tokens for replica in view.decode)
    limit = least + rule.decode_max_lead_tokens

    def rank(replica: ReplicaView) -> tuple[bool, int, int, int, str]:
        held = view.held_prefix_tokens(request.spans, node_id=replica.node_id)
        local = view.local_tokens(request.spans, node_id=replica.node_id)
        overloaded = replica.booked_tokens > limit
        wanted = (0, 0) if overloaded else (-held, -local)
        return (overloaded, *wanted, replica.booked_tokens, replica.peer.replica_id)

    best = min(view.decode, key=rank)
    held = view.held_prefix_tokens(request.spans, node_id=best.node_id)
    local = view.local_tokens(request.spans, node_id=best.node_id)
    elsewhere = f" and {held - local} more are on other nodes" if held > local else ""
    return best, (
        f"decode on {best.peer.replica_id}: its node holds {local} of {request.num_tokens} tokens{elsewhere},"
        f" {best.booked_tokens} tokens booked, best of {len(view.decode)}"
    )


def _choose_prefill(
    request: PlacementRequest, view: View, rule: RuleSettings, decode: ReplicaView, uncached_tokens: int
) -> tuple[list[ReplicaView], str, bool]:
    if not request.spans:
        return [], "local: the prompt has no chunks to hand over", False
    if uncached_tokens < rule.remote_min_tokens:
        return [], f"local: {uncached_tokens} uncached tokens are under {rule.remote_min_tokens}", False
    if not decode.has_store:
        return [], "local: the decode replica's node has no store to hand over through", True
    reachable = [r for r in view.prefill if r.has_store and view.share(r.node_id, decode.node_id)]
    if not reachable:
        return (
            [],
            "local: no prefill replica is ready on the decode replica's node, or on one that shares chunks with it"
            f" ({len(view.prefill)} elsewhere)",
            True,
        )

    def distance(replica: ReplicaView) -> tuple[bool, int]:
        is_far = replica.node_id != decode.node_id
        return (is_far, -view.local_tokens(request.spans, node_id=replica.node_id))

    # Of equally busy ones the nearest: its chunks need not travel.
    ready = _idle_first(sorted(reachable, key=lambda r: (distance(r), r.peer.replica_id)), rule)
    if not ready:
        booked = min(replica.booked_tokens for replica in reachable)
        return [], f"local: every prefill replica is overloaded (least booked: {booked} tokens)", True
    first = ready[0]
    where = "" if first.node_id == decode.node_id else " on another node"
    reason = (
        f"remote on {first.peer.replica_id}{where}: {uncached_tokens} uncached tokens,"
        f" {first.booked_tokens} tokens booked, best of {len(ready)}"
    )
    return ready[: rule.max_candidates], reason, True


def _idle_first(replicas: Sequence[ReplicaView], rule: RuleSettings) -> list[ReplicaView]:
    """Those that may take work, the least booked first; equals stay in their order."""
    ready = (replica for replica in replicas if replica.booked_tokens <= rule.prefill_max_booked_tokens)
    return sorted(ready, key=lambda replica: replica.booked_tokens)


def _spans(spans: Sequence[KeyedSpan], *, view: View, rule: RuleSettings, replica: ReplicaView) -> tuple[Span, ...]:
    planned = []
    for index, span in enumerate(spans):
        held = view.holds(span, node_id=replica.node_id)
        # Only the last span may be too small to save: a gap before others would make them unreachable.
        worth_it = index < len(spans) - 1 or span.num_tokens >= rule.min_save_tokens
        save = not held and worth_it and replica.has_store
        planned.append(Span(span.key, span.start, span.stop, span.kind, held, save))
    return tuple(planned)


def _save_reason(spans: Sequence[Span], decode: ReplicaView) -> tuple[str, ...]:
    if not spans:
        return ()
    if not decode.has_store:
        return ("save nothing: the node has no store",)
    saved = [span for span in spans if span.save]
    tokens = sum(span.num_tokens for span in saved)
    return (f"save {len(saved)} of {len(spans)} chunks ({tokens} tokens)",)


def _bookings(
    decode: ReplicaView, prefill: Sequence[ReplicaView], uncached_tokens: int, rule: RuleSettings
) -> tuple[BookedTokens, ...]:
    computing = (Role.PREFILL, prefill[0]) if prefill else (Role.DECODE, decode)
    role, replica = computing
    return (
        BookedTokens(role, replica.peer.replica_id, uncached_tokens, until_first_byte=True),
        BookedTokens(Role.DECODE, decode.peer.replica_id, rule.stream_tokens, until_first_byte=False),
    )


def _prefill_deadline_s(tokens: int, deadlines: DeadlineSettings) -> float:
    return min(deadlines.prefill_max_s, deadlines.prefill_base_s + tokens / deadlines.prefill_floor_tokens_per_s)


def _load_deadline_s(tokens: int, deadlines: DeadlineSettings) -> float:
    return min(deadlines.load_max_s, deadlines.load_base_s + tokens / deadlines.load_floor_tokens_per_s)
