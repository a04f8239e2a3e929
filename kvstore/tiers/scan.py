"""Finding the records of a folder again after a start, while the folder is in use.

Covers: the order of the work and its threads. Does not cover: what is found (`kvstore.tiers.findings`), the files
(`kvstore.tiers.records`).

Three steps: list all names (length and time of the last write come with them), read the headers, youngest first, and
enter the records in the books, oldest first, so that a policy by age sees the order in which they were written. A key
that is asked for before its header was read is looked for by its path.

No list of the records is kept beside them. Listing 100,000 names takes 1.2 to 1.7 s on the reference machine with a
cold cache, reading their headers another 3 to 4 s, in which everything works already: a list would save those, and be
one more thing that can be wrong.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from kvstore.container import ALIGN
from kvstore.keys import ChunkKey
from kvstore.tiers.buffers import AlignedBuffers
from kvstore.tiers.findings import NUM_PARTS
from kvstore.tiers.ledger import Ledger
from kvstore.tiers.records import RecordFiles

log = logging.getLogger(__name__)

_BATCH: Final = 256
"""Headers, or entries for the books, between two looks at whether to stop."""


class Scan:
    """One scan of one folder.

    Args:
        files: The folder.
        ledger: Told of everything.
        buffers: For headers.
        threads: For listing and for headers: they wait for the device most of the time.
        read_header: Reads the header of one key, by way of a page, and tells the ledger; whether that was news. Called
            on several threads.
        retire: Deletes records that leave for others.
        on_found: Told of keys whose headers were read, some at a time.
    """

    def __init__(
        self,
        files: RecordFiles,
        ledger: Ledger,
        *,
        buffers: AlignedBuffers,
        threads: int,
        read_header: Callable[[ChunkKey, memoryview], bool],
        retire: Callable[[list[ChunkKey]], object],
        on_found: Callable[[Sequence[ChunkKey]], None],
    ) -> None:
        self._files = files
        self._ledger = ledger
        self._buffers = buffers
        self._threads = threads
        self._read_header = read_header
        self._retire = retire
        self._on_found = on_found
        self.is_stopping = False
        """Set it to end the scan early."""

    def run(self) -> bool:
        """Do all of it, on this thread and a pool; whether it came to its end."""
        ledger = self._ledger
        with ThreadPoolExecutor(self._threads, thread_name_prefix="kvstore-scan") as pool:
            list(pool.map(self._list_part, range(NUM_PARTS)))
            with ledger.lock:
                ledger.findings.note_all_listed()
                # A part that could not be listed counts as unlisted for good: its keys are looked for one by one.
            self._retire(ledger.trim())
            with ledger.lock:
                keys = ledger.findings.unread()
            list(pool.map(self._read_headers, [keys[start : start + _BATCH] for start in range(0, len(keys), _BATCH)]))
        while not self.is_stopping and self.enter_some():
            pass
        if self.is_stopping:
            return False
        ledger.end_scan()
        return True

    def enter_some(self) -> bool:
        """Move some found records into the books; whether there may be more that can be moved now."""
        with self._ledger.lock:
            keys = self._ledger.findings.next_to_enter(_BATCH)
        self._retire(self._ledger.enter(keys))
        # Those that were put off are being read, perhaps for long: they are entered with others, or leave for them.
        return any(self._ledger.findings.find(key) is None for key in keys)

    def _list_part(self, part: int) -> None:
        if self.is_stopping:
            return
        try:
            listed = list(self._files.listing(part))
        except OSError as error:
            log.warning("file_tier_part_not_listed folder=%s part=%02x error=%s", self._files.folder, part, error)
            return
        with self._ledger.lock:
            self._ledger.findings.note_listed(part, listed)

    def _read_headers(self, keys: Sequence[ChunkKey]) -> None:
        if self.is_stopping:
            return
        # Without the lock: a key that has changed meanwhile is found out by the ledger.
        findings = self._ledger.findings
        with self._buffers.take(ALIGN) as page:
            found = [key for key in keys if findings.is_unread(key) and self._read_header(key, page)]
        if found:
            self._on_found(found)
