"""The engine of `learnonce bench join`, for real: forced answers, whole distributions, one context from end to end.

Covers: vLLM's logits processor, recorded logits beside what vLLM chooses, a short context with every way to join and
all controls. Does not cover: figures over many contexts (the benchmark itself).
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstore.wire import SpanKind
from loadtest.bench_join import CONTROLS, FULL, JOIN_POINTS
from loadtest.bench_join.contexts import Context, read_contexts
from loadtest.bench_join.rounds import Rounds, open_rounds
from router.segments import Prompt

pytestmark = pytest.mark.engine

MODEL = os.environ.get("LEARNONCE_TEST_MODEL", str(Path(__file__).parents[2] / ".models" / "SmolLM2-135M-Instruct"))
PASSAGE_TOKENS = 60


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rounds]:
    with open_rounds(MODEL, max_model_len=1024, folder=tmp_path_factory.mktemp("bench")) as opened:
        yield opened


@pytest.fixture(scope="module")
def context() -> Context:
    """Short passages: this proves the path, not quality."""
    (found,) = read_contexts(None, model=MODEL, num_contexts=1, num_retrievals=0, seed=2)
    segments = [
        type(each)(each.kind, each.ids[: PASSAGE_TOKENS + 7 * at], each.document)
        if each.kind is SpanKind.PASSAGE
        else each
        for at, each in enumerate(found.prompt.segments)
    ]
    return Context(name=found.name, kind=found.kind, prompt=Prompt(segments=tuple(segments)))


def test_an_answer_is_forced_and_its_logits_are_those_of_the_forced_tokens(rounds: Rounds, context: Context) -> None:
    engine, ids = rounds.engine, context.ids
    salts = (f"forced {count}" for count in itertools.count())
    greedy, own_TW = engine.read(ids, salt=next(salts), max_tokens=4)
    assert own_TW.argmax(dim=-1).tolist() == list(greedy.tokens)
    other = tuple(int(token) for token in own_TW.argsort(dim=-1)[:, -3])
    said, forced_TW = engine.read(ids, salt=next(salts), max_tokens=4, answer=other)
    assert said.tokens == other
    # Before anything else is said, nothing differs; behind another token, much does.
    assert np.allclose(forced_TW[0], own_TW[0], atol=1e-4)
    assert not np.allclose(forced_TW[1], own_TW[1], atol=1e-1)
    # The same tokens as part of the prompt.
    _, prompted_TW = engine.read([*ids, *other[:3]], salt=next(salts), max_tokens=1)
    assert np.allclose(prompted_TW[0], forced_TW[3], atol=1e-3)


def test_one_context_has_all_its_rows_and_good_controls(rounds: Rounds, context: Context) -> None:
    rows = {row["point"]: row for row in rounds.measure(context)}
    assert set(rows) == {FULL, *CONTROLS, *(point.name for point in JOIN_POINTS)}
    # `measure` refuses controls that are off; joins are between them.
    assert all(rows["wrong_kv"]["kl"] > rows[point.name]["kl"] for point in JOIN_POINTS)
    assert rows["naive"]["kl"] > rows["noise_floor"]["kl"]
    assert all(row["cpu_s"] > 0 for row in rows.values() if "ttft_s" in row)
