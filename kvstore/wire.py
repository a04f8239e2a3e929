"""What the rooms say to each other about one request, and how they know that it is true.

Covers: the signed plan that travels from the router to workers, what workers report about themselves, addresses of
node stores. Does not cover: how a plan is chosen (`router.policy`) or carried out (`*_workers.plan`).

A plan travels as one HTTP header, so that a replica serves the client's own request body unchanged
(docs/adr/0004-requests-between-replicas.md). It is signed with the cluster's secret and expires: a replica obeys
nothing else (D14).
"""

import base64
import hashlib
import hmac
import os
import zlib
from enum import StrEnum
from typing import Final

import msgspec
import numpy as np

from cluster.errors import DataError, SettingsError
from kvstore.engine.params import JoinMethod
from kvstore.keys import ChunkKey, KvScope
from kvstore.untrusted import UNDECODABLE

PLAN_HEADER: Final = "x-serve-router-plan"
"""HAProxy strips client-sent headers with this prefix."""
REQUEST_ID_HEADER: Final = "x-request-id"
NODE_HEADER: Final = "x-learnonce-node"
"""Node of the worker that asks another one for chunks. A hint for how they are coded, so it is not signed."""
SECRET_VARIABLE: Final = "LEARNONCE_CLUSTER_SECRET"
"""Environment variable of the cluster's secret, in hex; the same in every process of the cluster."""
MAX_PLAN_BYTES: Final = 16 << 20
"""Bound on the decompressed plan; a million-token prompt needs 4 MiB of token ids."""
_MAC_BYTES: Final = 32


class PlanRejectedError(DataError):
    """A plan that is forged, expired, damaged, or from another version."""


class PlanExpiredError(PlanRejectedError):
    """A plan that was true once: the router may make a new one."""


class Mode(StrEnum):
    """Who computes the part of the prompt that no store holds."""

    LOCAL = "local"
    """The decode replica itself."""
    REMOTE = "remote"
    """A prefill replica, whose chunks the decode replica then loads."""


class JoinPlan(msgspec.Struct, frozen=True):
    """How passages are joined that were learned at another place."""

    method: JoinMethod
    """Which of the moved tokens are computed again."""
    share: float
    """How many of them, 0 to 1."""

    def __str__(self) -> str:
        return f"{self.method};share={self.share:g}"


class SpanKind(StrEnum):
    """Which segment of the prompt a span belongs to."""

    PREFIX = "prefix"
    PASSAGE = "passage"
    TAIL = "tail"


class Span(msgspec.Struct, frozen=True, array_like=True):
    """One run of prompt tokens that is one chunk: half-open `[start, stop)`.

    Its key names it behind everything before it; with a `base`, behind the anchor alone.
    """

    key: bytes
    start: int
    stop: int
    kind: SpanKind
    held: bool
    """The router believed a store holds it. A hint: the store is asked again, and a miss is computed."""
    save: bool
    """Whoever computes it writes it to its node's store."""
    base: int | None = None
    """Where the chunk was learned, if it is to be moved from there and joined; None: it is exact where it stands."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the span."""
        return self.stop - self.start


class Peer(msgspec.Struct, frozen=True):
    """A worker as an address."""

    replica_id: str
    url: str
    """`http://host:port`, no trailing slash."""


class Refusal(msgspec.Struct, frozen=True):
    """The answer the replica gives instead of generating, in OpenAI's error format."""

    status: int
    error_type: str
    message: str
    retry_after_s: float | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What the router decided for one request."""

    request_id: str
    expires_unix_s: float
    """Not obeyed after this; bounds replay."""
    deadline_unix_s: float
    """The request is answered, or aborted with an error, by then."""
    mode: Mode = Mode.LOCAL
    prompt: bytes = b""
    """Prompt token ids, little-endian uint32. Empty: the replica renders the prompt itself and reuses nothing."""
    spans: tuple[Span, ...] = ()
    """Cover the prompt from token 0 without gaps; empty with an empty prompt."""
    join: JoinPlan | None = None
    """Spans may have a `base`, and what is not held before the tail is a hole in what is loaded; mode `local` only."""
    learned_tokens: int = 0
    """With a join: of the held tokens, those that were computed for this very request just before."""
    cache_salt: str = ""
    """Mixed into every key, and vLLM's own prefix cache salt (of a join: see `decode_workers.plan.engine_salt`)."""
    prefill: tuple[Peer, ...] = ()
    """Prefill replicas in order of preference; at least one in mode `remote`."""
    prefill_deadline_s: float = 0.0
    """Seconds after which the decode replica stops waiting for prefill replicas and computes the prompt itself."""
    load_deadline_s: float = 0.0
    """Seconds after which chunks that have not arrived are computed."""
    refusal: Refusal | None = None
    reasons: tuple[str, ...] = ()
    """Why, in words, for `learnonce explain` and the log."""
    version: int = 1

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt as a list."""
        ids: list[int] = np.frombuffer(self.prompt, dtype="<u4").tolist()
        return ids

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens in the prompt."""
        return len(self.prompt) // 4

    @property
    def held_tokens(self) -> int:
        """Tokens from position 0 that the router believed held, without a gap and exact."""
        stop = 0
        for span in self.spans:
            if not span.held or span.base is not None:
                break
            stop = span.stop
        return stop


def pack_tokens(tokens: "list[int] | np.ndarray") -> bytes:
    """Token ids in the form of `Plan.prompt`."""
    return np.ascontiguousarray(tokens, dtype="<u4").tobytes()


def sign_plan(plan: Plan, *, secret: bytes) -> str:
    """A plan as a header value (base64, no padding problems in HTTP)."""
    body = zlib.compress(msgspec.msgpack.encode(plan), level=1)
    return base64.urlsafe_b64encode(_mac(secret, body) + body).decode("ascii")


def open_plan(header: str, *, secret: bytes, now_unix_s: float) -> Plan:
    """Check a header value and return its plan.

    Raises:
        PlanExpiredError: It was valid, and is too old.
        PlanRejectedError: Bad encoding or signature, another version, spans that do not cover the prompt, a join that
            nobody could carry out.
    """
    try:
        raw = base64.urlsafe_b64decode(header.encode("ascii"))
    except ValueError as error:
        raise PlanRejectedError("plan is not base64") from error
    mac, body = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
    if not hmac.compare_digest(mac, _mac(secret, body)):
        raise PlanRejectedError("plan has a wrong signature")
    try:
        inflater = zlib.decompressobj()
        plain = inflater.decompress(body, MAX_PLAN_BYTES)
        plan = msgspec.msgpack.decode(plain, type=Plan)
    except (zlib.error, *UNDECODABLE) as error:
        raise PlanRejectedError(f"plan is damaged: {error}") from error
    if inflater.unconsumed_tail:
        raise PlanRejectedError(f"plan is larger than {MAX_PLAN_BYTES} bytes")
    if plan.version != 1:
        raise PlanRejectedError(f"plan has version {plan.version}, this worker knows 1")
    if not plan.expires_unix_s >= now_unix_s:  # so that NaN, which is neither, is no time at all
        raise PlanExpiredError(f"plan expired {now_unix_s - plan.expires_unix_s:.1f} s ago")
    _check_spans(plan)
    _check_join(plan)
    return plan


def cluster_secret() -> bytes:
    """The secret that signs plans and opens the store.

    Raises:
        SettingsError: The environment has none, or not in hex.
    """
    try:
        secret = bytes.fromhex(os.environ.get(SECRET_VARIABLE, ""))
    except ValueError as error:
        raise SettingsError(f"{SECRET_VARIABLE} is not hexadecimal") from error
    if not secret:
        raise SettingsError(f"{SECRET_VARIABLE} is not set: it is in the file `secret` of the cluster's state folder")
    return secret


def _mac(secret: bytes, body: bytes) -> bytes:
    return hmac.new(secret, b"learnonce plan 1" + body, hashlib.sha256).digest()


def _check_spans(plan: Plan) -> None:
    position = 0
    for span in plan.spans:
        if span.start != position or span.stop <= span.start:
            raise PlanRejectedError(f"plan's spans leave a gap at token {position}")
        position = span.stop
    if position not in (0, plan.num_prompt_tokens):
        raise PlanRejectedError(f"plan's spans end at {position}, its prompt at {plan.num_prompt_tokens}")


def _check_join(plan: Plan) -> None:
    moved = any(span.base is not None for span in plan.spans)
    if plan.join is None:
        if moved:
            raise PlanRejectedError("plan moves chunks without a join")
        return
    if not moved:
        raise PlanRejectedError("plan joins and moves no chunk")
    if any(span.base is not None and span.kind is not SpanKind.PASSAGE for span in plan.spans):
        raise PlanRejectedError("plan moves a chunk that is no passage")
    if plan.mode is not Mode.LOCAL:
        raise PlanRejectedError(f"plan joins in mode {plan.mode}, only the decode replica itself can join")
    if not 0.0 <= plan.join.share <= 1.0:  # NaN is refused as well
        raise PlanRejectedError(f"plan joins with a share of {plan.join.share}, not 0 to 1")
    if any(span.base is not None and span.base < 0 for span in plan.spans):
        raise PlanRejectedError("plan moves a chunk from before the prompt")
    if any(span.save for span in plan.spans):
        raise PlanRejectedError("plan saves chunks of a joined prompt, which are not what their keys say")


class StoreEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where one node's store can be reached, and which life of it is meant."""

    node_id: str
    epoch: str
    """Random per process life: a new epoch means that everything held before must be announced again."""
    socket_path: str
    """Unix socket of the control plane, for workers on the same node."""
    events_address: str
    """ZMQ PUB address (`tcp://host:port`) of store events."""
    snapshot_address: str
    """ZMQ ROUTER address for snapshots and replays."""
    peer_address: str = ""
    """`host:port` for the stores of other nodes; "" if this one neither reads theirs nor lends its own."""
    boot_id: str = ""
    """Of the machine that it runs on; stores with equal ones can share memory."""


class Role(StrEnum):
    """What a worker does."""

    PREFILL = "prefill"
    DECODE = "decode"


class WorkerReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says about itself, once a second to every router."""

    peer: Peer
    role: Role
    node_id: str
    model: str
    """Served model name."""
    max_model_len: int
    scope: KvScope | None
    """None while the engine does not know it, or for engines without KV."""
    store: StoreEndpoint | None
    """The node's store; None while it is away."""
    running_requests: int = 0
    queued_prompt_tokens: int = 0
    """Prompt tokens accepted and not yet computed."""
    draining: bool = False
    """Finishes what it has, takes nothing new."""
    joins: bool = False
    """Its engine can move and join passages (not every model's can)."""


class PrefillAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A prefill replica's answer: the chunks are in the store, or they are not."""

    request_id: str
    reused_tokens: int
    """Prompt tokens that the prefill replica did not compute."""
    computed_tokens: int
    held: tuple[bool, ...]
    """Per span of the plan: readable from the store now."""
    seconds: float


def key_of(span: Span) -> ChunkKey:
    """The span's chunk key."""
    return ChunkKey(span.key)
