"""`learnonce bench join` as a whole: contexts in, result out; a run that was stopped goes on where it was.

Covers: which contexts are still to be measured, the result's content. Does not cover: one context
(`loadtest.bench_join.rounds`), figures (`figures`).
"""

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import kvstore.engine
import loadtest.bench_join
from loadtest.bench_join import ANSWER_TOKENS, CONTROLS, FULL, JOIN_POINTS, JoinBenchSettings, Log
from loadtest.bench_join.contexts import Context, read_contexts
from loadtest.bench_join.figures import join_detail, join_figures, table_lines
from loadtest.bench_join.rounds import open_rounds
from loadtest.results import result
from loadtest.work import Work, code_fingerprint

_ROOM_TOKENS = 8
"""Behind the longest prompt and answer."""


def measure(settings: JoinBenchSettings, *, log: Log) -> dict[str, Any]:
    """Measure what the folder of finished work does not hold yet; a result file's content.

    Raises:
        DataMissingError: A text is not in the folder.
        InvariantError: A control says that what is measured means nothing.
        UnavailableError: No engine can be had here, or it did not load or join what it was told to.
    """
    contexts = read_contexts(
        settings.data,
        model=settings.model,
        num_contexts=settings.num_contexts,
        num_retrievals=settings.num_retrievals,
        seed=settings.seed,
    )
    choices = (settings.model, str(settings.data), settings.seed, JOIN_POINTS)
    fingerprint = code_fingerprint(*choices, packages=(kvstore.engine, loadtest.bench_join))
    work = Work(settings.work, fingerprint=fingerprint)
    pending = [context for context in contexts if not _is_done(context, work)]
    counters = _measure_all(pending, settings, work=work, log=log) if pending else {}
    rows = [row for context in contexts for row in work.rows(context=context.name)]
    detail = join_detail(rows)
    for line in table_lines(detail):
        log(line)
    skipped = {}
    if settings.plots is not None:
        from loadtest.bench_join.plots import draw

        skipped = draw(settings.plots, detail=detail, log=log)
    return result(
        join_figures(detail),
        settings={name: str(value) for name, value in asdict(settings).items()},
        dtype="float32",
        answer_tokens=ANSWER_TOKENS,
        join_points=[asdict(point) for point in JOIN_POINTS],
        **detail,
        rows=rows,
        engine_counters=counters,
        skipped=skipped,
    )


def _is_done(context: Context, work: Work) -> bool:
    """Whether every point has its row: a run that was killed may have left some."""
    names = {FULL, *CONTROLS, *(point.name for point in JOIN_POINTS)}
    return {row["point"] for row in work.rows(context=context.name)} >= names


def _measure_all(contexts: list[Context], settings: JoinBenchSettings, *, work: Work, log: Log) -> dict[str, float]:
    longest = max(context.prompt.num_tokens + len(context.answer) for context in contexts)
    with (
        tempfile.TemporaryDirectory(prefix="learnonce-join-") as scratch,
        open_rounds(
            settings.model,
            max_model_len=longest + ANSWER_TOKENS + _ROOM_TOKENS,
            folder=Path(scratch),
            seed=settings.seed,
        ) as rounds,
    ):
        began_s = time.perf_counter()
        for index, context in enumerate(contexts):
            for row in rounds.measure(context):
                work.add(row)
            spent_s = time.perf_counter() - began_s
            left_s = spent_s / (index + 1) * (len(contexts) - index - 1)
            log(f"{index + 1} of {len(contexts)}: {context.name}, {spent_s:.0f} s; about {left_s:.0f} s left")
        return rounds.counters()
