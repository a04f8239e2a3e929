"""What a node store and its clients count."""

from typing import Final

from cluster.telemetry import counter, gauge, histogram

TIER_READS: Final = counter(
    "learnonce_kvstore_tier_reads_total",
    "Reads of one record from a tier, by outcome (hit, miss, corrupt, error).",
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
    "Committed chunks on their way to the file tier, by outcome (stored, failed, dropped, evicted).",
    when_it_moves="dropped, evicted: the device is slower than chunks come; failed: see tier writes.",
    labels=("outcome",),
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
    "Reservations by outcome (granted, held, writing, full, committed, aborted, expired, refused).",
    when_it_moves="full: the arena is too small for what is pinned; expired: a writer stopped; refused: a bug.",
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
