"""The connector's metrics, by the names that `kvstore.engine.tally` counts under.

Covers: definitions, also for `docs/metrics.md`. Imports neither torch nor vLLM.
Does not cover: how they reach Prometheus: through vLLM's own metrics, on the engine's `/metrics`
(`kvstore.engine.stats`).
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from cluster.telemetry import DEFINITIONS, MetricDefinition, MetricKind


class Metric(NamedTuple):
    """One series: vLLM adds its own labels (model, engine) in front of ours."""

    name: str
    meaning: str
    when_it_moves: str
    labels: tuple[str, ...] = ()


_PREFIX: Final = "learnonce_kvstore_engine_"

COUNTERS: Final[Mapping[str, Metric]] = {
    "loaded_tokens": Metric(
        f"{_PREFIX}loaded_tokens_total",
        "Prompt tokens whose KV was loaded instead of computed",
        "Compare with vllm:prompt_tokens_total: their ratio is what the store saves",
    ),
    "loaded_bytes": Metric(
        f"{_PREFIX}loaded_bytes_total", "KV bytes written into the engine's blocks by loads", "Follows loaded tokens"
    ),
    "loads_complete": Metric(
        f"{_PREFIX}loads_complete_total", "Loads in which every planned token arrived", "Nothing to do"
    ),
    "loads_dropped": Metric(
        f"{_PREFIX}loads_dropped_total",
        "Loads given up because their request ended",
        "Clients disconnect while they wait; look at TTFT",
    ),
    "load_failed_tokens": Metric(
        f"{_PREFIX}load_failed_tokens_total",
        "Prompt tokens that were planned to be loaded and were computed",
        "Each costs prefill time; the reason is in load_failures_total",
    ),
    "saved_tokens": Metric(f"{_PREFIX}saved_tokens_total", "Tokens whose KV was stored", "Nothing to do"),
    "saved_bytes": Metric(
        f"{_PREFIX}saved_bytes_total",
        "Encoded bytes stored",
        "Compare with saved_kv_bytes_total: their ratio is what the codec saves",
    ),
    "saved_kv_bytes": Metric(
        f"{_PREFIX}saved_kv_bytes_total", "KV bytes of stored chunks before they were encoded", "Follows saved tokens"
    ),
    "loaded_encoded_bytes": Metric(
        f"{_PREFIX}loaded_encoded_bytes_total",
        "Encoded bytes that loads read, refinements only as far as they were used",
        "Compare with loaded_bytes_total: their ratio is what the codec saves on the way",
    ),
    "damaged_parts": Metric(
        f"{_PREFIX}damaged_parts_total",
        "Parts of coded chunks whose checksum was wrong; the layer was decoded at a coarser level, or computed",
        "A disk or a network corrupts data: look at the store's corrupt_reports_total",
    ),
    "recompute_chosen": Metric(
        f"{_PREFIX}recompute_chosen_total",
        "Loads given up because computing was estimated to be faster",
        "A link is slow, or dead: see load_failures_total (slow)",
    ),
    "prefill_tokens": Metric(
        f"{_PREFIX}prefill_tokens_total",
        "Tokens of the steps from which prefill speed is learned: those that compute many",
        "Divided by the sum of prefill_seconds it is the speed that loads are compared with",
    ),
    "joined_tokens": Metric(
        f"{_PREFIX}joined_tokens_total",
        "Prompt tokens of joined passages that were loaded at another place than where they were learned",
        "Follows joins_total",
    ),
    "join_recomputed_tokens": Metric(
        f"{_PREFIX}join_recomputed_tokens_total",
        "Joined tokens that were computed again to make them fit",
        "Divided by joined_tokens_total it is the share that requests asked for",
    ),
    "join_computed_tokens": Metric(
        f"{_PREFIX}join_computed_tokens_total",
        "Prompt tokens computed by joins because they were not loaded: holes between passages, and the tail",
        "Rises with missing passages: look at load_failures_total",
    ),
    "params_rejected": Metric(
        f"{_PREFIX}params_rejected_total",
        "Requests whose transfer parameters were invalid or not usable",
        "Somebody else than our workers sends kv_transfer_params, or versions differ",
    ),
}
"""Plain counters by tally name."""

LABELLED: Final[Mapping[str, Metric]] = {
    "load_failures": Metric(
        f"{_PREFIX}load_failures_total",
        "Loads that ended early",
        "missing: the directory is behind the store. deadline: the store is slow. slow: computing is faster. "
        "mismatch: a chunk is damaged, or engines differ under one key, a bug. profile: nobody has the profile of a "
        "chunk's codec. store_error, scatter_error: see the log",
        ("reason",),
    ),
    "joins": Metric(
        f"{_PREFIX}joins_total", "Requests whose passages were joined, by method", "Nothing to do", ("method",)
    ),
    "join_failures": Metric(
        f"{_PREFIX}join_failures_total",
        "Joins given up: the request was computed instead",
        "refused: the log says at start-up why this model cannot be joined; let the router plan `exact`. "
        "error: a bug, see the log",
        ("reason",),
    ),
    "saves": Metric(
        f"{_PREFIX}saves_total",
        "Chunks to be stored, by outcome",
        "staging_full: raise save_staging_bytes. refused: the store is full of pins, or others save the same",
        ("outcome",),
    ),
    "saved_chunks": Metric(
        f"{_PREFIX}saved_chunks_total",
        "Chunks stored, by codec",
        "raw beside another: hand-overs on this node",
        ("codec",),
    ),
    "loaded_levels": Metric(
        f"{_PREFIX}loaded_levels_total",
        "Coded chunks loaded, by the coarsest level of any layer; 0 is the smallest",
        "Lower levels: deadlines were near, or parts were damaged",
        ("level",),
    ),
    "hook_errors": Metric(
        f"{_PREFIX}hook_errors_total", "Exceptions caught at vLLM's hooks", "A bug: see the log", ("hook",)
    ),
}
"""Counters with one label of ours: the tally name is `name.label`."""

SECONDS: Final[Mapping[str, Metric]] = {
    "read_s": Metric(
        f"{_PREFIX}load_read_seconds", "Reading and verifying the chunks of one load", "The store or its disk is slow"
    ),
    "decode_s": Metric(
        f"{_PREFIX}load_decode_seconds",
        "Decoding one chunk, in seconds of all decoding threads together",
        "Raise decode_threads if it is more than the reading of a load leaves time for",
    ),
    "scatter_s": Metric(
        f"{_PREFIX}load_scatter_seconds",
        "Writing one piece of a load into the engine's blocks; other requests wait meanwhile",
        "Lower load_step_bytes if tokens of running requests stutter",
    ),
    "join_s": Metric(
        f"{_PREFIX}join_seconds",
        "One join, in seconds of the engine's own thread over all its steps",
        "Compare with prefill: it grows with what is computed again; lower join_step_tokens if other requests stutter",
    ),
    "load_s": Metric(f"{_PREFIX}load_seconds", "One load from allocation to the last token", "See its two parts"),
    "encode_s": Metric(
        f"{_PREFIX}save_encode_seconds", "Encoding one chunk", "Raise save_threads if saves are dropped (staging_full)"
    ),
    "prefill_s": Metric(
        f"{_PREFIX}prefill_seconds",
        "One step from which prefill speed is learned",
        "The engine's cores or its GPU are busy with something else",
    ),
    "save_s": Metric(f"{_PREFIX}save_seconds", "Reserving, encoding and committing one chunk", "The store is slow"),
}
"""Histograms by tally series."""

for _metric in COUNTERS.values():
    DEFINITIONS[_metric.name] = MetricDefinition(
        name=_metric.name, kind=MetricKind.COUNTER, meaning=_metric.meaning, when_it_moves=_metric.when_it_moves
    )
for _metric in LABELLED.values():
    DEFINITIONS[_metric.name] = MetricDefinition(
        name=_metric.name,
        kind=MetricKind.COUNTER,
        meaning=_metric.meaning,
        when_it_moves=_metric.when_it_moves,
        labels=_metric.labels,
    )
for _metric in SECONDS.values():
    DEFINITIONS[_metric.name] = MetricDefinition(
        name=_metric.name, kind=MetricKind.HISTOGRAM, meaning=_metric.meaning, when_it_moves=_metric.when_it_moves
    )
