"""What a node store and its clients count."""

from typing import Final

from cluster.telemetry import counter, gauge, histogram

TIER_READS: Final = counter(
    "learnonce_kvstore_tier_reads_total",
    "Reads of one record from a tier, by outcome (hit, miss, corrupt, error, late).",
    when_it_moves="corrupt or error: look at the device and at the log; such chunks were dropped and recomputed.",
    labels=("tier", "outcome"),
)
TIER_WRITES: Final = counter(
    "learnonce_kvstore_tier_writes_total",
    "Writes of one record to a tier, by outcome (stored, full, error, paused).",
    when_it_moves="full: every record is pinned or the tier is too small; error, paused: the device fails.",
    labels=("tier", "outcome"),
)
EVICTIONS: Final = counter(
    "learnonce_kvstore_evictions_total",
    "Records that left a tier to make room.",
    when_it_moves="Rising beside a falling hit ratio: give the tier more bytes.",
    labels=("tier",),
)
TIER_BYTES: Final = gauge(
    "learnonce_kvstore_tier_bytes",
    "Bytes of records in a tier.",
    when_it_moves="At capacity is normal.",
    labels=("tier",),
)
TIER_CHUNKS: Final = gauge(
    "learnonce_kvstore_tier_chunks",
    "Records in a tier.",
    when_it_moves="Zero after a restart without a file tier is normal.",
    labels=("tier",),
)
PINNED_BYTES: Final = gauge(
    "learnonce_kvstore_pinned_bytes",
    "Bytes of the arena that leases or reservations hold.",
    when_it_moves="Near the arena's size: writes are refused; a client may have stopped with its leases.",
)
WRITE_BEHIND: Final = counter(
    "learnonce_kvstore_write_behind_total",
    "Chunks of the arena on their way to a lower tier, by outcome (stored, failed, dropped, evicted).",
    when_it_moves="dropped, evicted: the device is slower than chunks come; failed: see tier writes.",
    labels=("tier", "outcome"),
)
SESSIONS: Final = counter(
    "learnonce_kvstore_sessions_total",
    "Connections to the store, by outcome (opened, refused, expelled, closed).",
    when_it_moves="refused: a wrong secret or too many connections; expelled: a client broke the protocol.",
    labels=("outcome",),
)
REQUESTS: Final = counter(
    "learnonce_kvstore_requests_total",
    "Requests that the store answered, by kind.",
    when_it_moves="The traffic of this node.",
    labels=("kind",),
)
RESERVATIONS: Final = counter(
    "learnonce_kvstore_reservations_total",
    "Reservations by outcome (granted, held, writing, full, quota, committed, aborted, expired, refused).",
    when_it_moves="full: the arena is too small for what is pinned; quota: a tenant holds all it may; "
    "expired: a writer stopped; refused: a bug.",
    labels=("outcome",),
)
CORRUPT_REPORTS: Final = counter(
    "learnonce_kvstore_corrupt_reports_total",
    "Chunks of the arena that a client found to be damaged.",
    when_it_moves="Never moves on sound machines: check the memory, then look for a client that writes late.",
)
EVENTS: Final = counter(
    "learnonce_kvstore_events_total",
    "Events published, by change.",
    when_it_moves="The traffic of this node.",
    labels=("change",),
)
FEED_RESYNCS: Final = counter(
    "learnonce_kvstore_feed_resyncs_total",
    "Times a subscriber asked a store again, by reason (start, gap, epoch, silence).",
    when_it_moves="gap: events come faster than the subscriber reads; silence: a store is gone or frozen.",
    labels=("reason",),
)
FEED_REJECTED: Final = counter(
    "learnonce_kvstore_feed_rejected_total",
    "Event messages that were forged, damaged or of another cluster.",
    when_it_moves="Somebody else sends to this port, or secrets differ between nodes.",
)
CLIENT_CALLS: Final = counter(
    "learnonce_kvstore_client_calls_total",
    "Calls of a store client, by call and outcome (answered, late, unavailable).",
    when_it_moves="late, unavailable: the store is frozen, dead or overloaded; callers recompute.",
    labels=("call", "outcome"),
)
CLIENT_READS: Final = counter(
    "learnonce_kvstore_client_reads_total",
    "Chunks that a client asked to read, by outcome (hit, miss, corrupt, late).",
    when_it_moves="corrupt: see corrupt reports; late: deadlines are shorter than loads take.",
    labels=("outcome",),
)
CLIENT_READ_SECONDS: Final = histogram(
    "learnonce_kvstore_client_read_seconds",
    "Seconds of one read call, checksums included.",
    when_it_moves="Rises when chunks come from files.",
)
CLIENT_CONNECTS: Final = counter(
    "learnonce_kvstore_client_connects_total",
    "Connection attempts of a store client, by outcome (connected, unreachable, refused).",
    when_it_moves="refused: the cluster secrets differ; unreachable: the store is being restarted.",
    labels=("outcome",),
)

# The holder's end of a data path between nodes (`kvstore.transport`).
TRANSPORT_SENDS: Final = counter(
    "learnonce_kvstore_transport_sends_total",
    "Requests of other nodes for a record, by outcome (sent, refused, busy, malformed, late, gone).",
    when_it_moves="malformed: not a node of ours; refused: expired leases, or somebody guesses; late: a slow network.",
    labels=("transport", "outcome"),
)
TRANSPORT_SENT_BYTES: Final = counter(
    "learnonce_kvstore_transport_sent_bytes_total",
    "Bytes of records sent to other nodes.",
    when_it_moves="The traffic out of this node.",
    labels=("transport",),
)

# Records at rest (`kvstore.tiers.sealed`).
SEALED: Final = counter(
    "learnonce_kvstore_sealed_records_total",
    "Records that an encrypted tier sealed or opened, by outcome (sealed, opened, refused, tampered, other_key).",
    when_it_moves="tampered: somebody or something changes the medium; other_key: the key was rotated, or another "
    "cluster writes to the same place.",
    labels=("tier", "outcome"),
)

# The NIXL sidecar (`kvstore.transport.nixl_service`).
NIXL_SIDECARS: Final = counter(
    "learnonce_kvstore_nixl_sidecars_total",
    "NIXL sidecars started, by cause (first, quarantine, peers, died, hung, unusable).",
    when_it_moves="died: a peer or the library crashed it; hung: it was frozen; quarantine: peers stop during "
    "transfers; unusable: NIXL cannot be used on this node, the log says why.",
    labels=("cause",),
)
NIXL_QUARANTINES: Final = counter(
    "learnonce_kvstore_nixl_quarantines_total",
    "Landing slots that were put into quarantine, by reason (late, failed).",
    when_it_moves="A peer was slow, frozen or died while it was read from; bytes may still land in the slot.",
    labels=("reason",),
)
NIXL_QUARANTINED_BYTES: Final = gauge(
    "learnonce_kvstore_nixl_quarantined_bytes",
    "Bytes of landing slots in quarantine now.",
    when_it_moves="Rises with peers that stop; at `nixl.quarantine_ratio` of the landing half the agent is replaced.",
)

# Mutual TLS (`kvstore.tls`).
TLS_EXPIRES: Final = gauge(
    "learnonce_kvstore_tls_expires_unix_seconds",
    "When this node's certificate expires, as Unix time; 0 without TLS.",
    when_it_moves="Near now: replace the files and restart the store, or other nodes will refuse this one.",
)

# Chunks of other nodes (`kvstore.peers`) and for them (`kvstore.peer_server`).
PEERS: Final = gauge(
    "learnonce_kvstore_peers",
    "Stores of other nodes, by state (up, down).",
    when_it_moves="down: a node is gone, frozen or cut off, or refuses this one; its chunks count as missing.",
    labels=("state",),
)
PEER_CHUNKS: Final = gauge(
    "learnonce_kvstore_peer_chunks",
    "Chunks that other nodes are known to hold.",
    when_it_moves="At peers.max_known_chunks the longest known are forgotten; falls when a node goes.",
)
PEER_READS: Final = counter(
    "learnonce_kvstore_peer_reads_total",
    "Chunks asked of another node, by data path and outcome (hit, miss, gone, refused, corrupt).",
    when_it_moves="gone, refused, corrupt: look at that node and at the network; "
    "miss: it evicted the chunk since it announced it.",
    labels=("transport", "outcome"),
)
PEER_READ_BYTES: Final = counter(
    "learnonce_kvstore_peer_read_bytes_total",
    "Bytes of records copied from other nodes, by data path.",
    when_it_moves="The traffic into this node.",
    labels=("transport",),
)
PEER_READ_SECONDS: Final = histogram(
    "learnonce_kvstore_peer_read_seconds",
    "Seconds from asking another node for a chunk until it is in the arena.",
    when_it_moves="Rises with the size of chunks and with transfers at the same time.",
)
PEER_PATH_CHANGES: Final = counter(
    "learnonce_kvstore_peer_path_changes_total",
    "Times that a pair of nodes took a data path, by path (none: there is no way).",
    when_it_moves="More often than nodes come: a path fails and is left; the log says why.",
    labels=("transport",),
)
PEER_SESSIONS: Final = counter(
    "learnonce_kvstore_peer_sessions_total",
    "Connections of other nodes' stores, by outcome (opened, refused, expelled, closed).",
    when_it_moves="refused: a stranger, a wrong secret, or too many; expelled: silent for peers.lease_s, or a bug.",
    labels=("outcome",),
)
PEER_LOANS: Final = counter(
    "learnonce_kvstore_peer_loans_total",
    "Chunks that other nodes asked for, by data path and outcome (lent, miss, full).",
    when_it_moves="miss: evicted since it was announced; full: the data path has no room for more transfers.",
    labels=("transport", "outcome"),
)

# Many tiers (`kvstore.mover`, `kvstore.upkeep`).
FETCHES: Final = counter(
    "learnonce_kvstore_fetches_total",
    "Chunks fetched into the arena for a reader, by source and outcome (whole, failed).",
    when_it_moves="failed: the next source is asked, then the chunk is recomputed; see the source's own counters.",
    labels=("source", "outcome"),
)
EXPIRED: Final = counter(
    "learnonce_kvstore_expired_total",
    "Records dropped because they were older than store.ttl_s.",
    when_it_moves="At the rate at which chunks were learned a TTL ago; a jump means that clocks disagree.",
    labels=("tier",),
)
VERIFIED: Final = counter(
    "learnonce_kvstore_verified_total",
    "Records read again by `learnonce store verify`, by outcome (good, bad, unread).",
    when_it_moves="bad: the medium changes bytes; such chunks were dropped.",
    labels=("tier", "outcome"),
)
PINS: Final = counter(
    "learnonce_kvstore_pins_total",
    "Chunks that clients asked to pin, by outcome (pinned, refused).",
    when_it_moves="refused: not held by this node, or pins hold store.max_pinned_ratio of its tiers.",
    labels=("outcome",),
)
STREAMS: Final = counter(
    "learnonce_kvstore_streams_total",
    "Chunks that clients asked to stream, by outcome (held, arriving, miss).",
    when_it_moves="The traffic of readers that start before a chunk is whole.",
    labels=("outcome",),
)

# The NVMe pool (`kvstore.tiers.nvme`).
NVME_DEVICES: Final = gauge(
    "learnonce_kvstore_nvme_devices",
    "Folders of the NVMe pool, by state (serving, read_only, paused, unusable).",
    when_it_moves="read_only: the device refuses writes; paused: it fails or does not answer, and its chunks count as "
    "missing; unusable: left out since the start, the log says why.",
    labels=("state",),
)
