"""Joins as a state machine: what is computed, in which order and in how many steps, over an invented model.

Covers: holes, tail, clipping, bounds per step, several joins, failures, requests that end, counts.
Does not cover: real models (`tests/engine/engine_join_test.py`), which tokens are chosen
(`tests/unit/engine_join_selection_test.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kvstore.engine.join.probe import Observer
from kvstore.engine.join.run import Joins
from kvstore.engine.ops import JoinOp, LoadOp, PlacedLoad
from kvstore.engine.params import JoinMethod
from kvstore.engine.tally import Tally

BLOCK = 16
PROMPT = 101
TAIL = 80


class Model:
    """Remembers what it was asked to compute."""

    num_layers = 30

    def __init__(self) -> None:
        self.runs: list[tuple[list[int], int | None]] = []
        self.fails_at = -1
        self.hot: list[int] = []

    def attention(self, layer: int) -> Any:
        class Impl:
            scale = 1.0

        class Layer:
            sliding_window = None
            impl = Impl()

        return Layer()

    def run(
        self,
        token_ids: Sequence[int],
        *,
        positions: torch.Tensor,
        block_ids: Sequence[int],
        stop_layer: int | None = None,
        observers: Mapping[int, Observer] | None = None,
    ) -> None:
        assert len(token_ids) == len(positions)
        if stop_layer is None:
            assert [1000 + position for position in positions.tolist()] == list(token_ids)
        if self.fails_at == len(self.runs):
            self.fails_at = -1
            raise RuntimeError("the model broke")
        self.runs.append((positions.tolist(), stop_layer))
        for observe in (observers or {}).values():
            value = torch.zeros(len(positions), 1, 4)
            value[[position in self.hot for position in positions.tolist()]] = 5.0
            observe(torch.ones(len(positions), 1, 4), value, value)

    @property
    def computed(self) -> list[int]:
        return [position for positions, stop_layer in self.runs if stop_layer is None for position in positions]


class Blocks:
    """KV in which hot tokens attract attention."""

    block_size = BLOCK

    def __init__(self, model: Model) -> None:
        self.model = model

    def gather_layer(self, layer: int, block_ids: Sequence[int], *, num_tokens: int) -> torch.Tensor:
        kv = torch.zeros(2, num_tokens, 1, 4)
        kv[0, self.model.hot] = 3.0
        return kv


def make(**bounds: int) -> tuple[Joins, Model, Tally]:
    model, tally = Model(), Tally()
    blocks: Any = Blocks(model)
    limits = {"step_tokens": 8, "max_tokens": 64} | bounds
    return Joins(model, blocks=blocks, tally=tally, **limits), model, tally


def placed(
    method: JoinMethod = "first_k", share: float = 0.25, *, start: int = 0, name: str = "r", **ranges: Any
) -> PlacedLoad:
    join = JoinOp(
        method=method,
        share=share,
        tail_start=TAIL,
        token_ids=tuple(range(1000, 1000 + PROMPT)),
    )
    op = LoadOp(
        request_id=name,
        spans=(),
        start=start,
        stop=PROMPT - 1,
        block_ids=tuple(range(50, 57)),
        deadline_s=1.0,
        join=join,
    )
    return PlacedLoad(op=op, **({"exact": ((start, 20),), "joined": ((20, 40), (40, 60), (64, TAIL))} | ranges))


def finish(joins: Joins, *, busy: bool = False, limit: int = 100) -> list[Any]:
    results = []
    for _ in range(limit):
        results.append(joins.advance(busy=busy))
        if not joins.num_open:
            return results
    raise AssertionError("the join does not end")


def test_holes_chosen_tokens_and_tail_are_computed_in_order() -> None:
    joins, model, tally = make()
    joins.submit(placed())
    result = finish(joins)[-1]
    assert model.computed == [*range(20, 25), *range(40, 45), *range(60, 68), *range(TAIL, PROMPT - 1)]
    assert (result.finished, result.bad_blocks, result.reused) == ({"r"}, set(), {"r": 20 + 56 - 14})
    counts = tally.drain()["counts"]
    assert counts == {
        "joins.first_k": 1,
        "joined_tokens": 56,
        "join_recomputed_tokens": 14,
        "join_computed_tokens": 4 + PROMPT - 1 - TAIL,
    }


def test_everything_is_computed_at_share_one_and_nothing_exact() -> None:
    joins, model, _ = make()
    joins.submit(placed("query_aware", 1.0))
    finish(joins)
    assert model.computed == list(range(20, PROMPT - 1))
    assert all(stop_layer is None for _, stop_layer in model.runs), "scored for nothing"


def test_exact_chunks_behind_joined_ones_are_kept() -> None:
    joins, model, _ = make()
    joins.submit(placed("naive", 0.0, exact=((0, 20), (40, 60)), joined=((20, 40), (60, TAIL))))
    result = finish(joins)[-1]
    assert model.computed == list(range(TAIL, PROMPT - 1))
    assert result.reused == {"r": TAIL}


def test_what_the_engine_holds_is_not_touched() -> None:
    joins, model, _ = make()
    joins.submit(placed(share=1.0, start=48, exact=(), joined=((48, 60), (64, TAIL))))
    finish(joins)
    assert model.computed == list(range(48, PROMPT - 1))


def test_steps_are_bounded_while_others_compute() -> None:
    joins, model, _ = make()
    joins.submit(placed(share=1.0))
    results = finish(joins, busy=True)
    assert [len(positions) for positions, _ in model.runs] == [8] * 10
    assert [result.finished for result in results] == [set()] * 9 + [{"r"}]
    assert model.computed == list(range(20, PROMPT - 1))


def test_one_step_without_others_takes_more_and_no_forward_is_too_large() -> None:
    joins, model, _ = make()
    joins.submit(placed(share=1.0))
    finish(joins)
    assert [len(positions) for positions, _ in model.runs] == [64, 16]


def test_query_aware_computes_what_the_end_looks_at() -> None:
    joins, model, _ = make()
    model.hot = [25, 33, 41, 70]
    joins.submit(placed("query_aware", 4 / 56))
    finish(joins)
    assert [p for p in model.computed if p < TAIL and not 60 <= p < 64] == model.hot
    partial = [(positions, stop_layer) for positions, stop_layer in model.runs if stop_layer is not None]
    # Holes are computed as deep as is looked, then the end of the prompt.
    assert partial == [([60, 61, 62, 63], 12), (list(range(TAIL, PROMPT - 1)), 12)]


def test_deviation_computes_what_differs_from_what_was_loaded() -> None:
    joins, model, _ = make()
    model.hot = [21, 22, 66]
    joins.submit(placed("deviation", 3 / 56))
    finish(joins)
    assert [p for p in model.computed if p < TAIL and not 60 <= p < 64] == model.hot
    partial = [positions for positions, stop_layer in model.runs if stop_layer == 2]
    assert sum(map(len, partial)) == 60, "not every token was compared"


def test_joins_go_one_after_another() -> None:
    joins, _, _ = make()
    for name in ("a", "b"):
        joins.submit(placed(name=name))
    results = finish(joins, busy=True)
    order = [name for result in results for name in sorted(result.finished)]
    assert order == ["a", "b"]


def test_failure_reports_the_blocks_that_are_not_exact() -> None:
    joins, model, tally = make()
    model.fails_at = 1
    joins.submit(placed("deviation"))
    joins.submit(placed(name="next"))
    results = finish(joins)
    assert [result.bad_blocks for result in results if result.bad_blocks] == [set(range(51, 57))]
    assert {name for result in results for name in result.reused} == {"next"}
    assert {name for result in results for name in result.finished} == {"r", "next"}
    assert tally.drain()["counts"]["join_failures.error"] == 1


def test_a_request_that_ends_is_forgotten() -> None:
    joins, model, _ = make()
    joins.submit(placed(share=1.0))
    joins.advance(busy=True)
    assert (joins.drop("r"), joins.drop("r"), joins.num_open) == (True, False, 0)
    before = len(model.runs)
    assert joins.advance(busy=True).finished == set()
    assert len(model.runs) == before
