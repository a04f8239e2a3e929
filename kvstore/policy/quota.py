"""How many bytes of a tier a tenant may hold, and how many nobody else may take from it: pure arithmetic.

Covers: limits and protected shares. Does not cover: counting (`kvstore.tiers.books`), who a request's tenant is.

A quota is both. As a *limit* it is hard: a tenant that would exceed it evicts its own records. As a *share* it holds
against others: what a tenant has within its quota is not evicted for another tenant. Where the quotas of the tenants
that hold something exceed the tier, shares shrink in proportion; tenants without a quota together count as one more
that has what the quotas leave, and at least a tenth of the tier, so that quotas can lock nobody out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

UNNAMED_RATIO: Final = 0.1
"""Share of a tier that tenants without a quota have together at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """Quotas of one tier.

    Example:
        >>> quotas = Quotas(by_tenant={"a": 60, "b": 60}, default=None)
        >>> quotas.limit_bytes("a"), quotas.limit_bytes("c")
        (60, None)
        >>> quotas.share_bytes("a", capacity_bytes=100, promised_bytes=60, has_unlimited=True)
        60
        >>> quotas.share_bytes("a", capacity_bytes=100, promised_bytes=120, has_unlimited=False)
        50
    """

    by_tenant: Mapping[str, int] = field(default_factory=dict)
    """Quota by tenant name; "" names requests without a tenant."""
    default: int | None = None
    """Quota of every tenant that is not named; None: none."""

    @property
    def are_set(self) -> bool:
        """Whether any tenant can have a quota."""
        return bool(self.by_tenant) or self.default is not None

    def limit_bytes(self, tenant: str) -> int | None:
        """Bytes that the tenant may hold; None: as many as the tier."""
        return self.by_tenant.get(tenant, self.default)

    def share_bytes(
        self, tenant: str, *, capacity_bytes: int | None, promised_bytes: int, has_unlimited: bool
    ) -> int | None:
        """Bytes that no other tenant may take from this one; None: it has no quota, and so no share.

        Args:
            tenant: Who holds the bytes.
            capacity_bytes: Of the tier; None: unbounded.
            promised_bytes: Sum of the quotas of all tenants that hold something or are about to, this one included;
                each counts as at most the tier.
            has_unlimited: Whether tenants without a quota hold something or are about to.
        """
        limit = self.limit_bytes(tenant)
        if limit is None or capacity_bytes is None:
            return limit
        unnamed_bytes = int(UNNAMED_RATIO * capacity_bytes) if has_unlimited else 0
        over_bytes = promised_bytes + unnamed_bytes - capacity_bytes
        limit = min(limit, capacity_bytes)
        return limit if over_bytes <= 0 else limit * capacity_bytes // (promised_bytes + unnamed_bytes)
