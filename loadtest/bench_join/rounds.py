"""One context after the other: learn its passages apart, compute it whole, join it in every way, time all of it.

Covers: the store beside the engine, chunks and requests, rows of results. Does not cover: the texts
(`loadtest.bench_join.contexts`), the pipe to the engine (`engine`), figures (`figures`).
"""

import random
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from cluster.errors import InvariantError, UnavailableError
from kvstore.client import NodeStoreClient
from kvstore.codecs.raw import RawCodec
from kvstore.engine.params import ChunkSpan, JoinParams, build_transfer_params
from kvstore.engine.settings import ConnectorSettings, EngineSettings
from kvstore.keys import ChunkKey
from kvstore.settings import StoreSettings
from kvstore.testing.process import StoreProcess
from loadtest.agreement import agreement, log_probabilities
from loadtest.bench_join import (
    AGAIN,
    ANSWER_TOKENS,
    EXACT_LOAD,
    FULL,
    FULL_SHARE,
    JOIN_POINTS,
    NOISE_FLOOR,
    WRONG_KV,
    JoinPoint,
)
from loadtest.bench_join.contexts import Context, document_spans
from loadtest.bench_join.engine import MeasuredEngine, Said
from router.view import KeyedSpan

Row = dict[str, Any]

MAX_CONTROL_KL: Final = 1e-5
"""Of what must equal the reference: more means that this benchmark or the engine is wrong."""
MIN_WRONG_KL: Final = 0.1
"""Of KV that belongs elsewhere: less means that nothing is measured."""
_DEADLINE_S: Final = 120.0
_HOST_BYTES: Final = 3 << 30


@contextmanager
def open_rounds(
    model: str, *, max_model_len: int, folder: Path, points: Sequence[JoinPoint] = JOIN_POINTS, seed: int = 1
) -> Iterator["Rounds"]:
    """Start a store and an engine for rounds, and stop them.

    Args:
        model: Folder of the model.
        max_model_len: Longest prompt and answer, in tokens.
        folder: For sockets, logs and logits.
        points: Ways to join.
        seed: Of the order in which points take their turns.
    """
    secret = secrets.token_bytes(32)
    socket = str(folder / f"store-{secrets.token_hex(3)}.sock")
    stored = StoreSettings(host_bytes=_HOST_BYTES, nvme=None)
    computed = EngineSettings(
        model=model,
        dtype="float32",
        max_model_len=max_model_len,
        connector=ConnectorSettings(recompute_when_faster=False),
    )
    with (
        StoreProcess(stored, secret=secret, socket_path=socket),
        closing(NodeStoreClient(socket, secret=secret, client_name="bench")) as client,
        MeasuredEngine(
            computed, store_socket=socket, secret=secret, log=folder / "engine.log", scratch=folder
        ) as engine,
    ):
        yield Rounds(engine, client, points=points, seed=seed)


class Rounds:
    """Measures contexts with one engine.

    Args:
        engine: The engine.
        store: Its node's store.
        points: Ways to join.
        seed: Of the order in which points take their turns.
    """

    def __init__(
        self, engine: MeasuredEngine, store: NodeStoreClient, *, points: Sequence[JoinPoint], seed: int
    ) -> None:
        self.engine = engine
        """What is asked."""
        self._store = store
        self._points, self._draw = points, random.Random(seed)
        self._count = 0
        self._kept: list[ChunkKey] = []

    def counters(self) -> dict[str, float]:
        """The engine's, since it started."""
        return self.engine.counters()

    def measure(self, context: Context) -> list[Row]:
        """Rows of one context: the reference, controls, every way to join.

        Raises:
            InvariantError: A control says that what is measured here means nothing.
            UnavailableError: The engine did not learn, load or join what it was told to.
        """
        learned = self._learn(context)
        exact = self._exact(context, salt="exact")
        num_tokens = len(context.answer) or ANSWER_TOKENS
        save = build_transfer_params(save=exact, load_deadline_s=_DEADLINE_S)
        full, logits_TW = self.engine.read(
            context.ids, salt=self._salt(), transfer=save, max_tokens=num_tokens, answer=context.answer
        )
        self._wait(exact)
        reference_TW = log_probabilities(logits_TW)
        requests = {AGAIN: _Request(), EXACT_LOAD: _loading(exact)}
        requests[NOISE_FLOOR] = _loading(self._changed(context, exact, lambda kv: kv.to(torch.bfloat16).float()))
        requests[WRONG_KV] = _loading(self._changed(context, exact, with_wrong_values))
        requests |= {point.name: self._join(context, point) for point in self._points}
        rows = {FULL: _row(context, FULL, full, reference_TW, reference_TW)}
        for name, request in self._shuffled(requests):
            said, other_TW = self.engine.read(
                context.ids,
                salt=self._salt(),
                transfer=request.transfer,
                max_tokens=num_tokens,
                answer=full.tokens,
            )
            _check_loaded(f"{context.name}, {name}", said, request)
            rows[name] = _row(context, name, said, reference_TW, log_probabilities(other_TW))
        check_controls(rows)
        timed = {name: each for name, each in requests.items() if name not in (AGAIN, NOISE_FLOOR, WRONG_KV)}
        for name, request in self._shuffled({FULL: _Request(), **timed}):
            said = self.engine.time(context.ids, salt=self._salt(), transfer=request.transfer)
            _check_loaded(f"{context.name}, {name}", said, request)
            rows[name] |= {"ttft_s": said.ttft_s, "cpu_s": said.cpu_s}
        self._forget(context, learned)
        return list(rows.values())

    def _learn(self, context: Context) -> list[ChunkKey]:
        """Every passage on its own behind the system prompt, as the prefill replicas do."""
        salt, keys = self._salt(), []
        for prompt in context.alone():
            spans = [ChunkSpan(*_place(span)) for span in document_spans(prompt, scope=self.engine.scope, salt="")]
            transfer = build_transfer_params(save=spans, load_deadline_s=_DEADLINE_S)
            self.engine.time([int(token) for token in prompt.ids], salt=salt, transfer=transfer)
            self._wait(spans)
            keys += [span.key for span in spans]
        return keys

    def _exact(self, context: Context, *, salt: str) -> list[ChunkSpan]:
        """Chunks of the very prompt; those of another salt have other names."""
        return [ChunkSpan(*_place(span)) for span in document_spans(context.prompt, scope=self.engine.scope, salt=salt)]

    def _join(self, context: Context, point: JoinPoint) -> "_Request":
        """What a worker asks for: the system prompt's own chunks, and passages from where they were learned."""
        spans = [
            ChunkSpan(*_place(span))
            if span.passage_key is None or span.passage_key == span.key
            else ChunkSpan(span.passage_key, span.start, span.stop, span.base)
            for span in document_spans(context.prompt, scope=self.engine.scope, salt="")
        ]
        join = JoinParams(method=point.method, share=point.share, tail_start=context.tail_start)
        num_joined = sum(span.stop - span.start for span in spans if span.base is not None)
        return _Request(
            transfer=build_transfer_params(load=spans, load_deadline_s=_DEADLINE_S, join=join),
            num_cached=context.tail_start - round(point.share * num_joined),
        )

    def _changed(
        self, context: Context, exact: Sequence[ChunkSpan], change: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[ChunkSpan]:
        """Store the KV of exact chunks, all of it changed, under other names."""
        spans, codec = self._exact(context, salt=self._salt()), RawCodec()
        leases = self._store.read([span.key for span in exact], deadline_s=_DEADLINE_S)
        held = [lease for lease in leases if lease is not None]
        try:
            if len(held) < len(spans):
                raise UnavailableError(f"the store lost exact chunks of {context.name}")
            metas = [lease.meta for lease in held]
            kv_L2TNH = change(torch.cat([codec.decode(lease.payload, meta=lease.meta) for lease in held], dim=2))
        finally:
            for lease in held:
                lease.release()
        parts = torch.split(kv_L2TNH, [meta.num_tokens for meta in metas], dim=2)
        for span, meta, part in zip(spans, metas, parts, strict=True):
            write = self._store.reserve(span.key, meta, codec.encoded_bytes(meta), deadline_s=_DEADLINE_S)
            if write is None:
                raise UnavailableError(f"the store has no room for {context.name}")
            codec.encode(part, out=write.payload)
            if not write.commit():
                raise UnavailableError(f"the store did not take a chunk of {context.name}")
            self._kept.append(span.key)
        return spans

    def _wait(self, spans: Sequence[ChunkSpan]) -> None:
        if not all(self._store.wait([span.key for span in spans], deadline_s=_DEADLINE_S)):
            raise UnavailableError(f"the engine did not save its chunks: {self.counters()}")

    def _forget(self, context: Context, learned: Sequence[ChunkKey]) -> None:
        exact = [span.key for span in self._exact(context, salt="exact")]
        self._store.drop([*learned, *exact, *self._kept], deadline_s=_DEADLINE_S)
        self._kept.clear()

    def _shuffled(self, requests: Mapping[str, "_Request"]) -> list[tuple[str, "_Request"]]:
        """In another order each time: what changes while a context is measured favours none."""
        return self._draw.sample(list(requests.items()), len(requests))

    def _salt(self) -> str:
        self._count += 1
        return f"bench {self._count}"


def with_wrong_values(kv_L2TNH: torch.Tensor) -> torch.Tensor:
    """Every K with the V of a token half a prompt away.

    Moving both would change nothing: attention does not ask where a pair of K and V lies, and K knows its position.
    """
    k_LTNH, v_LTNH = kv_L2TNH.unbind(dim=1)
    return torch.stack([k_LTNH, v_LTNH.roll(v_LTNH.shape[1] // 2, dims=1)], dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    transfer: Mapping[str, Any] | None = None
    num_cached: int = 0
    """Prompt tokens that the engine then reports as cached."""


def _place(span: KeyedSpan) -> tuple[ChunkKey, int, int]:
    return span.key, span.start, span.stop


def _loading(spans: Sequence[ChunkSpan]) -> _Request:
    return _Request(transfer=build_transfer_params(load=spans, load_deadline_s=_DEADLINE_S), num_cached=spans[-1].stop)


def _check_loaded(what: str, said: Said, request: _Request) -> None:
    """Whatever failed is computed, and would look perfect."""
    if said.cached_tokens != request.num_cached:
        raise UnavailableError(f"{what}: {said.cached_tokens} of {request.num_cached} tokens were loaded and kept")


def _row(context: Context, point: str, said: Said, reference_TW: torch.Tensor, other_TW: torch.Tensor) -> Row:
    words = torch.tensor(said.tokens)
    return {
        "context": context.name,
        "kind": context.kind,
        "tokens": context.prompt.num_tokens,
        "point": point,
        **asdict(agreement(reference_TW, other_TW, targets_T=words)),
        "is_right": bool((other_TW.argmax(dim=-1) == words).all()),
        "cached_tokens": said.cached_tokens,
    }


def check_controls(rows: Mapping[str, Row]) -> None:
    """Refuse rows of a context whose controls are off.

    Raises:
        InvariantError: What must equal the reference does not, or what must not does.
    """
    for name in (AGAIN, EXACT_LOAD, FULL_SHARE):
        if name in rows and rows[name]["kl"] > MAX_CONTROL_KL:
            raise InvariantError(f"{rows[name]['context']}: {name} has a KL of {rows[name]['kl']:.2g} to the reference")
    if rows[WRONG_KV]["kl"] < MIN_WRONG_KL:
        raise InvariantError(f"{rows[WRONG_KV]['context']}: wrong KV has a KL of only {rows[WRONG_KV]['kl']:.2g}")
