"""Figures of `learnonce bench join` from rows that are made up.

Covers: means, medians, paired ratios, intervals, the look-up task apart, what was not measured, table and picture.
Does not cover: measuring (`loadtest_join_rounds_test`).
"""

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from loadtest.bench_join import FULL, NOISE_FLOOR
from loadtest.bench_join.contexts import RETRIEVAL
from loadtest.bench_join.figures import join_detail, join_figures, table_lines
from loadtest.bench_join.plots import draw


def row(
    context: int, point: str, kl: float, *, kind: str = "novel", right: bool = False, **more: float
) -> dict[str, Any]:
    return {
        "context": f"{kind} {context}", "kind": kind, "point": point, "kl": kl, "first_token_kl": 2 * kl,
        "top1_ratio": 1 - kl, "dnll": kl / 2, "is_right": right, **more,
    }  # fmt: skip


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    found = []
    for context, (full_s, kl) in enumerate([(2.0, 0.01), (30.0, 0.02), (2.5, 0.06)]):
        found += [
            row(context, FULL, 0.0, right=True, ttft_s=full_s, cpu_s=2 * full_s),
            row(context, NOISE_FLOOR, 1e-6, right=True),
            row(context, "naive", 10 * kl, ttft_s=full_s / 20, cpu_s=full_s / 10),
            row(context, "deviation_15", 2 * kl, ttft_s=full_s / 4, cpu_s=full_s / 4),
            row(context, "query_aware_05", 2 * kl, ttft_s=full_s / 10, cpu_s=full_s / 8),
            row(context, "query_aware_15", kl, ttft_s=full_s / 5, cpu_s=full_s / 4),
        ]
    for context in range(4):
        found.append(row(context, FULL, 0.0, kind=RETRIEVAL, right=context < 3, ttft_s=1.0, cpu_s=1.0))
        found.append(row(context, "naive", 5.0, kind=RETRIEVAL, right=context == 0, ttft_s=1.0, cpu_s=1.0))
    return found


def test_figures_are_means_of_prose_and_paired_ratios(rows: list[dict[str, Any]]) -> None:
    figures = join_figures(join_detail(rows))
    assert figures["kl_naive"] == pytest.approx(0.3)
    assert figures["kl_query_aware_15"] == pytest.approx(0.03)
    assert figures["kl_noise_floor"] == pytest.approx(1e-6)
    assert figures["kl_query_aware_05_over_deviation_15"] == pytest.approx(1.0)
    assert figures["kl_query_aware_15_over_deviation_15"] == pytest.approx(0.5)
    # The second context met a busy machine: all of it is slow.
    assert figures["ttft_speedup_default"] == pytest.approx(5.0)
    assert figures["ttft_speedup_fast"] == pytest.approx(10.0)
    assert (figures["exact_match_full"], figures["exact_match_naive"]) == (0.75, 0.25)


def test_intervals_are_of_contexts_and_ratios_are_paired(rows: list[dict[str, Any]]) -> None:
    detail = join_detail(rows)
    kl = detail["points"]["query_aware_15"]["kl"]
    assert kl["low"] == pytest.approx(0.01)
    assert kl["low"] < kl["value"] < kl["high"] <= 0.06 + 1e-9
    # Every context has the same ratio, so no draw of contexts has another one.
    ratio = detail["compared"]["kl_query_aware_15_over_deviation_15"]
    assert (ratio["low"], ratio["high"]) == (pytest.approx(0.5), pytest.approx(0.5))
    assert detail["retrieval"]["naive"]["change_to_full"]["value"] == -0.5


def test_medians_are_not_moved_by_one_slow_context(rows: list[dict[str, Any]]) -> None:
    points = join_detail(rows)["points"]
    assert points[FULL]["ttft_s"] == 2.5
    assert points["naive"]["cpu_s"] == pytest.approx(0.25)
    assert points[NOISE_FLOOR]["ttft_s"] is None
    assert points[NOISE_FLOOR]["ttft_speedup"] is None


def test_a_point_that_some_context_lacks_is_left_out(rows: list[dict[str, Any]]) -> None:
    rows = [each for each in rows if (each["context"], each["point"]) != ("novel 1", "query_aware_15")]
    figures = join_figures(join_detail(rows))
    assert "kl_query_aware_15" not in figures
    assert "ttft_speedup_default" not in figures
    assert "kl_query_aware_15_over_deviation_15" not in figures
    assert "kl_naive" in figures


def test_without_lookups_there_is_no_exact_match(rows: list[dict[str, Any]]) -> None:
    detail = join_detail([each for each in rows if each["kind"] != RETRIEVAL])
    assert detail["retrieval_contexts"] == 0
    assert not any(name.startswith("exact_match") for name in join_figures(detail))


def test_kinds_are_told_apart(rows: list[dict[str, Any]]) -> None:
    rows += [row(7, name, 1.0, kind="articles", ttft_s=1.0, cpu_s=1.0) for name in (FULL, "naive")]
    by_kind = join_detail(rows)["points"]["naive"]["kl_by_kind"]
    assert by_kind["articles"] == {"value": 1.0, "low": None, "high": None}
    assert by_kind["novel"]["value"] == pytest.approx(0.3)


def test_the_table_has_a_line_per_point_worst_first(rows: list[dict[str, Any]]) -> None:
    lines = table_lines(join_detail(rows))
    assert [line.split()[0] for line in lines[1:3]] == ["naive", "deviation_15"]
    assert lines[-1].split()[0] == FULL
    assert len({len(line) for line in lines}) == 1


def test_table_and_picture_are_written(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    logged: list[str] = []
    skipped = draw(tmp_path / "plots", detail=join_detail(rows), log=logged.append)
    with (tmp_path / "plots" / "join_quality.csv").open(newline="") as file:
        lines = {line["point"]: line for line in csv.DictReader(file)}
    assert float(lines["naive"]["kl_value"]) == pytest.approx(0.3)
    assert lines["naive"]["exact_match"] == "0.25"
    assert lines[NOISE_FLOOR]["ttft_s"] == ""
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "plots" / "join_quality.png").is_file() == has_matplotlib
    assert ("plots" in skipped) != has_matplotlib
