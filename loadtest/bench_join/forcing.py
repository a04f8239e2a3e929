"""One answer is forced on a request, and the logits behind its tokens are kept.

Covers: what happens to one row of logits. Does not cover: which rows (`loadtest.bench_join.processor`), what is asked
(`loadtest.bench_join.engine`).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

FIELD: Final = "learnonce_bench"
"""Our key in `SamplingParams.extra_args`: `{"record": path, "answer": [token ids]}`, either of them may be missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForcedAnswer:
    """One request's part."""

    answer: tuple[int, ...]
    """Tokens to say, in this order; behind them the model chooses itself."""
    record: Path | None
    """File for the logits: row i belongs to the answer's token i, float32."""

    def __call__(self, said: Sequence[int], logits_W: torch.Tensor) -> torch.Tensor:
        """Keep the logits of the next token, then leave only the one that is to be said.

        A step of a prefill in pieces asks too, before anything is said: the last one wins, and is the right one.
        """
        index = len(said)
        if self.record is not None:
            row = logits_W.float().cpu().contiguous().numpy()
            descriptor = os.open(self.record, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.pwrite(descriptor, row.data, index * row.nbytes)
            finally:
                os.close(descriptor)
        if index < len(self.answer):
            logits_W.fill_(float("-inf"))
            logits_W[self.answer[index]] = 0.0
        return logits_W


def read_forced(extra_args: dict[str, Any] | None) -> ForcedAnswer | None:
    """What a request asks for.

    Raises:
        ValueError: The field is not what `FIELD` says.

    Example:
        >>> read_forced({"learnonce_bench": {"answer": [3, 4]}})
        ForcedAnswer(answer=(3, 4), record=None)
    """
    ours = (extra_args or {}).get(FIELD)
    if ours is None:
        return None
    if not isinstance(ours, dict) or set(ours) - {"answer", "record"}:
        raise ValueError(f"{FIELD} is not an object of answer and record")
    answer, record = ours.get("answer", []), ours.get("record")
    if not isinstance(answer, list) or any(type(token) is not int or token < 0 for token in answer):
        raise ValueError(f"{FIELD}.answer is not a list of token ids")
    if record is not None and not isinstance(record, str):
        raise ValueError(f"{FIELD}.record is not a path")
    return ForcedAnswer(answer=tuple(answer), record=None if record is None else Path(record))
