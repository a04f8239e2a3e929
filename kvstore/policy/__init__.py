"""What leaves a full tier: pure decisions, one module per rule.

Covers: which policies there are, by the name that settings use. Does not cover: carrying a decision out
(`kvstore.tiers`), counting (`kvstore.tiers.books`).
"""

from collections.abc import Callable, Mapping
from typing import Final

from kvstore.interfaces import EvictionPolicy
from kvstore.policy.arc import ArcPolicy
from kvstore.policy.arena import FreeRuns, Resident, victim_window
from kvstore.policy.cost import CostPolicy
from kvstore.policy.lru import LruPolicy
from kvstore.policy.quota import Quotas
from kvstore.policy.s3fifo import S3FifoPolicy
from kvstore.settings import PolicyName

__all__ = ["POLICIES", "FreeRuns", "Quotas", "Resident", "make_policy", "victim_window"]

POLICIES: Final[Mapping[PolicyName, Callable[[], EvictionPolicy]]] = {
    "cost": CostPolicy,
    "lru": LruPolicy,
    "s3fifo": S3FifoPolicy,
    "arc": ArcPolicy,
}
"""Every policy, by the name that settings use."""


def make_policy(name: PolicyName) -> EvictionPolicy:
    """A policy with nothing in it yet.

    Example:
        >>> list(make_policy("lru").victims())
        []
    """
    return POLICIES[name]()
