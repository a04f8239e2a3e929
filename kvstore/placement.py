"""Where a chunk is fetched from, and to which tiers it is written: pure rules.

Covers: the order of sources, admission to the tiers below the arena. Does not cover: which records leave a tier
(`kvstore.policy`), carrying it out (`kvstore.mover`).
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Final, Literal, TypeVar

Admission = Literal["all", "reused"]

SOURCE_ORDER: Final = ("nvme", "peer", "object")
"""Fastest first: a local disk, another node's memory or disk, a bucket. Others come last, in the order given."""


class Origin(StrEnum):
    """How a chunk came into the arena."""

    COMMIT = "commit"
    """Computed on this node."""
    NVME = "nvme"
    PEER = "peer"
    OBJECT = "object"
    OTHER = "other"


def origin_of(source_name: str) -> Origin:
    """The origin of what a source gave.

    Example:
        >>> origin_of("peer").value, origin_of("memory").value
        ('peer', 'other')
    """
    return Origin(source_name) if source_name in ("nvme", "peer", "object") else Origin.OTHER


_S = TypeVar("_S")


def in_order(sources: Iterable[tuple[str, _S]]) -> list[_S]:
    """Sources by name, in the order in which they are asked.

    Example:
        >>> in_order([("object", 3), ("peer", 2), ("nvme", 1)])
        [1, 2, 3]
    """

    def rank(named: tuple[str, _S]) -> int:
        return SOURCE_ORDER.index(named[0]) if named[0] in SOURCE_ORDER else len(SOURCE_ORDER)

    return [source for _, source in sorted(sources, key=rank)]


def should_write(tier: str, *, admit: Admission, origin: Origin, uses: int) -> bool:
    """Whether a chunk of the arena is to be written to a tier that does not hold it.

    - Learned here: at once with "all", after its first read with "reused".
    - Copied from a peer: nowhere before its second read. The peer keeps it, and the first read is why it was copied;
      a node that wrote all that passes through it would wear out its disks and push out what only it has.
    - Fetched from a bucket or a disk: somebody wants it again, so it is written to the tiers that lack it.

    Args:
        tier: Name of the tier.
        admit: The tier's setting.
        origin: How the chunk came into the arena.
        uses: Reads since it came into the arena, the one that fetched it included.

    Example:
        >>> should_write("nvme", admit="reused", origin=Origin.COMMIT, uses=0)
        False
        >>> should_write("nvme", admit="all", origin=Origin.PEER, uses=1)
        False
        >>> should_write("nvme", admit="reused", origin=Origin.OBJECT, uses=1)
        True
    """
    if origin.value == tier:
        return False
    match origin:
        case Origin.COMMIT:
            return admit == "all" or uses >= 1
        case Origin.PEER:
            return uses >= 2
        case _:
            return True
