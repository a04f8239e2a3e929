"""The books of one bounded tier: which records it holds, and which leave when room is needed.

Covers: counting bytes, per tenant too; asking the policy; quotas and pins. Does not cover: the bytes themselves
(`kvstore.tiers.host`, `.file`, `.object`), the order of victims (`kvstore.policy`).

The law that holds after every call: `used_bytes` is the sum of `stored_bytes` of all entries, and so for each tenant.
"""

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from kvstore.interfaces import EvictionPolicy, TierEntry, TierStat
from kvstore.keys import ChunkKey
from kvstore.policy.quota import Quotas
from kvstore.policy.ranking import Ranking

_MAX_PASSED: Final = 4096
"""Records of protected tenants that one search passes before it goes on in the order of last use."""


def never(key: ChunkKey) -> bool:
    """No record is busy."""
    return False


class TierBooks:
    """Entries of one tier. Not safe for several threads: the owner locks.

    Args:
        capacity_bytes: Bytes that the tier may hold; None: only quotas bound it.
        policy: Which records leave first; owned by these books from now on.
        quotas: Bytes per tenant.
        high_ratio: Share of the capacity above which records leave.
        low_ratio: Share of the capacity down to which one eviction goes, as far as it can; at most `high_ratio` counts.
        max_pinned_ratio: Share of the capacity that pins may hold.

    Cost:
        Per call that of the policy; quotas add a dict entry per record.

    Example:
        >>> from kvstore.policy import make_policy
        >>> books = TierBooks(capacity_bytes=10, policy=make_policy("lru"), quotas=Quotas())
        >>> entry = TierEntry(payload_bytes=6, stored_bytes=6, num_tokens=1, base_position=0, codec="raw")
        >>> books.admit(ChunkKey(b"a"), entry)
        >>> books.make_room(6, tenant="", now_s=0.0), books.used_bytes
        ([b'a'], 0)
    """

    def __init__(
        self,
        *,
        capacity_bytes: int | None,
        policy: EvictionPolicy,
        quotas: Quotas,
        high_ratio: float = 1.0,
        low_ratio: float = 1.0,
        max_pinned_ratio: float = 0.5,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        """Sum of the records' stored bytes."""
        self.pinned_bytes = 0
        """Stored bytes of pinned records; pins whose time is over count until they are noticed."""
        self._policy = policy
        self._quotas = quotas
        self._high_bytes = None if capacity_bytes is None else int(high_ratio * capacity_bytes)
        self._low_bytes = None if capacity_bytes is None else int(min(low_ratio, high_ratio) * capacity_bytes)
        self._max_pinned_bytes = None if capacity_bytes is None else int(max_pinned_ratio * capacity_bytes)
        self._entries: dict[ChunkKey, TierEntry] = {}
        self.find: Final[Callable[[ChunkKey], TierEntry | None]] = self._entries.get
        """The entry of a key; not a use. Without a call in between: lookups ask it for every key."""
        self._uses: Counter[ChunkKey] = Counter()
        self._pins: dict[ChunkKey, float] = {}
        """Until when a record is pinned; the policy does not know it meanwhile."""
        self._pin_ends = Ranking()
        self._used_by_tenant: Counter[str] = Counter()
        self._by_tenant: dict[str, OrderedDict[ChunkKey, None]] = {}
        """Keys of each tenant in the order of last use; only where there are quotas."""
        self._promised_bytes = 0
        """Sum of the quotas of the tenants that hold something, each at most the capacity."""
        self._num_unlimited = 0
        """Tenants without a quota that hold something."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def items(self) -> Iterator[tuple[ChunkKey, TierEntry]]:
        """All entries, in no order, as they are at this call."""
        return iter(list(self._entries.items()))

    def uses(self, key: ChunkKey) -> int:
        """How often a record was touched since it was admitted."""
        return self._uses.get(key, 0)

    def used_by(self, tenant: str) -> int:
        """Stored bytes of a tenant's records."""
        return self._used_by_tenant.get(tenant, 0)

    def stat(self) -> TierStat:
        """Counts now."""
        return TierStat(
            chunks=len(self._entries),
            bytes=self.used_bytes,
            capacity_bytes=self.capacity_bytes,
            pinned_bytes=self.pinned_bytes,
        )

    def admit(self, key: ChunkKey, entry: TierEntry) -> None:
        """Enter a record, or replace the entry of its key; uses and pin of the one before stay.

        Making room is `make_room`'s part: an owner that admits without it may exceed the capacity.
        """
        before = self._entries.get(key)
        if before is not None:
            self._count(key, before, -1)
        self._entries[key] = entry
        self._count(key, entry, +1)
        if key not in self._pins:
            self._policy.admit(key, entry)

    def touch(self, key: ChunkKey) -> None:
        """Count a use; unknown keys are ignored."""
        entry = self._entries.get(key)
        if entry is None:
            return
        self._uses[key] += 1
        self._policy.touch(key)
        if self._quotas.are_set:
            self._by_tenant[entry.tenant].move_to_end(key)

    def remove(self, key: ChunkKey, *, evicted: bool = False) -> TierEntry | None:
        """Take a record out, pinned or not; its entry, or None if there was none.

        Args:
            key: The record.
            evicted: Whether it left for room, which policies learn from, or was dropped.
        """
        entry = self._entries.get(key)
        if entry is None:
            return None
        if not self._end_pin(key):
            self._policy.remove(key, evicted=evicted)
        self._count(key, entry, -1)
        del self._entries[key]
        self._uses.pop(key, None)
        return entry

    def change_policy(self, policy: EvictionPolicy, *, seen: Mapping[ChunkKey, TierEntry]) -> None:
        """Go over to another policy, which knows what the books held a moment ago, in an order of its owner's choice.

        Args:
            policy: Owned by these books from now on. It was told of all of `seen`, and of nothing else.
            seen: Records, pinned ones too, as they were then; what has changed since, it is told now, and of all uses.
        """
        for key, entry in self._entries.items():
            if key not in self._pins and seen.get(key) is not entry:
                policy.admit(key, entry)
        for key in seen:
            if key not in self._entries or key in self._pins:
                policy.remove(key, evicted=False)
        for key, uses in self._uses.items():
            for _ in range(uses):
                policy.touch(key)
        self._policy = policy
        if self._quotas.are_set:
            new = [key for key in self._entries if key not in seen]
            for key in itertools.chain(seen, new, self._uses):
                if key in self._entries:
                    self._by_tenant[self._entries[key].tenant].move_to_end(key)

    # Pins. A pinned record is none of the policy's: no search has to pass it.

    def pin(self, key: ChunkKey, *, until_s: float, now_s: float | None = None) -> bool:
        """Keep a record from being evicted until a time; a pin that lasts longer already stays.

        Args:
            key: The record.
            until_s: On the clock of `make_room`.
            now_s: Now on that clock, so that pins whose time is over make room for this one.

        Returns:
            False if there is no such record, or pins would hold more than their share of the tier.
        """
        if now_s is not None:
            self._end_pins(now_s)
        entry = self._entries.get(key)
        if entry is None:
            return False
        if key not in self._pins:
            if self._max_pinned_bytes is not None and self.pinned_bytes + entry.stored_bytes > self._max_pinned_bytes:
                return False
            self.pinned_bytes += entry.stored_bytes
            self._policy.remove(key, evicted=False)
        self._pins[key] = max(until_s, self._pins.get(key, until_s))
        self._pin_ends.put(key, rank=self._pins[key])
        return True

    def unpin(self, key: ChunkKey) -> None:
        """End a pin; a key without one is ignored."""
        if self._end_pin(key):
            self._policy.admit(key, self._entries[key])

    def is_pinned(self, key: ChunkKey, now_s: float) -> bool:
        """Whether a pin keeps the record now."""
        self._end_pins(now_s)
        return key in self._pins

    def _end_pin(self, key: ChunkKey) -> bool:
        """Forget a pin; whether there was one. The policy does not know the record yet."""
        if self._pins.pop(key, None) is None:
            return False
        self._pin_ends.discard(key)
        self.pinned_bytes -= self._entries[key].stored_bytes
        return True

    def _end_pins(self, now_s: float) -> None:
        first = self._pin_ends.first()
        while first is not None and first[0] <= now_s:
            self.unpin(first[1])
            first = self._pin_ends.first()

    # Room

    def make_room(
        self,
        need_bytes: int,
        *,
        tenant: str,
        now_s: float,
        is_busy: Callable[[ChunkKey], bool] = never,
    ) -> list[ChunkKey] | None:
        """Take records out of the books so that a tenant may store `need_bytes` more.

        A tenant that would exceed its quota loses records of its own. Above `high_ratio` of the capacity records
        leave down to `low_ratio`: of tenants without a quota, of tenants that hold more than their share
        (`kvstore.policy.quota`), and of the tenant itself; its own come last while it has less than its share. Pinned
        and busy records stay.

        Returns:
            The records that are out of the books now, for the owner to delete; None, with all books unchanged, if
            there cannot be enough room.
        """
        if self._high_bytes is not None and need_bytes > self._high_bytes:
            return None
        leaving = self._over_quota(need_bytes, tenant=tenant, now_s=now_s, is_busy=is_busy)
        if leaving is None:
            return None
        if self._high_bytes is not None and self._low_bytes is not None:
            after_bytes = self.used_bytes + need_bytes - sum(entry.stored_bytes for entry in leaving.values())
            if after_bytes > self._high_bytes:
                candidates = self.victims(tenant=tenant, now_s=now_s, is_busy=is_busy, gone=leaving)
                missing_bytes = self._collect(candidates, leaving, after_bytes - self._low_bytes)
                if missing_bytes > self._high_bytes - self._low_bytes:
                    return None
        return self._evict(leaving)

    def make_room_in_quota(
        self,
        need_bytes: int,
        *,
        tenant: str,
        now_s: float,
        is_busy: Callable[[ChunkKey], bool] = never,
    ) -> list[ChunkKey] | None:
        """`make_room` as far as the tenant's quota asks for it, for owners who find room in their medium themselves."""
        leaving = self._over_quota(need_bytes, tenant=tenant, now_s=now_s, is_busy=is_busy)
        return None if leaving is None else self._evict(leaving)

    def victims(
        self,
        *,
        tenant: str,
        now_s: float,
        is_busy: Callable[[ChunkKey], bool] = never,
        gone: Iterable[ChunkKey] = (),
    ) -> Iterator[ChunkKey]:
        """Records that may leave for a tenant, in the policy's order; for owners for whom places matter too.

        Lazy: the books must not change while it is read; the owner then calls `remove(key, evicted=True)` for those
        that it takes. All that were read count as taken where shares of other tenants are kept.

        Args:
            tenant: For whom room is made.
            now_s: On the clock of pins.
            is_busy: Whether a record cannot leave now.
            gone: Records that are as good as gone: neither offered, nor counted as held.
        """
        self._end_pins(now_s)
        order = self._takeable(tenant) if self._quotas.are_set else self._policy.victims()
        return self._candidates(order, is_busy=is_busy, gone=gone)

    def _candidates(
        self,
        order: Iterable[ChunkKey],
        *,
        is_busy: Callable[[ChunkKey], bool],
        gone: Iterable[ChunkKey] = (),
    ) -> Iterator[ChunkKey]:
        """What of an order may leave: no busy or gone ones."""
        out = set(gone)
        return (key for key in order if key not in out and not is_busy(key))

    def _takeable(self, tenant: str) -> Iterator[ChunkKey]:
        """Records of tenants without quota, of those above their share, and its own: last, if it is below its share."""
        limit_bytes = self._quotas.limit_bytes(tenant)
        promised_bytes = self._promised_bytes
        if limit_bytes is not None and not self.used_by(tenant):
            promised_bytes += self._claim_bytes(limit_bytes)
        above_bytes: dict[str, int] = {}
        for holder in {tenant, *self._used_by_tenant}:
            share_bytes = self._quotas.share_bytes(
                holder,
                capacity_bytes=self._high_bytes,
                promised_bytes=promised_bytes,
                has_unlimited=self._num_unlimited > 0 or limit_bytes is None,
            )
            if share_bytes is not None:
                above_bytes[holder] = self.used_by(holder) - share_bytes
        comes_last = above_bytes.pop(tenant, 0) < 0

        def may_leave(key: ChunkKey) -> bool:
            holder = self._entries[key].tenant
            if holder == tenant:
                return not comes_last
            if holder not in above_bytes:
                return True
            if above_bytes[holder] <= 0:
                return False
            above_bytes[holder] -= self._entries[key].stored_bytes
            return True

        yield from self._filtered(
            may_leave, tenants=[holder for holder in self._used_by_tenant if above_bytes.get(holder, 1) > 0]
        )
        if comes_last and tenant in self._by_tenant:
            yield from self._mine(tenant)

    def _mine(self, tenant: str) -> Iterator[ChunkKey]:
        """A tenant's own records, in the policy's order."""
        return self._filtered(lambda key: self._entries[key].tenant == tenant, tenants=[tenant])

    def _filtered(self, may_leave: Callable[[ChunkKey], bool], *, tenants: list[str]) -> Iterator[ChunkKey]:
        """The policy's order without what may not leave; after many of those, the order of last use of `tenants`."""
        seen: set[ChunkKey] = set()
        num_passed = 0
        for key in self._policy.victims():
            if may_leave(key):
                seen.add(key)
                yield key
            else:
                num_passed += 1
                if num_passed >= _MAX_PASSED:
                    break
        else:
            return
        for holder in tenants:
            for key in self._by_tenant[holder]:
                if key not in seen and key not in self._pins and may_leave(key):
                    yield key

    def _over_quota(
        self, need_bytes: int, *, tenant: str, now_s: float, is_busy: Callable[[ChunkKey], bool]
    ) -> dict[ChunkKey, TierEntry] | None:
        """Records of the tenant without which `need_bytes` more are within its quota; None if there are too few."""
        limit_bytes = self._quotas.limit_bytes(tenant)
        leaving: dict[ChunkKey, TierEntry] = {}
        if limit_bytes is None:
            return leaving
        over_bytes = self.used_by(tenant) + need_bytes - limit_bytes
        if need_bytes > limit_bytes:
            return None
        if over_bytes > 0:
            self._end_pins(now_s)
            mine = self._candidates(self._mine(tenant), is_busy=is_busy)
            if self._collect(mine, leaving, over_bytes):
                return None
        return leaving

    def _evict(self, leaving: Iterable[ChunkKey]) -> list[ChunkKey]:
        keys = list(leaving)
        for key in keys:
            self.remove(key, evicted=True)
        return keys

    def _collect(self, candidates: Iterable[ChunkKey], leaving: dict[ChunkKey, TierEntry], need_bytes: int) -> int:
        """Add candidates to `leaving` until `need_bytes` are freed; the bytes that are missing then."""
        for key in candidates:
            entry = self._entries[key]
            leaving[key] = entry
            need_bytes -= entry.stored_bytes
            if need_bytes <= 0:
                break
        return max(0, need_bytes)

    def _count(self, key: ChunkKey, entry: TierEntry, sign: int) -> None:
        """Add an entry to the sums (+1), or take it out (-1)."""
        change_bytes = sign * entry.stored_bytes
        tenant = entry.tenant
        self.used_bytes += change_bytes
        self._used_by_tenant[tenant] += change_bytes
        if not self._used_by_tenant[tenant]:
            del self._used_by_tenant[tenant]
        if key in self._pins:
            self.pinned_bytes += change_bytes
        if not self._quotas.are_set:
            return
        keys = self._by_tenant.setdefault(tenant, OrderedDict())
        had_any = bool(keys)
        if sign > 0:
            keys[key] = None
        else:
            del keys[key]
        if bool(keys) != had_any:
            limit_bytes = self._quotas.limit_bytes(tenant)
            self._num_unlimited += sign if limit_bytes is None else 0
            self._promised_bytes += sign * self._claim_bytes(limit_bytes or 0)
        if not keys:
            del self._by_tenant[tenant]

    def _claim_bytes(self, limit_bytes: int) -> int:
        return limit_bytes if self._high_bytes is None else min(limit_bytes, self._high_bytes)
