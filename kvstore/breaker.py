"""A circuit breaker: after failures in a row, fail fast for a while, then try once.

Covers: the decision, over times that the caller passes in.
Does not cover: what a failure is, or counting it.
"""


class Breaker:
    """Closed (all pass), open (none pass until a time), half open (one may try).

    Args:
        failures: Failures in a row that open it.
        first_pause_s: Seconds it stays open the first time.
        max_pause_s: The pause doubles with every failed try, up to this.

    Example:
        >>> breaker = Breaker(failures=2, first_pause_s=1.0, max_pause_s=8.0)
        >>> breaker.record_failure(now_s=0.0); breaker.allows(now_s=0.0)
        True
        >>> breaker.record_failure(now_s=0.0); breaker.allows(now_s=0.5), breaker.allows(now_s=1.0)
        (False, True)
        >>> breaker.record_failure(now_s=1.0); breaker.allows(now_s=2.5), breaker.allows(now_s=3.0)
        (False, True)
        >>> breaker.record_success(); breaker.allows(now_s=3.0)
        True
    """

    def __init__(self, *, failures: int, first_pause_s: float, max_pause_s: float) -> None:
        self._limit = failures
        self._first_pause_s = first_pause_s
        self._max_pause_s = max_pause_s
        self._failures = 0
        self._open_until_s = float("-inf")
        self._pause_s = first_pause_s

    @property
    def is_open(self) -> bool:
        """Whether failures have opened it and no success has closed it since."""
        return self._failures >= self._limit

    def allows(self, *, now_s: float) -> bool:
        """Whether a try may be made now."""
        return not self.is_open or now_s >= self._open_until_s

    def record_success(self) -> None:
        """A try worked: closed again, and the pause starts small again."""
        self._failures = 0
        self._pause_s = self._first_pause_s

    def record_failure(self, *, now_s: float) -> None:
        """A try failed. Tries that began before the pause and fail in it do not make it longer."""
        self._failures += 1
        if self.is_open and now_s >= self._open_until_s:
            self._open_until_s = now_s + self._pause_s
            self._pause_s = min(2 * self._pause_s, self._max_pause_s)
