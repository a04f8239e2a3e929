"""Which tokens a join recomputes: exactly as many as asked for, and the right ones.

Covers: every method, shares at both ends, and how attention becomes scores.
Does not cover: what recomputing them does (`tests/engine/engine_join_test.py`).
"""

from itertools import chain, pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore.engine.join.probe import StepBudget, attention_mass, probe_layers
from kvstore.engine.join.selection import positions_of, select
from kvstore.engine.params import JoinMethod

SPANS = [(10, 20), (20, 50), (60, 67)]
TOKENS = 47


def scores(seed: int = 0) -> Any:
    return np.random.default_rng(seed).random(TOKENS, dtype=np.float32)


@given(
    method=st.sampled_from(get_args(JoinMethod)),
    share=st.floats(0, 1),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
)
def test_as_many_as_asked_for_all_of_them_joined(method: JoinMethod, share: float, lengths: list[int]) -> None:
    edges = np.cumsum([3, *lengths])
    spans = [(int(a), int(b)) for a, b in pairwise(edges)]
    total = sum(lengths)
    found = select(method, spans=spans, share=share, seed=1, scores=np.arange(total, dtype=np.float32))
    assert len(found) == (0 if method == "naive" else round(share * total))
    assert set(found) <= set(positions_of(spans))
    assert list(found) == sorted(set(found))


def test_first_k_shares_equally_and_fills_up_where_spans_end() -> None:
    found = select("first_k", spans=SPANS, share=27 / TOKENS, seed=0)
    assert found.tolist() == [*range(10, 20), *range(20, 30), *range(60, 67)]


@pytest.mark.parametrize("method", ["deviation", "query_aware"])
def test_highest_scores(method: JoinMethod) -> None:
    given_scores = scores()
    found = select(method, spans=SPANS, share=0.2, seed=0, scores=given_scores)
    positions = positions_of(SPANS)
    assert set(found) == set(positions[np.argsort(given_scores)[-len(found) :]])


def test_random_depends_on_the_seed_alone() -> None:
    first, again, other = (select("random", spans=SPANS, share=0.3, seed=seed).tolist() for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_scores_that_are_missing_or_too_few() -> None:
    for wrong in (None, scores()[:-1]):
        with pytest.raises(ValueError, match="one score for each of 47"):
            select("deviation", spans=SPANS, share=0.1, seed=0, scores=wrong)


def test_attention_mass_is_causal_softmax_over_all_heads() -> None:
    generator = torch.Generator().manual_seed(3)
    width, total, heads, group, dim = 4, 11, 2, 3, 8
    query = torch.randn((width, heads * group, dim), generator=generator)
    k = torch.randn((total, heads, dim), generator=generator)
    expected = torch.zeros(total)
    for w in range(width):
        seen = total - width + w + 1
        for head in range(heads * group):
            products = k[:seen, head // group] @ query[w, head] * 0.3
            expected[:seen] += products.softmax(0)
    mass = attention_mass(query, k_TNH=k, scale=0.3)
    torch.testing.assert_close(mass, expected)
    assert float(mass.sum()) == pytest.approx(width * heads * group, rel=1e-5)


@pytest.mark.parametrize(
    ("windows", "layers"),
    [([None] * 2, [1]), ([None], [0]), ([4] * 10, [3]), ([None, *[4] * 9], [0]), ([None] * 80, [*range(22, 32)])],
)
def test_layers_that_are_looked_at(windows: list[int | None], layers: list[int]) -> None:
    assert probe_layers(windows) == layers


def test_budget_is_followed_while_it_changes() -> None:
    budget = StepBudget(max_tokens=50, left_tokens=20.0)
    pieces = []
    for piece in budget.split(torch.arange(100, 200), depth_ratio=1.0):
        pieces.append(piece.tolist())
        budget.left_tokens = 64.0
    assert [len(piece) for piece in pieces] == [20, 50, 30]
    assert list(chain(*pieces)) == list(range(100, 200))
