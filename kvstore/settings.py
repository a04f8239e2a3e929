"""Settings of one node's store.

Covers: sizes, bounds and times of the node store process. Does not cover: where it runs (`cluster.settings`).
"""

from pydantic import Field, PositiveFloat, PositiveInt

from cluster.settings_base import SettingsBase


class FileTierSettings(SettingsBase):
    """Records as files below the arena."""

    folder: str = "~/.cache/learnonce/chunks"
    """Folder of this node's records, by cluster name below it; mode 0700, one store at a time owns it."""
    capacity_bytes: PositiveInt = 8 << 30
    """Bytes of records kept; the least recently used leave first."""
    write_behind_chunks: PositiveInt = 256
    """Committed chunks that may wait to be written; more stay in the arena only, and are counted."""
    io_threads: int = Field(default=4, ge=1, le=64)
    """Threads that read and write files."""
    lock_wait_s: float = Field(default=5.0, ge=0)
    """Seconds to wait for a former owner of the folder to go."""
    breaker_failures: PositiveInt = 3
    """Device errors in a row after which the tier pauses (reads and writes apart)."""
    breaker_pause_s: PositiveFloat = 5.0
    """Seconds of the first pause; doubles up to twelve times this while errors go on."""


class StoreSettings(SettingsBase):
    """One node's store."""

    host_bytes: PositiveInt | None = None
    """Size of the arena in shared memory; memory is taken as chunks fill it. None: `host_ram_share`."""
    host_ram_share: float = Field(default=0.2, gt=0, le=0.9)
    """Share of the node's memory (or of the container's limit) for the arena when `host_bytes` is not set."""
    file: FileTierSettings | None = FileTierSettings()
    """Records as files below the arena, found again after a restart; null keeps chunks in memory only."""
    reservation_s: PositiveFloat = 60.0
    """Seconds in which a writer must commit; then others may write the chunk."""
    handshake_s: PositiveFloat = 2.0
    """Seconds in which a new connection must have proven the secret."""
    max_sessions: PositiveInt = 128
    """Connections at one time."""
    max_keys_per_request: int = Field(default=8192, ge=1, le=16384)
    """Keys in one lookup, wait or read; a client splits longer ones."""
    max_leases_per_session: PositiveInt = 16384
    """Leases and reservations of one connection."""
    max_waiting_per_session: PositiveInt = 256
    """Requests of one connection that wait for a write or a file."""
    max_event_ring: PositiveInt = 16384
    """Events kept for subscribers that missed some; who missed more gets a snapshot."""
    heartbeat_s: PositiveFloat = 0.5
    """Seconds between heartbeats of the event stream."""
    events_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the event stream; None takes a free one."""
    snapshot_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of snapshots and replays; None takes a free one."""


def resolve_host_bytes(settings: StoreSettings, *, memory_bytes: int) -> int:
    """Size of the arena on a machine (or in a container) with `memory_bytes`.

    Example:
        >>> resolve_host_bytes(StoreSettings(host_ram_share=0.25), memory_bytes=1000)
        250
        >>> resolve_host_bytes(StoreSettings(host_bytes=64), memory_bytes=1000)
        64
    """
    if settings.host_bytes is not None:
        return settings.host_bytes
    return int(settings.host_ram_share * memory_bytes)
