"""Work that this router has promised and that is not done: the load that placement sees.

Covers: booking a decision, releasing it at the first byte and at the end, forgetting it when its time is over.
Does not cover: what other routers have promised (it shows in the replicas' reports).
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Final

from kvstore.wire import Role
from router.policy import BookedTokens

_COMPACT_MIN: Final = 256
"""Entries below which ended bookings are not worth removing."""


class Booking:
    """One decision's promises. Releasing twice is harmless."""

    def __init__(self, ledger: "Ledger", promises: Sequence[BookedTokens]) -> None:
        self._ledger = ledger
        self._open = list(promises)

    @property
    def is_open(self) -> bool:
        """Whether anything of it is left to do."""
        return bool(self._open)

    def first_byte(self) -> None:
        """The prompt is computed: what was booked until then is done."""
        self._release([promise for promise in self._open if promise.until_first_byte])

    def end(self) -> None:
        """Nothing of it is left to do."""
        self._release(list(self._open))

    def _release(self, done: Sequence[BookedTokens]) -> None:
        for promise in done:
            self._open.remove(promise)
            self._ledger._add(promise, sign=-1)


class Ledger:
    """Booked tokens by replica.

    Guarantees:
        Memory follows the open bookings: ended ones are forgotten long before their deadline.
    """

    def __init__(self) -> None:
        self._tokens: Counter[tuple[Role, str]] = Counter()
        self._expiries: list[tuple[float, int, Booking]] = []
        self._order = itertools.count()
        self._compact_at = _COMPACT_MIN

    def book(self, promises: Sequence[BookedTokens], *, expires_s: float) -> Booking:
        """Add promises; they end at the latest when the clock passes `expires_s` (see `expire`)."""
        booking = Booking(self, promises)
        for promise in promises:
            self._add(promise, sign=1)
        heapq.heappush(self._expiries, (expires_s, next(self._order), booking))
        if len(self._expiries) >= self._compact_at:
            self._expiries = [entry for entry in self._expiries if entry[2].is_open]
            heapq.heapify(self._expiries)
            # Twice what is left, so that compacting costs a constant per booking.
            self._compact_at = max(_COMPACT_MIN, 2 * len(self._expiries))
        return booking

    def expire(self, now_s: float) -> None:
        """End bookings whose time is over: a caller that never came back must not block a replica."""
        while self._expiries and self._expiries[0][0] <= now_s:
            heapq.heappop(self._expiries)[2].end()

    def tokens(self, role: Role, replica_id: str) -> int:
        """Tokens booked on one replica."""
        return self._tokens[role, replica_id]

    def total(self, role: Role) -> int:
        """Tokens booked on all replicas of a role."""
        return sum(tokens for (booked_role, _), tokens in self._tokens.items() if booked_role is role)

    def _add(self, promise: BookedTokens, *, sign: int) -> None:
        key = (promise.role, promise.replica_id)
        self._tokens[key] += sign * promise.tokens
        if not self._tokens[key]:
            del self._tokens[key]
