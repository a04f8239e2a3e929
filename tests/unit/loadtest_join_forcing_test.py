"""Forced answers of `learnonce bench join`: what a request may ask for, and what happens to its logits.

Covers: one row of logits, its place in the file, refusals. Does not cover: vLLM's interface (a run of the benchmark).
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from loadtest.bench_join.forcing import FIELD, ForcedAnswer, read_forced


def test_the_forced_token_is_the_only_choice_and_the_row_is_kept_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "logits"
    forced = ForcedAnswer(answer=(2, 0), record=path)
    rows = torch.tensor([[0.5, 3.0, -1.0], [2.0, 1.0, 0.0], [0.0, 9.0, 1.0]])
    chosen = [int(forced([1] * said, rows[said].clone()).argmax()) for said in range(3)]
    # Behind the answer, the model chooses.
    assert chosen == [2, 0, 1]
    assert np.fromfile(path, np.float32).reshape(3, 3).tolist() == rows.tolist()


def test_a_prefill_in_pieces_asks_more_than_once_for_the_first_row(tmp_path: Path) -> None:
    forced = ForcedAnswer(answer=(), record=tmp_path / "logits")
    for row in ([1.0, 2.0], [3.0, 4.0]):
        forced([], torch.tensor(row, dtype=torch.bfloat16))
    forced([0], torch.tensor([5.0, 6.0], dtype=torch.bfloat16))
    assert np.fromfile(tmp_path / "logits", np.float32).tolist() == [3.0, 4.0, 5.0, 6.0]


def test_without_a_file_nothing_is_kept() -> None:
    assert int(ForcedAnswer(answer=(1,), record=None)([], torch.tensor([5.0, 0.0])).argmax()) == 1


@pytest.mark.parametrize("extra", [None, {}, {"kv_transfer_params": {}}])
def test_other_requests_are_left_alone(extra: dict[str, object] | None) -> None:
    assert read_forced(extra) is None


@pytest.mark.parametrize(
    "value", [[], {"other": 1}, {"answer": "1"}, {"answer": [-1]}, {"answer": [1.0]}, {"record": 3}]
)
def test_what_is_not_understood_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=FIELD):
        read_forced({FIELD: value})


def test_what_is_understood() -> None:
    assert read_forced({FIELD: {"answer": [1], "record": "/x"}}) == ForcedAnswer(answer=(1,), record=Path("/x"))
