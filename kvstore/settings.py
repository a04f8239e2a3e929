"""Settings of one node's store.

Covers: sizes, bounds and times of the node store process. Does not cover: where it runs (`cluster.settings`).
"""

import os
from collections import Counter
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from cluster.errors import SettingsError
from cluster.settings_base import SettingsBase
from kvstore.object_url import split_object_url

STORE_KEY_VARIABLE: Final = "LEARNONCE_STORE_KEY"
"""Environment variable of the key that records are encrypted with at rest: 32 bytes in hex. Several may be given,
separated by commas, while one replaces another: the first one seals, all of them open."""

MIN_HOST_BYTES: Final = 1 << 20
"""Smallest arena: sixteen chunks of one page."""
MIN_STAGING_BYTES: Final = 8 << 20
"""Smallest memory of a NIXL sidecar: three pieces that land, and as much that is offered."""
MAX_HEARTBEAT_S: Final = 1.0
"""Followers of events take three seconds of silence for a store's end (`kvstore.events.DirectoryFeed`)."""

PolicyName = Literal["cost", "lru", "s3fifo", "arc"]


def _as_text(value: object) -> object:
    """`true` and `5` as YAML reads them, where a client wants text."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else value


OptionText = Annotated[str, BeforeValidator(_as_text, json_schema_input_type=str | bool | int)]


class NvmeSettings(SettingsBase):
    """Records as files on local disks, below the arena."""

    folders: tuple[str, ...] = Field(default=("~/.cache/learnonce/chunks",), min_length=1)
    """One folder per device; records are striped over them. The cluster's name is added below each; mode 0700, one
    store at a time owns them."""
    capacity_bytes: PositiveInt = 8 << 30
    """Bytes of records kept, over all folders."""
    high_ratio: float = Field(default=1.0, gt=0.1, le=1.0)
    """Share of the capacity above which records are evicted."""
    low_ratio: float = Field(default=0.95, gt=0.1, le=1.0)
    """Share of the capacity down to which one eviction goes, so that not every write has to evict."""
    policy: PolicyName = "cost"
    """Which records leave first."""
    admit: Literal["all", "reused"] = "all"
    """Which chunks are written: every one, or only those that were read again after they were learned (less wear)."""
    write_behind_chunks: PositiveInt = 256
    """Committed chunks that may wait to be written; more stay in the arena only, and are counted."""
    io_threads: int = Field(default=4, ge=1, le=64)
    """Threads that read and write files."""
    lock_wait_s: float = Field(default=5.0, ge=0)
    """Seconds to wait for a former owner of a folder to go."""
    breaker_failures: PositiveInt = 3
    """Device errors in a row after which a device pauses (reads and writes apart)."""
    breaker_pause_s: PositiveFloat = 5.0
    """Seconds of the first pause; doubles up to twelve times this while errors go on."""
    slow_read_s: PositiveFloat = 10.0
    """A read that takes longer counts as a device error."""

    @field_validator("folders")
    @classmethod
    def _check_folders(cls, folders: tuple[str, ...]) -> tuple[str, ...]:
        names = Counter(os.path.abspath(os.path.expanduser(folder)) for folder in folders)
        twice = sorted(name for name, count in names.items() if count > 1)
        if twice:
            raise ValueError(f"named twice: {', '.join(twice)}; one folder per device")
        return folders

    @model_validator(mode="after")
    def _check_ratios(self) -> Self:
        if self.low_ratio > self.high_ratio:
            raise ValueError(f"low_ratio {self.low_ratio} must not be above high_ratio {self.high_ratio}: set both")
        return self


class ObjectSettings(SettingsBase):
    """Records as objects in a bucket that all nodes share, below the disks."""

    # A URL may hold a secret, by mistake.
    model_config = ConfigDict(hide_input_in_errors=True)

    url: str
    """`s3://bucket/prefix`, `gs://…`, `az://…`, `file:///folder`; or `arrow+…` for what pyarrow.fs speaks, for example
    `arrow+file:///mnt/nfs` or `arrow+hdfs://host:port/folder`. Credentials come from the environment."""
    options: dict[str, OptionText] = Field(default_factory=dict)
    """Options of the client, by the names that obstore (or, behind `arrow+`, pyarrow.fs) documents, for example
    endpoint, region, allow_http. They are shown with the settings: secrets belong in the environment."""
    capacity_bytes: PositiveInt | None = None
    """Bytes kept in the bucket, whoever wrote them, as far as this node knows; null leaves it to the bucket's
    life-cycle rules. Set it alike on all nodes."""
    policy: PolicyName = "cost"
    """Which records leave first, where there is a capacity."""
    admit: Literal["all", "reused"] = "all"
    """Which chunks are written."""
    write_behind_chunks: PositiveInt = 256
    """Chunks that may wait to be written; more are not, and are counted."""
    io_threads: int = Field(default=4, ge=1, le=64)
    """Requests at the same time."""
    connect_timeout_s: PositiveFloat = 1.0
    """Seconds for a connection."""
    timeout_s: PositiveFloat = 2.0
    """Seconds for one request, beside the time that its bytes take at `min_bytes_per_s`."""
    min_bytes_per_s: PositiveFloat = 20e6
    """A slower answer is given up."""
    max_retries: int = Field(default=2, ge=0, le=10)
    """Repeats of a request that failed."""
    deadline_s: PositiveFloat = 8.0
    """Seconds for one operation with its repeats, beside the time of its bytes; nothing outlives it."""
    refresh_s: PositiveFloat = 60.0
    """Seconds between two listings of the bucket, which find what other nodes wrote."""
    breaker_failures: PositiveInt = 3
    """Failures in a row after which the tier pauses."""
    breaker_pause_s: PositiveFloat = 5.0
    """Seconds of the first pause; doubles up to twelve times this while errors go on."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        try:
            split_object_url(url)
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return url


class PeerSettings(SettingsBase):
    """Chunks from the stores of other nodes."""

    transports: tuple[Literal["shm", "nixl", "tcp"], ...] = Field(default=("shm", "tcp"), min_length=1)
    """Data paths in order of preference; a pair of nodes takes the first that both can use. Without RDMA sockets need
    less CPU than NIXL, and NIXL has no authentication of its own: use it on a private network only."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the control plane for other nodes; null takes a free one."""
    data_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the TCP data path; null takes a free one."""
    lease_s: PositiveFloat = 30.0
    """Seconds after which a lease of a silent peer ends."""
    heartbeat_s: PositiveFloat = 5.0
    """Seconds between signs of life of a peer that holds leases."""
    connect_timeout_s: PositiveFloat = 1.0
    """Seconds for a connection to another node."""
    transfer_s: PositiveFloat = 5.0
    """Seconds for one transfer, beside the time that its bytes take at `min_bytes_per_s`."""
    min_bytes_per_s: PositiveFloat = 20e6
    """A slower peer is given up."""
    max_transfers: int = Field(default=8, ge=1, le=256)
    """Transfers into this node at the same time."""
    max_connections_per_peer: int = Field(default=4, ge=1, le=64)
    """Data connections that one peer may open."""
    breaker_pause_s: PositiveFloat = 1.0
    """Seconds for which a peer that failed is not asked; doubles up to twelve times this."""
    news_s: float = Field(default=0.2, ge=0, le=10)
    """Seconds for which a read of a chunk that nobody is known to hold waits for the news that another node does: a
    replica there may have just learned it for this request."""
    max_known_chunks: PositiveInt = 500_000
    """Chunks of other nodes that are remembered (about half a kilobyte each); beyond it the longest known are
    forgotten."""

    @field_validator("transports")
    @classmethod
    def _check_transports(cls, transports: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(transports)) < len(transports):
            raise ValueError(f"each data path once, in order of preference; given: {', '.join(transports)}")
        return transports

    @model_validator(mode="after")
    def _check_times(self) -> Self:
        if 2 * self.heartbeat_s > self.lease_s:
            raise ValueError(
                f"leases of a silent peer end after lease_s {self.lease_s:g}: "
                f"heartbeat_s must be at most half of it, is {self.heartbeat_s:g}"
            )
        return self


class NixlSettings(SettingsBase):
    """The NIXL sidecar: used where `peers.transports` names `nixl`."""

    staging_bytes: int = Field(default=256 << 20, ge=MIN_STAGING_BYTES)
    """Memory through which NIXL transfers pass, in the sidecar's own arena: half for what lands, half for what is
    offered. A sidecar that is being replaced keeps its own until it has ended what it does."""
    quarantine_ratio: float = Field(default=0.25, gt=0, le=1.0)
    """Share of the landing half in quarantine above which the agent is replaced."""
    progress_delay_us: PositiveInt = 1000
    """Pause of NIXL's progress thread between two looks; 0 would burn a core."""
    net_devices: str = ""
    """Network devices that UCX may use (`UCX_NET_DEVICES`); "" lets UCX choose, on all interfaces."""


class TlsSettings(SettingsBase):
    """Mutual TLS on the ports between nodes."""

    certificate: str
    """PEM file of this node's certificate, chain included."""
    key: str
    """PEM file of its private key."""
    authority: str
    """PEM file of the authority that signed the certificates of all nodes."""

    def absolute(self) -> Self:
        """The same files for a process that runs in another folder."""
        names = {name: os.path.abspath(os.path.expanduser(path)) for name, path in self.model_dump().items()}
        return self.model_copy(update=names)


class StoreSettings(SettingsBase):
    """One node's store."""

    RENAMED: ClassVar[dict[str, str]] = {"file": "nvme, whose `folders` is a list, one folder per device"}

    host_bytes: Annotated[int, Field(ge=MIN_HOST_BYTES)] | None = None
    """Size of the arena in shared memory; memory is taken as chunks fill it. None: `host_ram_share`."""
    host_ram_share: float = Field(default=0.2, gt=0, le=0.9)
    """Share of the node's memory (or of the container's limit) for the arena when `host_bytes` is not set."""
    host_policy: PolicyName = "cost"
    """Which records leave the arena first."""
    nvme: NvmeSettings | None = NvmeSettings()
    """Records as files below the arena, found again after a restart; null keeps none."""
    object: ObjectSettings | None = None
    """Records as objects that all nodes share, found again after a restart; null keeps none."""
    peers: PeerSettings | None = PeerSettings()
    """Chunks from the stores of other nodes; null reads none and offers none."""
    nixl: NixlSettings = NixlSettings()
    """The NIXL sidecar."""
    tls: TlsSettings | None = None
    """Mutual TLS between nodes; null uses the cluster's secret alone, and does not hide the bytes."""
    encrypt_at_rest: bool = False
    """Whether records on disks and in buckets are encrypted (AES-256-GCM, a key per tenant derived from
    `LEARNONCE_STORE_KEY`)."""
    ttl_s: PositiveFloat | None = None
    """Seconds after which a chunk is forgotten, counted from when it was learned; null keeps it."""
    quota_bytes_by_tenant: dict[str, PositiveInt] = Field(default_factory=dict)
    """Bytes that a tenant may hold per tier of a node; who has more evicts its own chunks first."""
    default_quota_bytes: PositiveInt | None = None
    """The quota of tenants that are not named above; null: none."""
    max_pin_s: PositiveFloat = 86_400.0
    """Longest time for which a client may pin a chunk."""
    max_pinned_ratio: float = Field(default=0.5, ge=0, le=1)
    """Share of a tier that pins of clients may hold."""
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
    heartbeat_s: float = Field(default=0.5, gt=0, le=MAX_HEARTBEAT_S)
    """Seconds between heartbeats of the event stream."""
    events_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the event stream; None takes a free one."""
    snapshot_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of snapshots and replays; None takes a free one."""

    @model_validator(mode="after")
    def _check_ports(self) -> Self:
        names: dict[int, list[str]] = {}
        for name, port in self.ports().items():
            names.setdefault(port, []).append(name)
        for port, users in names.items():
            if len(users) > 1:
                raise ValueError(f"{' and '.join(users)} are both {port}: each needs a port of its own")
        return self

    def ports(self) -> dict[str, int]:
        """Ports that are set, by their setting's name below `store`."""
        named = {"events_port": self.events_port, "snapshot_port": self.snapshot_port}
        if self.peers is not None:
            named |= {"peers.port": self.peers.port, "peers.data_port": self.peers.data_port}
        return {name: port for name, port in named.items() if port is not None}


def resolve_host_bytes(settings: StoreSettings, *, memory_bytes: int) -> int:
    """Size of the arena on a machine (or in a container) with `memory_bytes`.

    Example:
        >>> resolve_host_bytes(StoreSettings(host_ram_share=0.25), memory_bytes=1000)
        250
        >>> resolve_host_bytes(StoreSettings(host_bytes=1 << 20), memory_bytes=1000)
        1048576
    """
    if settings.host_bytes is not None:
        return settings.host_bytes
    return int(settings.host_ram_share * memory_bytes)
