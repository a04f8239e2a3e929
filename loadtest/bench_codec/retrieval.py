"""Exact match on a look-up task: a table of random identifiers, all of whose lines must be said again.

Covers: the task, its score per point of a scheme. Does not cover: quality of prose (`loadtest.bench_codec.quality`).

A value counts if every one of its tokens is the model's first choice: then greedy decoding says exactly that value. The
first line is an example, and does not count.
Published tables have 75 pairs. The embedded model fails there with exact KV too, so the first `NUM_PAIRS` are used,
and its score with exact KV stands beside every other.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from loadtest.agreement import bootstrap
from loadtest.bench_codec import CodecBenchSettings, Log
from loadtest.bench_codec.contenders import decode_chunks, encode_chunks
from loadtest.bench_codec.exact import ExactModel, Tokenizer
from loadtest.bench_codec.profiles import read_schemes
from loadtest.bench_codec.schemes import Scheme, rows_fingerprint
from loadtest.bench_codec.texts import Tokenize
from loadtest.bench_store import Measured
from loadtest.data import Lookup, read_lookups
from loadtest.work import Work

NUM_PAIRS: Final = 5
EXACT: Final = "exact"
_HEAD: Final = "Here is a table of keys and values.\n\n"
_AGAIN: Final = "\nThe same lines in another order:\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One table and its lines in another order, as token ids."""

    table: tuple[int, ...]
    """What is stored and loaded."""
    answer: tuple[int, ...]
    """What the model is led through, starting behind the table."""
    values: tuple[range, ...]
    """Where the values stand in `answer`, without the first."""


def make_task(lookup: Lookup, *, seed: int, tokenize: Tokenize) -> Task:
    """The task of one table; the order of its answers comes from the seed."""
    table = tokenize(_HEAD + "".join(f"{key} = {value}\n" for key, value in lookup.pairs))
    answer = list(tokenize(_AGAIN))
    values = []
    for key, value in random.Random(seed).sample(lookup.pairs, len(lookup.pairs)):
        answer += tokenize(f"{key} =")
        said = tokenize(f" {value}\n")
        values.append(range(len(answer), len(answer) + len(said)))
        answer += said
    return Task(table=tuple(table), answer=tuple(answer), values=tuple(values[1:]))


def score(task: Task, log_probabilities_SW: torch.Tensor) -> list[bool]:
    """Which values greedy decoding would have said, given what the model saw behind each token of the answer."""
    first_choice = log_probabilities_SW.argmax(dim=-1).tolist()
    return [all(first_choice[at - 1] == task.answer[at] for at in span) for span in task.values]


def measure(settings: CodecBenchSettings, *, log: Log) -> Measured:
    """Exact match with exact KV and at every point of every scheme.

    Raises:
        DataMissingError: The tables are not here.
    """
    lookups = read_lookups(settings.data, count=settings.num_retrievals, num_pairs=NUM_PAIRS)
    schemes, _ = read_schemes(settings, log=log)
    tokenize = Tokenizer(settings.model)
    work = Work(settings.work, fingerprint=rows_fingerprint("retrieval", model=settings.model, schemes=schemes))
    exact = ExactModel.load(settings.model)
    points = [EXACT, *(point for scheme in schemes for point in scheme.points)]
    began_s = time.perf_counter()
    for index, lookup in enumerate(lookups):
        if {row["point"] for row in work.rows(task=index)} >= set(points):
            continue
        task = make_task(lookup, seed=index, tokenize=tokenize)
        for point, right in _scores(task, schemes, exact=exact).items():
            work.add({"task": index, "point": point, "right": right, "tokens": len(task.table)})
        if (index + 1) % 5 == 0:
            log(f"retrieval: {index + 1} of {len(lookups)} tables, {time.perf_counter() - began_s:.0f} s")
    rows = [row for row in work.rows() if row["task"] < len(lookups) and row["point"] in points]
    return Measured(
        figures={},
        detail={"tables": len(lookups), "pairs": NUM_PAIRS, "points": retrieval_table(rows, points=points)},
    )


def _scores(task: Task, schemes: Sequence[Scheme], *, exact: ExactModel) -> dict[str, list[bool]]:
    kv_L2TNH, _ = exact.read(task.table, keep=[], kv_tokens=len(task.table))
    found = {EXACT: score(task, exact.go_on(kv_L2TNH, task.answer))}
    for scheme in schemes:
        chunks = encode_chunks(scheme, kv_L2TNH.to(torch.bfloat16))
        for index, point in enumerate(scheme.points):
            decoded_L2TNH = decode_chunks(scheme, [chunk[index] for chunk in chunks])
            found[point] = score(task, exact.go_on(decoded_L2TNH, task.answer))
    return found


def retrieval_table(rows: Sequence[dict[str, Any]], *, points: Sequence[str]) -> dict[str, Any]:
    """Per point: share of exact matches, and its difference to exact KV on the same tables, with intervals."""
    by_point = {
        point: np.array([row["right"] for row in sorted(rows, key=lambda row: row["task"]) if row["point"] == point])
        for point in points
    }
    exact = by_point[EXACT].astype(np.float64)
    table = {}
    for point, right in by_point.items():
        kept = right.astype(np.float64)
        share = bootstrap(lambda draw, kept=kept: float(kept[draw].mean()), count=len(exact))  # type: ignore[misc]
        change = bootstrap(
            lambda draw, kept=kept: float((kept[draw] - exact[draw]).mean()),  # type: ignore[misc]
            count=len(exact),
        )
        table[point] = {"exact_match": share.as_json(), "change_to_exact_kv": change.as_json()}
    return table
