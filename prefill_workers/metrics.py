"""What prefill workers count."""

from typing import Final

from cluster.telemetry import counter, gauge, histogram

REQUESTS: Final = counter(
    "learnonce_prefill_requests_total",
    "Requests to prefill replicas, by outcome.",
    when_it_moves="full: add replicas. late, left: deadlines are shorter than the queue. failed: see the log.",
    labels=("outcome",),
)
SHARED: Final = counter(
    "learnonce_prefill_shared_total",
    "Requests that waited for the same prompt's computation instead of starting their own.",
    when_it_moves="Rises with bursts over the same documents; it is work saved.",
)
TOKENS: Final = counter(
    "learnonce_prefill_tokens_total",
    "Prompt tokens of finished prefills, by whether they were computed or reused.",
    when_it_moves="Computed near the prompt rate: documents are seldom repeated, or the store is too small.",
    labels=("source",),
)
NOT_STORED: Final = counter(
    "learnonce_prefill_chunks_not_stored_total",
    "Chunks of finished prefills that could not be read from the store in time.",
    when_it_moves="The store is full of pinned chunks, slow, or away.",
)
QUEUED_TOKENS: Final = gauge(
    "learnonce_prefill_queued_tokens",
    "Prompt tokens accepted and not yet computed.",
    when_it_moves="Near `max_queued_prompt_tokens`: add prefill replicas.",
)
SECONDS: Final = histogram(
    "learnonce_prefill_seconds",
    "Seconds from a prefill's acceptance until its chunks could be read.",
    when_it_moves="Above the plans' prefill deadline, decode replicas compute instead.",
)
