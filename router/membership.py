"""Which replicas may take requests: their own reports, minus those that just failed.

Covers: folding rounds of reports, suspects, what the replicas agree on (scope, model length), store addresses.
Does not cover: how reports are fetched (`router.actor`), when rounds run (`router.service`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvstore.keys import KvScope
from kvstore.wire import Role, StoreEndpoint, WorkerReport


class ReportSource(Protocol):
    """Asks all workers of a role about themselves."""

    async def reports(self, role: Role, *, timeout_s: float) -> Sequence[WorkerReport]:
        """Reports of all workers that answered within `timeout_s`. Empty if there are none.

        Raises:
            Exception: Nobody could be asked; what was known stays valid until it is too old.
        """
        ...


@dataclass(frozen=True, slots=True)
class ServingFacts:
    """What the ready decode replicas have in common."""

    scope: KvScope | None
    """None: engines without KV, nothing is reused."""
    max_model_len: int
    joins: bool = False
    """All of them can join passages."""


@dataclass(slots=True)
class _Member:
    report: WorkerReport
    reported_s: float
    suspected_s: float | None = None
    """It failed a request then."""
    silent: bool = False
    """It was missing in the last round: gone, or too busy to answer in time."""

    @property
    def state(self) -> str:
        """For people."""
        if self.report.draining:
            return "draining"
        return "ready" if self.suspected_s is None and not self.silent else "suspect"


class Membership:
    """Replicas by id. Times are the caller's monotonic seconds.

    Guarantees:
        A suspect takes nothing until a report that was asked for after the suspicion.
        A worker that was missing in the last round takes something only if no other can; after `ttl_s` it is gone.
    """

    def __init__(self, *, model: str, ttl_s: float) -> None:
        self._model = model
        self._ttl_s = ttl_s
        self._members: dict[Role, dict[str, _Member]] = {role: {} for role in Role}

    def apply_round(self, role: Role, reports: Sequence[WorkerReport], *, asked_s: float) -> None:
        """Fold one round of reports that was asked for at `asked_s`."""
        members = self._members[role]
        for report in reports:
            if report.model != self._model or report.role is not role:
                continue
            known = members.get(report.peer.replica_id)
            suspected_s = known.suspected_s if known else None
            if suspected_s is not None and suspected_s <= asked_s:
                suspected_s = None
            members[report.peer.replica_id] = _Member(report, asked_s, suspected_s)
        reported = {report.peer.replica_id for report in reports}
        for replica_id, member in members.items():
            member.silent = replica_id not in reported

    def expire(self, now_s: float) -> None:
        """Forget workers that have been silent for too long."""
        for members in self._members.values():
            for replica_id in [r for r, m in members.items() if now_s - m.reported_s > self._ttl_s]:
                del members[replica_id]

    def suspect(self, replica_id: str, *, now_s: float) -> None:
        """Take a replica out at its first failure, before anyone else notices."""
        for members in self._members.values():
            if replica_id in members:
                members[replica_id].suspected_s = now_s

    def ready(self, role: Role) -> list[WorkerReport]:
        """Latest reports of the replicas that may take requests, by replica id."""
        members = [member for _, member in sorted(self._members[role].items())]
        usable = [member for member in members if member.suspected_s is None and not member.report.draining]
        # One late report of a busy worker must not turn its cluster away: prefer the others, if there are any.
        heard = [member for member in usable if not member.silent]
        return [member.report for member in heard or usable]

    def known(self, role: Role) -> list[WorkerReport]:
        """Latest reports of all replicas, suspects and draining ones included."""
        return [member.report for _, member in sorted(self._members[role].items())]

    def listing(self) -> list[dict[str, Any]]:
        """Every known worker in plain values, for `/ready` and `learnonce status`."""
        return [
            {
                "role": role.value,
                "replica_id": replica_id,
                "state": member.state,
                "running_requests": member.report.running_requests,
                "store_epoch": member.report.store.epoch if member.report.store else None,
            }
            for role, members in self._members.items()
            for replica_id, member in sorted(members.items())
        ]

    def facts(self) -> ServingFacts | None:
        """What the ready decode replicas agree on; None without any.

        If they disagree about the scope (a rolling update), the most common one counts: the others' chunks have other
        keys, which costs misses only. The shortest model length counts.
        """
        ready = self.ready(Role.DECODE)
        if not ready:
            return None
        scopes = Counter(report.scope for report in ready if report.scope is not None)
        scope = max(scopes, key=lambda scope: (scopes[scope], scope.model_digest, repr(scope))) if scopes else None
        return ServingFacts(
            scope=scope,
            max_model_len=min(report.max_model_len for report in ready),
            joins=all(report.joins for report in ready),
        )

    def stores(self) -> dict[str, StoreEndpoint]:
        """Latest store of each node that any worker reports."""
        newest: dict[str, tuple[float, StoreEndpoint]] = {}
        for members in self._members.values():
            for member in members.values():
                store = member.report.store
                if store is None:
                    continue
                known = newest.get(store.node_id)
                if known is None or member.reported_s > known[0]:
                    newest[store.node_id] = (member.reported_s, store)
        return {node_id: endpoint for node_id, (_, endpoint) in newest.items()}

    def sharing_nodes(self) -> frozenset[str]:
        """Nodes whose stores read from each other."""
        return frozenset(node_id for node_id, store in self.stores().items() if store.peer_address)
