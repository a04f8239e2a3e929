"""Room in an arena: runs of pages, handed out in one piece and joined again when freed.

Covers: which pages are free.
Does not cover: the memory itself (`kvstore.tiers.host`), what to evict (`kvstore.policy`).

The law that holds after every call: the runs that are handed out and the free runs cover the arena, without overlap,
and no two free runs touch.
"""

import bisect
from collections.abc import Mapping

from cluster.errors import InvariantError


class ExtentAllocator:
    """Best fit over free runs, so that large runs stay large.

    Example:
        >>> room = ExtentAllocator(10)
        >>> a, b = room.allocate(4), room.allocate(4)
        >>> room.allocate(4), room.free_pages
        (None, 2)
        >>> room.free(a); room.free(b); dict(room.free_runs)
        {0: 10}
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.free_pages = 0
        """Pages that are not handed out."""
        self._used: dict[int, int] = {}
        self._free_by_start: dict[int, int] = {}
        self._free_by_stop: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []
        """Free runs as (pages, start), sorted."""
        if num_pages:
            self._insert(0, num_pages)

    @property
    def free_runs(self) -> Mapping[int, int]:
        """Pages of every free run, by its first page. A live view."""
        return self._free_by_start

    @property
    def free_starts(self) -> Mapping[int, int]:
        """First page of every free run, by the page behind its last. A live view."""
        return self._free_by_stop

    @property
    def used_runs(self) -> Mapping[int, int]:
        """Pages of every run that is handed out, by its first page. A live view."""
        return self._used

    def allocate(self, pages: int) -> int | None:
        """The first page of a run of `pages`, from the smallest free run that has them; None if none has."""
        at = bisect.bisect_left(self._by_size, (pages, -1))
        if pages <= 0 or at == len(self._by_size):
            return None
        size, start = self._by_size[at]
        self._remove(start, size)
        if size > pages:
            self._insert(start + pages, size - pages)
        self._used[start] = pages
        return start

    def free(self, start: int) -> None:
        """Take back the run that `allocate` handed out.

        Raises:
            InvariantError: No run that is handed out starts there.
        """
        pages = self._used.pop(start, None)
        if pages is None:
            raise InvariantError(f"no run of pages starts at {start}: freed twice?")
        stop = start + pages
        left = self._free_by_stop.get(start)
        if left is not None:
            self._remove(left, start - left)
            start = left
        right_pages = self._free_by_start.get(stop)
        if right_pages is not None:
            self._remove(stop, right_pages)
            stop += right_pages
        self._insert(start, stop - start)

    def shrink(self, start: int, pages: int) -> None:
        """Take back the tail of a run, so that its first `pages` pages stay handed out.

        Raises:
            InvariantError: No run that is handed out starts there, or it has fewer pages.
        """
        had = self._used.get(start, 0)
        if not 0 < pages <= had:
            raise InvariantError(f"a run of {had} pages at {start} cannot be cut to {pages}")
        if pages < had:
            self._used[start] = pages
            self._used[start + pages] = had - pages
            self.free(start + pages)

    def _insert(self, start: int, pages: int) -> None:
        self.free_pages += pages
        self._free_by_start[start] = pages
        self._free_by_stop[start + pages] = start
        bisect.insort(self._by_size, (pages, start))

    def _remove(self, start: int, pages: int) -> None:
        self.free_pages -= pages
        del self._free_by_start[start]
        del self._free_by_stop[start + pages]
        del self._by_size[bisect.bisect_left(self._by_size, (pages, start))]
