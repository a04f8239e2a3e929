"""A chunk that is there already, for whoever reads chunks as streams.

Covers: a read lease that looks like a stream of which everything has arrived.
Does not cover: chunks on their way (`kvstore.client`).
"""

from kvstore.interfaces import ChunkMeta, ReadLease, ReleasedAtExit
from kvstore.keys import ChunkKey


class WholeStream(ReleasedAtExit):
    """A read lease as a `StreamLease`.

    Args:
        lease: Of a verified chunk; owned from now on.
    """

    def __init__(self, lease: ReadLease) -> None:
        self._lease = lease

    @property
    def key(self) -> ChunkKey:
        """The chunk's key."""
        return self._lease.key

    @property
    def meta(self) -> ChunkMeta | None:
        """How to read the payload."""
        return self._lease.meta

    @property
    def payload(self) -> memoryview:
        """Verified bytes."""
        return self._lease.payload

    def wait_bytes(self, num_bytes: int, *, deadline_s: float) -> int:
        """All of them."""
        return len(self._lease.payload)

    def finish(self, *, deadline_s: float) -> bool:
        """They are true."""
        return True

    def release(self) -> None:
        """Give the lease back."""
        self._lease.release()
