"""The protocol of `learnonce bench join` on an engine that is not there: its KV is a formula, and so are its answers.

Covers: what is learned, saved, loaded and joined; controls that must be right, and what happens if they are not;
rows; times of paired requests; nothing left in the store; going on after a stop.
Does not cover: vLLM, real quality (a run of the benchmark), figures (`loadtest_join_figures_test`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cluster.errors import InvariantError, UnavailableError
from kvstore.codecs.raw import RawCodec
from kvstore.engine.params import ChunkSpan, TransferParams, parse_transfer_params
from kvstore.interfaces import ChunkMeta
from kvstore.keys import ChunkKey, KvScope
from kvstore.testing.memory import MemoryStore, MemoryStoreClient
from kvstore.wire import SpanKind
from loadtest.bench_join import (
    AGAIN,
    ANSWER_TOKENS,
    CONTROLS,
    EXACT_LOAD,
    FULL,
    FULL_SHARE,
    JOIN_POINTS,
    NOISE_FLOOR,
    WRONG_KV,
    measure,
)
from loadtest.bench_join.contexts import Context
from loadtest.bench_join.engine import Said
from loadtest.bench_join.rounds import Rounds, with_wrong_values
from loadtest.cli import bench
from router.segments import Prompt, Segment

_VOCABULARY = 11


class Store(MemoryStoreClient):
    """Drops chunks as a node store's client does."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self._chunks = store

    def drop(self, keys: Sequence[ChunkKey], *, deadline_s: float) -> bool:
        del deadline_s
        return all([self._chunks.drop(key) for key in keys])


class FormulaEngine:
    """KV of a token depends on it and on the tokens before it; the error of an answer on how wrong its KV is."""

    scope = KvScope(
        model_digest="00",
        compute_dtype="float32",
        kv_dtype="float32",
        num_layers=1,
        num_kv_heads=1,
        head_dim=2,
        rope="",
    )

    def __init__(self, store: Store) -> None:
        self._store = store
        self.asked: list[TransferParams | None] = []
        self.salts: list[str] = []
        self.drift = 0.0
        """Added to every answer but the first of a prompt: an engine that is not deterministic."""
        self.ignores_kv = False
        self.loses_joins = False

    def time(self, prompt: Sequence[int], *, salt: str, transfer: Mapping[str, Any] | None = None) -> Said:
        _, cached = self._compute(prompt, salt, transfer)
        return Said(tokens=(0,), cached_tokens=cached, ttft_s=0.5 if cached else 2.0, cpu_s=0.25 if cached else 4.0)

    def read(
        self,
        prompt: Sequence[int],
        *,
        salt: str,
        max_tokens: int,
        transfer: Mapping[str, Any] | None = None,
        answer: Sequence[int] = (),
    ) -> tuple[Said, torch.Tensor]:
        error, cached = self._compute(prompt, salt, transfer)
        draw = np.random.default_rng(sum(prompt))
        exact_TW = torch.from_numpy(draw.normal(size=(max_tokens, _VOCABULARY)).astype(np.float32))
        other_TW = torch.from_numpy(draw.normal(size=(max_tokens, _VOCABULARY)).astype(np.float32))
        logits_TW = exact_TW + error * other_TW
        tokens = tuple(answer) or tuple(logits_TW.argmax(dim=-1).tolist())
        return Said(tokens=tokens, cached_tokens=cached, ttft_s=1.0, cpu_s=1.0), logits_TW

    def counters(self) -> dict[str, float]:
        return {"learnonce_asked": float(len(self.asked))}

    def _compute(self, prompt: Sequence[int], salt: str, transfer: Mapping[str, Any] | None) -> tuple[float, int]:
        self.salts.append(salt)
        params = parse_transfer_params(transfer, num_prompt_tokens=len(prompt))
        self.asked.append(params)
        if params is None:
            return self.drift, 0
        for span in params.save:
            self._save(span, prompt)
        if not params.load:
            return 0.0, 0
        if params.join is not None:
            joined = sum(span.stop - span.start for span in params.load if span.base is not None)
            if self.loses_joins:
                return 0.0, 0
            error = 0.5 * (1 - params.join.share) if params.join.method != "naive" else 0.5
            return error, params.join.tail_start - round(params.join.share * joined)
        wrong = max(self._distance(span, prompt) for span in params.load)
        return 0.0 if self.ignores_kv else wrong, params.load[-1].stop

    def _kv(self, prompt: Sequence[int], start: int, stop: int) -> torch.Tensor:
        sums = np.cumsum(np.asarray(prompt))[start:stop] % 97 / 97
        return torch.from_numpy(sums)[None, None, :, None, None].expand(1, 2, -1, 1, 2).float()

    def _save(self, span: ChunkSpan, prompt: Sequence[int]) -> None:
        meta = ChunkMeta(
            num_tokens=span.stop - span.start, num_layers=1, num_kv_heads=1, head_dim=2, dtype="float32",
            base_position=span.start,
        )  # fmt: skip
        lease = self._store.reserve(span.key, meta, RawCodec().encoded_bytes(meta), deadline_s=1.0)
        if lease is not None:
            RawCodec().encode(self._kv(prompt, span.start, span.stop), out=lease.payload)
            assert lease.commit()

    def _distance(self, span: ChunkSpan, prompt: Sequence[int]) -> float:
        (lease,) = self._store.read([span.key], deadline_s=1.0)
        assert lease is not None, f"chunk at {span.start} was never stored"
        with lease:
            kv = RawCodec().decode(lease.payload, meta=lease.meta)
            return 3 * float((kv - self._kv(prompt, span.start, span.stop)).abs().mean())


@pytest.fixture
def chunks() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def engine(chunks: MemoryStore) -> FormulaEngine:
    return FormulaEngine(Store(chunks))


def rounds_of(engine: FormulaEngine, chunks: MemoryStore) -> Rounds:
    return Rounds(engine, Store(chunks), points=JOIN_POINTS, seed=3)  # type: ignore[arg-type]


def make_context(*, name: str = "one", kind: str = "requests", answer: tuple[int, ...] = (), seed: int = 1) -> Context:
    draw = np.random.default_rng(seed)

    def segment(kind: SpanKind, num_tokens: int, index: int | None = None) -> Segment:
        return Segment(kind, draw.integers(1, _VOCABULARY, num_tokens).astype(np.uint32), index)

    passages = [segment(SpanKind.PASSAGE, 100 + 7 * at, at) for at in range(6)]
    prompt = Prompt(segments=(segment(SpanKind.PREFIX, 30), *passages, segment(SpanKind.TAIL, 12)))
    return Context(name=name, kind=kind, prompt=prompt, answer=answer)


def test_every_point_has_a_row_and_the_controls_are_as_they_must_be(engine: FormulaEngine, chunks: MemoryStore) -> None:
    context = make_context()
    rows = {row["point"]: row for row in rounds_of(engine, chunks).measure(context)}
    assert set(rows) == {FULL, *CONTROLS, *(point.name for point in JOIN_POINTS)}
    for name in (FULL, AGAIN, EXACT_LOAD, FULL_SHARE):
        assert rows[name]["kl"] == 0, name
        assert rows[name]["is_right"]
    assert 0 < rows[NOISE_FLOOR]["kl"] < rows["query_aware_15"]["kl"] < rows["naive"]["kl"] < rows[WRONG_KV]["kl"]
    assert rows["naive"]["top1_ratio"] < 1
    assert not rows[WRONG_KV]["is_right"]
    # The first passage stands where it was learned: it is not joined.
    joined = context.tail_start - 30 - 100
    assert rows["first_k_15"]["cached_tokens"] == context.tail_start - round(0.15 * joined)
    assert rows[EXACT_LOAD]["cached_tokens"] == context.tail_start


def test_whatever_is_compared_is_timed_in_the_same_round(engine: FormulaEngine, chunks: MemoryStore) -> None:
    rows = {row["point"]: row for row in rounds_of(engine, chunks).measure(make_context())}
    timed = {name for name, row in rows.items() if "ttft_s" in row}
    assert timed == {FULL, EXACT_LOAD, *(point.name for point in JOIN_POINTS)}
    assert (rows[FULL]["ttft_s"], rows["naive"]["ttft_s"]) == (2.0, 0.5)
    assert (rows[FULL]["cpu_s"], rows["naive"]["cpu_s"]) == (4.0, 0.25)


def test_passages_are_learned_one_by_one_behind_the_system_prompt(engine: FormulaEngine, chunks: MemoryStore) -> None:
    context = make_context()
    rounds_of(engine, chunks).measure(context)
    learned = [params for params in engine.asked[:6] if params is not None]
    assert [[(span.start, span.stop) for span in params.save] for params in learned] == [
        [(0, 30), (30, 130 + 7 * at)] for at in range(6)
    ]
    joins = [params for params in engine.asked if params is not None and params.join is not None]
    assert len(joins) == 2 * len(JOIN_POINTS)
    for params in joins:
        assert params.join is not None
        assert params.join.tail_start == context.tail_start
        assert [span.base for span in params.load] == [None, None, 30, 30, 30, 30, 30]
        assert [span.key for span in params.load[1:]] == [each.save[1].key for each in learned]


def test_no_request_finds_blocks_of_another_one(engine: FormulaEngine, chunks: MemoryStore) -> None:
    rounds_of(engine, chunks).measure(make_context())
    # Passages share the system prompt, as they do where they are learned.
    assert len(set(engine.salts[6:])) == len(engine.salts[6:])
    assert len(set(engine.salts[:6])) == 1


def test_nothing_of_a_context_stays_in_the_store(engine: FormulaEngine, chunks: MemoryStore) -> None:
    rounds_of(engine, chunks).measure(make_context())
    assert chunks.keys() == []


def test_an_answer_that_is_known_is_the_one_that_is_forced(engine: FormulaEngine, chunks: MemoryStore) -> None:
    rows = rounds_of(engine, chunks).measure(make_context(kind="retrieval", answer=(1, 2, 3)))
    assert not any(row["is_right"] for row in rows)
    assert len(rows) == 1 + len(CONTROLS) + len(JOIN_POINTS)


def test_an_engine_that_is_not_deterministic_is_refused(engine: FormulaEngine, chunks: MemoryStore) -> None:
    engine.drift = 0.05
    with pytest.raises(InvariantError, match=AGAIN):
        rounds_of(engine, chunks).measure(make_context())


def test_an_engine_that_does_not_use_the_kv_is_refused(engine: FormulaEngine, chunks: MemoryStore) -> None:
    engine.ignores_kv = True
    with pytest.raises(InvariantError, match="wrong KV"):
        rounds_of(engine, chunks).measure(make_context())


def test_wrong_kv_is_wrong_for_attention() -> None:
    draw = torch.Generator().manual_seed(1)
    kv_L2TNH = torch.randn(1, 2, 40, 1, 8, generator=draw)
    question_H = torch.randn(8, generator=draw)

    def attend(kv_L2TNH: torch.Tensor) -> torch.Tensor:
        k_TH, v_TH = kv_L2TNH[0, :, :, 0]
        return torch.softmax(k_TH @ question_H, dim=0) @ v_TH

    assert not torch.allclose(attend(with_wrong_values(kv_L2TNH)), attend(kv_L2TNH), atol=0.1)
    # Pairs that only lie elsewhere are the same KV.
    assert torch.allclose(attend(kv_L2TNH.roll(20, dims=2)), attend(kv_L2TNH), atol=1e-5)


def test_a_join_that_was_computed_instead_is_no_perfect_join(engine: FormulaEngine, chunks: MemoryStore) -> None:
    engine.loses_joins = True
    with pytest.raises(UnavailableError, match="0 of"):
        rounds_of(engine, chunks).measure(make_context())


def test_the_command_goes_on_where_a_stopped_run_was(
    engine: FormulaEngine, chunks: MemoryStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    contexts = [make_context(name=f"c{at}", seed=at) for at in range(3)]
    contexts.append(make_context(name="look-up", kind="retrieval", answer=(1, 2), seed=9))
    measured: list[str] = []

    class Breaking(Rounds):
        def measure(self, context: Context) -> list[dict[str, Any]]:
            if len(measured) == 2 and "stop" in breaking:
                raise KeyboardInterrupt
            measured.append(context.name)
            return super().measure(context)

    @contextmanager
    def opened(model: str, **choices: Any) -> Iterator[Rounds]:
        assert choices["max_model_len"] > contexts[0].prompt.num_tokens + ANSWER_TOKENS
        yield Breaking(engine, Store(chunks), points=JOIN_POINTS, seed=1)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "read_contexts", lambda *_, **__: contexts)
    monkeypatch.setattr(measure, "open_rounds", opened)
    monkeypatch.setattr("loadtest.cli.provide_model", lambda model: model)
    breaking = {"stop"}
    out = tmp_path / "out.json"
    command = ["join", "--json", str(out), "--work", str(tmp_path / "work"), "--quick"]
    assert CliRunner().invoke(bench, command).exit_code != 0
    breaking.clear()
    answer = CliRunner().invoke(bench, command)
    assert answer.exit_code == 0, f"{answer.output}\n{answer.exception!r}"
    assert measured == [context.name for context in contexts]

    content = json.loads(out.read_text())
    figures = content["figures"]
    assert figures["kl_share_100"] == 0
    assert 0 < figures["kl_noise_floor"] < figures["kl_query_aware_15"] < figures["kl_naive"]
    assert figures["ttft_speedup_default"] == figures["ttft_speedup_fast"] == 4
    assert (content["contexts"], content["retrieval_contexts"]) == (3, 1)
    assert len(content["rows"]) == 4 * (1 + len(CONTROLS) + len(JOIN_POINTS))
