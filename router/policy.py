"""The first placement rule: one frozen view in, one decision with its reasons out.

Covers: decode replica, mode, prefill candidates, which spans are saved, what is learned first, deadlines, bookings.
Does not cover: what can be reused (`router.reuse`), prices in seconds (a later rule), signing, sending.

Pure: reads no clock, draws no random number, touches no counter. The rule as a formula: docs/router.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from kvstore.wire import JoinPlan, Mode, Peer, Role, Span
from router.errors import NoReplicaError
from router.reuse import PlacementRequest, Reuse, best_reuse, worth_learning
from router.settings import DeadlineSettings, RuleSettings
from router.view import KeyedSpan, ReplicaView, View


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
    join: JoinPlan | None = None
    """Passages are moved and joined, by the decode replica."""
    hit_tokens: int = 0
    """Tokens that the decode replica can read, wherever they are: from position 0, with a join behind gaps as well."""
    hole_tokens: int = 0
    """With a join: tokens before the tail that nobody holds."""
    uncached_tokens: int = 0
    """Tokens that are left to compute, those that a join computes again included."""
    prefill_deadline_s: float = 0.0
    load_deadline_s: float = 0.0
    wanted_remote: bool = False
    """The prompt was long enough for a prefill replica, whether or not one could take it."""
    reasons: tuple[str, ...] = ()
    bookings: tuple[BookedTokens, ...] = ()

    @property
    def way(self) -> str:
        """Label of metrics: joined, or the mode."""
        return "joined" if self.join is not None else self.mode.value


@dataclass(frozen=True, slots=True)
class LearnFirst:
    """Passages that are learned before their request is joined."""

    documents: tuple[int, ...]
    """Indices into the request's documents."""
    node_id: str
    """Where they must be readable."""
    budget_s: float
    """What is not learned by then is a hole."""

    @property
    def reason(self) -> str:
        """In words."""
        return f"learn {len(self.documents)} passages first, for at most {self.budget_s:.1f} s"


def choose(request: PlacementRequest, *, view: View, rule: RuleSettings, deadlines: DeadlineSettings) -> Decision:
    """Place one request.

    Ties go to the smaller replica id, so that a recorded view replays to the same decision.

    Raises:
        NoReplicaError: The view has no decode replica.
    """
    decode, reuse, decode_reason = _choose_decode(request, view, rule)
    prefill, mode_reason, wanted = _choose_prefill(request, view, rule, decode, reuse)
    spans = _spans(reuse, rule=rule, replica=decode)
    ahead_tokens = prefill[0].booked_tokens if prefill else 0
    uncached_tokens = reuse.computed_tokens
    return Decision(
        decode=decode.peer,
        mode=Mode.REMOTE if prefill else Mode.LOCAL,
        prefill=tuple(replica.peer for replica in prefill),
        spans=spans,
        join=reuse.join,
        hit_tokens=reuse.held_tokens,
        hole_tokens=reuse.hole_tokens,
        uncached_tokens=uncached_tokens,
        prefill_deadline_s=_prefill_deadline_s(ahead_tokens + uncached_tokens, deadlines) if prefill else 0.0,
        load_deadline_s=_load_deadline_s(request.num_tokens if prefill else reuse.held_tokens, deadlines),
        wanted_remote=wanted,
        reasons=(decode_reason, *_join_reason(request, reuse), mode_reason, *_save_reason(spans, decode)),
        bookings=_bookings(decode, prefill, uncached_tokens, rule),
    )


def choose_learning(
    request: PlacementRequest, *, view: View, rule: RuleSettings, deadlines: DeadlineSettings, min_tokens: int
) -> LearnFirst | None:
    """What to learn before a request is placed; None if nothing is worth it, or nobody can.

    Args:
        request: The prompt.
        view: What the router believes now.
        rule: Says which decode replica would answer.
        deadlines: Bound the wait.
        min_tokens: A shorter passage is computed in place.
    """
    if request.join is None or not view.decode or not view.prefill:
        return None
    decode, _, _ = _choose_decode(request, view, rule)
    documents = worth_learning(request, view=view, node_id=decode.node_id, min_tokens=min_tokens)
    try:
        learner = choose_learner(view, rule=rule, for_node=decode.node_id)
    except NoReplicaError:
        return None
    tokens = sum(span.num_tokens for span in request.spans if span.document in documents)
    budget_s = _prefill_deadline_s(learner.booked_tokens + tokens, deadlines)
    return LearnFirst(documents, decode.node_id, budget_s) if documents else None


def choose_learner(view: View, *, rule: RuleSettings, for_node: str | None = None) -> ReplicaView:
    """The prefill replica that learns a passage ahead: the least booked one.

    Args:
        view: What the router believes now.
        rule: Says who is overloaded.
        for_node: Where the passage must be readable; None where nobody waits for it.

    Raises:
        NoReplicaError: No prefill replica can take work.
    """
    by_id = sorted(view.prefill, key=lambda replica: replica.peer.replica_id)
    useful = [r for r in by_id if r.has_store and (for_node is None or view.share(r.node_id, for_node))]
    ready = _idle_first(useful, rule)
    if not ready:
        raise NoReplicaError("no prefill replica can learn passages now")
    return ready[0]


def plan_learning(
    spans: Sequence[KeyedSpan], *, view: View, learner: ReplicaView, deadlines: DeadlineSettings
) -> tuple[tuple[Span, ...], float]:
    """The spans of a passage learned ahead (everything missing is saved), and how long it may take in seconds."""
    held = [view.holds(span.key, node_id=learner.node_id) for span in spans]
    planned = tuple(
        Span(span.key, span.start, span.stop, span.kind, is_held, not is_held)
        for span, is_held in zip(spans, held, strict=True)
    )
    tokens = spans[-1].stop if spans else 0
    return planned, _prefill_deadline_s(learner.booked_tokens + tokens, deadlines)


def _choose_decode(request: PlacementRequest, view: View, rule: RuleSettings) -> tuple[ReplicaView, Reuse, str]:
    if not view.decode:
        raise NoReplicaError("no decode replica is ready")
    limit = min(replica.booked_tokens for replica in view.decode) + rule.decode_max_lead_tokens
    # Of all replicas of a node at once: they read the same store.
    reuse_by_node = {
        node_id: best_reuse(request, view=view, node_id=node_id) for node_id in {r.node_id for r in view.decode}
    }

    def rank(replica: ReplicaView) -> tuple[bool, int, int, int, str]:
        reuse = reuse_by_node[replica.node_id]
        overloaded = replica.booked_tokens > limit
        wanted = (0, 0) if overloaded else (reuse.computed_tokens, -reuse.local_tokens)
        return (overloaded, *wanted, replica.booked_tokens, replica.peer.replica_id)

    best = min(view.decode, key=rank)
    reuse = reuse_by_node[best.node_id]
    away_tokens = reuse.held_tokens - reuse.local_tokens
    elsewhere = f" and {away_tokens} more are on other nodes" if away_tokens else ""
    reason = (
        f"decode on {best.peer.replica_id}: its node holds {reuse.local_tokens} of {request.num_tokens}"
        f" tokens{elsewhere}, {best.booked_tokens} tokens booked, best of {len(view.decode)}"
    )
    return best, reuse, reason


def _choose_prefill(
    request: PlacementRequest, view: View, rule: RuleSettings, decode: ReplicaView, reuse: Reuse
) -> tuple[list[ReplicaView], str, bool]:
    if not request.spans:
        return [], "local: the prompt has no chunks to hand over", False
    if reuse.join is not None:
        return [], "local: passages are joined where the answer is generated", False
    uncached_tokens = reuse.computed_tokens
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


def _spans(reuse: Reuse, *, rule: RuleSettings, replica: ReplicaView) -> tuple[Span, ...]:
    planned = []
    for index, span in enumerate(reuse.spans):
        # Only the last span may be too small to save: a gap before others would make them unreachable.
        worth_it = index < len(reuse.spans) - 1 or span.num_tokens >= rule.min_save_tokens
        planned.append(msgspec.structs.replace(span, save=span.save and worth_it and replica.has_store))
    return tuple(planned)


def _join_reason(request: PlacementRequest, reuse: Reuse) -> tuple[str, ...]:
    if request.exact_because:
        return (f"exact: {request.exact_because}",)
    if request.join is None:
        return ()
    if reuse.join is None:
        return (f"exact: a join would not compute fewer than {reuse.computed_tokens} tokens",)
    return (
        f"join {reuse.join}: {reuse.moved_tokens} tokens moved, {reuse.hole_tokens} in holes,"
        f" {reuse.computed_tokens} to compute",
    )


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
