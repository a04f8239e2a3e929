"""What an operator may change about the router.

Covers: the documented template, spans, the placement rule, joins, deadlines, limits.
Does not cover: where the model is or what it is called (`cluster.settings`), API keys (environment
`LEARNONCE_API_KEYS`), the cluster's secret (environment `LEARNONCE_CLUSTER_SECRET`).
"""

from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster.settings_base import SettingsBase
from kvstore.engine.params import JoinMethod
from kvstore.wire import JoinPlan
from router.body import NamedQuality, Quality


class TemplateSettings(SettingsBase):
    """How documents become text in the prompt. A change makes every learned passage unknown."""

    titled_passage: str = "\n\n# {title}\n{text}"
    """A document with a title. `{title}` and `{text}` are replaced; nothing depends on the document's place."""
    untitled_passage: str = "\n\n{text}"
    """A document without a title."""
    default_system: str = "You are a helpful assistant. Answer from the documents below."
    """The system message of a request that has documents and no system message."""

    @model_validator(mode="after")
    def _names_its_fields(self) -> Self:
        if self.titled_passage.count("{title}") != 1 or self.titled_passage.count("{text}") != 1:
            raise ValueError("titled_passage must hold {title} and {text} once each")
        if self.untitled_passage.count("{text}") != 1:
            raise ValueError("untitled_passage must hold {text} once")
        return self


class SpanSettings(SettingsBase):
    """Where a prompt is cut into chunks."""

    exact_chunk_tokens: PositiveInt = 256
    """Tokens of one span of the prefix or the tail, counted from the segment's own start."""
    max_chunk_tokens: PositiveInt = 8192
    """A longer passage is split into spans of this size; a shorter one is one chunk."""


class RuleSettings(SettingsBase):
    """The placement rule's numbers (docs/router.md)."""

    remote_min_tokens: NonNegativeInt = 512
    """Uncached prompt tokens from which a prefill replica computes the prompt instead of the decode replica."""
    prefill_max_booked_tokens: PositiveInt = 65_536
    """A prefill replica with more booked tokens is overloaded and gets nothing new."""
    decode_max_lead_tokens: NonNegativeInt = 16_384
    """A decode replica with this many more booked tokens than the least booked one loses its chunks' advantage."""
    stream_tokens: NonNegativeInt = 64
    """Booked on a decode replica for every answer that is still being written."""
    min_save_tokens: NonNegativeInt = 64
    """A shorter last span is not saved: computing it again costs less than keeping it."""
    max_candidates: PositiveInt = 3
    """Prefill replicas named in a plan."""


Share = Annotated[float, Field(ge=0.0, le=1.0)]


class JoinSettings(SettingsBase):
    """Reuse of passages at another place than they were learned at (docs/router.md)."""

    default_quality: NamedQuality = "exact"
    """Of requests without `quality`; `exact` never joins."""
    high_method: JoinMethod = "query_aware"
    """Which of the moved tokens quality `high` computes again; a number as quality takes this method, too."""
    high_share: Share = 0.15
    """How many of them, as a part of all moved tokens."""
    fast_method: JoinMethod = "query_aware"
    """Which of the moved tokens quality `fast` computes again."""
    fast_share: Share = 0.05
    """How many of them, as a part of all moved tokens."""
    learn_min_tokens: NonNegativeInt = 64
    """A passage that nobody holds is learned before its request is joined, or computed in place if it is shorter."""

    def plan_for(self, quality: Quality | None) -> JoinPlan | None:
        """The join that a request's quality allows; None: exact reuse only."""
        quality = self.default_quality if quality is None else quality
        if quality == "exact":
            return None
        if quality == "fast":
            return JoinPlan(self.fast_method, self.fast_share)
        return JoinPlan(self.high_method, self.high_share if quality == "high" else quality)


class DeadlineSettings(SettingsBase):
    """How long each step may take. All are upper bounds, not estimates."""

    request_s: PositiveFloat = 600.0
    """From the request's arrival to its last byte."""
    plan_expires_s: PositiveFloat = 60.0
    """A replica obeys a plan for so long after it was signed."""
    prefill_base_s: PositiveFloat = 5.0
    """Waiting for a prefill replica: base, plus the tokens before and of this request over the floor speed."""
    prefill_floor_tokens_per_s: PositiveFloat = 100.0
    """The slowest prefill that is still waited for."""
    prefill_max_s: PositiveFloat = 120.0
    """Never wait longer than this for prefill replicas."""
    load_base_s: PositiveFloat = 2.0
    """Waiting for chunks: base, plus held tokens over the floor speed."""
    load_floor_tokens_per_s: PositiveFloat = 2_000.0
    """The slowest load that is still waited for."""
    load_max_s: PositiveFloat = 30.0
    """Never wait longer than this for chunks."""
    connect_s: PositiveFloat = 2.0
    """Opening a connection to a replica."""
    report_s: PositiveFloat = 3.0
    """Asking all workers of one role for their reports."""
    metrics_s: PositiveFloat = 2.0
    """Collecting the replicas' metric pages."""


class LimitSettings(SettingsBase):
    """Bounds on what one request, or all requests, may hold."""

    max_body_bytes: PositiveInt = 32 << 20
    """A larger request body is answered with 413."""
    max_documents: PositiveInt = 4_096
    """Documents in one request."""
    max_answer_bytes: PositiveInt = 256 << 20
    """An answer that is not streamed is held until it is complete, up to this size."""
    max_relay_attempts: PositiveInt = 3
    """Decode replicas tried for one request, as long as no byte was sent to the client."""
    inline_body_bytes: NonNegativeInt = 8 << 10
    """A larger body is tokenised on the thread pool, a smaller one on the event loop."""
    tokenizer_threads: PositiveInt = 2
    """Threads that tokenise."""
    max_tokenizing: PositiveInt = 256
    """Requests waiting for a tokenizer thread; more are refused with 503."""
    token_cache_tokens: NonNegativeInt = 4 << 20
    """Token ids of passages and prefixes remembered by content (4 bytes each)."""
    directory_entries: PositiveInt = 1 << 20
    """Chunk locations remembered; beyond it the oldest are forgotten, which costs only misses."""
    max_learning: PositiveInt = 8
    """Passages being learned ahead at the same time in this router, and as many again for requests that wait."""
    max_metrics_bytes: PositiveInt = 16 << 20
    """Metric pages larger than this are left out."""


class RouterSettings(SettingsBase):
    """Everything about one router process."""

    template: TemplateSettings = Field(default_factory=TemplateSettings)
    """How documents become text."""
    spans: SpanSettings = Field(default_factory=SpanSettings)
    """Where prompts are cut."""
    rule: RuleSettings = Field(default_factory=RuleSettings)
    """Who computes and who generates."""
    join: JoinSettings = Field(default_factory=JoinSettings)
    """Which requests may reuse passages at other places."""
    deadlines: DeadlineSettings = Field(default_factory=DeadlineSettings)
    """How long each step may take."""
    limits: LimitSettings = Field(default_factory=LimitSettings)
    """What may be held."""
    report_period_s: PositiveFloat = 1.0
    """Time between two rounds of worker reports."""
    report_ttl_s: PositiveFloat = 10.0
    """A worker that has not reported for so long is taken for gone."""
    retry_after_s: PositiveFloat = 2.0
    """What a client is told when no replica can take its request."""
