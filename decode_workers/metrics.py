"""What decode workers count."""

from typing import Final

from cluster.telemetry import counter, histogram

REQUESTS: Final = counter(
    "learnonce_decode_requests_total",
    "Requests served by decode replicas, by how they were served.",
    when_it_moves="Mostly `fallback`: prefill replicas are missing or slow, see the fallback counter.",
    labels=("served_as",),
)
FALLBACKS: Final = counter(
    "learnonce_decode_fallbacks_total",
    "Prompts computed on the decode replica although a prefill replica was planned or chunks were to be loaded.",
    when_it_moves="absent, dead: start prefill replicas. late, refused: add some. not_stored: look at the store.",
    labels=("reason",),
)
PLANS_REJECTED: Final = counter(
    "learnonce_decode_plans_rejected_total",
    "Requests refused because their plan was missing, forged, damaged or expired.",
    when_it_moves="expired: clocks differ between nodes. Others: somebody calls replicas directly, or secrets differ.",
    labels=("reason",),
)
ENDED: Final = counter(
    "learnonce_decode_ended_total",
    "Requests ended before their answer was complete.",
    when_it_moves="deadline: replicas are overloaded, or deadlines too short. client: clients hang up.",
    labels=("by",),
)
PREFILL_WAIT_SECONDS: Final = histogram(
    "learnonce_decode_prefill_wait_seconds",
    "Seconds that a decode replica waited for prefill replicas, answered or not.",
    when_it_moves="Near the plan's prefill deadline: add prefill replicas.",
)
PROMPT_TOKENS: Final = counter(
    "learnonce_decode_prompt_tokens_total",
    "Prompt tokens of requests that reached their first token.",
    when_it_moves="The base of the hit ratio.",
)
REUSED_TOKENS: Final = counter(
    "learnonce_decode_reused_tokens_total",
    "Prompt tokens that nobody computed for the request they were used in (`cached_tokens`).",
    when_it_moves="Its rate over that of the prompt tokens is the hit ratio, token-weighted.",
)
PROMISED_TOKENS: Final = counter(
    "learnonce_decode_promised_tokens_total",
    "Prompt tokens that the router believed held when it planned the request (its directory's promise).",
    when_it_moves="The base of the directory's self-check.",
)
KEPT_TOKENS: Final = counter(
    "learnonce_decode_kept_tokens_total",
    "Promised prompt tokens that really need not be computed. What is missing to the promise is phantom credit.",
    when_it_moves="Falls behind the promise: stores evict or lose chunks faster than routers hear of it, loads miss "
    "their deadline, or a node is cut off; look at peer reads, client reads and feed resyncs.",
)
