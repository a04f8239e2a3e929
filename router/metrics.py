"""The router's metrics. Labels come from closed sets; the ingress and the relay move them, never a policy."""

from typing import Final

from cluster.telemetry import counter, gauge, histogram

TTFT_SECONDS: Final = histogram(
    "learnonce_router_ttft_seconds",
    "Request received at the ingress to the first byte of the answer sent, by plan: local, remote, joined",
    labels=("mode",),
    when_it_moves="Compare modes; a rise in `remote` alone points at prefill replicas or the store.",
)
REQUESTS_TOTAL: Final = counter(
    "learnonce_router_requests_total",
    "Requests that ended, by outcome: ok, rejected (4xx), unavailable, failed, broken, cancelled, deadline",
    labels=("outcome",),
    when_it_moves="`broken` (midway) and `failed` mean dying replicas; `unavailable`: none was ready.",
)
PROMPT_TOKENS_TOTAL: Final = counter(
    "learnonce_router_prompt_tokens_total",
    "Prompt tokens of planned requests",
    when_it_moves="The denominator of the hit ratio.",
)
HIT_TOKENS_TOTAL: Final = counter(
    "learnonce_router_hit_tokens_total",
    "Prompt tokens that the directory believed readable when the plan was made",
    when_it_moves="Falling against prompt tokens: the store evicts, restarted, or the template or model changed.",
)
HOLE_TOKENS_TOTAL: Final = counter(
    "learnonce_router_hole_tokens_total",
    "Prompt tokens of joined plans that stand before the tail and that nobody held",
    when_it_moves="Passages come in that were not learned in time: add prefill replicas, or learn them ahead.",
)
PLANS_TOTAL: Final = counter(
    "learnonce_router_plans_total",
    "Plans made, by mode: local, remote, joined, opaque (the replica renders the prompt; nothing is reused)",
    labels=("mode",),
    when_it_moves="Many `opaque` plans: clients use features that can not be segmented (docs/router.md).",
)
OPAQUE_TOTAL: Final = counter(
    "learnonce_router_opaque_total",
    "Requests that could not be segmented, by reason",
    labels=("reason",),
    when_it_moves="Shows which client feature costs reuse.",
)
PLAN_SECONDS: Final = histogram(
    "learnonce_router_plan_seconds",
    "Segmenting, tokenising and choosing, per request",
    when_it_moves="Long texts that are new to the token cache; raise limits.tokenizer_threads.",
)
FALLBACKS_TOTAL: Final = counter(
    "learnonce_router_fallbacks_total",
    "Another way was taken, by cause: connect, died, refused (a 503), expired, no_prefill (wanted remote)",
    labels=("cause",),
    when_it_moves="`connect` and `died`: look at that replica's log. `no_prefill`: prefill is absent or overloaded.",
)
VIEW_AGE_SECONDS: Final = gauge(
    "learnonce_router_view_age_seconds",
    "Seconds since the last complete round of worker reports",
    when_it_moves="Over a few seconds: reports time out; placement works on old facts.",
)
REPLICAS: Final = gauge(
    "learnonce_router_replicas",
    "Replicas that may take requests, by role",
    labels=("role",),
    when_it_moves="Zero decode replicas: every request is answered 503.",
)
DIRECTORY_CHUNKS: Final = gauge(
    "learnonce_router_directory_chunks",
    "Chunk locations in this router's directory",
    when_it_moves="At limits.directory_entries the oldest are forgotten.",
)
DIRECTORY_RESETS_TOTAL: Final = counter(
    "learnonce_router_directory_resets_total",
    "Stores whose entries were dropped, by cause: epoch (store restarted), gone (no longer reported)",
    labels=("cause",),
    when_it_moves="A store process restarted or a node left; expect misses for a while.",
)
LEARNED_TOTAL: Final = counter(
    "learnonce_router_learned_total",
    "Passages asked for at /v1/documents, by state: learned, already_held, failed",
    labels=("state",),
    when_it_moves="`failed`: no prefill replica, or the store had no room.",
)
LEARNED_FIRST_TOTAL: Final = counter(
    "learnonce_router_learned_first_total",
    "Passages that requests waited for before they were joined, by state: learned, already_held, failed",
    labels=("state",),
    when_it_moves="`failed`: they are computed in place; prefill replicas are too few, or too slow for the deadline.",
)
BOOKED_TOKENS: Final = gauge(
    "learnonce_router_booked_tokens",
    "Tokens of work promised by this router and not yet done, by role",
    labels=("role",),
    when_it_moves="Grows without bound only if replicas stop answering; see rule.prefill_max_booked_tokens.",
)
