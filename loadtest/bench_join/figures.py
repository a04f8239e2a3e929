"""From rows to figures: means over contexts, 95 % intervals, ways to join held against each other.

Covers: the flat figures of a result, the tables beside them. Does not cover: measuring (`loadtest.bench_join.rounds`).

All points of a context were measured in the same minutes on the same tokens, so whatever compares points is paired:
contexts are drawn, and every point sees the same draws.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loadtest.agreement import bootstrap
from loadtest.bench_join import DEFAULT_POINT, FAST_POINT, FULL
from loadtest.bench_join.contexts import RETRIEVAL

Row = Mapping[str, Any]
Draw = NDArray[np.intp]

_QUALITY: Final = ("kl", "first_token_kl", "top1_ratio", "dnll")
_COSTS: Final = ("ttft_s", "cpu_s")
_COMPARED: Final = (
    ("kl_query_aware_05_over_deviation_15", "query_aware_05", "deviation_15"),
    ("kl_query_aware_15_over_deviation_15", "query_aware_15", "deviation_15"),
    ("kl_query_aware_15_over_naive", "query_aware_15", "naive"),
    ("kl_random_15_over_naive", "random_15", "naive"),
)
"""Ratios of mean KL, by name."""
_SPEEDUPS: Final = (("ttft_speedup_default", DEFAULT_POINT), ("ttft_speedup_fast", FAST_POINT))


class Table:
    """One kind of contexts: values by point, in the same order of contexts."""

    def __init__(self, rows: Iterable[Row]) -> None:
        by_point: dict[str, dict[str, Row]] = {}
        for row in rows:
            by_point.setdefault(row["point"], {})[row["context"]] = row
        self.contexts = list(by_point.get(FULL, {}))
        self._rows = {
            point: [found[name] for name in self.contexts]
            for point, found in by_point.items()
            if all(name in found for name in self.contexts)
        }

    @property
    def points(self) -> list[str]:
        """Those that every context has."""
        return list(self._rows)

    def values(self, point: str, name: str) -> NDArray[np.float64] | None:
        """One value of every context; None where it was not measured."""
        rows = self._rows.get(point, [])
        if not rows or any(row.get(name) is None for row in rows):
            return None
        return np.array([row[name] for row in rows], np.float64)

    def mean(self, point: str, name: str) -> dict[str, float | None] | None:
        """Mean with its interval."""
        found = self.values(point, name)
        if found is None:
            return None
        return bootstrap(lambda draw: float(found[draw].mean()), count=len(found)).as_json()

    def mean_change(self, point: str, name: str, *, base: str = FULL) -> dict[str, float | None] | None:
        """Mean difference to another point."""
        one, other = self.values(point, name), self.values(base, name)
        if one is None or other is None:
            return None
        return bootstrap(lambda draw: float((one[draw] - other[draw]).mean()), count=len(one)).as_json()

    def ratio_of_means(self, point: str, name: str, *, base: str) -> dict[str, float | None] | None:
        """Mean over the other point's mean."""
        one, other = self.values(point, name), self.values(base, name)
        if one is None or other is None:
            return None
        return bootstrap(lambda draw: _ratio(one[draw].mean(), other[draw].mean()), count=len(one)).as_json()

    def median_ratio(self, point: str, name: str, *, base: str = FULL) -> dict[str, float | None] | None:
        """Median over contexts of the other point's value over this one's: how many times less."""
        one, other = self.values(point, name), self.values(base, name)
        if one is None or other is None:
            return None
        return bootstrap(lambda draw: float(np.median(other[draw] / one[draw])), count=len(one)).as_json()

    def median(self, point: str, name: str) -> float | None:
        """Over contexts."""
        found = self.values(point, name)
        return None if found is None else float(np.median(found))


def _ratio(one: float, other: float) -> float:
    return float(one / other) if other > 0 else math.nan


def join_figures(detail: Mapping[str, Any]) -> dict[str, float]:
    """The flat figures of what `join_detail` gave; one that was not measured is left out."""
    points, compared = detail["points"], detail["compared"]
    found = {f"kl_{name}": each["kl"]["value"] for name, each in points.items() if name != FULL}
    found |= {f"top1_{name}": each["top1_ratio"]["value"] for name, each in points.items() if name != FULL}
    found |= {name: each["value"] for name, each in compared.items()}
    for name, point in _SPEEDUPS:
        if points.get(point, {}).get("ttft_speedup"):
            found[name] = points[point]["ttft_speedup"]["value"]
    found |= {f"exact_match_{name}": each["exact_match"]["value"] for name, each in detail["retrieval"].items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def join_detail(rows: Sequence[Row]) -> dict[str, Any]:
    """Tables by point, with intervals; the look-up task on its own; ratios of points."""
    prose = Table(row for row in rows if row["kind"] != RETRIEVAL)
    lookups = Table(row for row in rows if row["kind"] == RETRIEVAL)
    kinds = sorted({row["kind"] for row in rows} - {RETRIEVAL})
    by_kind = {kind: Table(row for row in rows if row["kind"] == kind) for kind in kinds}
    compared = {name: prose.ratio_of_means(point, "kl", base=base) for name, point, base in _COMPARED}
    return {
        "contexts": len(prose.contexts),
        "points": {
            point: {
                **{name: prose.mean(point, name) for name in _QUALITY},
                "same_answer": prose.mean(point, "is_right"),
                **{name: prose.median(point, name) for name in _COSTS},
                "ttft_speedup": prose.median_ratio(point, "ttft_s"),
                "cpu_ratio": prose.median_ratio(point, "cpu_s"),
                "kl_by_kind": {kind: table.mean(point, "kl") for kind, table in by_kind.items()},
            }
            for point in prose.points
        },
        "compared": {name: each for name, each in compared.items() if each is not None},
        "retrieval_contexts": len(lookups.contexts),
        "retrieval": {
            point: {
                "exact_match": lookups.mean(point, "is_right"),
                "change_to_full": lookups.mean_change(point, "is_right"),
                "kl": lookups.mean(point, "kl"),
            }
            for point in lookups.points
        },
    }


def table_lines(detail: Mapping[str, Any]) -> list[str]:
    """The table as text, best reading first: what a person wants to see at the end of a run."""
    lines = [f"{'point':<16}{'KL':>9}{'first':>9}{'top-1':>7}{'dNLL':>8}{'exact':>7}{'TTFT s':>8}{'x':>6}{'CPU s':>7}"]
    for point, found in sorted(detail["points"].items(), key=lambda each: -each[1]["kl"]["value"]):
        exact = detail["retrieval"].get(point, {}).get("exact_match", {}).get("value")
        speedup = found["ttft_speedup"] or {}
        numbers = [
            (found["kl"]["value"], "9.5f"),
            (found["first_token_kl"]["value"], "9.5f"),
            (found["top1_ratio"]["value"], "7.3f"),
            (found["dnll"]["value"], "8.4f"),
            (exact, "7.2f"),
            (found["ttft_s"], "8.2f"),
            (speedup.get("value"), "6.1f"),
            (found["cpu_s"], "7.2f"),
        ]
        cells = "".join(
            f"{'-':>{form.partition('.')[0]}}" if value is None else f"{value:{form}}" for value, form in numbers
        )
        lines.append(f"{point:<16}{cells}")
    return lines
