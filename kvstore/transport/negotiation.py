"""Which data path a pair of nodes takes, and why.

Covers: the rule, as a pure function of what both sides have. Does not cover: finding out what there is, or noticing
that a path fails (`kvstore.peers`), the paths (`kvstore.transport`).
"""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

MAX_ADDRESS_BYTES: Final = 1 << 16
"""Bound on one data path's address; NIXL's metadata needs a few hundred bytes."""
SAME_MACHINE_ONLY: Final = frozenset({"shm"})
"""Paths that pass through memory that both sides map."""


class Reach(msgspec.Struct, frozen=True, kw_only=True):
    """What one node's store has for transfers, as it tells its peers."""

    boot_id: str
    """Random per boot of the machine (or of its kernel): equal on both sides means one machine."""
    addresses: dict[str, bytes]
    """Address by name of every data path that is served."""
    missing: dict[str, str] = {}
    """Why other paths that were asked for are not there, in words."""


class Choice(msgspec.Struct, frozen=True):
    """The path of a pair, or None; the reason is for people."""

    transport: str | None
    reason: str


def negotiate(
    ours: Reach, theirs: Reach, preferences: Sequence[str], *, failing: Mapping[str, str] | None = None
) -> Choice:
    """Take the first path in our order of preference that both sides have and that works.

    Args:
        ours: What the puller has.
        theirs: What the holder told.
        preferences: Names of paths, best first (`peers.transports`).
        failing: Paths that are not to be used now, and why.

    Example:
        >>> here = Reach(boot_id="m1", addresses={"shm": b"/s1", "tcp": b"10.0.0.1:1"})
        >>> there = Reach(boot_id="m2", addresses={"shm": b"/s2", "tcp": b"10.0.0.2:1"})
        >>> negotiate(here, there, ("shm", "nixl", "tcp"))
        Choice(transport='tcp', reason='shm: another machine; nixl: not here; tcp: both have it')
    """
    reasons = []
    for name in preferences:
        problem = _problem(name, ours, theirs, failing or {})
        if problem is None:
            reasons.append(f"{name}: " + ("one machine" if name in SAME_MACHINE_ONLY else "both have it"))
            return Choice(name, "; ".join(reasons))
        reasons.append(f"{name}: {problem}")
    return Choice(None, "; ".join(reasons) or "no path is configured")


def _problem(name: str, ours: Reach, theirs: Reach, failing: Mapping[str, str]) -> str | None:
    if name not in ours.addresses:
        return ours.missing.get(name, "not here")
    if name in SAME_MACHINE_ONLY and ours.boot_id != theirs.boot_id:
        return "another machine"
    if name not in theirs.addresses:
        return "the peer has none: " + theirs.missing.get(name, "not configured there")
    return failing.get(name)
